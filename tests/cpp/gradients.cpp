#include "gradients.h"

#include <algorithm>

#include "reference.h"

namespace sink_attention::tests {

Gradients make_gradients(const Scenario& s, bool with_dlse, unsigned seed) {
  Random random(seed);
  Gradients g;
  attention::FlashBwdParams& b = g.params;
  b.fwd = s.params;
  const attention::FlashFwdParams& p = b.fwd;
  const bool varlen = p.cu_seqlens_q != nullptr;
  g.dout = Array::normal(p.dtype, s.q_rows * p.num_heads_q * p.head_dim_v, random);
  g.dq = Array(p.dtype, s.q_rows * p.num_heads_q * p.head_dim);
  g.dk = Array(p.dtype, s.k_rows * p.num_heads_kv * p.head_dim);
  g.dv = Array(p.dtype, s.k_rows * p.num_heads_kv * p.head_dim_v);
  b.dout = g.dout.data();
  b.dq = g.dq.data();
  b.dk = g.dk.data();
  b.dv = g.dv.data();
  const auto set = [&](int64_t heads, int64_t dim, int64_t rows, int64_t& batch, int64_t& row,
                       int64_t& head) {
    head = dim;
    row = heads * dim;
    batch = varlen ? 0 : rows * row;
  };
  set(p.num_heads_q, p.head_dim_v, p.seqlen_q, b.dout_stride_batch, b.dout_stride_row,
      b.dout_stride_head);
  set(p.num_heads_q, p.head_dim, p.seqlen_q, b.dq_stride_batch, b.dq_stride_row, b.dq_stride_head);
  set(p.num_heads_kv, p.head_dim, p.seqlen_k, b.dk_stride_batch, b.dk_stride_row, b.dk_stride_head);
  set(p.num_heads_kv, p.head_dim_v, p.seqlen_k, b.dv_stride_batch, b.dv_stride_row,
      b.dv_stride_head);
  if (with_dlse) {  // with a row stride that lse itself never has
    constexpr int64_t kRowStride = 2;
    g.dlse = Array::normal(lse_type(p.dtype), s.lse.count() * kRowStride, random);
    b.dlse = g.dlse.data();
    b.dlse_stride_batch = p.lse_stride_batch * kRowStride;
    b.dlse_stride_head = p.lse_stride_head * kRowStride;
    b.dlse_stride_row = kRowStride;
  }
  if (p.s_aux != nullptr) {
    g.ds_aux = Array(p.s_aux_dtype, p.num_heads_q);
    b.ds_aux = g.ds_aux.data();
  }
  return g;
}

std::vector<double> values_of(const Array& array) {
  std::vector<double> values;
  for (int64_t i = 0; i < array.count(); ++i) values.push_back(array[i]);
  return values;
}

void set_reference_results(Scenario& s) {
  const attention::FlashFwdParams& p = s.params;
  const ReferenceForward forward = reference_forward(p, s.q_rows);
  for (int64_t row = 0; row < s.q_rows * p.num_heads_q; ++row) {
    for (int64_t d = 0; d < p.head_dim_v; ++d) {
      s.out.set(row * p.out_stride_head + d, forward.out[row * p.head_dim_v + d]);
    }
  }
  const int64_t batch = p.cu_seqlens_q != nullptr ? 1 : p.batch, rows = s.q_rows / batch;
  for (int64_t head = 0; head < p.num_heads_q; ++head) {
    for (int64_t row = 0; row < s.q_rows; ++row) {
      s.lse.set(row / std::max<int64_t>(rows, 1) * p.lse_stride_batch + head * p.lse_stride_head +
                    row % std::max<int64_t>(rows, 1),
                forward.lse[head * s.q_rows + row]);
    }
  }
}

}  // namespace sink_attention::tests
