// The backward of one block of keys (kernels.h): dK and dV are summed over query tiles in scratch,
// dQ is added to an accumulator.
//
//   P = exp(S - lse)    dP = dO V^T    dS = P (dP - delta)    delta = <dO, O> - dlse
//   dV += P^T dO        dK += dS^T Q   dQ += dS K
//
// dK and dQ are multiplied by the softmax scale when they are stored. Rows are PackGQA rows as in
// the forward, so the products also sum over the query heads of a kv head. K and V are packed once
// per block. A tile's Q and dO are packed again for each block, which takes 2% of the time of its
// products.
#pragma once

#include "cpu/simd/banked_sum.h"
#include "cpu/simd/bwd_plan.h"
#include "cpu/simd/fwd_tile.h"

namespace sink_attention::cpu::SA_ISA {

template <class Arithmetic>
struct BwdBlock {
  using Real = typename Arithmetic::Real;
  using Unit = typename Arithmetic::Unit;
  using Geo = Geometry<Arithmetic>;
  using Scratch = BwdScratch<Arithmetic>;
  static constexpr bool kPairs = Arithmetic::kPair == 2;

  const FlashBwdParams& bwd;
  const FlashFwdParams& params;
  const BwdPlan& plan;
  const BwdJob& job;
  int64_t qhead_per_khead;
  SeqlenInfo info;
  Mask mask;
  ScoreScale<Real> scale;
  Range block;  // the block's keys, cut at seqlen_k
  Scratch scratch;

  BwdBlock(const FlashBwdParams& bwd, const BwdPlan& plan, const BwdJob& job)
      : bwd(bwd),
        params(bwd.fwd),
        plan(plan),
        job(job),
        qhead_per_khead(params.num_heads_q / params.num_heads_kv),
        info(attention::seqlen_info(params, job.batch_idx)),
        mask(attention::make_mask(params, info)),
        scale(score_scale<Real>(params)) {
    block = intersect({job.block_idx * plan.block_keys, (job.block_idx + 1) * plan.block_keys},
                      {0, info.seqlen_k});
    BumpAllocator allocator(job.scratch);
    scratch = Scratch::allocate(params, plan, allocator);
  }

  void begin() {
    const KeyRows keys =
        attention::key_rows(params, job.batch_idx, info, job.kv_head_idx, {0, block});
    const KeyRows values =
        attention::value_rows(params, job.batch_idx, info, job.kv_head_idx, {0, block});
    pack_transposed<Arithmetic>(keys, block.begin, block.end, scratch.k_transposed);
    pack_transposed<Arithmetic>(values, block.begin, block.end, scratch.v_transposed);
    pack_rowwise<Arithmetic>(keys, block.begin, block.end, plan.block_keys, scratch.k_rowwise);
    memset(scratch.dk, 0, dk_elements() * sizeof(Real));
    memset(scratch.dv, 0, dv_elements() * sizeof(Real));
    *scratch.pieces_banked = 0;
  }

  void add_tile(int64_t q_begin, int64_t q_end) {
    const Range visible = mask.visible_keys(q_begin, q_end).within(block);
    if (visible.begin >= visible.end) return;
    // Whole panels of the block.
    const int64_t begin = (visible.begin - block.begin) / Geo::kPanel * Geo::kPanel;
    const int64_t end = round_up(visible.end - block.begin, Geo::kPanel);
    const int64_t rows = (q_end - q_begin) * qhead_per_khead;
    load_rows(q_begin, rows);
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int count = static_cast<int>(min_of(kTileRows, rows - row));
      score(scratch.q, Scratch::row_stride(params.head_dim), Geo::units(params.head_dim),
            scratch.k_transposed, row, count, begin, end, scratch.p);
      score(scratch.dout, Scratch::row_stride(params.head_dim_v), Geo::units(params.head_dim_v),
            scratch.v_transposed, row, count, begin, end, scratch.ds);
      differentiate_strip(q_begin, row, count, begin, end);
    }
    const int64_t depth = divide_up(rows, Geo::kPair);
    add_transposed(scratch.p_zipped, scratch.dout_zipped, depth, Geo::columns(params.head_dim_v),
                   begin, end, scratch.dv);
    add_transposed(scratch.ds_zipped, scratch.q_zipped, depth, Geo::columns(params.head_dim), begin,
                   end, scratch.dk);
    add_dq(q_begin, rows, begin, end);
  }

