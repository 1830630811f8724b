// Blocks of keys that a range of keys falls into.
#pragma once

#include "attention/mask.h"

namespace sink_attention::cpu {

inline attention::Range blocks_of(attention::Range keys, int64_t block_keys) {
  if (keys.begin >= keys.end) return {0, 0};
  return {keys.begin / block_keys, (keys.end + block_keys - 1) / block_keys};
}

}  // namespace sink_attention::cpu
