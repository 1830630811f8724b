// Rows from global memory into tiles: of q, out and their gradients, or of keys and values.
//
// A matrix of more columns than a tile has comes chunk by chunk, through two buffers in turns:
//
//     chunk c used from buffer c % 2     |  wait c | barrier | use c     | wait c + 1 | barrier |
//     ... chunk c + 1 copied into the other  |                   | copies ...             |
//
// The barrier does two things: chunk c, of which each thread has copied a part, becomes all
// threads' to read; and the other buffer, which some thread may have read until then (chunk c - 1),
// is free for chunk c + 1.
#pragma once

#include "attention/block_list.h"
#include "attention/paged_kv.h"
#include "cuda/device/element.cuh"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/simt/tile.cuh"
#include "primitives/cp_async.h"
#include "primitives/cta.h"

namespace sink_attention::cuda::simt {

// Whether all rows that start at multiples of the strides are aligned to 16 bytes.
SA_HOST_DEVICE bool is_aligned(const void* base, int64_t element_bytes, int64_t stride_a,
                               int64_t stride_b, int64_t stride_c) {
  return (static_cast<int64_t>(reinterpret_cast<intptr_t>(base)) |
          (stride_a | stride_b | stride_c) * element_bytes) %
             16 ==
         0;
}

// What the loads below take their rows from:
//   const void* row(int64_t idx)         where a row lies, or null: it counts as zeros
//   Real number(const void* row, int i)  one of its dim numbers as stored
//   Real scale(int64_t idx)              the factor of the numbers of a row that is there
//   in_vectors                           whether it may be copied 16 bytes at a time
template <class Real>
struct KeySource {
  attention::KeyRows rows;
  int dim;
  bool in_vectors;

  SA_DEVICE const void* row(int64_t key) const {
    return rows.is_readable(key) && rows.is_in_cache(key) ? rows.row(key) : nullptr;
  }
  SA_DEVICE Real number(const void* row, int i) const {
    if (rows.dtype == attention::DataType::kFloat8E4M3) {
      return load_as<Real, attention::Float8E4M3>(row, i);
    }
    if (rows.dtype == attention::DataType::kInt8) return load_as<Real, attention::Int8>(row, i);
    return load_as<Real, Real>(row, i);
  }
  SA_DEVICE Real scale(int64_t key) const {
    return static_cast<Real>(
        rows.token_scales == nullptr ? rows.scale : primitives::load_global(rows.token_scale(key)));
  }
};

template <class Real>
SA_DEVICE KeySource<Real> key_source(const attention::KeyRows& rows, const void* tensor,
                                     int64_t stride_batch, int64_t stride_row,
                                     int64_t stride_head) {
  const bool aligned = is_aligned(tensor, sizeof(Real), stride_batch, stride_row, stride_head);
  return {rows, static_cast<int>(rows.dim), aligned && !attention::is_8_bit(rows.dtype)};
}

// K and V of one kv head; keys outside `readable` count as zeros.
template <class Real>
SA_DEVICE KeySource<Real> k_source(const attention::FlashFwdParams& params, int batch_idx,
                                   const attention::SeqlenInfo& info, int kv_head,
                                   attention::KeySet readable) {
  return key_source<Real>(attention::key_rows(params, batch_idx, info, kv_head, readable), params.k,
                          params.k_stride_batch, params.k_stride_row, params.k_stride_head);
}
template <class Real>
SA_DEVICE KeySource<Real> v_source(const attention::FlashFwdParams& params, int batch_idx,
                                   const attention::SeqlenInfo& info, int kv_head,
                                   attention::KeySet readable) {
  return key_source<Real>(attention::value_rows(params, batch_idx, info, kv_head, readable),
                          params.v, params.v_stride_batch, params.v_stride_row,
                          params.v_stride_head);
}

// The packed rows of one kv head in a tensor like q or out.
template <class Real>
struct QuerySource {
  const Real* base;
  int64_t stride_batch, stride_row, stride_head;
  PackGqa rows;
  int dim;
  bool in_vectors;

