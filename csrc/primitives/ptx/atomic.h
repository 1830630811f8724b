#pragma once

namespace sink_attention::primitives {

SA_DEVICE void atomic_add(float* sum, float value) { atomicAdd(sum, value); }

SA_DEVICE void semaphore_wait(const int* semaphore, int value) {
  int current;
  do {
    asm volatile("ld.global.acquire.gpu.b32 %0, [%1];\n"
                 : "=r"(current)
                 : "l"(semaphore)
                 : "memory");
  } while (current != value);
}
SA_DEVICE void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;\n" ::: "memory");
}
// The release needs no other fence (PTX ISA 8.8, release patterns). It orders this thread's
// accesses, those of others that it saw through a barrier, and the bulk_reduce_adds that it waited
// for: their completion implies a proxy fence (9.7.9.25.2).
SA_DEVICE void semaphore_release(int* semaphore, int value) {
  asm volatile("st.global.release.gpu.b32 [%0], %1;\n" ::"l"(semaphore), "r"(value) : "memory");
}

}  // namespace sink_attention::primitives
