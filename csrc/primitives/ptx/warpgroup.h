#pragma once

namespace sink_attention::primitives {

// A shuffle tells the compiler that the value is uniform in a warp.
SA_DEVICE int warpgroup_idx() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroupSize, 0);
}

// PTX ISA 9.7.19.5, setmaxnreg.
template <int kCount>
SA_DEVICE void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}
template <int kCount>
SA_DEVICE void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

}  // namespace sink_attention::primitives
