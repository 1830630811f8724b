#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "primitives/launch.h"

namespace sink_attention::primitives {

namespace internal {
// The CUDA runtime looks up the driver's function, so nothing links to libcuda.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &found),
               "cuTensorMapEncodeTiled");
#else
    check_cuda(
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
#endif
    if (found != cudaDriverEntryPointSuccess || function == nullptr) {
      throw std::runtime_error("sink_attention_ext: this driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

// The encoder needs a current context. A thread's first CUDA call may be this one: torch sets the
// device only where it changes, and memory may come from torch's cache. Setting the device is
// allowed while a graph is captured.
inline void bind_context() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
}
}  // namespace internal

inline TensorMap encode_tensor_map(const TensorMapShape& shape) {
  constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                              CU_TENSOR_MAP_SWIZZLE_64B,
                                              CU_TENSOR_MAP_SWIZZLE_128B};
  // The element type decides only the fill value outside the tensor: zero.
  const CUtensorMapDataType type =
      shape.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  cuuint64_t size[kMaxTensorRank];
  cuuint64_t stride[kMaxTensorRank];  // of dimensions 1 and up
  cuuint32_t box[kMaxTensorRank];
  cuuint32_t step[kMaxTensorRank];
  for (int i = 0; i < shape.rank; ++i) {
    size[i] = static_cast<cuuint64_t>(shape.size[i]);
    box[i] = static_cast<cuuint32_t>(shape.box[i]);
    step[i] = 1;
    if (i > 0) stride[i - 1] = static_cast<cuuint64_t>(shape.stride_bytes[i]);
  }
  CUtensorMap encoded;
  const auto encode = [&] {
    return internal::tensor_map_encoder()(
        &encoded, type, static_cast<cuuint32_t>(shape.rank), const_cast<void*>(shape.base), size,
        stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        kSwizzles[static_cast<int>(shape.swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult status = encode();
  if (status == CUDA_ERROR_INVALID_CONTEXT) {
    internal::bind_context();
    status = encode();
  }
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("sink_attention_ext: cuTensorMapEncodeTiled: error " +
                             std::to_string(static_cast<int>(status)));
  }
  TensorMap map;
  static_assert(sizeof(map) == sizeof(encoded) && alignof(TensorMap) >= alignof(CUtensorMap));
  std::memcpy(&map, &encoded, sizeof(map));
  return map;
}

// PTX ISA 9.7.9.27.1, cp.async.bulk.tensor, and 9.7.9.16, prefetch.
SA_DEVICE void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

template <int kRank>
SA_DEVICE void tma_load(void* shared, const TensorMap* map, Mbarrier* barrier,
                        const int (&at)[kRank]) {
  static_assert(kRank >= 3 && kRank <= kMaxTensorRank);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t arrives_at = internal::address_of(barrier);
  if constexpr (kRank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];\n" ::"r"(address),
        "l"(map), "r"(arrives_at), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  } else if constexpr (kRank == 4) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(address),
        "l"(map), "r"(arrives_at), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];\n" ::"r"(address),
        "l"(map), "r"(arrives_at), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
        : "memory");
  }
}

}  // namespace sink_attention::primitives
