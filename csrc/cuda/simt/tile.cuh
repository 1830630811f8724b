// Tiles of float or double in shared memory, and products of them by plain multiplications.
//
// A block has 128 threads, 8 x 16: thread t is at (y, x) = (t / 16, t % 16). Of a matrix of rows
// and columns it owns the rows y + 8 i, and, where columns are keys (or, in the backward, queries),
//
//     the columns x + 16 j                        of a matrix of scores,
//     kVector neighbours from kVector * x on      of each chunk of columns of an output.
//
// Everything that a row's owners share is shared by the 16 lanes of one half of a warp.
//
// All loads from shared memory are of 16 bytes: kVector numbers. The rows of a tile lie 16 bytes
// further apart than they are long, a multiple of 128 bytes, so that eight of them read at the same
// column fall into different banks.
#pragma once

#include "primitives/memory.h"
#include "primitives/warp.h"

namespace sink_attention::cuda::simt {

constexpr int kThreads = 128;
constexpr int kThreadRows = 8;
constexpr int kThreadCols = 16;

SA_DEVICE int thread_y() { return primitives::thread_idx() / kThreadCols; }
SA_DEVICE int thread_x() { return primitives::thread_idx() % kThreadCols; }

template <class Real>
constexpr int kVector = 16 / static_cast<int>(sizeof(Real));

// Columns of an output that the threads of a row cover together: 64 of float, 32 of double.
template <class Real>
constexpr int kChunkCols = kThreadCols * kVector<Real>;

template <class Real>
struct alignas(16) Vector {
  Real number[kVector<Real>];
};

template <class Real_, int kRows_, int kCols_>
struct Tile {
  using Real = Real_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kStride = kCols + kVector<Real>;
  static_assert(kCols * sizeof(Real) % 128 == 0, "rows then start in banks 16 bytes apart");

  alignas(16) Real data[kRows * kStride];

  SA_DEVICE Real* at(int row, int col) { return data + row * kStride + col; }
  // The kVector numbers from column col on, a multiple of kVector.
  SA_DEVICE Vector<Real> load(int row, int col) const {
    return primitives::load_shared(
        reinterpret_cast<const Vector<Real>*>(data + row * kStride + col));
  }
};

// s[i][j] += sum over columns c < depth of  a(y + 8 i, a_col + c) * b(x + 16 j, c).
template <class Real, int kRows, int kCols, class TileA, class TileB>
SA_DEVICE void add_dots(Real (&s)[kRows][kCols], const TileA& a_tile, int a_col,
                        const TileB& b_tile, int depth) {
  static_assert(TileA::kRows == kRows * kThreadRows && TileB::kRows == kCols * kThreadCols,
                "the threads cover all scores");
  for (int c = 0; c < depth; c += kVector<Real>) {
    Vector<Real> a[kRows];
    Vector<Real> b[kCols];
    SA_UNROLL
    for (int i = 0; i < kRows; ++i) a[i] = a_tile.load(thread_y() + kThreadRows * i, a_col + c);
    SA_UNROLL
    for (int j = 0; j < kCols; ++j) b[j] = b_tile.load(thread_x() + kThreadCols * j, c);
    SA_UNROLL
    for (int e = 0; e < kVector<Real>; ++e) {
      SA_UNROLL
      for (int i = 0; i < kRows; ++i) {
        SA_UNROLL
        for (int j = 0; j < kCols; ++j) s[i][j] += a[i].number[e] * b[j].number[e];
      }
    }
  }
}

// acc[i][e] += sum over rows k < depth of  w(y + 8 i, k) * b(k, kVector * x + e).
//
// In float32 the sum starts from zero and is added once. Were it added number by number, the sums
// over n blocks would be chains of n times as many additions, each of which rounds a number as
// large as the result. Float64 has digits to spare, and needs the registers.
template <class Real, int kRows, class TileW, class TileB>
SA_DEVICE void add_products(Real (&acc)[kRows][kVector<Real>], const TileW& w_tile,
                            const TileB& b_tile, int depth) {
  static_assert(TileW::kRows == kRows * kThreadRows && TileW::kCols == TileB::kRows,
                "summed over all rows of b");
  constexpr bool kStartsFromZero = sizeof(Real) == 4;
  Real part[kRows][kVector<Real>] = {};
  auto& sum = kStartsFromZero ? part : acc;
  for (int k = 0; k < depth; k += kVector<Real>) {
    Vector<Real> w[kRows];
    SA_UNROLL
    for (int i = 0; i < kRows; ++i) w[i] = w_tile.load(thread_y() + kThreadRows * i, k);
    SA_UNROLL
    for (int e = 0; e < kVector<Real>; ++e) {
      const Vector<Real> b = b_tile.load(k + e, kVector<Real> * thread_x());
      SA_UNROLL
      for (int i = 0; i < kRows; ++i) {
        SA_UNROLL
        for (int n = 0; n < kVector<Real>; ++n) sum[i][n] += w[i].number[e] * b.number[n];
      }
    }
  }
  if constexpr (kStartsFromZero) {
    SA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      SA_UNROLL
      for (int n = 0; n < kVector<Real>; ++n) acc[i][n] += part[i][n];
    }
  }
}