  // Tiles come last to first. A piece of dK's and dV's sums (banked_sum.h) ends every kPieceRows
  // rows.
  void bank_piece_from(int64_t q_begin) {
    const int64_t tiles = max_of(1, kPieceRows / (plan.tile_positions * qhead_per_khead));
    if (q_begin > 0 && q_begin / plan.tile_positions % tiles == 0) bank_dk_dv();
  }

  void end() {
    if (*scratch.pieces_banked > 0) bank_dk_dv();
    const Real* dk = *scratch.pieces_banked > 0 ? scratch.dk_total : scratch.dk;
    const Real* dv = *scratch.pieces_banked > 0 ? scratch.dv_total : scratch.dv;
    for (int64_t key = block.begin; key < block.end; ++key) {
      const int64_t row = info.k_row + key;
      const int64_t dk_offset = info.k_batch * bwd.dk_stride_batch + row * bwd.dk_stride_row +
                                job.kv_head_idx * bwd.dk_stride_head;
      const int64_t dv_offset = info.k_batch * bwd.dv_stride_batch + row * bwd.dv_stride_row +
                                job.kv_head_idx * bwd.dv_stride_head;
      store_row(dk + (key - block.begin) * Geo::columns(params.head_dim), params.head_dim,
                static_cast<Real>(params.softmax_scale), element(bwd.dk, params.dtype, dk_offset),
                params.dtype);
      store_row(dv + (key - block.begin) * Geo::columns(params.head_dim_v), params.head_dim_v,
                Real(1), element(bwd.dv, params.dtype, dv_offset), params.dtype);
    }
  }

 private:
  int64_t dk_elements() const { return plan.block_keys * Geo::columns(params.head_dim); }
  int64_t dv_elements() const { return plan.block_keys * Geo::columns(params.head_dim_v); }

  void bank_dk_dv() {
    if ((*scratch.pieces_banked)++ == 0) {
      memcpy(scratch.dk_total, scratch.dk, dk_elements() * sizeof(Real));
      memcpy(scratch.dv_total, scratch.dv, dv_elements() * sizeof(Real));
      memset(scratch.dk, 0, dk_elements() * sizeof(Real));
      memset(scratch.dv, 0, dv_elements() * sizeof(Real));
      return;
    }
    bank<Real>(scratch.dk_total, scratch.dk, dk_elements());
    bank<Real>(scratch.dv_total, scratch.dv, dv_elements());
  }

