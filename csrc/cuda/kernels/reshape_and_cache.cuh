// Writing keys and values into a paged cache.
//
// A block takes some tokens, k and v, all heads: the row of a head is cut into pieces, a piece is
// one thread's, neighbouring threads take neighbouring pieces. A piece is 16 bytes where all
// addresses allow it, narrower otherwise.
//
// Where each row is stored with a scale of its own, a row is a few lanes' of a warp, which hold all
// of it while they find its largest number by shuffles.
//
// Where tokens share a slot the last one stays, as if they were written in order: a block looks
// through the slots of later tokens and leaves out those of its own that are written again. Each
// later slot is compared with the range of the block's slots first, which is all that most of them
// cost.
#pragma once

#include <cstring>

#include "cuda/device/element.cuh"
#include "primitives/cta.h"
#include "primitives/memory.h"
#include "primitives/warp.h"

namespace sink_attention::cuda {

constexpr int kCacheThreads = 128;
constexpr int kMaxTokensPerBlock = 32;  // a bit of a mask each

// k or v on their way. Strides are in bytes.
struct CacheSide {
  const char* source;   // [num_tokens, num_heads_kv, dim]
  char* cache;          // [num_pages, page_size, num_heads_kv, dim]
  const float* scale;   // [1] or [num_heads_kv]; null where numbers are copied as they are
  float* token_scales;  // [num_pages, page_size, num_heads_kv], strides in numbers; or null
  int64_t source_stride_token, source_stride_head;
  int64_t cache_stride_page, cache_stride_slot, cache_stride_head;
  int64_t scale_stride_page, scale_stride_slot, scale_stride_head;
  int num_pieces;  // of a row
  int row_lanes;   // of a warp, for a row with a scale of its own: a power of two
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

// Numbers that become 8-bit ones, Stored: eight of them, or one.
template <class Element, class Stored>
struct Quantize {
  static constexpr int kElems = 8;
  static constexpr int kLoads = kElems * static_cast<int>(sizeof(Element)) / 16;

