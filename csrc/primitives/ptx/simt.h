#pragma once

#define SA_DEVICE __device__ __forceinline__
#define SA_UNROLL _Pragma("unroll")
#define SA_ROLLED _Pragma("unroll 1")

namespace sink_attention::primitives {

SA_DEVICE int thread_idx() { return static_cast<int>(threadIdx.x); }
SA_DEVICE int lane_idx() { return static_cast<int>(threadIdx.x) % kWarpSize; }
SA_DEVICE int rematerialise_thread_idx() {
  int thread = static_cast<int>(threadIdx.x);
  asm volatile("" : "+r"(thread));  // opaque to the compiler
  return thread & 1023;             // tells it that the value is not negative
}
SA_DEVICE int rematerialise_lane_idx() { return rematerialise_thread_idx() % kWarpSize; }
// A shuffle tells the compiler that the value is uniform in a warp.
SA_DEVICE int warp_idx() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpSize, 0);
}
SA_DEVICE Index3 block_idx() {
  return {static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)};
}
SA_DEVICE Index3 grid_dim() {
  return {static_cast<int>(gridDim.x), static_cast<int>(gridDim.y), static_cast<int>(gridDim.z)};
}

SA_DEVICE int optimisation_barrier(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace sink_attention::primitives
