// Operands and products of the decode consumers for 8-bit caches.
//
// The tensor cores multiply Float16. Every 8-bit element is exact in Float16.
//
// K. ldmatrix of 16-byte vectors gives a lane 4 adjacent elements: columns 4 q to 4 q + 3 of 16,
// with q = lane % 4. Operand B needs columns 2 q, 2 q + 1, 2 q + 8, 2 q + 9 there. Columns are
// summed over, so Q's columns are permuted the same way when Q is loaded:
//
//     column of 16     0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
//     stored at        0  1  8  9  2  3 10 11  4  5 12 13  6  7 14 15
//
// V. A transposing ldmatrix takes two bytes for one element, so a lane gets columns 2 n and 2 n + 1
// of two keys. Even columns make one operand, odd columns another. Of columns 16 j to 16 j + 15,
// accumulator 2 j holds the even ones, accumulator 2 j + 1 the odd ones.
//
// Q is rounded to Float16 too. Before that, each row is multiplied by the power of 2 that brings
// its largest element to 2^15 or more. A bfloat16 element down to 2^-29 of the largest is then
// exact. A smaller one loses at most 2^-40 of the largest.
#pragma once

#include "cuda/device/pack_gqa.cuh"
#include "cuda/sm90/decode/stored_tile.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/gemm_operands.cuh"
#include "primitives/upcast.h"
#include "primitives/warp.h"

namespace sink_attention::cuda::sm90 {

// Loads PackGQA rows [0, QTile::kRows) of Q, with permuted columns and scaled rows. descales[row]
// undoes the scaling. num_warps warps share the rows.
template <class QTile>
SA_DEVICE void load_permuted_queries(QTile& tile, float* descales,
                                     const attention::FlashFwdParams& params, const PackGqa& rows,
                                     bool is_vectorised, int warp, int num_warps) {
  using attention::Float16;
  constexpr int kSteps = QTile::kCols / 16;
  constexpr int kLanes = kSteps <= 2 ? 2 : kSteps <= 4 ? 4 : kSteps <= 8 ? 8 : 16;  // of a row
  constexpr int kRows = primitives::kWarpSize / kLanes;  // of a warp at a time
  static_assert(QTile::kRows % kRows == 0);
  const int lane = primitives::lane_idx();
  const int step_idx = lane % kLanes;
  const int cols = static_cast<int>(params.head_dim);
  const bool is_bfloat16 = params.dtype == attention::DataType::kBFloat16;
  for (int first = warp * kRows; first < QTile::kRows; first += num_warps * kRows) {
    const int row = first + lane / kLanes;
    float elements[16];
    float largest = 0.0f;
    SA_UNROLL
    for (int half = 0; half < 2; ++half) {
      primitives::Bytes16 chunk{};
      const int col = step_idx * 16 + half * kChunkElems;
      if (row < rows.num_rows && col < cols) {
        const Float16* source =
            static_cast<const Float16*>(params.q) +
            rows.offset(row, params.q_stride_batch, params.q_stride_row, params.q_stride_head);
        chunk = is_vectorised ? primitives::load_global(
                                    reinterpret_cast<const primitives::Bytes16*>(source + col))
                              : gather_chunk(source, col, cols);
      }
      SA_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& low = elements[8 * half + 2 * i];
        float& high = elements[8 * half + 2 * i + 1];
        if (is_bfloat16) {
          primitives::unpack<attention::BFloat16>(chunk.word[i], low, high);
        } else {
          primitives::unpack<Float16>(chunk.word[i], low, high);
        }
        const float low_size = low < 0 ? -low : low;
        const float high_size = high < 0 ? -high : high;
        largest = low_size > largest ? low_size : largest;
        largest = high_size > largest ? high_size : largest;
      }
    }
    SA_UNROLL
    for (int mask = 1; mask < kLanes; mask *= 2) {
      const float other = primitives::shfl_xor(largest, mask);
      largest = other > largest ? other : largest;
    }
    int shift = 15 + 127 - static_cast<int>(attention::bits_of(largest) >> 23);
    shift = shift < -112 ? -112 : shift > 100 ? 100 : shift;  // both powers of 2 are normal floats
    const float factor = attention::float_of(static_cast<uint32_t>(127 + shift) << 23);
    if (step_idx >= kSteps) continue;
    primitives::Bytes16 permuted[2];
    SA_UNROLL
    for (int i = 0; i < 8; ++i) {
      permuted[i % 2].word[i / 2] =
          primitives::pack<Float16>(elements[2 * i] * factor, elements[2 * i + 1] * factor);
    }
    SA_UNROLL
    for (int half = 0; half < 2; ++half) {
      primitives::store_shared(
          reinterpret_cast<primitives::Bytes16*>(tile.chunk(row, 2 * step_idx + half)),
          permuted[half]);
    }
    if (step_idx == 0) {
      primitives::store_shared(descales + row,
                               attention::float_of(static_cast<uint32_t>(127 - shift) << 23));
    }
  }
}

