#include "cpu/unused_rows.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "attention/paged_kv.h"
#include "cpu/backend.h"

namespace sink_attention::cpu {
namespace {

using attention::DataType;
using attention::FlashFwdParams;
using attention::Range;

// A packed tensor [rows, heads, dim]. Strides count elements.
struct RowsOf {
  void* data;
  DataType dtype;
  int64_t stride_row, stride_head, heads, dim;
};

void zero_rows(const RowsOf& tensor, Range rows) {
  const int64_t bytes = attention::bytes_of(tensor.dtype);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t head = 0; head < tensor.heads; ++head) {
      const int64_t offset = row * tensor.stride_row + head * tensor.stride_head;
      std::memset(static_cast<char*>(tensor.data) + offset * bytes, 0, tensor.dim * bytes);
    }
  }
}

// lse is [heads, rows].
template <class Real>
void fill_lse(void* lse, int64_t stride_head, int64_t heads, Range rows) {
  for (int64_t head = 0; head < heads; ++head) {
    Real* of_head = static_cast<Real*>(lse) + head * stride_head;
    std::fill(of_head + rows.begin, of_head + rows.end, -std::numeric_limits<Real>::infinity());
  }
}

void fill_results(const RowsOf& out, void* lse, int64_t lse_stride_head, Range rows) {
  zero_rows(out, rows);
  if (out.dtype == DataType::kFloat64) {
    fill_lse<double>(lse, lse_stride_head, out.heads, rows);
  } else {
    fill_lse<float>(lse, lse_stride_head, out.heads, rows);
  }
}

// Calls fill with the rows between and after the sequences. rows_of(b): those of sequence b.
template <class RowsOfSequence, class Fill>
void for_unused_rows(int64_t batch, int64_t total, const RowsOfSequence& rows_of,
                     const Fill& fill) {
  int64_t filled = 0;  // rows before it are in sequences, or filled
  for (int64_t b = 0; b < batch; ++b) {
    const Range rows = rows_of(b);
    if (rows.begin > filled) fill(Range{filled, rows.begin});
    filled = std::max(filled, rows.end);
  }
  if (filled < total) fill(Range{filled, total});
}

// The rows of a sequence that attention writes.
Range query_rows(const int32_t* cu_seqlens_q, int64_t max_seqlen_q, int64_t batch_idx,
                 int64_t total) {
  const Range rows = packed_rows(cu_seqlens_q, batch_idx, total);
  return {rows.begin, std::min(rows.end, rows.begin + max_seqlen_q)};
}

Range query_rows(const FlashFwdParams& params, int64_t batch_idx) {
  return query_rows(params.cu_seqlens_q, params.seqlen_q, batch_idx, params.total_q);
}

Range key_rows(const FlashFwdParams& params, int64_t batch_idx) {
  const attention::SeqlenInfo info = attention::seqlen_info(params, batch_idx);
  return {info.k_row, info.k_row + info.seqlen_k};
}

}  // namespace

void fill_unused_rows(const FlashFwdParams& params) {
  if (params.cu_seqlens_q == nullptr) return;
  const RowsOf out{
      params.out,         params.dtype,     params.out_stride_row, params.out_stride_head,
      params.num_heads_q, params.head_dim_v};
  for_unused_rows(
      params.batch, params.total_q, [&](int64_t b) { return query_rows(params, b); },
      [&](Range rows) { fill_results(out, params.lse, params.lse_stride_head, rows); });
}

void fill_unused_rows(const attention::AppendKvParams& params) {
  const RowsOf out{
      params.out,         params.out_dtype, params.out_stride_row, params.out_stride_head,
      params.num_heads_q, params.head_dim_v};
  for_unused_rows(
      params.batch, params.num_tokens,
      [&](int64_t b) {
        return query_rows(params.cu_seqlens_q, params.seqlen_new, b, params.num_tokens);
      },
      [&](Range rows) { fill_results(out, params.lse, params.lse_stride_head, rows); });
}

void fill_unused_rows(const attention::FlashBwdParams& params) {
  const FlashFwdParams& fwd = params.fwd;
  if (fwd.cu_seqlens_q == nullptr) return;
  const RowsOf dq{params.dq,       fwd.dtype,   params.dq_stride_row, params.dq_stride_head,
                  fwd.num_heads_q, fwd.head_dim};
  const RowsOf dk{params.dk,        fwd.dtype,   params.dk_stride_row, params.dk_stride_head,
                  fwd.num_heads_kv, fwd.head_dim};
  const RowsOf dv{params.dv,        fwd.dtype,     params.dv_stride_row, params.dv_stride_head,
                  fwd.num_heads_kv, fwd.head_dim_v};
  for_unused_rows(
      fwd.batch, fwd.total_q, [&](int64_t b) { return query_rows(fwd, b); },
      [&](Range rows) { zero_rows(dq, rows); });
  for_unused_rows(
      fwd.batch, fwd.total_k, [&](int64_t b) { return key_rows(fwd, b); },
      [&](Range rows) {
        zero_rows(dk, rows);
        zero_rows(dv, rows);
      });
}

}  // namespace sink_attention::cpu
