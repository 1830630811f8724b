// Writing new keys and values into a cache: at given slots, or behind the keys of each sequence.
//
// A block takes some tokens, k and v, all heads. The row of a head is cut into vectors of 16 bytes,
// narrower where an address is not aligned; neighbouring threads take neighbouring vectors. Where
// each row is stored with a scale of its own, some lanes of a warp hold a row while they find its
// largest magnitude by shuffles.
//
// Where two tokens share a slot, threads of any blocks write it in any order. Under `deterministic`
// the last token stays, as if they were written in order: a block looks through the slots of later
// tokens, O(n^2) loads in all, and leaves out those of its own that are written again.
#pragma once

#include "cuda/kernels/new_tokens.cuh"
#include "cuda/kernels/quantize.cuh"
#include "primitives/cta.h"

namespace sink_attention::cuda {

struct CacheWrite {
  CacheSide k;
  CacheSide v;
  NewTokens tokens;
  ZeroedRows out;  // of rows that are in no sequence; only for an append
  FilledLse lse;
  int64_t page_size;
  int64_t scale_stride;  // 0: one scale for all heads, 1: one per kv head
  int num_heads_kv;
  int tokens_per_block;
};

// Vector: CopyVector, QuantizeVector or QuantizeRow.
template <class Vector>
struct WriteCacheKernel {
  using Params = CacheWrite;
  struct SharedStorage {
    TokenPlace places[kMaxRowsPerBlock];                      // of the block's tokens
    uint32_t rewritten[kRowThreads / primitives::kWarpSize];  // a bit a token, of each warp
  };
  struct Config {
    static constexpr int kThreads = kRowThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = sizeof(SharedStorage);
  };

  static SA_DEVICE void run(const Params& params, char* shared) {
    SharedStorage& storage = *reinterpret_cast<SharedStorage*>(shared);
    const NewTokens& tokens = params.tokens;
    const int first = primitives::block_idx().x * params.tokens_per_block;
    const int rest = tokens.sequences.num_rows - first;  // an append may have blocks beyond them
    const int count = rest < params.tokens_per_block ? rest : params.tokens_per_block;

    const int thread = primitives::thread_idx();
    if (thread < count) storage.places[thread].store(place_of(tokens, first + thread));
    if (tokens.slot_mapping == nullptr) store_lengths(tokens);
    primitives::sync_threads();  // each place is one thread's to find and all threads' to read
    if (tokens.deterministic) {
      leave_out_rewritten(tokens, storage, first, count);
    }
    if constexpr (kIsRow<Vector>) {
      write_rows(params, params.k, storage, count);
      write_rows(params, params.v, storage, count);
    } else {
      write_tokens(params, storage, count);
    }
    if (params.out.data == nullptr) return;
    for (int i = 0; i < count; ++i) {
      if (!storage.places[i].is_unused()) continue;
      zero_row(params.out, first + i);
      fill_lse(params.lse, first + i);
    }
  }

  // Which of the block's tokens a later one overwrites, as far as the later tokens looked at by
  // this warp say.
  static SA_DEVICE uint32_t find_rewritten(const NewTokens& tokens, const SharedStorage& storage,
                                           int first, int count) {
    int64_t lowest = tokens.num_slots;
    int64_t highest = -1;
    for (int i = 0; i < count; ++i) {
      const int64_t slot = storage.places[i].slot();
      if (slot >= 0 && slot < lowest) lowest = slot;
      if (slot > highest) highest = slot;
    }
    uint32_t found = 0;
    for (int token = first + 1 + primitives::thread_idx(); token < tokens.sequences.num_rows;
         token += kRowThreads) {
      const int64_t slot = primitives::load_global(tokens.slot_mapping + token);
      if (slot < lowest || slot > highest) continue;  // all that most tokens cost
      for (int i = 0; i < count && first + i < token; ++i) {
        if (storage.places[i].slot() == slot) found |= uint32_t{1} << i;
      }
    }
    SA_UNROLL
    for (int mask = 1; mask < primitives::kWarpSize; mask *= 2) {
      found |= primitives::shfl_xor(found, mask);
    }
    return found;
  }

