// Writing keys and values into a paged cache.
//
// A block takes some tokens, k and v, all heads: the row of a head is cut into pieces, a piece is
// one thread's, neighbouring threads take neighbouring pieces. A piece is 16 bytes where all
// addresses allow it, narrower otherwise.
//
// Where tokens share a slot the last one stays, as if they were written in order: a block looks
// through the slots of later tokens and leaves out those of its own that are written again. Each
// later slot is compared with the range of the block's slots first, which is all that most of them
// cost.
#pragma once

#include <cstring>

#include "cuda/tile/number.cuh"
#include "primitives/cta.h"
#include "primitives/memory.h"
#include "primitives/warp.h"

namespace sink_attention::cuda {

constexpr int kCacheThreads = 128;
constexpr int kMaxTokensPerBlock = 32;  // a bit of a mask each

// k or v on their way. Strides are in bytes.
struct CacheSide {
  const char* source;  // [num_tokens, num_heads_kv, dim]
  char* cache;         // [num_pages, page_size, num_heads_kv, dim]
  const float* scale;  // [1] or [num_heads_kv]; null where numbers are copied as they are
  int64_t source_stride_token, source_stride_head;
  int64_t cache_stride_page, cache_stride_slot, cache_stride_head;
  int num_pieces;  // of a row
  int source_piece_bytes;
  int cache_piece_bytes;
};

struct CacheWrite {
  CacheSide k;
  CacheSide v;
  const int64_t* slot_mapping;  // [num_tokens]; outside [0, num_slots): the token is skipped
  int64_t num_slots;
  int64_t page_size;
  int64_t scale_stride;  // 0: one scale for all heads, 1: one per kv head
  int num_tokens;
  int num_heads_kv;
  int tokens_per_block;
};

// A piece of numbers that the cache holds as they are.
struct CopyPiece {
  static SA_DEVICE void write(const char* source, char* cache, int bytes, float) {
    switch (bytes) {
      case 16:
        return copy<primitives::Bytes16>(source, cache);
      case 8:
        return copy<uint64_t>(source, cache);
      case 4:
        return copy<uint32_t>(source, cache);
      default:
        return copy<uint16_t>(source, cache);
    }
  }
  template <class Word>
  static SA_DEVICE void copy(const char* source, char* cache) {
    primitives::store_global(reinterpret_cast<Word*>(cache),
                             primitives::load_global(reinterpret_cast<const Word*>(source)));
  }
};

// A piece of numbers that become float8: eight of them, or one.
template <class Element>
struct QuantizePiece {
  static constexpr int kElems = 8;
  static constexpr int kLoads = kElems * static_cast<int>(sizeof(Element)) / 16;

  static SA_DEVICE uint8_t quantize(Element number, float scale) {
    return attention::to_float8_e4m3(to_real<float>(number) / scale).bits;
  }

  static SA_DEVICE void write(const char* source, char* cache, int bytes, float scale) {
    if (bytes == 1) {
      const Element number = primitives::load_global(reinterpret_cast<const Element*>(source));
      primitives::store_global(reinterpret_cast<uint8_t*>(cache), quantize(number, scale));
      return;
    }
    primitives::Bytes16 words[kLoads];
    SA_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      words[i] = primitives::load_global(reinterpret_cast<const primitives::Bytes16*>(source) + i);
    }
    Element numbers[kElems];
    memcpy(numbers, words, sizeof(numbers));
    uint64_t packed = 0;
    SA_UNROLL
    for (int i = 0; i < kElems; ++i) {
      packed |= uint64_t{quantize(numbers[i], scale)} << (8 * i);
    }
    primitives::store_global(reinterpret_cast<uint64_t*>(cache), packed);
  }
};

template <class Piece>
struct ReshapeAndCacheKernel {
  using Problem = CacheWrite;
  struct SharedStorage {
    int64_t slots[kMaxTokensPerBlock];  // of the block's tokens; -1: skipped
    uint32_t rewritten[kCacheThreads / primitives::kWarpSize];  // a bit a token, of each warp
  };
  struct Config {
    static constexpr int kThreads = kCacheThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = sizeof(SharedStorage);
  };

