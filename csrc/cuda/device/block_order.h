// The order in which thread blocks start that divide (sequence, kv head) pairs among them, each
// pair into the same number of blocks: those of the longest sequence, of which a shorter one leaves
// some without work.
//
// All pairs, kv heads fastest, are cut into sections, one after the other. Of a section, the blocks
// of rank 0 of all pairs come first, then all of rank 1, ... Kernels give the lowest rank to the
// block that has the most to do under a causal mask: started last, it would work on alone. All
// pairs in one section would be the best for that, but the blocks at work at one time shall belong
// to few pairs, so that they find in L2 what those of one pair share.
//
// Of one pair, a block of a lower rank has a lower index, and so starts no later.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "attention/host_device.h"
#include "attention/params.h"

namespace sink_attention::cuda {

struct BlockOrder {
  int blocks_per_pair;
  int num_pairs;
  int num_heads_kv;
  int section_pairs;  // the last section has at least as many
  int num_sections;

  int num_blocks() const { return blocks_per_pair * num_pairs; }
};

struct BlockPlace {
  int batch_idx;
  int kv_head;
  int rank;
};

// Sections of section_pairs, and a last one of at least last_pairs, which are no fewer. Throws
// std::runtime_error if the blocks are more than one dimension of a grid can have. Sizes: the params,
// or the shape that a plan looks at.
template <class Sizes>
BlockOrder make_block_order(const Sizes& params, int64_t blocks_per_pair, int64_t section_pairs,
                            int64_t last_pairs) {
  const int64_t pairs = params.batch * params.num_heads_kv;
  if (blocks_per_pair > 0 && pairs > INT32_MAX / blocks_per_pair) {
    throw std::runtime_error("sink_attention_ext: more rows or keys than one launch can take");
  }
  BlockOrder order{};
  order.blocks_per_pair = static_cast<int>(blocks_per_pair);
  order.num_pairs = static_cast<int>(pairs);
  order.num_heads_kv = static_cast<int>(params.num_heads_kv);
  // No more than there are: a section's blocks then can be counted, too.
  order.section_pairs = static_cast<int>(std::min(section_pairs, std::max<int64_t>(pairs, 1)));
  order.num_sections =
      static_cast<int>(1 + std::max<int64_t>(pairs - last_pairs, 0) / order.section_pairs);
  return order;
}

// The backward's: a block for each block of keys, in their order. A pair's blocks share Q, dO and
// dQ, tile by tile. Of 8 to 16 pairs these are too much for most L2s as a whole; what counts is
// that of each pair some blocks are at work at one time, at tiles near each other. Cards run 1 or 2
// blocks on a multiprocessor, some 60 (L4) to 300 in all: of each pair about 4 or more. A section's
// blocks, mostly 256 or more, are about as many as that, so its short ones fill the gaps that its
// long ones leave at the end.
template <class Sizes>
BlockOrder bwd_block_order(const Sizes& params, int block_keys) {
  const int64_t key_blocks = (params.seqlen_k + block_keys - 1) / block_keys;
  const int64_t section_pairs = std::clamp<int64_t>(256 / std::max<int64_t>(key_blocks, 1), 8, 16);
  return make_block_order(params, key_blocks, section_pairs, section_pairs);
}

// The forward's: a block for each tile of rows, from the last to the first. A pair's blocks share K
// and V. Cards run 1 to 3 on a multiprocessor, some 60 to 400 at one time, and these read the keys
// of all pairs that they are cut from, whatever their order. 256 blocks a section are about as
// many: hardly more keys are in use at one time than with one pair after the other, so the rule
// needs no size of L2. The last section has twice as many, so that besides its long tiles there are
// enough short ones to fill the gaps that they leave at the end.
template <class Sizes>
BlockOrder fwd_block_order(const Sizes& params, int block_rows) {
  const int64_t rows = params.seqlen_q * (params.num_heads_q / params.num_heads_kv);
  const int64_t tiles = (rows + block_rows - 1) / block_rows;
  const int64_t section_pairs = std::max<int64_t>(256 / std::max<int64_t>(tiles, 1), 1);
  return make_block_order(params, tiles, section_pairs, 2 * section_pairs);
}

SA_HOST_DEVICE BlockPlace place_of_block(const BlockOrder& order, int block) {
  const int section_blocks = order.section_pairs * order.blocks_per_pair;
  const int last = order.num_sections - 1;
  const int section = block / section_blocks < last ? block / section_blocks : last;
  const int first_pair = section * order.section_pairs;
  const int pairs = section < last ? order.section_pairs : order.num_pairs - first_pair;
  const int in_section = block - section * section_blocks;
  const int rank = in_section / pairs;
  const int pair = first_pair + in_section - rank * pairs;
  const int batch_idx = pair / order.num_heads_kv;
  return {batch_idx, pair - batch_idx * order.num_heads_kv, rank};
}

}  // namespace sink_attention::cuda
