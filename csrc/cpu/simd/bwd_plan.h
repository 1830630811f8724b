// The backward's plan: the sizes of its tiles and blocks, and the layout of a thread's scratch.
#pragma once

#include <cmath>

#include "cpu/simd/banked_sum.h"
#include "cpu/simd/fwd_tile.h"

namespace sink_attention::cpu::SA_ISA {

using attention::FlashBwdParams;

constexpr int64_t kTargetBwdRows = 64;  // of a tile

// A row's lse in base 2, as whole + rest: P = exp2(logit - rest) * 2^-whole. Over many keys lse is
// much larger than the logits. Rounding logit - lse would then be one common error of the row's
// whole P.
template <class Real>
struct SplitLse {
  Real whole;
  Real rest;
  Real power;  // 2^-whole
};

template <class Real>
SplitLse<Real> split_lse(Real lse) {
  // A row without a key and without a sink has lse = -inf. A rest of +inf makes its P zero.
  if (lse == attention::negative_infinity<Real>()) return {0, -lse, 1};
  const double log2 = static_cast<double>(lse) * attention::kLog2E;
  // whole < 64, so that exp2(logit - rest), which is clamped to 2^whole, stays finite.
  const double whole = log2 > 0 && log2 < 64 ? std::floor(log2) : 0;
  return {static_cast<Real>(whole), static_cast<Real>(log2 - whole),
          static_cast<Real>(std::exp2(-whole))};
}

// A thread's scratch for one block of keys. score_stride is a block and one vector, so that a
// column of P does not map to few cache sets.
template <class Arithmetic>
struct BwdScratch {
  using Real = typename Arithmetic::Real;
  using Unit = typename Arithmetic::Unit;
  using Geo = Geometry<Arithmetic>;

  Unit* k_transposed;  // B of S
  Unit* v_transposed;  // B of dP
  Unit* k_rowwise;     // B of dQ
  Real* dk;            // [block_keys][columns(head_dim)]
  Real* dv;            // [block_keys][columns(head_dim_v)]
  Real* dk_total;      // banked totals of dk and dv (banked_sum.h)
  Real* dv_total;
  int64_t* pieces_banked;
  Unit* q;  // [rows][row_stride(head_dim)]
  Unit* dout;
  Unit* q_zipped;  // [rows / 2][columns]: rows zipped in pairs, B of dK; q itself if kPair is 1
  Unit* dout_zipped;
  Real* p;         // [rows][score_stride]: S, then P
  Real* ds;        // [rows][score_stride]: dP, then dS as units along keys: A of dQ
  Unit* p_zipped;  // [rows / 2][score_stride]: A of dV; p itself if kPair is 1
  Unit* ds_zipped;
  SplitLse<Real>* lse;  // [rows]
  Real* delta;

  static int64_t row_stride(int64_t dim) { return round_up(Geo::units(dim), Geo::kLanesReal); }
  static int64_t score_stride(const BwdPlan& plan) { return plan.block_keys + Geo::kLanesReal; }

  static BwdScratch allocate(const FlashFwdParams& params, const BwdPlan& plan,
                             BumpAllocator& allocator) {
    const int64_t rows =
        round_up(plan.tile_positions * (params.num_heads_q / params.num_heads_kv), 2);
    const int64_t dim = params.head_dim;
    const int64_t dim_v = params.head_dim_v;
    BwdScratch scratch{};
    scratch.k_transposed = allocator.take<Unit>(plan.block_keys * Geo::units(dim));
    scratch.v_transposed = allocator.take<Unit>(plan.block_keys * Geo::units(dim_v));
    scratch.k_rowwise =
        allocator.take<Unit>(plan.block_keys / Geo::kPair * round_up(dim, Geo::kPanel));
    scratch.dk = allocator.take<Real>(plan.block_keys * Geo::columns(dim));
    scratch.dv = allocator.take<Real>(plan.block_keys * Geo::columns(dim_v));
    scratch.dk_total = allocator.take<Real>(plan.block_keys * Geo::columns(dim));
    scratch.dv_total = allocator.take<Real>(plan.block_keys * Geo::columns(dim_v));
    scratch.pieces_banked = allocator.take<int64_t>(1);
    scratch.q = allocator.take<Unit>(rows * row_stride(dim));
    scratch.dout = allocator.take<Unit>(rows * row_stride(dim_v));
    scratch.p = allocator.take<Real>(rows * score_stride(plan));
    scratch.ds = allocator.take<Real>(rows * score_stride(plan));
    if constexpr (Arithmetic::kPair == 2) {
      scratch.q_zipped = allocator.take<Unit>(rows / 2 * Geo::columns(dim));
      scratch.dout_zipped = allocator.take<Unit>(rows / 2 * Geo::columns(dim_v));
      scratch.p_zipped = allocator.take<Unit>(rows / 2 * score_stride(plan));
      scratch.ds_zipped = allocator.take<Unit>(rows / 2 * score_stride(plan));
    } else {
      scratch.q_zipped = scratch.q;
      scratch.dout_zipped = scratch.dout;
      scratch.p_zipped = scratch.p;
      scratch.ds_zipped = scratch.ds;
    }
    scratch.lse = allocator.take<SplitLse<Real>>(rows);
    scratch.delta = allocator.take<Real>(rows);
    return scratch;
  }
};

template <class Arithmetic>
BwdPlan plan_bwd(const FlashBwdParams& bwd) {
  using Geo = Geometry<Arithmetic>;
  const FlashFwdParams& params = bwd.fwd;
  const int64_t larger_dim = max_of(params.head_dim, params.head_dim_v);
  BwdPlan plan{};
  plan.tile_positions =
      max_of(1, kTargetBwdRows / max_of(params.num_heads_q / max_of(params.num_heads_kv, 1), 1));
  plan.block_keys = larger_dim <= 64 ? 256 : 128;
  plan.blocks_per_piece = kPieceKeys / plan.block_keys;
  plan.dq_row_bytes =
      Geo::columns(params.head_dim) * static_cast<int64_t>(sizeof(typename Arithmetic::Real));
  BumpAllocator allocator(nullptr);
  BwdScratch<Arithmetic>::allocate(params, plan, allocator);
  plan.scratch_bytes = allocator.used();
  return plan;
}

}  // namespace sink_attention::cpu::SA_ISA
