// Packs rows of q, k, v or dout into operands that a register tile reads front to back.
//
//   layout       shape                                      operand
//   row units    [row][units(dim)]                          A: a row in memory order, as units
//   transposed   [panel of keys][units(dim)][kPanel]        B of S = Q K^T and dP = dO V^T
//   row-wise     [panel of columns][units(keys)][kPanel]    B of O += P V and dQ += dS K
//
// Elements beyond the last key or column of a panel are zero.
#pragma once

#include "attention/paged_kv.h"
#include "cpu/simd/arithmetic.h"
#include "cpu/simd/convert.h"
#include "cpu/simd/transpose.h"

namespace sink_attention::cpu::SA_ISA {

using attention::KeyRows;
using attention::max_of;
using attention::min_of;

using attention::kMaxHeadDim;

// The scale that dequantises a key's row.
SA_INLINE float scale_of_row(const KeyRows& rows, int64_t key) {
  return rows.token_scales == nullptr ? rows.scale : *rows.token_scale(key);
}

// Writes a row as units, padded with zeros to `padded` units.
template <class Arithmetic>
SA_INLINE void pack_row_units(const void* row, DataType dtype, int64_t dim,
                              typename Arithmetic::Real scale, int64_t padded,
                              typename Arithmetic::Unit* destination) {
  if constexpr (Arithmetic::kPair == 1) {
    load_row(row, dtype, dim, scale, destination);
    for (int64_t i = dim; i < padded; ++i) destination[i] = 0;
  } else {
    BFloat16* elements = reinterpret_cast<BFloat16*>(destination);
    memcpy(elements, row, dim * sizeof(BFloat16));
    memset(elements + dim, 0, (2 * padded - dim) * sizeof(BFloat16));
  }
}

// Whether rows of this type are units in memory and whole vectors, so that they need no staging.
template <class Arithmetic>
SA_INLINE bool rows_are_units(DataType dtype, int64_t dim) {
  if (dim % (kLanes<typename Arithmetic::Real> * Arithmetic::kPair) != 0) return false;
  if constexpr (Arithmetic::kPair == 2) return true;
  return dtype ==
         (sizeof(typename Arithmetic::Real) == 4 ? DataType::kFloat32 : DataType::kFloat64);
}

// Prefetches into L2 part `part` of `parts` of the panel of keys at `first`. A key has rows of
// `parts` heads, head_stride elements apart; they are fetched token by token, in the cache's memory
// order.
template <class Arithmetic>
SA_INLINE void prefetch_panel(const KeyRows& rows, int64_t head_stride, int64_t first, int64_t part,
                              int64_t parts) {
  constexpr int64_t kKeys = Geometry<Arithmetic>::kPanel;
  const int64_t head_bytes = head_stride * attention::bytes_of(rows.dtype);
  const int64_t row_bytes = rows.dim * attention::bytes_of(rows.dtype);
  const auto [begin, end] =
      rows.readable.within({first + kKeys * part / parts, first + kKeys * (part + 1) / parts});
  for (int64_t key = begin; key < end; ++key) {
    if (!rows.is_readable(key)) continue;
    const char* row = static_cast<const char*>(rows.row(key));
    for (int64_t head = 0; head < parts; ++head, row += head_bytes) {
      for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
    }
  }
}

// Packs keys [begin, end) as transposed panels.
template <class Arithmetic>
void pack_transposed(const KeyRows& rows, int64_t begin, int64_t end,
                     typename Arithmetic::Unit* destination) {
  using Unit = typename Arithmetic::Unit;
  using Real = typename Arithmetic::Real;
  constexpr int kStep = kLanes<Unit>;
  constexpr int kPanel = Geometry<Arithmetic>::kPanel;
  const int64_t units = Geometry<Arithmetic>::units(rows.dim);
  const int64_t padded_units = round_up(units, kStep);
  const bool direct = rows_are_units<Arithmetic>(rows.dtype, rows.dim);
  alignas(64) Unit staging[kStep * kMaxHeadDim];
  alignas(64) static const Unit zeros[kMaxHeadDim] = {};
  for (int64_t panel = begin; panel < end; panel += kPanel, destination += units * kPanel) {
    for (int half = 0; half < kTileVecs; ++half) {
      const Unit* sources[kStep];
      for (int lane = 0; lane < kStep; ++lane) {
        const int64_t key = panel + half * kStep + lane;
        if (key >= end || !rows.is_readable(key)) {
          sources[lane] = zeros;
        } else if (direct) {
          sources[lane] = static_cast<const Unit*>(rows.row(key));
        } else {
          Unit* staged = staging + lane * padded_units;
          pack_row_units<Arithmetic>(rows.row(key), rows.dtype, rows.dim,
                                     static_cast<Real>(scale_of_row(rows, key)), padded_units,
                                     staged);
          sources[lane] = staged;
        }
      }
      for (int64_t unit = 0; unit < units; unit += kStep) {
        Vec<Unit> square[kStep];
        SA_UNROLL
        for (int lane = 0; lane < kStep; ++lane) square[lane] = load(sources[lane] + unit);
        transpose(square);
        Unit* column = destination + unit * kPanel + half * kStep;
        if (unit + kStep <= units) {
          SA_UNROLL
          for (int i = 0; i < kStep; ++i) store(column + i * kPanel, square[i]);
        } else {
          for (int i = 0; i < units - unit; ++i) store(column + i * kPanel, square[i]);
        }
      }
    }
  }
}

#if defined(__AVX512BF16__)
// Turns pairs along rows into pairs along columns: (even[c], odd[c]) for 32 columns c.
SA_INLINE void zip_unit_vectors(Vec<uint32_t> even, Vec<uint32_t> odd, Vec<uint32_t>& low,
                                Vec<uint32_t>& high) {
  alignas(64) static constexpr uint16_t kLow[] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                  11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low_idx = _mm512_load_si512(kLow);
  const __m512i high_idx = _mm512_add_epi16(low_idx, _mm512_set1_epi16(16));
  low = (Vec<uint32_t>)_mm512_permutex2var_epi16((__m512i)even, low_idx, (__m512i)odd);
  high = (Vec<uint32_t>)_mm512_permutex2var_epi16((__m512i)even, high_idx, (__m512i)odd);
}

// The same for whole rows: destination[c] = (even[c], odd[c]).
SA_INLINE void zip_unit_rows(const uint32_t* even, const uint32_t* odd, int64_t columns,
                             uint32_t* destination) {
  int64_t i = 0;
  for (; i + 32 <= columns; i += 32) {
    Vec<uint32_t> low, high;
    zip_unit_vectors(load(even + i / 2), load(odd + i / 2), low, high);
    store(destination + i, low);
    store(destination + i + 16, high);
  }
  const uint16_t* low = reinterpret_cast<const uint16_t*>(even);
  const uint16_t* high = reinterpret_cast<const uint16_t*>(odd);
  for (; i < columns; ++i) destination[i] = low[i] | uint32_t{high[i]} << 16;
}
#endif

// Packs keys [begin, end) as row-wise panels of columns, which have room for block_rows keys. Keys
// up to the next multiple of kPanel are zero.
template <class Arithmetic>
void pack_rowwise(const KeyRows& rows, int64_t begin, int64_t end, int64_t block_rows,
                  typename Arithmetic::Unit* destination) {
  using Unit = typename Arithmetic::Unit;
  using Real = typename Arithmetic::Real;
  constexpr int kStep = kLanes<Real>;
  constexpr int kPanel = Geometry<Arithmetic>::kPanel;
  constexpr int kPair = Arithmetic::kPair;
  const int64_t columns = Geometry<Arithmetic>::columns(rows.dim);
  const int64_t panel_units = block_rows / kPair * kPanel;
  const int64_t used_rows = round_up(end - begin, kPanel);
  const bool direct = rows_are_units<Arithmetic>(rows.dtype, rows.dim);
  alignas(64) Unit staging[2][kMaxHeadDim];
  alignas(64) static const Unit zeros[kMaxHeadDim] = {};
  for (int64_t i = 0; i < used_rows; i += kPair) {
    const Unit* sources[kPair];
    for (int half = 0; half < kPair; ++half) {
      const int64_t key = begin + i + half;
      if (key >= end || !rows.is_readable(key)) {
        sources[half] = zeros;
      } else if (direct) {
        sources[half] = static_cast<const Unit*>(rows.row(key));
      } else {
        pack_row_units<Arithmetic>(rows.row(key), rows.dtype, rows.dim,
                                   static_cast<Real>(scale_of_row(rows, key)),
                                   divide_up(columns, kPair), staging[half]);
        sources[half] = staging[half];
      }
    }
    Unit* out = destination + i / kPair * kPanel;
    for (int64_t column = 0; column < columns; column += kPanel) {
      Unit* target = out + column / kPanel * panel_units;
      const int64_t count = min_of(kPanel, columns - column);
      if constexpr (kPair == 1) {
        for (int64_t j = 0; j < count; j += kStep) store(target + j, load(sources[0] + column + j));
      } else {
#if defined(__AVX512BF16__)
        zip_unit_rows(sources[0] + column / 2, sources[1] + column / 2, count, target);
#endif
      }
    }
  }
}

}  // namespace sink_attention::cpu::SA_ISA
