#pragma once

namespace sink_attention::primitives {

template <class T>
SA_DEVICE T shfl(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
SA_DEVICE T shfl_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
SA_DEVICE bool any(bool value) { return __any_sync(0xffffffffu, value) != 0; }
SA_DEVICE void sync_warp() { __syncwarp(); }

}  // namespace sink_attention::primitives
