// Describes results to the kernels that fill their unused rows.
#pragma once

#include <cstdint>

#include "attention/paged_kv.h"
#include "cuda/kernels/alignment.h"
#include "cuda/kernels/unused_rows.cuh"

namespace sink_attention::cuda {

// Strides count elements.
inline ZeroedRows zeroed_rows(void* data, attention::DataType dtype, int64_t stride_row,
                              int64_t stride_head, int64_t num_heads, int64_t dim) {
  const int64_t bytes = attention::bytes_of(dtype);
  ZeroedRows rows{};
  rows.data = static_cast<char*>(data);
  rows.stride_row = stride_row * bytes;
  rows.stride_head = stride_head * bytes;
  rows.num_heads = static_cast<int>(num_heads);
  rows.vector_bytes = common_alignment(
      {reinterpret_cast<intptr_t>(data), rows.stride_row, rows.stride_head, dim * bytes});
  rows.vectors_per_head = static_cast<int>(dim * bytes / rows.vector_bytes);
  return rows;
}

inline FilledLse filled_lse(void* lse, attention::DataType out_dtype, int64_t stride_head,
                            int64_t num_heads) {
  return {lse, stride_head, static_cast<int>(num_heads),
          out_dtype == attention::DataType::kFloat64};
}

}  // namespace sink_attention::cuda
