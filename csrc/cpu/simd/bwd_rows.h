// The backward's work on rows: delta and ds_aux before the tiles, dQ's scaling and rounding after.
#pragma once

#include "cpu/simd/banked_sum.h"
#include "cpu/simd/fwd_tile.h"

namespace sink_attention::cpu::SA_ISA {

using attention::FlashBwdParams;

// Reads the sink in the forward's precision, so that exp(s_aux - lse) = 1 in a row without keys.
template <class Real>
SA_INLINE Real read_sink(const FlashFwdParams& params, int64_t head_idx) {
  Real value;
  load_row(element(params.s_aux, params.s_aux_dtype, head_idx), params.s_aux_dtype, 1, Real(1),
           &value);
  return value;
}

// sum over rows of exp(sink - lse) * -delta. Exponentials are vectorised; the sum is in double, in
// the rows' order.
template <class Real>
double sink_gradient(Real sink, const Real* lse, const Real* delta, int64_t rows) {
  constexpr int kStep = kLanes<Real>;
  double sum = 0;
  for (int64_t row = 0; row < rows; row += kStep) {
    const int64_t count = min_of(kStep, rows - row);
    Real lanes[kStep];
    for (int i = 0; i < kStep; ++i) lanes[i] = i < count ? lse[row + i] : sink;
    const Vec<Real> exponent = (sink - load(lanes)) * static_cast<Real>(attention::kLog2E);
    // The comparison also catches sink = lse = +inf, whose difference is NaN.
    store(lanes, load(lanes) == broadcast(sink) ? broadcast(Real(1)) : exp2(exponent));
    for (int64_t i = 0; i < count; ++i) {
      sum -= static_cast<double>(lanes[i]) * static_cast<double>(delta[row + i]);
    }
  }
  return sum;
}

// One head of one sequence: writes delta = <dout, out> - dlse of every row. Returns its part of
//   ds_aux = sum over rows of exp(s_aux - lse) * (dlse - <dout, out>).
template <class Arithmetic>
double bwd_preprocess(const FlashBwdParams& bwd, int64_t batch_idx, int64_t head_idx,
                      void* delta_of_head) {
  using Real = typename Arithmetic::Real;
  constexpr int kStep = kLanes<Real>;
  const FlashFwdParams& params = bwd.fwd;
  const SeqlenInfo info = attention::seqlen_info(params, batch_idx);
  const int64_t dim = params.head_dim_v;
  const int64_t padded = round_up(dim, kStep);
  Real* delta = static_cast<Real*>(delta_of_head);
  alignas(64) Real out[kMaxHeadDim] = {};
  alignas(64) Real dout[kMaxHeadDim] = {};
  for (int64_t position = 0; position < info.seqlen_q; ++position) {
    const int64_t row = info.q_row + position;
    const int64_t out_offset = info.q_batch * params.out_stride_batch +
                               row * params.out_stride_row + head_idx * params.out_stride_head;
    const int64_t dout_offset = info.q_batch * bwd.dout_stride_batch + row * bwd.dout_stride_row +
                                head_idx * bwd.dout_stride_head;
    load_row(element(params.out, params.dtype, out_offset), params.dtype, dim, Real(1), out);
    load_row(element(bwd.dout, params.dtype, dout_offset), params.dtype, dim, Real(1), dout);
    Vec<Real> sum{};
    for (int64_t i = 0; i < padded; i += kStep) sum += load(out + i) * load(dout + i);
    Real value = reduce_add<Real>(sum);
    if (bwd.dlse != nullptr) {
      value -= static_cast<const Real*>(
          bwd.dlse)[info.q_batch * bwd.dlse_stride_batch + head_idx * bwd.dlse_stride_head +
                    row * bwd.dlse_stride_row];
    }
    delta[position] = value;
  }
  if (params.s_aux == nullptr) return 0;
  const Real sink = read_sink<Real>(params, head_idx);
  if (sink == attention::negative_infinity<Real>()) return 0;
  const Real* lse = static_cast<const Real*>(params.lse) + info.q_batch * params.lse_stride_batch +
                    head_idx * params.lse_stride_head + info.q_row;
  return sink_gradient(sink, lse, delta, info.seqlen_q);
}

// Calls body(row of dq, row of the accumulator) for all rows of one kv head at `positions`.
template <class Arithmetic, class Body>
SA_INLINE void for_dq_rows(const FlashBwdParams& bwd, int64_t batch_idx, int64_t kv_head_idx,
                           Range positions, char* dq_accumulator, const Body& body) {
  using Real = typename Arithmetic::Real;
  const FlashFwdParams& params = bwd.fwd;
  const SeqlenInfo info = attention::seqlen_info(params, batch_idx);
  const int64_t qhead_per_khead = params.num_heads_q / params.num_heads_kv;
  const int64_t columns = Geometry<Arithmetic>::columns(params.head_dim);
  Real* row = reinterpret_cast<Real*>(dq_accumulator) + positions.begin * qhead_per_khead * columns;
  for (int64_t position = positions.begin; position < positions.end; ++position) {
    for (int64_t i = 0; i < qhead_per_khead; ++i, row += columns) {
      const int64_t offset = info.q_batch * bwd.dq_stride_batch +
                             (info.q_row + position) * bwd.dq_stride_row +
                             (kv_head_idx * qhead_per_khead + i) * bwd.dq_stride_head;
      body(element(bwd.dq, params.dtype, offset), row);
    }
  }
}

// Banks the accumulator (the sums over a piece of the keys) in dq itself, whose type is Real.
template <class Arithmetic>
void bwd_bank_dq(const FlashBwdParams& bwd, int64_t batch_idx, int64_t kv_head_idx, Range positions,
                 char* dq_accumulator, bool is_first) {
  using Real = typename Arithmetic::Real;
  const int64_t dim = bwd.fwd.head_dim;
  alignas(64) Real total[kMaxHeadDim] = {};
  for_dq_rows<Arithmetic>(bwd, batch_idx, kv_head_idx, positions, dq_accumulator,
                          [&](void* dq, Real* piece) {
                            if (is_first) {
                              memset(total, 0, sizeof(total));
                            } else {
                              memcpy(total, dq, dim * sizeof(Real));
                            }
                            bank<Real>(total, piece, Geometry<Arithmetic>::columns(dim));
                            memcpy(dq, total, dim * sizeof(Real));
                          });
}

// Writes the final dq, from the accumulator and, if was_banked, from dq itself.
template <class Arithmetic>
void bwd_store_dq(const FlashBwdParams& bwd, int64_t batch_idx, int64_t kv_head_idx,
                  Range positions, char* dq_accumulator, bool was_banked) {
  using Real = typename Arithmetic::Real;
  const FlashFwdParams& params = bwd.fwd;
  if (was_banked) {
    bwd_bank_dq<Arithmetic>(bwd, batch_idx, kv_head_idx, positions, dq_accumulator, false);
  }
  for_dq_rows<Arithmetic>(
      bwd, batch_idx, kv_head_idx, positions, dq_accumulator, [&](void* dq, const Real* sums) {
        store_row(was_banked ? static_cast<const Real*>(dq) : sums, params.head_dim,
                  static_cast<Real>(params.softmax_scale), dq, params.dtype);
      });
}

}  // namespace sink_attention::cpu::SA_ISA