  static SA_DEVICE void run(const Problem& problem, char* shared) {
    SharedStorage& storage = *reinterpret_cast<SharedStorage*>(shared);
    const int first = primitives::block_idx().x * problem.tokens_per_block;
    const int rest = problem.num_tokens - first;
    const int count = rest < problem.tokens_per_block ? rest : problem.tokens_per_block;

    load_slots(problem, storage, first, count);
    primitives::sync_threads();  // each slot is one thread's to load and all threads' to read
    const uint32_t mine = find_rewritten(problem, storage, first, count);
    if (primitives::lane_idx() == 0) {
      primitives::store_shared(&storage.rewritten[primitives::warp_idx()], mine);
    }
    primitives::sync_threads();  // what each warp has found is all threads' to read
    uint32_t rewritten = 0;
    SA_UNROLL
    for (int warp = 0; warp < kCacheThreads / primitives::kWarpSize; ++warp) {
      rewritten |= primitives::load_shared(&storage.rewritten[warp]);
    }
    write_tokens(problem, storage, first, count, rewritten);
  }

  static SA_DEVICE void load_slots(const Problem& problem, SharedStorage& storage, int first,
                                   int count) {
    const int i = primitives::thread_idx();
    if (i >= count) return;
    const int64_t slot = primitives::load_global(problem.slot_mapping + first + i);
    const bool exists = 0 <= slot && slot < problem.num_slots;
    primitives::store_shared(&storage.slots[i], exists ? slot : int64_t{-1});
  }

  // Which of the block's tokens a later one overwrites, as far as the later tokens looked at by
  // this warp say.
  static SA_DEVICE uint32_t find_rewritten(const Problem& problem, const SharedStorage& storage,
                                           int first, int count) {
    int64_t lowest = problem.num_slots;
    int64_t highest = -1;
    for (int i = 0; i < count; ++i) {
      const int64_t slot = primitives::load_shared(&storage.slots[i]);
      if (slot >= 0 && slot < lowest) lowest = slot;
      if (slot > highest) highest = slot;
    }
    uint32_t found = 0;
    for (int token = first + 1 + primitives::thread_idx(); token < problem.num_tokens;
         token += kCacheThreads) {
      const int64_t slot = primitives::load_global(problem.slot_mapping + token);
      if (slot < lowest || slot > highest) continue;
      for (int i = 0; i < count && first + i < token; ++i) {
        if (primitives::load_shared(&storage.slots[i]) == slot) found |= uint32_t{1} << i;
      }
    }
    SA_UNROLL
    for (int mask = 1; mask < primitives::kWarpSize; mask *= 2) {
      found |= primitives::shfl_xor(found, mask);
    }
    return found;
  }

  static SA_DEVICE void write_tokens(const Problem& problem, const SharedStorage& storage,
                                     int first, int count, uint32_t rewritten) {
    const int k_pieces = problem.num_heads_kv * problem.k.num_pieces;
    const int v_pieces = problem.num_heads_kv * problem.v.num_pieces;
    const int pieces = k_pieces + v_pieces;  // of a token
    for (int i = primitives::thread_idx(); i < count * pieces; i += kCacheThreads) {
      const int token = i / pieces;
      const int piece = i - token * pieces;
      const int64_t slot = primitives::load_shared(&storage.slots[token]);
      if (slot < 0 || (rewritten >> token & 1) != 0) continue;
      if (piece < k_pieces) {
        write_piece(problem, problem.k, first + token, slot, piece);
      } else {
        write_piece(problem, problem.v, first + token, slot, piece - k_pieces);
      }
    }
  }

  static SA_DEVICE void write_piece(const Problem& problem, const CacheSide& side, int token,
                                    int64_t slot, int piece_of_token) {
    const int head = piece_of_token / side.num_pieces;
    const int piece = piece_of_token - head * side.num_pieces;
    const int64_t page = slot / problem.page_size;
    const char* source = side.source + token * side.source_stride_token +
                         head * side.source_stride_head + int64_t{piece} * side.source_piece_bytes;
    char* cache = side.cache + page * side.cache_stride_page +
                  (slot - page * problem.page_size) * side.cache_stride_slot +
                  head * side.cache_stride_head + int64_t{piece} * side.cache_piece_bytes;
    const float scale = side.scale == nullptr
                            ? 1.0f
                            : primitives::load_global(side.scale + head * problem.scale_stride);
    Piece::write(source, cache, side.cache_piece_bytes, scale);
  }
};

}  // namespace sink_attention::cuda