// Operand A of 16-deep step k: out of registers, or out of a tile.
template <int kTilesK>
SA_DEVICE void get_operand_a(const OperandsA<1, kTilesK>& q, int, int k, uint32_t (&a)[4], int) {
  SA_UNROLL
  for (int i = 0; i < 4; ++i) a[i] = q.a[0][k][i];
}
template <class Element, int kRows, int kCols>
SA_DEVICE void get_operand_a(const SmemTile<Element, kRows, kCols>& q, int row, int k,
                             uint32_t (&a)[4], int lane) {
  load_operand_a(q, row, k, a, lane);
}

// acc += Q K^T, for the tile's keys [first_key, first_key + 8 kTilesN).
template <class Stored, int kTilesN, class Queries, class Tile>
SA_DEVICE void gemm_qk_upcast(Accumulators<1, kTilesN>& acc, const Queries& q, int q_row,
                              const Tile& tile, int first_key, int lane) {
  static_assert(kTilesN % 2 == 0 && Tile::kChunks % 2 == 0, "operands come in pairs");
  SA_UNROLL
  for (int k = 0; k < Tile::kChunks; k += 2) {
    uint32_t a[2][4];
    SA_UNROLL
    for (int step = 0; step < 2; ++step) get_operand_a(q, q_row, k + step, a[step], lane);
    SA_UNROLL
    for (int n = 0; n < kTilesN; n += 2) {
      uint32_t r[4];  // (keys of n, step 0), (n, 1), (n + 1, 0), (n + 1, 1)
      primitives::ldmatrix_x4(
          r, tile.chunk(first_key + 8 * n + lane % 8 + lane / 16 * 8, k + lane / 8 % 2));
      SA_UNROLL
      for (int i = 0; i < 4; ++i) {
        uint32_t b[2];
        primitives::upcast<Stored>(r[i], b[0], b[1]);
        primitives::mma_m16n8k16<attention::Float16>(acc.c[0][n + i / 2], a[i % 2], b);
      }
    }
  }
}

// acc += P V, for the tile's keys [first_key, first_key + 8 kTilesK) and all columns. Accumulators
// hold even and odd columns as described above.
template <class Stored, int kTilesK, int kTilesN, class Tile>
SA_DEVICE void gemm_pv_upcast(Accumulators<1, kTilesN>& acc, const Accumulators<1, kTilesK>& p,
                              const Tile& tile, int first_key, int lane) {
  static_assert(Tile::kChunks * 2 == kTilesN && kTilesK % 2 == 0, "all columns");
  SA_UNROLL
  for (int k = 0; k < kTilesK / 2; ++k) {
    uint32_t a[4];
    to_operand_a<attention::Float16>(p, 0, k, a);
    SA_UNROLL
    for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
      uint32_t r[4];  // (keys 0 - 7, chunk), (8 - 15, chunk), (0 - 7, chunk + 1), (8 - 15, ...)
      primitives::ldmatrix_x4_trans(r,
                                    tile.chunk(first_key + 16 * k + lane % 16, chunk + lane / 16));
      SA_UNROLL
      for (int i = 0; i < 2; ++i) {
        uint32_t even[2];
        uint32_t odd[2];
        SA_UNROLL
        for (int half = 0; half < 2; ++half) {
          primitives::upcast<Stored>(primitives::swap_middle_bytes(r[2 * i + half]), even[half],
                                     odd[half]);
        }
        primitives::mma_m16n8k16<attention::Float16>(acc.c[0][2 * (chunk + i)], a, even);
        primitives::mma_m16n8k16<attention::Float16>(acc.c[0][2 * (chunk + i) + 1], a, odd);
      }
    }
  }
}

}  // namespace sink_attention::cuda::sm90
