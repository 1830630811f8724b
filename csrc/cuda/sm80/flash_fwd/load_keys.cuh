// A block of keys or values into shared memory, from a tensor or through a block table, 16-bit or
// float8.
#pragma once

#include "attention/paged_kv.h"
#include "cuda/tile/copy.cuh"
#include "primitives/convert.h"

namespace sink_attention::cuda::sm80 {

// Eight float8 numbers as Elements, which hold each of them exactly; the scale is applied
// elsewhere.
template <class Element>
SA_DEVICE primitives::Bytes16 widen_chunk(const attention::Float8E4M3* row, int first, int cols) {
  primitives::Bytes16 chunk{};
  SA_UNROLL
  for (int i = 0; i < kChunkElems; i += 2) {
    float pair[2] = {};
    SA_UNROLL
    for (int j = 0; j < 2; ++j) {
      if (first + i + j < cols) {
        pair[j] = attention::to_float(primitives::load_global(row + first + i + j));
      }
    }
    chunk.word[i / 2] = primitives::pack<Element>(pair[0], pair[1]);
  }
  return chunk;
}

// The keys (or values) of one sequence and kv head. Kept small, since it lives in registers as long
// as the kernel runs: strides and sizes are read from the problem, which lies in constant memory,
// anew.
template <bool kValues>
struct KeySource {
  const attention::FlashFwdProblem& problem;
  const char* base;      // of key 0, or of page 0 slot 0 with a block table
  const int32_t* pages;  // the sequence's row of the block table, or null
  int sink_end;          // keys that may be read: [0, sink_end) and [begin, end); the others count
  int begin;             // as zeros
  int end;

  SA_DEVICE int dim() const {
    return static_cast<int>(kValues ? problem.head_dim_v : problem.head_dim);
  }
  SA_DEVICE int64_t row_stride() const {
    return kValues ? problem.v_stride_row : problem.k_stride_row;
  }
  SA_DEVICE int64_t page_stride() const {
    return kValues ? problem.v_stride_batch : problem.k_stride_batch;
  }
  SA_DEVICE bool is_readable(int key) const {
    return key < sink_end || (begin <= key && key < end);
  }

  template <class Stored>
  SA_DEVICE const Stored* origin() const {
    return reinterpret_cast<const Stored*>(base);
  }
  template <class Stored>
  SA_DEVICE const Stored* row_in_page(int key) const {
    const int page_size = static_cast<int>(problem.page_size);
    const int page = key / page_size;
    return origin<Stored>() + primitives::load_global(pages + page) * page_stride() +
           (key - page * page_size) * row_stride();
  }
  template <class Stored>
  SA_DEVICE const Stored* row(int key) const {
    if (!is_readable(key)) return nullptr;
    return pages == nullptr ? origin<Stored>() + key * row_stride() : row_in_page<Stored>(key);
  }
};

// What a kv head's stored numbers are to be multiplied with; 1 but for float8.
SA_DEVICE float cache_scale(const float* scales, const attention::FlashFwdProblem& problem,
                            int kv_head) {
  return scales == nullptr ? 1.0f
                           : primitives::load_global(scales + kv_head * problem.kv_scale_stride);
}

template <bool kValues>
SA_DEVICE KeySource<kValues> key_source(const attention::FlashFwdProblem& problem, int batch_idx,
                                        int kv_head, const attention::SeqlenInfo& info,
                                        attention::KeySet visible) {
  const attention::KeyRows rows =
      kValues ? attention::value_rows(problem, batch_idx, info, kv_head, visible)
              : attention::key_rows(problem, batch_idx, info, kv_head, visible);
  return {problem,
          rows.base,
          rows.pages,
          static_cast<int>(rows.readable.sink_end),
          static_cast<int>(rows.readable.window.begin),
          static_cast<int>(rows.readable.window.end)};
}

// Keys [first_key, first_key + kRows); those that may not be read become zeros. 16-bit rows in
// chunks travel by cp.async, and the caller commits and waits; others are copied at once.
template <int kThreads, class Tile, bool kValues>
SA_DEVICE void load_keys(Tile& tile, const KeySource<kValues>& source, int first_key,
                         bool in_chunks) {
  using Element = typename Tile::Element;
  using attention::Float8E4M3;
  const int cols = source.dim();
  const int thread = primitives::opaque(primitives::thread_idx());
  if (source.problem.kv_dtype == attention::DataType::kFloat8E4M3) {
    store_chunks<kThreads>(
        tile,
        [&](int row, int chunk) {
          const Float8E4M3* numbers = source.template row<Float8E4M3>(first_key + row);
          return numbers == nullptr ? primitives::Bytes16{}
                                    : widen_chunk<Element>(numbers, chunk * kChunkElems, cols);
        },
        thread);
  } else if (!in_chunks) {
    store_chunks<kThreads>(
        tile,
        [&](int row, int chunk) {
          const Element* numbers = source.template row<Element>(first_key + row);
          return numbers == nullptr ? primitives::Bytes16{}
                                    : gather_chunk(numbers, chunk * kChunkElems, cols);
        },
        thread);
  } else if (source.pages == nullptr) {
    for_each_chunk<kThreads, Tile>(
        [&](int row, int chunk) {
          const int key = first_key + row;
          const int col = chunk * kChunkElems;
          const bool valid = source.is_readable(key) && col < cols;
          const Element* numbers = source.template origin<Element>();
          if (valid) numbers += key * source.row_stride() + col;
          primitives::cp_async_16(tile.chunk(row, chunk), numbers, valid);
        },
        thread);
  } else {
    for_each_chunk<kThreads, Tile>(
        [&](int row, int chunk) {
          const int key = first_key + row;
          const int col = chunk * kChunkElems;
          const bool valid = source.is_readable(key) && col < cols;
          const Element* numbers = source.template origin<Element>();
          if (valid) numbers = source.template row_in_page<Element>(key) + col;
          primitives::cp_async_16(tile.chunk(row, chunk), numbers, valid);
        },
        thread);
  }
}

}  // namespace sink_attention::cuda::sm80
