// Decode: at most one strip of rows, against keys and values that are read once.
//
// Packing would cost more than the products. Both products read the cache's rows in place, and
// prefetch the next rows meanwhile (prefetch.h).
//
//   S = Q K^T   Query rows are in vector lanes: the tile computed is S^T. q is transposed once, to
//               [unit][row]. Each key takes one multiply-add with a memory broadcast per unit; K is
//               never shuffled. At the end, kTileRows x kTileRows squares of S^T are transposed.
//               On AVX-512: 16 accumulators of 8 lanes, two multiply-adds a cycle, one load each.
//   O += P V    A row of V is a row of operand B. bfloat16: two rows are zipped by two shuffles.
//
// Every sum has the same terms in the same order as in the packed path, so the two paths give the
// same bits.
#pragma once

#include <algorithm>

#include "cpu/simd/gemm.h"
#include "cpu/simd/pack.h"
#include "cpu/simd/prefetch.h"

namespace sink_attention::cpu::SA_ISA {

constexpr int kMaxScoreKeys = 2 * kTileRows;  // the most keys of one score_keys

// Transposes a strip of q to q_transposed[unit][row]. Rows from `rows` on are zero.
template <class Unit>
SA_INLINE void transpose_strip(const Unit* q, int64_t q_stride, int rows, int64_t units,
                               Unit* q_transposed) {
  for (int64_t unit = 0; unit < units; unit += kTileRows) {
    StripVec<Unit> square[kTileRows] = {};
    for (int row = 0; row < rows; ++row) square[row] = load_strip(q + row * q_stride + unit);
    transpose(square);
    for (int i = 0; i < kTileRows; ++i)
      store_strip(q_transposed + (unit + i) * kTileRows, square[i]);
  }
}

template <class Unit>
SA_INLINE Unit unit_at(const char* row, int64_t idx) {
  Unit unit;  // a bfloat16 row may not be aligned to a pair
  memcpy(&unit, row + idx * static_cast<int64_t>(sizeof(Unit)), sizeof(Unit));
  return unit;
}

// scores[row][0 .. kKeys) of kKeys keys; key i's row is at keys[i] + offset bytes. The loop order
// keeps enough sums in flight to hide the latency of an addition, and reuses each key's address for
// several loads.
template <class Arithmetic, int kKeys>
SA_INLINE void score_keys(const char* const* keys, int64_t offset, int64_t units,
                          const typename Arithmetic::Unit* q_transposed,
                          typename Arithmetic::Real* scores, int64_t score_stride,
                          RowPrefetcher& ahead) {
  using Unit = typename Arithmetic::Unit;
  using Real = typename Arithmetic::Real;
  constexpr int kUnits = 2;
  constexpr int kKeysTogether = 4;
  StripVec<Real> sum[kKeys] = {};
  for (int64_t unit = 0; unit < units; unit += kUnits) {
    ahead.fetch(kKeys * kUnits * static_cast<int64_t>(sizeof(Unit)));
    StripVec<Unit> q[kUnits];
    SA_UNROLL
    for (int i = 0; i < kUnits; ++i) q[i] = load_strip(q_transposed + (unit + i) * kTileRows);
    SA_UNROLL
    for (int first = 0; first < kKeys; first += kKeysTogether) {
      SA_UNROLL
      for (int i = 0; i < kUnits; ++i) {
        SA_UNROLL
        for (int key = first; key < first + kKeysTogether; ++key) {
          const StripVec<Unit> k = broadcast_strip(unit_at<Unit>(keys[key] + offset, unit + i));
          sum[key] = Arithmetic::dot(q[i], k, sum[key]);
        }
      }
    }
  }
  SA_UNROLL
  for (int first = 0; first < kKeys; first += kTileRows) {
    StripVec<Real> square[kTileRows];
    SA_UNROLL
    for (int i = 0; i < kTileRows; ++i) square[i] = sum[first + i];
    transpose(square);
    SA_UNROLL
    for (int row = 0; row < kTileRows; ++row)
      store_strip(scores + row * score_stride + first, square[row]);
  }
}

// Loads kTileVecs vectors of B's next row: a row of V, or two rows zipped.
template <class Arithmetic>
SA_INLINE void load_value_units(const char* const* values, int64_t offset,
                                Vec<typename Arithmetic::Unit> (&units)[kTileVecs]) {
  using Unit = typename Arithmetic::Unit;
  static_assert(kTileVecs == 2);
  const Unit* row = reinterpret_cast<const Unit*>(values[0] + offset);
  if constexpr (Arithmetic::kPair == 1) {
    units[0] = load(row);
    units[1] = load(row + kLanes<Unit>);
  } else {
#if defined(__AVX512BF16__)
    const Unit* next_row = reinterpret_cast<const Unit*>(values[1] + offset);
    zip_unit_vectors(load(row), load(next_row), units[0], units[1]);
#endif
  }
}

// out[row] = out[row] * rescale + P V over `depth` units of keys, for kTileVecs vectors of columns.
// Key i's columns are at values[i] + offset bytes. The first chain ends after rest_of_chain units
// (gemm.h).
template <class Arithmetic, int kRows>
SA_INLINE void accumulate_columns(const char* const* values, int64_t offset, int64_t depth,
                                  int64_t rest_of_chain, const typename Arithmetic::Unit* p,
                                  int64_t p_stride, const typename Arithmetic::Real* rescale,
                                  typename Arithmetic::Real* out, int64_t out_stride,
                                  RowPrefetcher* ahead) {
  using Unit = typename Arithmetic::Unit;
  using Real = typename Arithmetic::Real;
  constexpr int kStep = kLanes<Real>;
  const auto out_at = [&](int row, int n) { return out + row * out_stride + n * kStep; };
  Real factor[kRows];
  SA_UNROLL
  for (int row = 0; row < kRows; ++row) factor[row] = rescale[row];
  int64_t end = rest_of_chain < depth ? rest_of_chain : depth;
  for (int64_t k = 0; k < depth; end = min_of(end + kChainUnits, depth)) {
    Vec<Real> sum[kRows][kTileVecs] = {};
    for (; k < end; ++k) {
      ahead->fetch(kTileVecs * kVectorBytes);
      Vec<Unit> b[kTileVecs];
      load_value_units<Arithmetic>(values + k * Arithmetic::kPair, offset, b);
      SA_UNROLL
      for (int row = 0; row < kRows; ++row) {
        const Vec<Unit> a = broadcast(p[row * p_stride + k]);
        SA_UNROLL
        for (int n = 0; n < kTileVecs; ++n) sum[row][n] = Arithmetic::dot(a, b[n], sum[row][n]);
      }
    }
    SA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      SA_UNROLL
      for (int n = 0; n < kTileVecs; ++n)
        store(out_at(row, n), rescaled<Real>(load(out_at(row, n)), factor[row]) + sum[row][n]);
      factor[row] = 1;
    }
  }
}

// accumulate_columns with the number of rows given at run time.
template <class Arithmetic, int kRows = kTileRows, class... Args>
SA_INLINE void accumulate_columns_rows(int rows, Args... args) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return accumulate_columns_rows<Arithmetic, kRows - 1>(rows, args...);
  }
  accumulate_columns<Arithmetic, kRows>(args...);
}

// Whether a cache can be read in place: a strip fits a vector, rows in memory are units, and
// head_dim_v is whole panels.
template <class Arithmetic>
SA_INLINE bool can_read_in_place(const attention::FlashFwdParams& params) {
  constexpr int kWhole = kTileVecs * kLanes<typename Arithmetic::Real>;
  return kHasStripVec<typename Arithmetic::Real> &&
         rows_are_units<Arithmetic>(params.kv_dtype, params.head_dim) &&
         rows_are_units<Arithmetic>(params.kv_dtype, params.head_dim_v) &&
         params.head_dim_v % kWhole == 0;
}

}  // namespace sink_attention::cpu::SA_ISA