  static SA_DEVICE void leave_out_rewritten(const NewTokens& tokens, SharedStorage& storage,
                                            int first, int count) {
    const uint32_t of_warp = find_rewritten(tokens, storage, first, count);
    const int warp = primitives::warp_idx();  // by all lanes
    if (primitives::lane_idx() == 0) primitives::store_shared(&storage.rewritten[warp], of_warp);
    primitives::sync_threads();  // what each warp has found is all threads' to read
    uint32_t rewritten = 0;
    SA_UNROLL
    for (int i = 0; i < kRowThreads / primitives::kWarpSize; ++i) {
      rewritten |= primitives::load_shared(&storage.rewritten[i]);
    }
    const int thread = primitives::thread_idx();
    if (thread < count && (rewritten >> thread & 1) != 0) storage.places[thread].skip();
    primitives::sync_threads();  // which tokens are skipped is all threads' to read
  }

  static SA_DEVICE void write_tokens(const Params& params, const SharedStorage& storage,
                                     int count) {
    const int k_vectors = params.num_heads_kv * params.k.num_vectors;
    const int v_vectors = params.num_heads_kv * params.v.num_vectors;
    const int vectors = k_vectors + v_vectors;  // of a token
    for (int i = primitives::thread_idx(); i < count * vectors; i += kRowThreads) {
      const int token = i / vectors;
      const int vector = i - token * vectors;
      const TokenPlace& place = storage.places[token];
      if (place.slot() < 0) continue;
      if (vector < k_vectors) {
        write_vector(params, params.k, place, vector);
      } else {
        write_vector(params, params.v, place, vector - k_vectors);
      }
    }
  }

  static SA_DEVICE void write_vector(const Params& params, const CacheSide& side,
                                     const TokenPlace& place, int vector_of_token) {
    const int head = vector_of_token / side.num_vectors;
    const int64_t vector = vector_of_token - head * side.num_vectors;
    const char* source = source_row(side, place, head) + vector * side.source_vector_bytes;
    char* cache = cache_row(params, side, place.slot(), head) + vector * side.cache_vector_bytes;
    const float scale = side.scale == nullptr
                            ? 1.0f
                            : primitives::load_global(side.scale + head * params.scale_stride);
    Vector::write(source, cache, side.cache_vector_bytes, scale);
  }

  static SA_DEVICE const char* source_row(const CacheSide& side, const TokenPlace& place,
                                          int head) {
    return side.source + place.source_batch() * side.source_stride_batch +
           place.source_row() * side.source_stride_row + head * side.source_stride_head;
  }
  static SA_DEVICE char* cache_row(const Params& params, const CacheSide& side, int64_t slot,
                                   int head) {
    const int64_t page = slot / params.page_size;
    return side.cache + page * side.cache_stride_page +
           (slot - page * params.page_size) * side.cache_stride_slot +
           head * side.cache_stride_head;
  }

  // All rows of k or v, as many of them at once as a warp has lanes for. A warp's lanes go through
  // the shuffles together, those without a row too.
  static SA_DEVICE void write_rows(const Params& params, const CacheSide& side,
                                   const SharedStorage& storage, int count) {
    constexpr int kWarps = kRowThreads / primitives::kWarpSize;
    const int together = primitives::kWarpSize / side.row_lanes;
    const int rows = count * params.num_heads_kv;
    for (int i = primitives::warp_idx() * together; i < rows; i += kWarps * together) {
      const int row = i + primitives::lane_idx() / side.row_lanes;
      const int token = row < rows ? row / params.num_heads_kv : 0;
      const int head = row < rows ? row - token * params.num_heads_kv : 0;
      const TokenPlace& place = storage.places[token];
      const bool exists = row < rows && place.slot() >= 0;
      const int64_t slot = exists ? place.slot() : 0;
      const int64_t page = slot / params.page_size;
      float* token_scale = side.token_scales + page * side.scale_stride_page +
                           (slot - page * params.page_size) * side.scale_stride_slot +
                           head * side.scale_stride_head;
      Vector::write(side, source_row(side, place, head), cache_row(params, side, slot, head),
                    token_scale, exists);
    }
  }
};

}  // namespace sink_attention::cuda