  void load_rows(int64_t q_begin, int64_t rows) {
    const int64_t q_stride = Scratch::row_stride(params.head_dim);
    const int64_t dout_stride = Scratch::row_stride(params.head_dim_v);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t position = q_begin + row / qhead_per_khead;
      const int64_t q_row = info.q_row + position;
      const int64_t head = job.kv_head_idx * qhead_per_khead + row % qhead_per_khead;
      const int64_t q_offset = info.q_batch * params.q_stride_batch + q_row * params.q_stride_row +
                               head * params.q_stride_head;
      const int64_t dout_offset = info.q_batch * bwd.dout_stride_batch +
                                  q_row * bwd.dout_stride_row + head * bwd.dout_stride_head;
      pack_row_units<Arithmetic>(element(params.q, params.dtype, q_offset), params.dtype,
                                 params.head_dim, Real(1), q_stride, scratch.q + row * q_stride);
      pack_row_units<Arithmetic>(element(bwd.dout, params.dtype, dout_offset), params.dtype,
                                 params.head_dim_v, Real(1), dout_stride,
                                 scratch.dout + row * dout_stride);
      const Real lse = static_cast<const Real*>(params.lse)[info.q_batch * params.lse_stride_batch +
                                                            head * params.lse_stride_head + q_row];
      scratch.lse[row] = split_lse(lse);
      scratch.delta[row] = static_cast<const Real*>(
          job.delta)[info.q_batch * job.delta_stride_batch + head * job.delta_stride_head + q_row];
    }
#if defined(__AVX512BF16__)
    if constexpr (kPairs) {
      if (rows % 2 != 0) {
        memset(scratch.q + rows * q_stride, 0, q_stride * sizeof(Unit));
        memset(scratch.dout + rows * dout_stride, 0, dout_stride * sizeof(Unit));
      }
      const int64_t columns = Geo::columns(params.head_dim);
      const int64_t columns_v = Geo::columns(params.head_dim_v);
      for (int64_t row = 0; row < rows; row += 2) {
        const Unit* q = scratch.q + row * q_stride;
        const Unit* dout = scratch.dout + row * dout_stride;
        zip_unit_rows(q, q + q_stride, columns, scratch.q_zipped + row / 2 * columns);
        zip_unit_rows(dout, dout + dout_stride, columns_v,
                      scratch.dout_zipped + row / 2 * columns_v);
      }
    }
#endif
  }

  // c = A B: rows [row, row + count), keys [begin, end) of the block.
  void score(const Unit* a, int64_t a_stride, int64_t units, const Unit* b, int64_t row, int count,
             int64_t begin, int64_t end, Real* c) {
    GemmOperands<Arithmetic> op{};
    op.a = a + row * a_stride;
    op.a_stride = a_stride;
    op.b = b + begin * units;
    op.b_stride = Geo::kPanel;
    op.depth = units;
    op.c = c + row * Scratch::score_stride(plan) + begin;
    op.c_stride = Scratch::score_stride(plan);
    for (int64_t key = begin; key < end; key += Geo::kPanel) {
      gemm<Arithmetic, AOrder::kRowMajor, Accumulate::kNo>(op, count, kTileVecs);
      op.b += units * Geo::kPanel;
      op.c += Geo::kPanel;
    }
  }

  struct PAndDs {
    Vec<Real> p;
    Vec<Real> ds;
  };

  // A row's visible keys, counted from the block's first: those of `range` that are not in `gap`,
  // which lies between the sink tokens and the window.
  struct VisibleKeys {
    Range range;
    Range gap;
  };
  VisibleKeys visible_keys(int64_t position) const {
    const attention::KeySet keys = mask.visible_keys(position);
    const Range range = keys.within(block);
    VisibleKeys result{{range.begin - block.begin, range.end - block.begin}, {0, 0}};
    if (keys.sink_end > 0) {
      result.gap = {keys.sink_end - block.begin, keys.window.begin - block.begin};
    }
    return result;
  }

  // P and dS of one row and a vector of keys from j on; zero where a key is masked.
  SA_INLINE PAndDs differentiate(Vec<Real> score, Vec<Real> dp, int64_t j,
                                 const VisibleKeys& visible, const SplitLse<Real>& lse, Real delta,
                                 bool is_edge, bool has_gap) const {
    Vec<Real> slope = broadcast(Real(1));
    if (scale.has_softcap) {
      score = tanh<Real>(score * scale.to_tanh);
      slope = Real(1) - score * score;
    }
    PAndDs result;
    // Clamps P to 1. Logits can be so large that lse's rounding error exceeds 1: this keeps the
    // gradients finite then. A NaN passes.
    const Vec<Real> exponent =
        minimum(broadcast(lse.whole), score * scale.softmax_scale_log2 - lse.rest);
    result.p = Arithmetic::softmax_exp2(exponent) * lse.power;
    result.ds = result.p * (dp - delta) * slope;
    if (is_edge) {
      result.p = keep_range<Real>(result.p, j, visible.range, Vec<Real>{});
      result.ds = keep_range<Real>(result.ds, j, visible.range, Vec<Real>{});
    }
    if (has_gap) {
      result.p = keep_range<Real>(Vec<Real>{}, j, visible.gap, result.p);
      result.ds = keep_range<Real>(Vec<Real>{}, j, visible.gap, result.ds);
    }
    return result;
  }

  // P over S and dS over dP, for the strip of rows [row, row + count) and keys [begin, end).
  void differentiate_strip(int64_t q_begin, int64_t row, int count, int64_t begin, int64_t end) {
    constexpr int kStep = kLanes<Real>;
    const int64_t stride = Scratch::score_stride(plan);
    for (int i = 0; i < count; i += Geo::kPair) {
      VisibleKeys visible[Geo::kPair];
      SplitLse<Real> lse[Geo::kPair];
      Real delta[Geo::kPair];
      for (int half = 0; half < Geo::kPair; ++half) {
        const int64_t r = row + i + half;
        const bool exists = i + half < count;  // the last odd row is paired with a row of zeros
        visible[half] =
            exists ? visible_keys(q_begin + r / qhead_per_khead) : VisibleKeys{{0, 0}, {0, 0}};
        lse[half] = exists ? scratch.lse[r] : SplitLse<Real>{0, 0, 1};
        delta[half] = exists ? scratch.delta[r] : Real(0);
        if (!exists) {
          memset(scratch.p + r * stride + begin, 0, (end - begin) * sizeof(Real));
          memset(scratch.ds + r * stride + begin, 0, (end - begin) * sizeof(Real));
        }
      }
      Real* p = scratch.p + (row + i) * stride;
      Real* ds = scratch.ds + (row + i) * stride;
      for (int64_t j = begin; j < end; j += kStep) {
        PAndDs result[Geo::kPair];
        SA_UNROLL
        for (int half = 0; half < Geo::kPair; ++half) {
          const auto& [range, gap] = visible[half];
          const bool is_edge = j < range.begin || j + kStep > range.end;
          const bool has_gap = j < gap.end && j + kStep > gap.begin;
          result[half] = differentiate(load(p + half * stride + j), load(ds + half * stride + j), j,
                                       visible[half], lse[half], delta[half], is_edge, has_gap);
          store_row_units<Arithmetic>(reinterpret_cast<Unit*>(ds + half * stride), j,
                                      result[half].ds);
        }
        if constexpr (kPairs) {
#if defined(__AVX512BF16__)
          const int64_t zipped = (row + i) / 2 * stride + j;
          store(scratch.p_zipped + zipped, zip_rows(result[0].p, result[1].p));
          store(scratch.ds_zipped + zipped, zip_rows(result[0].ds, result[1].ds));
#endif
        } else {
          store(p + j, result[0].p);
        }
      }
    }
  }

  // c += A^T B over the rows, for the keys [begin, end) of the block.
  void add_transposed(const Unit* a, const Unit* b, int64_t depth, int64_t columns, int64_t begin,
                      int64_t end, Real* c) {
    GemmOperands<Arithmetic> op{};
    op.a_stride = Scratch::score_stride(plan);
    op.b_stride = columns;
    op.depth = depth;
    op.rest_of_chain = kChainUnits;
    op.c_stride = columns;
    for (int64_t column = 0; column < columns; column += Geo::kPanel) {
      const int vecs = static_cast<int>(min_of(kTileVecs, (columns - column) / Geo::kLanesReal));
      op.b = b + column;
      for (int64_t key = begin; key < end; key += kTileRows) {
        op.a = a + key;
        op.c = c + key * columns + column;
        gemm<Arithmetic, AOrder::kColMajor, Accumulate::kAdd>(op, kTileRows, vecs);
      }
    }
  }

  void add_dq(int64_t q_begin, int64_t rows, int64_t begin, int64_t end) {
    const int64_t columns = Geo::columns(params.head_dim);
    Real* dq = reinterpret_cast<Real*>(job.dq_accumulator) + q_begin * qhead_per_khead * columns;
    GemmOperands<Arithmetic> op{};
    op.a_stride = Scratch::score_stride(plan);
    op.b_stride = Geo::kPanel;
    op.depth = (end - begin) / Geo::kPair;
    op.rest_of_chain = rest_of_chain(begin / Geo::kPair);
    op.c_stride = columns;
    for (int64_t row = 0; row < rows; row += kTileRows) {
      op.a = reinterpret_cast<const Unit*>(scratch.ds + row * Scratch::score_stride(plan)) +
             begin / Geo::kPair;
      op.b = scratch.k_rowwise + begin / Geo::kPair * Geo::kPanel;
      op.c = dq + row * columns;
      for (int64_t column = 0; column < columns; column += Geo::kPanel) {
        const int vecs = static_cast<int>(min_of(kTileVecs, (columns - column) / Geo::kLanesReal));
        gemm<Arithmetic, AOrder::kRowMajor, Accumulate::kAdd>(
            op, static_cast<int>(min_of(kTileRows, rows - row)), vecs);
        op.b += plan.block_keys / Geo::kPair * Geo::kPanel;
        op.c += Geo::kPanel;
      }
    }
  }
};

template <class Arithmetic>
void bwd_begin_block(const FlashBwdParams& params, const BwdPlan& plan, const BwdJob& job) {
  BwdBlock<Arithmetic>(params, plan, job).begin();
}

template <class Arithmetic>
void bwd_tile(const FlashBwdParams& params, const BwdPlan& plan, const BwdJob& job, int64_t q_begin,
              int64_t q_end) {
  BwdBlock<Arithmetic> block(params, plan, job);
  block.add_tile(q_begin, q_end);
  block.bank_piece_from(q_begin);
}

template <class Arithmetic>
void bwd_end_block(const FlashBwdParams& params, const BwdPlan& plan, const BwdJob& job) {
  BwdBlock<Arithmetic>(params, plan, job).end();
}

}  // namespace sink_attention::cpu::SA_ISA
