#pragma once

namespace sink_attention::primitives {

SA_DEVICE void sync_threads() { __syncthreads(); }

// PTX ISA 9.7.13.1, barrier.sync.
SA_DEVICE void sync_named(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(num_threads) : "memory");
}
SA_DEVICE void arrive_named(int id, int num_threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(num_threads) : "memory");
}

}  // namespace sink_attention::primitives
