// One tile of the forward (kernels.h) against blocks of keys:
//
//   for each block of keys (packed, in L2)
//     for each strip of kTileRows rows
//       S = Q K^T                  kTileRows x block_keys, in L1
//       P = online softmax of S    in place
//       O = O * rescale + P V
//
// Rows are position-major PackGQA rows, so neighbouring rows share their mask.
#pragma once

#include "attention/seqlen_info.h"
#include "cpu/simd/banked_sum.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/pack.h"
#include "cpu/simd/softmax.h"

namespace sink_attention::cpu::SA_ISA {

using attention::FlashFwdParams;
using attention::Mask;
using attention::SeqlenInfo;

constexpr int64_t kTargetRows = 128;  // of a tile: K and V are read from L2 once per tile

// Bump allocator over a thread's scratch, aligned to 64 bytes. With a null base it only counts
// bytes.
class BumpAllocator {
 public:
  explicit BumpAllocator(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    char* piece = base_ == nullptr ? nullptr : base_ + used_;  // nullptr + 1 is undefined
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <class Arithmetic>
struct FwdTile {
  using Real = typename Arithmetic::Real;
  using Unit = typename Arithmetic::Unit;
  using Geo = Geometry<Arithmetic>;

  struct Scratch {
    Unit* q;                // [rows][q_stride]
    Unit* q_transposed;     // [q_stride][kTileRows]: a strip's q for keys read in place
    Real* out;              // [rows][columns(head_dim_v)]: O, not yet divided by the sum
    RowState<Real>* state;  // [rows]
    Real* total_out;        // banked totals of out and state (banked_sum.h)
    RowState<Real>* total_state;
    Real* scores;  // [kTileRows][score_stride]: S, then P in place
  };

  const FlashFwdParams& params;
  const FwdPlan& plan;
  const FwdJob& job;
  int64_t kv_head_idx;
  int64_t qhead_per_khead;
  int64_t rows;
  SeqlenInfo info;
  Mask mask;
  ScoreScale<Real> scale;
  Scratch scratch;

  static void allocate_tile(const FlashFwdParams& params, const FwdPlan& plan,
                            BumpAllocator& allocator, Scratch& scratch) {
    const int64_t rows = plan.tile_positions * (params.num_heads_q / params.num_heads_kv);
    scratch.q = allocator.take<Unit>(rows * q_stride(params));
    scratch.q_transposed = allocator.take<Unit>(q_stride(params) * kTileRows);
    scratch.out = allocator.take<Real>(rows * Geo::columns(params.head_dim_v));
    scratch.state = allocator.take<RowState<Real>>(rows);
    scratch.total_out = allocator.take<Real>(rows * Geo::columns(params.head_dim_v));
    scratch.total_state = allocator.take<RowState<Real>>(rows);
    scratch.scores = allocator.take<Real>(kTileRows * score_stride(plan));
  }
  static int64_t q_stride(const FlashFwdParams& params) {
    return round_up(Geo::units(params.head_dim), max_of(Geo::kLanesReal, kTileRows));
  }
  // A block and one vector, so that the strip's rows do not map to the same cache sets.
  static int64_t score_stride(const FwdPlan& plan) { return plan.block_keys + Geo::kLanesReal; }

  static FwdPlan make_plan(const FlashFwdParams& params) {
    const int64_t qhead_per_khead = max_of(params.num_heads_q / max_of(params.num_heads_kv, 1), 1);
    const int64_t larger_dim = max_of(params.head_dim, params.head_dim_v);
    FwdPlan plan{};
    plan.tile_positions =
        min_of(max_of(1, kTargetRows / qhead_per_khead), max_of(1, params.seqlen_q));
    plan.block_keys = larger_dim <= 128 ? 256 : 128;
    plan.packed_k_bytes =
        plan.block_keys * Geo::units(params.head_dim) * static_cast<int64_t>(sizeof(Unit));
    plan.packed_v_bytes = plan.block_keys / Geo::kPair * round_up(params.head_dim_v, Geo::kPanel) *
                          static_cast<int64_t>(sizeof(Unit));
    const int64_t rows = plan.tile_positions * qhead_per_khead;
    plan.partial_bytes =
        round_up(rows * (Geo::columns(params.head_dim_v) * static_cast<int64_t>(sizeof(Real)) +
                         static_cast<int64_t>(sizeof(RowState<Real>))),
                 64);
    Scratch scratch{};
    BumpAllocator tile(nullptr);
    allocate_tile(params, plan, tile, scratch);
    plan.tile_scratch_bytes = tile.used();
    return plan;
  }

  FwdTile(const FlashFwdParams& params, const FwdPlan& plan, const FwdJob& job, int64_t kv_head_idx)
      : params(params),
        plan(plan),
        job(job),
        kv_head_idx(kv_head_idx),
        qhead_per_khead(params.num_heads_q / params.num_heads_kv),
        rows((job.q_end - job.q_begin) * qhead_per_khead),
        info(attention::seqlen_info(params, job.batch_idx)),
        mask(attention::make_mask(params, info)),
        scale(score_scale<Real>(params)) {
    BumpAllocator tile(job.scratch + (kv_head_idx - job.kv_head_begin) * plan.tile_scratch_bytes);
    allocate_tile(params, plan, tile, scratch);
  }

  int64_t position(int64_t row) const { return job.q_begin + row / qhead_per_khead; }
  int64_t head(int64_t row) const { return kv_head_idx * qhead_per_khead + row % qhead_per_khead; }

  void load_q() {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t offset = info.q_batch * params.q_stride_batch +
                             (info.q_row + position(row)) * params.q_stride_row +
                             head(row) * params.q_stride_head;
      pack_row_units<Arithmetic>(element(params.q, params.dtype, offset), params.dtype,
                                 params.head_dim, Real(1), q_stride(params),
                                 scratch.q + row * q_stride(params));
    }
    clear_sums();
  }

  void clear_sums() {
    for (int64_t row = 0; row < rows; ++row) {
      scratch.state[row] = {attention::negative_infinity<Real>(), Real(0)};
    }
    memset(scratch.out, 0, rows * Geo::columns(params.head_dim_v) * sizeof(Real));
  }

  // The piece of the sums over keys (banked_sum.h) that holds a block.
  static int64_t piece(const FwdPlan& plan, int64_t block_idx) {
    return block_idx * plan.block_keys / kPieceKeys;
  }

  // Adds out and state, the sums over a piece of the keys, to the totals. The rounding error stays
  // in out and state.
  void bank_piece(bool is_first) {
    const int64_t columns = Geo::columns(params.head_dim_v);
    for (int64_t row = 0; row < rows; ++row) {
      RowState<Real>& total = scratch.total_state[row];
      RowState<Real>& state = scratch.state[row];
      Real* total_out = scratch.total_out + row * columns;
      Real* out = scratch.out + row * columns;
      if (is_first) {
        total = state;
        state.sum = 0;
        memcpy(total_out, out, columns * sizeof(Real));
        memset(out, 0, columns * sizeof(Real));
        continue;
      }
      const Real max = state.max > total.max ? state.max : total.max;
      const Real total_factor = attention::rebase_factor(total.max, max);
      const Real factor = attention::rebase_factor(state.max, max);
      total = {max, total.sum * total_factor + Real(0)};
      state = {max, state.sum * factor + Real(0)};
      bank(total.sum, state.sum);
      bank<Real>(total_out, out, columns, total_factor, factor);
    }
  }

  // Moves the totals to out and state. Only where something was banked.
  void load_totals() {
    bank_piece(false);
    memcpy(scratch.state, scratch.total_state, rows * sizeof(RowState<Real>));
    memcpy(scratch.out, scratch.total_out, rows * Geo::columns(params.head_dim_v) * sizeof(Real));
  }

  // All rows against a packed block of keys: its K, then its V.
  void attend_block(int64_t block_idx, const char* packed) {
    const Unit* k = reinterpret_cast<const Unit*>(packed);
    const Unit* v = reinterpret_cast<const Unit*>(packed + plan.packed_k_bytes);
    for (int64_t row = 0; row < rows; row += kTileRows) {
      attend_strip(block_idx * plan.block_keys, row,
                   static_cast<int>(min_of(kTileRows, rows - row)), k, v);
    }
  }

  // The panels of the block at key `first` that some row of [row, row + count) sees, as a range of
  // keys counted from `first`.
  Range visible_panels(int64_t first, int64_t row, int count) const {
    const Range visible = mask.visible_keys(position(row), position(row + count - 1) + 1)
                              .within({first, first + plan.block_keys});
    if (visible.begin >= visible.end) return {0, 0};
    return {(visible.begin - first) / Geo::kPanel * Geo::kPanel,
            round_up(visible.end - first, Geo::kPanel)};
  }

  // Rows [row, row + count) against the block of keys at key `first`.
  void attend_strip(int64_t first, int64_t row, int count, const Unit* k, const Unit* v) {
    const auto [begin, end] = visible_panels(first, row, count);
    if (begin >= end) return;
    score(k, row, count, begin, end);
    Real rescale[kTileRows];
    softmax(first, row, count, begin, end, rescale);
    accumulate(v, row, count, begin, end, rescale);
  }

  // S -> P of the strip; rescale[i] is the factor for row + i of O. Not inlined: every path uses
  // the same code, so all round alike.
  __attribute__((noinline)) void softmax(int64_t first, int64_t row, int count, int64_t begin,
                                         int64_t end, Real* rescale) {
    const int64_t origin = first + begin;
    for (int i = 0; i < count; ++i) {
      const attention::KeySet visible = mask.visible_keys(position(row + i));
      const Range keys = visible.within({origin, first + end});
      rescale[i] =
          softmax_row<Arithmetic>(scratch.scores + i * score_stride(plan), end - begin,
                                  {keys.begin - origin, keys.end - origin},
                                  masked_keys(visible, position(row + i), {origin, first + end}),
                                  scale, scratch.state[row + i]);
    }
  }

  // The masked keys between a position's first and last visible key in `keys`, counted from
  // keys.begin.
  MaskedKeys masked_keys(const attention::KeySet& visible, int64_t position, Range keys) const {
    MaskedKeys masked{};
    if (visible.sink_end > 0) {
      masked.gap = {visible.sink_end - keys.begin, visible.window.begin - keys.begin};
    }
    if (mask.tree != nullptr && keys.end > mask.context()) {
      masked.has_drafts = true;
      masked.first_draft = mask.context() - keys.begin;
      masked.visible_drafts = mask.visible_drafts(position);
    }
    return masked;
  }

  void score(const Unit* k, int64_t row, int count, int64_t begin, int64_t end) {
    const int64_t units = Geo::units(params.head_dim);
    GemmOperands<Arithmetic> op{};
    op.a = scratch.q + row * q_stride(params);
    op.a_stride = q_stride(params);
    op.b = k + begin * units;
    op.b_stride = Geo::kPanel;
    op.depth = units;
    op.c = scratch.scores;
    op.c_stride = score_stride(plan);
    for (int64_t key = begin; key < end; key += Geo::kPanel) {
      gemm<Arithmetic, AOrder::kRowMajor, Accumulate::kNo>(op, count, kTileVecs);
      op.b += units * Geo::kPanel;
      op.c += Geo::kPanel;
    }
  }

  void accumulate(const Unit* v, int64_t row, int count, int64_t begin, int64_t end,
                  const Real* rescale) {
    const int64_t columns = Geo::columns(params.head_dim_v);
    GemmOperands<Arithmetic> op{};
    op.a = reinterpret_cast<const Unit*>(scratch.scores);
    op.a_stride = score_stride(plan);
    op.b = v + begin / Geo::kPair * Geo::kPanel;
    op.b_stride = Geo::kPanel;
    op.depth = (end - begin) / Geo::kPair;
    op.rest_of_chain = rest_of_chain(begin / Geo::kPair);
    op.c = scratch.out + row * columns;
    op.c_stride = columns;
    op.row_scale = rescale;
    for (int64_t column = 0; column < columns; column += Geo::kPanel) {
      const int vecs = static_cast<int>(min_of(kTileVecs, (columns - column) / Geo::kLanesReal));
      gemm<Arithmetic, AOrder::kRowMajor, Accumulate::kRescale>(op, count, vecs);
      op.b += plan.block_keys / Geo::kPair * Geo::kPanel;
      op.c += Geo::kPanel;
    }
  }

  Real sink(int64_t head_idx) const {
    if (params.s_aux == nullptr) return attention::negative_infinity<Real>();
    Real value;
    load_row(element(params.s_aux, params.s_aux_dtype, head_idx), params.s_aux_dtype, 1, Real(1),
             &value);
    return value;
  }

  // Adds the sink to the denominator, once, and writes out and lse.
  void finish() {
    for (int64_t row = 0; row < rows; ++row) {
      const attention::RowResult<Real> result =
          attention::fold_sink(scratch.state[row], sink(head(row)));
      const int64_t q_row = info.q_row + position(row);
      const int64_t offset = info.q_batch * params.out_stride_batch +
                             q_row * params.out_stride_row + head(row) * params.out_stride_head;
      store_row(scratch.out + row * Geo::columns(params.head_dim_v), params.head_dim_v,
                result.scale, element(params.out, params.dtype, offset), params.dtype);
      static_cast<Real*>(params.lse)[info.q_batch * params.lse_stride_batch +
                                     head(row) * params.lse_stride_head + q_row] = result.lse;
    }
  }

  // Layout of a partial result: the rows' states, then their O.
  void store_partial(char* partial) {
    memcpy(partial, scratch.state, rows * sizeof(RowState<Real>));
    memcpy(partial + rows * sizeof(RowState<Real>), scratch.out,
           rows * Geo::columns(params.head_dim_v) * sizeof(Real));
  }

  void merge_partial(const char* partial) {
    const int64_t columns = Geo::columns(params.head_dim_v);
    const RowState<Real>* states = reinterpret_cast<const RowState<Real>*>(partial);
    const Real* outs = reinterpret_cast<const Real*>(partial + rows * sizeof(RowState<Real>));
    for (int64_t row = 0; row < rows; ++row) {
      RowState<Real>& state = scratch.state[row];
      const Real max = state.max > states[row].max ? state.max : states[row].max;
      const Real mine = attention::rebase_factor(state.max, max);
      const Real theirs = attention::rebase_factor(states[row].max, max);
      state = {max, state.sum * mine + states[row].sum * theirs};
      Real* out = scratch.out + row * columns;
      for (int64_t i = 0; i < columns; ++i)
        out[i] = out[i] * mine + outs[row * columns + i] * theirs;
    }
  }
};

}  // namespace sink_attention::cpu::SA_ISA
