// Tiles of float or double in shared memory, and their products by FMAs.
//
// A CTA has 128 threads, 8 x 16: thread t is at (y, x) = (t / 16, t % 16). It owns rows y + 8 i of
// a matrix, and these columns:
//
//     scores    x + 16 j
//     output    [kVector * x, kVector * x + kVector)  of each column chunk
//
// The 16 lanes of a half warp share a row.
//
// Loads from shared memory are 16-byte vectors of kVector elements. Rows are a multiple of 128
// bytes long and padded by 16 bytes, so that 8 rows read at the same column are in different banks.
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

// Columns of a chunk, one vector per thread of a row: 64 of float, 32 of double.
template <class Real>
constexpr int kChunkCols = kThreadCols * kVector<Real>;

template <class Real>
struct alignas(16) Vector {
  Real element[kVector<Real>];
};

template <class Real_, int kRows_, int kCols_>
struct Tile {
  using Real = Real_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kStride = kCols + kVector<Real>;
  static_assert(kCols * sizeof(Real) % 128 == 0,
                "padded rows then start 16 bytes apart in the banks");

  alignas(16) Real data[kRows * kStride];

  SA_DEVICE Real* at(int row, int col) { return data + row * kStride + col; }
  // Elements [col, col + kVector) of a row. col is a multiple of kVector.
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
        for (int j = 0; j < kCols; ++j) s[i][j] += a[i].element[e] * b[j].element[e];
      }
    }
  }
}

// acc[i][e] += sum over rows k < depth of  w(y + 8 i, k) * b(k, kVector * x + e).
//
// In float32 the block's sum starts from zero and is added to acc once. Adding each product to acc
// would round at the magnitude of the result every time, and over n blocks n times as often.
// Float64 has precision to spare, and needs the registers.
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
        for (int n = 0; n < kVector<Real>; ++n) sum[i][n] += w[i].element[e] * b.element[n];
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

// Stores a matrix of scores, P or dS in shared memory, for add_products.
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

// After every 16 blocks float32 sums are added to the result in global memory, and start from zero
// again. So no chain of additions is longer than 128 for 131072 elements. Blocks are counted from
// key (or row) 0, so the grouping does not depend on where the key-block range begins.
constexpr int kBlocksOfSum = 16;

// Index of the sum that a block belongs to.
template <class Real>
SA_DEVICE int sum_of_block(int block) {
  return sizeof(Real) == 4 ? block / kBlocksOfSum : 0;
}

// Writes values * factor of one row and chunk to columns [col, col + kVector) below dim. If `adds`,
// adds them to kept * the elements that are there.
template <class Real>
SA_DEVICE void store_vector(Real* row, int col, int dim, bool is_vectorised,
                            const Real (&values)[kVector<Real>], Real factor, bool adds,
                            Real kept) {
  if (is_vectorised && col + kVector<Real> <= dim) {
    auto* target = reinterpret_cast<Vector<Real>*>(row + col);
    Vector<Real> vector{};
    if (adds) vector = primitives::load_global(target);
    SA_UNROLL
    for (int e = 0; e < kVector<Real>; ++e) {
      vector.element[e] = (adds ? vector.element[e] * kept : Real(0)) + values[e] * factor;
    }
    primitives::store_global(target, vector);
    return;
  }
  SA_UNROLL
  for (int e = 0; e < kVector<Real>; ++e) {
    if (col + e >= dim) continue;
    const Real before = adds ? primitives::load_global(row + col + e) * kept : Real(0);
    primitives::store_global(row + col + e, before + values[e] * factor);
  }
}

}  // namespace sink_attention::cuda::simt
