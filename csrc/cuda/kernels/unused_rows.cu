#include <stdexcept>

#include "cuda/backend.h"
#include "cuda/kernels/unused_rows.h"
#include "primitives/launch.h"

namespace sink_attention::cuda {
namespace {

using attention::DataType;
using attention::FlashFwdParams;

PackedSequences queries_of(const FlashFwdParams& params) {
  return {params.cu_seqlens_q, nullptr, static_cast<int>(params.batch),
          static_cast<int>(params.total_q), params.seqlen_q};
}

void start(UnusedRowsParams rows, Stream stream) {
  rows.query_rows_per_block = rows_per_block(rows.queries.num_rows, kMaxRowsPerBlock);
  rows.key_rows_per_block = rows_per_block(rows.keys.num_rows, kMaxRowsPerBlock);
  rows.num_query_blocks = blocks_of(rows.queries.num_rows, rows.query_rows_per_block);
  const int key_blocks = blocks_of(rows.keys.num_rows, rows.key_rows_per_block);
  primitives::launch<FillUnusedRowsKernel>(rows, {rows.num_query_blocks + key_blocks, 1, 1},
                                           stream);
}

void check_rows(int64_t rows) {
  if (rows > INT32_MAX / 2)
    throw std::runtime_error("sink_attention_ext: more rows or keys than one launch can take");
}

}  // namespace

void fill_unused_rows(const FlashFwdParams& params, Stream stream) {
  if (params.cu_seqlens_q == nullptr) return;
  check_rows(params.total_q);
  const DataType out_dtype = attention::is_8_bit(params.dtype) ? DataType::kBFloat16 : params.dtype;
  UnusedRowsParams rows{};
  rows.queries = queries_of(params);
  rows.of_queries = zeroed_rows(params.out, out_dtype, params.out_stride_row,
                                params.out_stride_head, params.num_heads_q, params.head_dim_v);
  rows.lse = filled_lse(params.lse, out_dtype, params.lse_stride_head, params.num_heads_q);
  start(rows, stream);
}

void fill_unused_rows(const attention::FlashBwdParams& params, Stream stream) {
  const FlashFwdParams& fwd = params.fwd;
  if (fwd.cu_seqlens_q == nullptr) return;
  check_rows(fwd.total_q);
  check_rows(fwd.total_k);
  UnusedRowsParams rows{};
  rows.queries = queries_of(fwd);
  rows.keys = {fwd.cu_seqlens_k, fwd.seqused_k, static_cast<int>(fwd.batch),
               static_cast<int>(fwd.total_k), fwd.seqlen_k};
  rows.of_queries = zeroed_rows(params.dq, fwd.dtype, params.dq_stride_row, params.dq_stride_head,
                                fwd.num_heads_q, fwd.head_dim);
  rows.dk = zeroed_rows(params.dk, fwd.dtype, params.dk_stride_row, params.dk_stride_head,
                        fwd.num_heads_kv, fwd.head_dim);
  rows.dv = zeroed_rows(params.dv, fwd.dtype, params.dv_stride_row, params.dv_stride_head,
                        fwd.num_heads_kv, fwd.head_dim_v);
  start(rows, stream);
}

}  // namespace sink_attention::cuda
