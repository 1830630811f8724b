#pragma once

#include "emulator/machine.h"

namespace sink_attention::primitives {

inline TensorMap encode_tensor_map(const TensorMapShape& shape) {
  emulator::TensorMapData data{};
  data.base = static_cast<const char*>(shape.base);
  data.element_bytes = shape.element_bytes;
  data.rank = shape.rank;
  data.swizzle = static_cast<int>(shape.swizzle);
  for (int i = 0; i < kMaxTensorRank; ++i) {
    const bool used = i < shape.rank;
    data.size[i] = used ? shape.size[i] : 1;
    data.stride[i] = used && i > 0 ? shape.stride_bytes[i] : 0;
    data.box[i] = used ? shape.box[i] : 1;
  }
  TensorMap map;
  emulator::encode(data, map.words);
  return map;
}

SA_DEVICE void prefetch_tensor_map(const TensorMap*) {}

template <int kRank>
SA_DEVICE void tma_load(void* shared, const TensorMap* map, Mbarrier* barrier,
                        const int (&at)[kRank], emulator::Site site = emulator::here()) {
  static_assert(kRank >= 3 && kRank <= kMaxTensorRank);
  emulator::start_tma_load(shared, map->words, barrier, kRank, at, {"tma_load", site});
}

}  // namespace sink_attention::primitives
