// Rows of packed tensors that attention leaves alone: those in no sequence, beyond the greatest
// length that the call names, or beyond the keys that count.
//
// Only these are written: a launch that finds none reads cu_seqlens and ends.
#pragma once

#include "attention/mask.h"
#include "attention/online_softmax.h"
#include "attention/seqlen_info.h"
#include "primitives/cta.h"
#include "primitives/memory.h"
#include "primitives/simt.h"

namespace sink_attention::cuda {

constexpr int kRowThreads = 128;
constexpr int kMaxRowsPerBlock = 32;

// Sequences that follow each other in rows of a tensor.
struct PackedSequences {
  const int32_t* cu_seqlens;  // [batch + 1]
  const int32_t* seqused;     // [batch]: rows that count, the first ones; may be null
  int batch;
  int num_rows;        // of the tensor
  int64_t max_seqlen;  // rows of a sequence beyond it count as unused
};

// The sequence b with cu_seqlens[b] <= row < cu_seqlens[b + 1]; -1: none. The bounds of the search
// hold these inequalities throughout, so that its answer is right whatever cu_seqlens holds.
SA_DEVICE int sequence_of(const PackedSequences& sequences, int row) {
  const int32_t* cu_seqlens = sequences.cu_seqlens;
  int low = 0;
  int high = sequences.batch;
  if (high == 0 || row < primitives::load_global(cu_seqlens) ||
      row >= primitives::load_global(cu_seqlens + high)) {
    return -1;
  }
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (primitives::load_global(cu_seqlens + middle) <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Rows [begin, end) of sequence batch_idx, within the tensor whatever cu_seqlens holds.
SA_DEVICE attention::Range rows_of(const PackedSequences& sequences, int batch_idx) {
  const int64_t num_rows = sequences.num_rows;
  const int64_t begin =
      attention::bounded_row(primitives::load_global(sequences.cu_seqlens + batch_idx), num_rows);
  const int64_t end = primitives::load_global(sequences.cu_seqlens + batch_idx + 1);
  return {begin, begin + attention::bounded_row(end - begin, num_rows - begin)};
}

SA_DEVICE bool is_unused(const PackedSequences& sequences, int row) {
  const int batch_idx = sequence_of(sequences, row);
  if (batch_idx < 0) return true;
  const int64_t position = row - rows_of(sequences, batch_idx).begin;
  return position >= sequences.max_seqlen ||
         (sequences.seqused != nullptr &&
          position >= primitives::load_global(sequences.seqused + batch_idx));
}

// A tensor [rows, heads, dim] whose unused rows are zeroed. Strides are in bytes.
struct ZeroedRows {
  char* data;  // null: no tensor
  int64_t stride_row, stride_head;
  int num_heads;
  int vectors_per_head;
  int vector_bytes;  // 2, 4, 8 or 16
};

// lse [heads, rows], whose unused rows become -inf.
struct FilledLse {
  void* data;  // null: no tensor
  int64_t stride_head;
  int num_heads;
  bool is_float64;
};

template <class Word>
SA_DEVICE void zero_vector(char* destination) {
  primitives::store_global(reinterpret_cast<Word*>(destination), Word{});
}

// By all threads of a block.
SA_DEVICE void zero_row(const ZeroedRows& rows, int row) {
  if (rows.data == nullptr) return;
  const int vectors = rows.num_heads * rows.vectors_per_head;
  for (int i = primitives::thread_idx(); i < vectors; i += kRowThreads) {
    const int head = i / rows.vectors_per_head;
    const int64_t in_head = i - head * rows.vectors_per_head;
    char* destination =
        rows.data + row * rows.stride_row + head * rows.stride_head + in_head * rows.vector_bytes;
    switch (rows.vector_bytes) {
      case 16:
        zero_vector<primitives::Bytes16>(destination);
        break;
      case 8:
        zero_vector<uint64_t>(destination);
        break;
      case 4:
        zero_vector<uint32_t>(destination);
        break;
      default:
        zero_vector<uint16_t>(destination);
    }
  }
}

SA_DEVICE void fill_lse(const FilledLse& lse, int row) {
  if (lse.data == nullptr) return;
  for (int head = primitives::thread_idx(); head < lse.num_heads; head += kRowThreads) {
    const int64_t idx = head * lse.stride_head + row;
    if (lse.is_float64) {
      primitives::store_global(static_cast<double*>(lse.data) + idx,
                               attention::negative_infinity<double>());
    } else {
      primitives::store_global(static_cast<float*>(lse.data) + idx,
                               attention::negative_infinity<float>());
    }
  }
}

struct UnusedRowsParams {
  PackedSequences queries;
  PackedSequences keys;   // num_rows 0: none
  ZeroedRows of_queries;  // out or dq
  FilledLse lse;
  ZeroedRows dk, dv;
  int query_rows_per_block, key_rows_per_block;
  int num_query_blocks;  // the blocks after these are the keys'
};

struct FillUnusedRowsKernel {
  using Params = UnusedRowsParams;
  struct SharedStorage {
    int is_unused[kMaxRowsPerBlock];
  };
  struct Config {
    static constexpr int kThreads = kRowThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = sizeof(SharedStorage);
  };

  static SA_DEVICE void run(const Params& params, char* shared) {
    SharedStorage& storage = *reinterpret_cast<SharedStorage*>(shared);
    const int block = primitives::block_idx().x;
    if (block < params.num_query_blocks) {
      for_unused(params.queries, params.query_rows_per_block, block, storage, [&](int row) {
        zero_row(params.of_queries, row);
        fill_lse(params.lse, row);
      });
    } else {
      for_unused(params.keys, params.key_rows_per_block, block - params.num_query_blocks, storage,
                 [&](int row) {
                   zero_row(params.dk, row);
                   zero_row(params.dv, row);
                 });
    }
  }

  template <class Fill>
  static SA_DEVICE void for_unused(const PackedSequences& sequences, int rows_per_block, int block,
                                   SharedStorage& storage, const Fill& fill) {
    const int first = block * rows_per_block;
    const int rest = sequences.num_rows - first;
    const int count = rest < rows_per_block ? rest : rows_per_block;
    const int thread = primitives::thread_idx();
    if (thread < count) {
      primitives::store_shared(&storage.is_unused[thread],
                               is_unused(sequences, first + thread) ? 1 : 0);
    }
    primitives::sync_threads();  // each flag is one thread's to set and all threads' to read
    for (int i = 0; i < count; ++i) {
      if (primitives::load_shared(&storage.is_unused[i]) != 0) fill(first + i);
    }
  }
};

}  // namespace sink_attention::cuda
