#pragma once

namespace sink_attention::primitives {

SA_DEVICE void atomic_add(float* sum, float value) { atomicAdd(sum, value); }

SA_DEVICE void wait_for_turn(const int* turn, int mine) {
  int now;
  do {
    asm volatile("ld.global.acquire.gpu.b32 %0, [%1];\n" : "=r"(now) : "l"(turn) : "memory");
  } while (now != mine);
}
SA_DEVICE void pass_turn(int* turn, int next) {
  __threadfence();
  asm volatile("st.global.release.gpu.b32 [%0], %1;\n" ::"l"(turn), "r"(next) : "memory");
}

}  // namespace sink_attention::primitives
