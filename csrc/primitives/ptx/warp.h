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
SA_DEVICE int first_lane(bool value) {
  const unsigned lanes = __ballot_sync(0xffffffffu, value);
  return lanes == 0 ? kWarpSize : __ffs(static_cast<int>(lanes)) - 1;
}
SA_DEVICE void sync_warp() { __syncwarp(); }

}  // namespace sink_attention::primitives
