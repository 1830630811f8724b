// Loads rows from global memory into tiles: of q, out and their gradients, or of keys and values.
//
// A matrix wider than a tile is loaded in column chunks, double-buffered. Chunk c uses buffer
// c % 2:
//
//     use        wait c | barrier | use c ............. | wait c + 1 | barrier | use c + 1 ...
//     copies                      | copy c + 1 ......................          | copy c + 2 ...
//
// The barrier does two things. It makes chunk c, of which each thread has copied a part, visible to
// all threads. And all threads have read chunk c - 1, so that chunk c + 1 may overwrite its buffer.
#pragma once

#include "attention/block_list.h"
#include "attention/paged_kv.h"
#include "cuda/device/element.cuh"
#include "cuda/device/pack_gqa.cuh"
#include "cuda/simt/tile.cuh"
#include "primitives/cp_async.h"
#include "primitives/cta.h"

namespace sink_attention::cuda::simt {

// Whether base and strides are multiples of 16 bytes, and so every row's address.
SA_HOST_DEVICE bool is_aligned(const void* base, int64_t element_bytes, int64_t stride_a,
                               int64_t stride_b, int64_t stride_c) {
  return (static_cast<int64_t>(reinterpret_cast<intptr_t>(base)) |
          (stride_a | stride_b | stride_c) * element_bytes) %
             16 ==
         0;
}

// A row source, which the loads below read, has:
//   const void* row(int64_t idx)          address of a row, or null: it counts as zeros
//   Real element(const void* row, int i)  element i of a row as stored, i < dim
//   Real scale(int64_t idx)               factor of the elements of a row that is not null
//   is_vectorised                         whether rows may be copied in 16-byte vectors
template <class Real>
struct KvRowSource {
  attention::KeyRows rows;
  int dim;
  bool is_vectorised;

  SA_DEVICE const void* row(int64_t key) const {
    return rows.is_readable(key) && rows.is_in_cache(key) ? rows.row(key) : nullptr;
  }
  SA_DEVICE Real element(const void* row, int i) const {
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
SA_DEVICE KvRowSource<Real> kv_row_source(const attention::KeyRows& rows, const void* tensor,
                                          int64_t stride_batch, int64_t stride_row,
                                          int64_t stride_head) {
  const bool aligned = is_aligned(tensor, sizeof(Real), stride_batch, stride_row, stride_head);
  return {rows, static_cast<int>(rows.dim), aligned && !attention::is_8_bit(rows.dtype)};
}

// K or V of one kv head. Keys outside `readable` count as zeros.
template <class Real>
SA_DEVICE KvRowSource<Real> k_source(const attention::FlashFwdParams& params, int batch_idx,
                                     const attention::SeqlenInfo& info, int kv_head,
                                     attention::KeySet readable) {
  return kv_row_source<Real>(attention::key_rows(params, batch_idx, info, kv_head, readable),
                             params.k, params.k_stride_batch, params.k_stride_row,
                             params.k_stride_head);
}
template <class Real>
SA_DEVICE KvRowSource<Real> v_source(const attention::FlashFwdParams& params, int batch_idx,
                                     const attention::SeqlenInfo& info, int kv_head,
                                     attention::KeySet readable) {
  return kv_row_source<Real>(attention::value_rows(params, batch_idx, info, kv_head, readable),
                             params.v, params.v_stride_batch, params.v_stride_row,
                             params.v_stride_head);
}

// The PackGQA rows of one kv head in a tensor like q or out.
template <class Real>
struct QueryRowSource {
  const Real* base;
  int64_t stride_batch, stride_row, stride_head;
  PackGqa rows;
  int dim;
  bool is_vectorised;

  SA_DEVICE const void* row(int64_t idx) const {
    if (idx >= rows.num_rows) return nullptr;
    return base + rows.offset(static_cast<int>(idx), stride_batch, stride_row, stride_head);
  }
  SA_DEVICE Real element(const void* row, int i) const { return load_as<Real, Real>(row, i); }
  SA_DEVICE Real scale(int64_t) const { return Real(1); }
};

template <class Real>
SA_DEVICE QueryRowSource<Real> query_row_source(const PackGqa& rows, const void* tensor,
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

// Starts to load a whole tile from row first_row and column first_col on, with zeros outside of the
// matrix. Thread t takes 16-byte vectors t, t + 128, ... in row-major order. The caller commits and
// waits.
template <class TileT, class Source>
SA_DEVICE void load_rows(TileT& tile, const Source& source, int64_t first_row, int first_col) {
  using Real = typename TileT::Real;
  constexpr int kRowVectors = TileT::kCols / kVector<Real>;
  for (int i = primitives::thread_idx(); i < TileT::kRows * kRowVectors; i += kThreads) {
    const int row = i / kRowVectors;
    const int tile_col = i % kRowVectors * kVector<Real>;
    const int col = first_col + tile_col;
    const void* source_row = source.row(first_row + row);
    Real* target = tile.at(row, tile_col);
    if (source.is_vectorised && source_row != nullptr && col + kVector<Real> <= source.dim) {
      primitives::cp_async_16(target, static_cast<const Real*>(source_row) + col, true);
      continue;
    }
    Vector<Real> vector{};
    if (source_row != nullptr) {
      const Real scale = source.scale(first_row + row);
      SA_UNROLL
      for (int e = 0; e < kVector<Real>; ++e) {
        if (col + e < source.dim) vector.element[e] = source.element(source_row, col + e) * scale;
      }
    }
    primitives::store_shared(reinterpret_cast<Vector<Real>*>(target), vector);
  }
}

// Streams blocks of kRows rows of two matrices, chunk by chunk. For each block the passes are: all
// column chunks of the first matrix, then of the second, and with kPasses = 3 of the first again.
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

  // Starts to load the first chunk. Earlier cp.async copies of the caller are in the same group.
  SA_DEVICE void start(const attention::BlockList<int>& blocks) {
    blocks_ = blocks;
    idx_ = 0;
    pass_ = chunk_ = parity_ = 0;
    load_next();
  }

  // Returns the next chunk, valid until the next call. All threads call: it has a barrier.
  SA_DEVICE const Chunk& next() {
    const Chunk& ready = buffers_.chunk[parity_ ^ 1];
    primitives::cp_async_wait<0>();
    primitives::sync_threads();  // `ready` has arrived; all threads have read the other buffer
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
        load_rows(chunk, first_, row, col);
      } else {
        load_rows(chunk, second_, row, col);
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
  int parity_ = 0;  // buffer of the next load
};

// Number of columns of a chunk that exist.
template <class Real>
SA_DEVICE int chunk_depth(int dim, int chunk) {
  const int rest = dim - chunk * kChunkCols<Real>;
  return rest < kChunkCols<Real> ? rest : kChunkCols<Real>;
}

}  // namespace sink_attention::cuda::simt