  static SA_DEVICE uint8_t quantize(float number, float scale) {
    return static_cast<uint8_t>(attention::to_stored<Stored>(number / scale).bits);
  }
  static SA_DEVICE float load_one(const char* source, int idx) {
    return load_as<float, Element>(source, idx);
  }
  static SA_DEVICE void store_one(char* cache, int idx, float number, float scale) {
    primitives::store_global(reinterpret_cast<uint8_t*>(cache) + idx, quantize(number, scale));
  }
  static SA_DEVICE void load_eight(const char* source, float (&numbers)[kElems]) {
    primitives::Bytes16 words[kLoads];
    SA_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      words[i] = primitives::load_global(reinterpret_cast<const primitives::Bytes16*>(source) + i);
    }
    Element elements[kElems];
    memcpy(elements, words, sizeof(elements));
    SA_UNROLL
    for (int i = 0; i < kElems; ++i) numbers[i] = to_real<float>(elements[i]);
  }
  static SA_DEVICE void store_eight(char* cache, const float (&numbers)[kElems], float scale) {
    uint64_t packed = 0;
    SA_UNROLL
    for (int i = 0; i < kElems; ++i) {
      packed |= uint64_t{quantize(numbers[i], scale)} << (8 * i);
    }
    primitives::store_global(reinterpret_cast<uint64_t*>(cache), packed);
  }
};

// A piece of them, with a scale that is there.
template <class Element, class Stored>
struct QuantizePiece {
  using Numbers = Quantize<Element, Stored>;
  static SA_DEVICE void write(const char* source, char* cache, int bytes, float scale) {
    if (bytes == 1) return Numbers::store_one(cache, 0, Numbers::load_one(source, 0), scale);
    float numbers[Numbers::kElems];
    Numbers::load_eight(source, numbers);
    Numbers::store_eight(cache, numbers, scale);
  }
};

// A row of them, with a scale of its own. Lane i of the row's lanes takes the piece i where pieces
// are of eight numbers, of which a row has no more than there are lanes; and the numbers i,
// i + lanes, ..., no more than eight, where they are of one.
template <class Element, class Stored>
struct QuantizeRow {
  using Numbers = Quantize<Element, Stored>;
  // All lanes of the warp call; `exists` is the same for those of a row.
  static SA_DEVICE void write(const CacheSide& side, const char* source, char* cache,
                              float* token_scale, bool exists) {
    const int lanes = side.row_lanes;
    const int lane = primitives::lane_idx() % lanes;
    const bool in_eights = side.cache_piece_bytes == Numbers::kElems;
    float numbers[Numbers::kElems] = {};
    if (exists && in_eights && lane < side.num_pieces) {
      Numbers::load_eight(source + lane * side.source_piece_bytes, numbers);
    } else if (exists && !in_eights) {
      SA_UNROLL
      for (int i = 0; i < Numbers::kElems; ++i) {
        const int idx = lane + i * lanes;
        if (idx < side.num_pieces) numbers[i] = Numbers::load_one(source, idx);
      }
    }
    uint32_t largest = 0;
    SA_UNROLL
    for (int i = 0; i < Numbers::kElems; ++i) {
      const uint32_t magnitude = attention::finite_magnitude(numbers[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    for (int mask = 1; mask < lanes; mask *= 2) {
      const uint32_t other = primitives::shfl_xor(largest, mask);
      largest = other > largest ? other : largest;
    }
    if (!exists) return;
    const float scale = attention::row_scale<Stored>(largest);
    if (lane == 0) primitives::store_global(token_scale, scale);
    if (in_eights) {
      if (lane < side.num_pieces) {
        Numbers::store_eight(cache + lane * side.cache_piece_bytes, numbers, scale);
      }
      return;
    }
    SA_UNROLL
    for (int i = 0; i < Numbers::kElems; ++i) {
      const int idx = lane + i * lanes;
      if (idx < side.num_pieces) Numbers::store_one(cache, idx, numbers[i], scale);
    }
  }
};

template <class Piece>
constexpr bool kIsRow = false;
template <class Element, class Stored>
constexpr bool kIsRow<QuantizeRow<Element, Stored>> = true;

// Piece: what a thread writes at a time, a piece of a row, or with other lanes a row.
template <class Piece>
struct ReshapeAndCacheKernel {
  using Params = CacheWrite;
  struct SharedStorage {
    int64_t slots[kMaxTokensPerBlock];  // of the block's tokens; -1: skipped
    uint32_t rewritten[kCacheThreads / primitives::kWarpSize];  // a bit a token, of each warp
  };
  struct Config {
    static constexpr int kThreads = kCacheThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = sizeof(SharedStorage);
  };

  static SA_DEVICE void run(const Params& params, char* shared) {
    SharedStorage& storage = *reinterpret_cast<SharedStorage*>(shared);
    const int first = primitives::block_idx().x * params.tokens_per_block;
    const int rest = params.num_tokens - first;
    const int count = rest < params.tokens_per_block ? rest : params.tokens_per_block;

    load_slots(params, storage, first, count);
    primitives::sync_threads();  // each slot is one thread's to load and all threads' to read
    const uint32_t mine = find_rewritten(params, storage, first, count);
    const int warp = primitives::warp_idx();  // by all lanes
    if (primitives::lane_idx() == 0) primitives::store_shared(&storage.rewritten[warp], mine);
    primitives::sync_threads();  // what each warp has found is all threads' to read
    uint32_t rewritten = 0;
    SA_UNROLL
    for (int warp = 0; warp < kCacheThreads / primitives::kWarpSize; ++warp) {
      rewritten |= primitives::load_shared(&storage.rewritten[warp]);
    }
    if constexpr (kIsRow<Piece>) {
      write_rows(params, params.k, storage, first, count, rewritten);
      write_rows(params, params.v, storage, first, count, rewritten);
    } else {
      write_tokens(params, storage, first, count, rewritten);
    }
  }

  static SA_DEVICE void load_slots(const Params& params, SharedStorage& storage, int first,
                                   int count) {
    const int i = primitives::thread_idx();
    if (i >= count) return;
    const int64_t slot = primitives::load_global(params.slot_mapping + first + i);
    const bool exists = 0 <= slot && slot < params.num_slots;
    primitives::store_shared(&storage.slots[i], exists ? slot : int64_t{-1});
  }

  // Which of the block's tokens a later one overwrites, as far as the later tokens looked at by
  // this warp say.
  static SA_DEVICE uint32_t find_rewritten(const Params& params, const SharedStorage& storage,
                                           int first, int count) {
    int64_t lowest = params.num_slots;
    int64_t highest = -1;
    for (int i = 0; i < count; ++i) {
      const int64_t slot = primitives::load_shared(&storage.slots[i]);
      if (slot >= 0 && slot < lowest) lowest = slot;
      if (slot > highest) highest = slot;
    }
    uint32_t found = 0;
    for (int token = first + 1 + primitives::thread_idx(); token < params.num_tokens;
         token += kCacheThreads) {
      const int64_t slot = primitives::load_global(params.slot_mapping + token);
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

  static SA_DEVICE void write_tokens(const Params& params, const SharedStorage& storage, int first,
                                     int count, uint32_t rewritten) {
    const int k_pieces = params.num_heads_kv * params.k.num_pieces;
    const int v_pieces = params.num_heads_kv * params.v.num_pieces;
    const int pieces = k_pieces + v_pieces;  // of a token
    for (int i = primitives::thread_idx(); i < count * pieces; i += kCacheThreads) {
      const int token = i / pieces;
      const int piece = i - token * pieces;
      const int64_t slot = primitives::load_shared(&storage.slots[token]);
      if (slot < 0 || (rewritten >> token & 1) != 0) continue;
      if (piece < k_pieces) {
        write_piece(params, params.k, first + token, slot, piece);
      } else {
        write_piece(params, params.v, first + token, slot, piece - k_pieces);
      }
    }
  }

  static SA_DEVICE void write_piece(const Params& params, const CacheSide& side, int token,
                                    int64_t slot, int piece_of_token) {
    const int head = piece_of_token / side.num_pieces;
    const int piece = piece_of_token - head * side.num_pieces;
    const char* source = source_row(side, token, head) + int64_t{piece} * side.source_piece_bytes;
    char* cache = cache_row(params, side, slot, head) + int64_t{piece} * side.cache_piece_bytes;
    const float scale = side.scale == nullptr
                            ? 1.0f
                            : primitives::load_global(side.scale + head * params.scale_stride);
    Piece::write(source, cache, side.cache_piece_bytes, scale);
  }

  static SA_DEVICE const char* source_row(const CacheSide& side, int token, int head) {
    return side.source + token * side.source_stride_token + head * side.source_stride_head;
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
                                   const SharedStorage& storage, int first, int count,
                                   uint32_t rewritten) {
    constexpr int kWarps = kCacheThreads / primitives::kWarpSize;
    const int together = primitives::kWarpSize / side.row_lanes;
    const int rows = count * params.num_heads_kv;
    for (int i = primitives::warp_idx() * together; i < rows; i += kWarps * together) {
      const int row = i + primitives::lane_idx() / side.row_lanes;
      const int token = row < rows ? row / params.num_heads_kv : 0;
      const int head = row - token * params.num_heads_kv;
      const int64_t wanted = primitives::load_shared(&storage.slots[token]);
      const bool exists = row < rows && wanted >= 0 && (rewritten >> token & 1) == 0;
      const int64_t slot = exists ? wanted : 0;
      const int64_t page = slot / params.page_size;
      float* token_scale = side.token_scales + page * side.scale_stride_page +
                           (slot - page * params.page_size) * side.scale_stride_slot +
                           head * side.scale_stride_head;
      Piece::write(side, source_row(side, first + token, head), cache_row(params, side, slot, head),
                   token_scale, exists);
    }
  }
};

}  // namespace sink_attention::cuda