  SA_DEVICE const void* row(int64_t idx) const {
    if (idx >= rows.num_rows) return nullptr;
    return base + rows.offset(static_cast<int>(idx), stride_batch, stride_row, stride_head);
  }
  SA_DEVICE Real number(const void* row, int i) const { return load_as<Real, Real>(row, i); }
  SA_DEVICE Real scale(int64_t) const { return Real(1); }
};

template <class Real>
SA_DEVICE QuerySource<Real> query_source(const PackGqa& rows, const void* tensor,
                                         int64_t stride_batch, int64_t stride_row,
                                         int64_t stride_head, int64_t dim) {
  return {static_cast<const Real*>(tensor),
          stride_batch,
          stride_row,
          stride_head,
          rows,
          static_cast<int>(dim),
          is_aligned(tensor, sizeof(Real), stride_batch, stride_row, stride_head)};
}

// Starts to load rows first_row ... and columns first_col ... into all of a tile, zeros where there
// are none. Thread t takes the vectors t, t + 128, ... in row-major order. The caller commits and
// waits.
template <class TileT, class Source>
SA_DEVICE void load_tile(TileT& tile, const Source& source, int64_t first_row, int first_col) {
  using Real = typename TileT::Real;
  constexpr int kRowVectors = TileT::kCols / kVector<Real>;
  for (int i = primitives::thread_idx(); i < TileT::kRows * kRowVectors; i += kThreads) {
    const int row = i / kRowVectors;
    const int tile_col = i % kRowVectors * kVector<Real>;
    const int col = first_col + tile_col;
    const void* numbers = source.row(first_row + row);
    Real* target = tile.at(row, tile_col);
    if (source.in_vectors && numbers != nullptr && col + kVector<Real> <= source.dim) {
      primitives::cp_async_16(target, static_cast<const Real*>(numbers) + col, true);
      continue;
    }
    Vector<Real> vector{};
    if (numbers != nullptr) {
      const Real scale = source.scale(first_row + row);
      SA_UNROLL
      for (int e = 0; e < kVector<Real>; ++e) {
        if (col + e < source.dim) vector.number[e] = source.number(numbers, col + e) * scale;
      }
    }
    primitives::store_shared(reinterpret_cast<Vector<Real>*>(target), vector);
  }
}

// A walk over blocks of kRows rows of two matrices, in each block first over all chunks of columns
// of the first, then of the second and, with three passes, of the first once more.
template <class Real, int kRows, int kPasses, class Source>
class ChunkStream {
 public:
  using Chunk = Tile<Real, kRows, kChunkCols<Real>>;
  struct Buffers {
    Chunk chunk[2];
  };

  SA_DEVICE ChunkStream(Buffers& buffers, const Source& first, const Source& second)
      : buffers_(buffers), first_(first), second_(second) {}

  SA_DEVICE static int num_chunks(const Source& source) {
    return (source.dim + kChunkCols<Real> - 1) / kChunkCols<Real>;
  }

  // Starts to load the first chunk. What the caller has begun to copy before is waited for with it.
  SA_DEVICE void start(const attention::BlockList<int>& blocks) {
    blocks_ = blocks;
    idx_ = 0;
    pass_ = chunk_ = parity_ = 0;
    load_next();
  }

  // The next chunk, ready to be read until the call after; all threads call.
  SA_DEVICE const Chunk& next() {
    const Chunk& ready = buffers_.chunk[parity_ ^ 1];
    primitives::cp_async_wait<0>();
    primitives::sync_threads();  // `ready` is there; nobody reads the other buffer any more
    load_next();
    return ready;
  }

 private:
  SA_DEVICE void load_next() {
    if (idx_ < blocks_.count()) {
      Chunk& chunk = buffers_.chunk[parity_];
      const int64_t row = int64_t{blocks_.block(idx_)} * kRows;
      const int col = chunk_ * kChunkCols<Real>;
      const bool is_first = pass_ != 1;
      if (is_first) {
        load_tile(chunk, first_, row, col);
      } else {
        load_tile(chunk, second_, row, col);
      }
      if (++chunk_ == num_chunks(is_first ? first_ : second_)) {
        chunk_ = 0;
        if (++pass_ == kPasses) {
          pass_ = 0;
          ++idx_;
        }
      }
    }
    parity_ ^= 1;
    primitives::cp_async_commit();
  }

  Buffers& buffers_;
  const Source& first_;
  const Source& second_;
  attention::BlockList<int> blocks_{};
  int idx_ = 0;
  int pass_ = 0;
  int chunk_ = 0;
  int parity_ = 0;  // the buffer that the next load fills
};

// Columns of chunk c that exist, in whole vectors.
template <class Real>
SA_DEVICE int chunk_depth(int dim, int chunk) {
  const int rest = dim - chunk * kChunkCols<Real>;
  return rest < kChunkCols<Real> ? rest : kChunkCols<Real>;
}

}  // namespace sink_attention::cuda::simt
