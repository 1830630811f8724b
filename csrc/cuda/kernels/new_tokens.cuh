// Where new tokens come from, and which slots of a cache they go to.
//
// Each token's sequence is searched for in cu_seqlens: the tokens of a long prompt then spread over
// as many blocks as those of many sequences, which a block for each sequence would not do.
#pragma once

#include "cuda/kernels/unused_rows.cuh"

namespace sink_attention::cuda {

struct NewTokens {
  const int64_t* slot_mapping;  // [num_rows], of reshape_and_cache; null: slots are derived
  PackedSequences sequences;    // of cu_seqlens null: each has max_seqlen rows
  // Of an append.
  const int32_t* cache_seqlens;  // [batch]
  const int32_t* block_table;    // [batch, ...]; null: sequence b has page b
  int32_t* seqused_k;            // [batch], written
  int32_t* page_table;           // [batch], written with 0, 1, ...; may be null
  int64_t block_table_stride;
  int64_t capacity;   // keys of a sequence that its pages have room for
  int64_t num_pages;  // of the cache
  int64_t num_slots;
  int64_t page_size;
  bool deterministic;
};

// One token of a block, in shared memory.
struct TokenPlace {
  static constexpr int64_t kSkipped = -1;

  int64_t slot_;  // or kSkipped
  int source_batch_, source_row_;
  int is_unused_;  // attention leaves the token's row of out alone

  SA_DEVICE void store(const TokenPlace& found) {
    primitives::store_shared(&slot_, found.slot_);
    primitives::store_shared(&source_batch_, found.source_batch_);
    primitives::store_shared(&source_row_, found.source_row_);
    primitives::store_shared(&is_unused_, found.is_unused_);
  }
  SA_DEVICE void skip() { primitives::store_shared(&slot_, kSkipped); }
  SA_DEVICE int64_t slot() const { return primitives::load_shared(&slot_); }
  SA_DEVICE bool is_unused() const { return primitives::load_shared(&is_unused_) != 0; }
  SA_DEVICE int64_t source_batch() const { return primitives::load_shared(&source_batch_); }
  SA_DEVICE int64_t source_row() const { return primitives::load_shared(&source_row_); }
};

// The slot at a position of a sequence.
SA_DEVICE int64_t slot_at(const NewTokens& tokens, int batch_idx, int64_t position) {
  if (position < 0 || position >= tokens.capacity) return TokenPlace::kSkipped;
  const int64_t entry = position / tokens.page_size;
  const int64_t page = tokens.block_table == nullptr
                           ? batch_idx
                           : primitives::load_global(tokens.block_table +
                                                     batch_idx * tokens.block_table_stride + entry);
  if (page < 0 || page >= tokens.num_pages) return TokenPlace::kSkipped;
  return page * tokens.page_size + position - entry * tokens.page_size;
}

SA_DEVICE TokenPlace place_of(const NewTokens& tokens, int token) {
  if (tokens.slot_mapping != nullptr) {
    const int64_t slot = primitives::load_global(tokens.slot_mapping + token);
    const bool exists = 0 <= slot && slot < tokens.num_slots;
    return {exists ? slot : TokenPlace::kSkipped, 0, token, 0};
  }
  const PackedSequences& sequences = tokens.sequences;
  if (sequences.cu_seqlens == nullptr) {
    const int seqlen = static_cast<int>(sequences.max_seqlen);
    const int batch_idx = token / seqlen;
    const int row = token - batch_idx * seqlen;
    const int64_t before = primitives::load_global(tokens.cache_seqlens + batch_idx);
    return {slot_at(tokens, batch_idx, before + row), batch_idx, row, 0};
  }
  const int batch_idx = sequence_of(sequences, token);
  if (batch_idx < 0) return {TokenPlace::kSkipped, 0, token, 1};
  const int64_t before = primitives::load_global(tokens.cache_seqlens + batch_idx);
  const int64_t row = token - rows_of(sequences, batch_idx).begin;
  return {slot_at(tokens, batch_idx, before + row), 0, token, row >= sequences.max_seqlen ? 1 : 0};
}

// Lengths after the append, and the pages of a dense cache, by all threads of all blocks.
SA_DEVICE void store_lengths(const NewTokens& tokens) {
  const PackedSequences& sequences = tokens.sequences;
  const int threads = primitives::grid_dim().x * kRowThreads;
  for (int b = primitives::block_idx().x * kRowThreads + primitives::thread_idx();
       b < sequences.batch; b += threads) {
    int64_t added = sequences.max_seqlen;
    if (sequences.cu_seqlens != nullptr) {
      const attention::Range rows = rows_of(sequences, b);
      added = rows.end - rows.begin;
    }
    const int64_t length = primitives::load_global(tokens.cache_seqlens + b) + added;
    primitives::store_global(tokens.seqused_k + b,
                             static_cast<int32_t>(attention::bounded_row(length, tokens.capacity)));
    if (tokens.page_table != nullptr) primitives::store_global(tokens.page_table + b, b);
  }
}

}  // namespace sink_attention::cuda
