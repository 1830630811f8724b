// Copying or quantising elements of new keys and values on their way to a cache.
#pragma once

#include <cstring>

#include "cuda/device/element.cuh"
#include "primitives/memory.h"
#include "primitives/warp.h"

namespace sink_attention::cuda {

// k or v. Strides are in bytes.
struct CacheSide {
  const char* source;   // [batch, row, num_heads_kv, dim]
  char* cache;          // [num_pages, page_size, num_heads_kv, dim]
  const float* scale;   // [1] or [num_heads_kv]; null where elements are copied as they are
  float* token_scales;  // [num_pages, page_size, num_heads_kv], strides in elements; or null
  int64_t source_stride_batch, source_stride_row, source_stride_head;
  int64_t cache_stride_page, cache_stride_slot, cache_stride_head;
  int64_t scale_stride_page, scale_stride_slot, scale_stride_head;
  int num_vectors;  // of one head of a token: what a thread reads or writes at a time
  int row_lanes;    // of a warp, for a row with a scale of its own: a power of two
  int source_vector_bytes;
  int cache_vector_bytes;
};

// One vector of elements that the cache holds as they are.
struct CopyVector {
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

// Elements that are quantised to Stored, of 8 bits: eight at a time, or one.
template <class Element, class Stored>
struct Quantize {
  static constexpr int kElems = 8;
  static constexpr int kLoads = kElems * static_cast<int>(sizeof(Element)) / 16;

  static SA_DEVICE uint8_t quantize(float value, float scale) {
    return static_cast<uint8_t>(attention::to_stored<Stored>(value / scale).bits);
  }
  static SA_DEVICE float load_one(const char* source, int idx) {
    return load_as<float, Element>(source, idx);
  }
  static SA_DEVICE void store_one(char* cache, int idx, float value, float scale) {
    primitives::store_global(reinterpret_cast<uint8_t*>(cache) + idx, quantize(value, scale));
  }
  static SA_DEVICE void load_eight(const char* source, float (&values)[kElems]) {
    primitives::Bytes16 words[kLoads];
    SA_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      words[i] = primitives::load_global(reinterpret_cast<const primitives::Bytes16*>(source) + i);
    }
    Element elements[kElems];
    memcpy(elements, words, sizeof(elements));
    SA_UNROLL
    for (int i = 0; i < kElems; ++i) values[i] = to_real<float>(elements[i]);
  }
  static SA_DEVICE void store_eight(char* cache, const float (&values)[kElems], float scale) {
    uint64_t packed = 0;
    SA_UNROLL
    for (int i = 0; i < kElems; ++i) {
      packed |= uint64_t{quantize(values[i], scale)} << (8 * i);
    }
    primitives::store_global(reinterpret_cast<uint64_t*>(cache), packed);
  }
};

// One vector of them, divided by a given scale.
template <class Element, class Stored>
struct QuantizeVector {
  using Values = Quantize<Element, Stored>;
  static SA_DEVICE void write(const char* source, char* cache, int bytes, float scale) {
    if (bytes == 1) return Values::store_one(cache, 0, Values::load_one(source, 0), scale);
    float values[Values::kElems];
    Values::load_eight(source, values);
    Values::store_eight(cache, values, scale);
  }
};

// One row of them, with a scale of its own, by side.row_lanes lanes of a warp. Vectors of eight
// elements: lane i takes vector i, and there are no fewer lanes than vectors. Vectors of one
// element: lane i takes elements i, i + lanes, ..., at most eight.
template <class Element, class Stored>
struct QuantizeRow {
  using Values = Quantize<Element, Stored>;
  // All lanes of the warp call; `exists` is the same for those of a row.
  static SA_DEVICE void write(const CacheSide& side, const char* source, char* cache,
                              float* token_scale, bool exists) {
    const int lanes = side.row_lanes;
    const int lane = primitives::lane_idx() % lanes;
    const bool by_eight = side.cache_vector_bytes == Values::kElems;
    float values[Values::kElems] = {};
    if (exists && by_eight && lane < side.num_vectors) {
      Values::load_eight(source + lane * side.source_vector_bytes, values);
    } else if (exists && !by_eight) {
      SA_UNROLL
      for (int i = 0; i < Values::kElems; ++i) {
        const int idx = lane + i * lanes;
        if (idx < side.num_vectors) values[i] = Values::load_one(source, idx);
      }
    }
    uint32_t largest = 0;
    SA_UNROLL
    for (int i = 0; i < Values::kElems; ++i) {
      const uint32_t magnitude = attention::finite_magnitude(values[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    for (int mask = 1; mask < lanes; mask *= 2) {
      const uint32_t other = primitives::shfl_xor(largest, mask);
      largest = other > largest ? other : largest;
    }
    if (!exists) return;
    const float scale = attention::row_scale<Stored>(largest);
    if (lane == 0) primitives::store_global(token_scale, scale);
    if (by_eight) {
      if (lane < side.num_vectors) {
        Values::store_eight(cache + lane * side.cache_vector_bytes, values, scale);
      }
      return;
    }
    SA_UNROLL
    for (int i = 0; i < Values::kElems; ++i) {
      const int idx = lane + i * lanes;
      if (idx < side.num_vectors) Values::store_one(cache, idx, values[i], scale);
    }
  }
};

template <class Vector>
constexpr bool kIsRow = false;
template <class Element, class Stored>
constexpr bool kIsRow<QuantizeRow<Element, Stored>> = true;

}  // namespace sink_attention::cuda