template <class Real, int kChunks, int kRows>
SA_DEVICE void clear(Real (&acc)[kChunks][kRows][kVector<Real>]) {
  SA_UNROLL
  for (int c = 0; c < kChunks; ++c) {
    SA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      SA_UNROLL
      for (int n = 0; n < kVector<Real>; ++n) acc[c][i][n] = Real(0);
    }
  }
}

// Puts a matrix of scores, or of what became of them, where add_products can read it.
template <class Real, int kRows, int kCols, class TileW>
SA_DEVICE void store_scores(const Real (&s)[kRows][kCols], TileW& tile) {
  SA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    SA_UNROLL
    for (int j = 0; j < kCols; ++j) {
      primitives::store_shared(tile.at(thread_y() + kThreadRows * i, thread_x() + kThreadCols * j),
                               s[i][j]);
    }
  }
}

template <class Real>
SA_DEVICE Real max_over_row(Real value) {
  SA_UNROLL
  for (int mask = 1; mask < kThreadCols; mask *= 2) {
    const Real other = primitives::shfl_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

template <class Real>
SA_DEVICE Real sum_over_row(Real value) {
  SA_UNROLL
  for (int mask = 1; mask < kThreadCols; mask *= 2) value += primitives::shfl_xor(value, mask);
  return value;
}

// After as many blocks sums in float32 go from registers to the result's own memory, and start from
// zero again, so that of 131072 numbers no chain of additions is longer than 128. Blocks are
// counted from the first key (or row): which numbers are summed first does not depend on a walk's
// begin.
constexpr int kBlocksOfSum = 16;

// Which of the sums a block belongs to.
template <class Real>
SA_DEVICE int sum_of_block(int block) {
  return sizeof(Real) == 4 ? block / kBlocksOfSum : 0;
}

// Writes a thread's numbers of one row and chunk: those from column col on that are below dim. With
// `adds` to what it has written there before, times `kept`.
template <class Real>
SA_DEVICE void store_numbers(Real* row, int col, int dim, bool in_vectors,
                             const Real (&numbers)[kVector<Real>], Real factor, bool adds,
                             Real kept) {
  if (in_vectors && col + kVector<Real> <= dim) {
    auto* place = reinterpret_cast<Vector<Real>*>(row + col);
    Vector<Real> vector{};
    if (adds) vector = primitives::load_global(place);
    SA_UNROLL
    for (int e = 0; e < kVector<Real>; ++e) {
      vector.number[e] = (adds ? vector.number[e] * kept : Real(0)) + numbers[e] * factor;
    }
    primitives::store_global(place, vector);
    return;
  }
  SA_UNROLL
  for (int e = 0; e < kVector<Real>; ++e) {
    if (col + e >= dim) continue;
    const Real before = adds ? primitives::load_global(row + col + e) * kept : Real(0);
    primitives::store_global(row + col + e, before + numbers[e] * factor);
  }
}

}  // namespace sink_attention::cuda::simt
