#pragma once

namespace sink_attention::primitives {

SA_DEVICE void atomic_add(float* sum, float value) { atomicAdd(sum, value); }

SA_DEVICE void semaphore_wait(const int* turn, int mine) {
  int now;
  do {
    asm volatile("ld.global.acquire.gpu.b32 %0, [%1];\n" : "=r"(now) : "l"(turn) : "memory");
  } while (now != mine);
}
SA_DEVICE void fence_turn_for_copies() { asm volatile("fence.proxy.async.global;\n" ::: "memory"); }
// The release alone orders all that came before (8.8, release patterns): what this thread did, what
// it knows from others by a barrier, and bulk_reduce_adds that it waited for, whose completion
// comes with a fence between the proxies (9.7.9.25.2).
SA_DEVICE void semaphore_release(int* turn, int next) {
  asm volatile("st.global.release.gpu.b32 [%0], %1;\n" ::"l"(turn), "r"(next) : "memory");
}

}  // namespace sink_attention::primitives
