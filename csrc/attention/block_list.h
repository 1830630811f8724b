// The key blocks that a loop over keys visits: a key set as at most two ranges of fixed-size
// blocks.
#pragma once

#include "attention/host_device.h"
#include "attention/mask.h"

namespace sink_attention::attention {

// Blocks [0, sink_end), then [begin, end), counted from key 0. The blocks between the two ranges
// hold no visible key and are not visited.
template <class Int>
struct BlockList {
  Int sink_end;
  Int begin;  // not before sink_end
  Int end;

  SA_HOST_DEVICE Int count() const { return sink_end + end - begin; }
  // The idx-th block of the list; index() is the inverse.
  SA_HOST_DEVICE Int block(Int idx) const { return idx < sink_end ? idx : idx - sink_end + begin; }
  SA_HOST_DEVICE Int index(Int block) const {
    return block < sink_end ? block : block - begin + sink_end;
  }
};

// The blocks of block_keys keys that hold a key of the set.
template <class Int>
SA_HOST_DEVICE BlockList<Int> blocks_of(KeySet keys, Int block_keys) {
  if (keys.is_empty()) return {0, 0, 0};
  const Int sinks = (static_cast<Int>(keys.sink_end) + block_keys - 1) / block_keys;
  const Int first = static_cast<Int>(keys.window.begin) / block_keys;
  const Int last = (static_cast<Int>(keys.window.end) + block_keys - 1) / block_keys;
  return {sinks, first > sinks ? first : sinks, last};
}

// The tiles of tile_size indices that overlap a range.
SA_HOST_DEVICE Range tiles_of(Range range, int64_t tile_size) {
  if (range.begin >= range.end) return {0, 0};
  return {range.begin / tile_size, (range.end + tile_size - 1) / tile_size};
}

}  // namespace sink_attention::attention
