// The order in which CTAs start.
//
// A pair is a (sequence, kv head). Each pair is divided among blocks_per_pair CTAs, a tile each,
// enough for the longest sequence; a shorter sequence leaves some of them without work. Kernels
// give tile 0 to the CTA with the most work under a causal mask: if it started last, it would run
// alone at the end.
//
// Pairs, kv heads fastest, are cut into sections. Sections follow each other. Within a section tile
// 0 of all pairs comes first, then tile 1 of all, and so on:
//
//     section 0:  tile 0 of pairs 0 1 2,  tile 1 of pairs 0 1 2, ...
//     section 1:  tile 0 of pairs 3 4 5,  tile 1 of pairs 3 4 5, ...
//
// One section would balance best. Small sections keep the running CTAs on few pairs, whose shared
// data then stays in L2.
//
// In one pair a lower tile index has a lower CTA index. The hardware starts CTAs in the order of
// their indices, so it starts no later.
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

struct BlockCoord {
  int batch_idx;
  int kv_head;
  int tile_idx;  // of the pair, in the order in which CTAs start
};

// Sections of section_pairs pairs; the last has at least last_pairs >= section_pairs. Throws
// std::runtime_error if there are more CTAs than a one-dimensional grid can have.
inline BlockOrder make_block_order(const attention::FlashFwdParams& params, int64_t blocks_per_pair,
                                   int64_t section_pairs, int64_t last_pairs) {
  const int64_t pairs = params.batch * params.num_heads_kv;
  if (blocks_per_pair > 0 && pairs > INT32_MAX / blocks_per_pair) {
    throw std::runtime_error("sink_attention_ext: more rows or keys than one launch can take");
  }
  BlockOrder order{};
  order.blocks_per_pair = static_cast<int>(blocks_per_pair);
  order.num_pairs = static_cast<int>(pairs);
  order.num_heads_kv = static_cast<int>(params.num_heads_kv);
  // At most the pairs that exist, so that the CTAs of a section fit into an int too.
  order.section_pairs = static_cast<int>(std::min(section_pairs, std::max<int64_t>(pairs, 1)));
  order.num_sections =
      static_cast<int>(1 + std::max<int64_t>(pairs - last_pairs, 0) / order.section_pairs);
  return order;
}

// The backward's order: tile index i is key block i. The CTAs of a pair share Q, dO and dQ, query
// tile by query tile.
//
// Cards run 1 or 2 CTAs an SM, 60 (L4) to 300 in all. With sections of 8 to 16 pairs about 4 or
// more of each pair run at once, on tiles near each other. Their Q, dO and dQ do not fit into most
// L2s as a whole, but those tiles do. A section has mostly 256 CTAs or more, about as many as run
// at once, so its short CTAs fill the gaps that its long ones leave at the end.
inline BlockOrder bwd_block_order(const attention::FlashFwdParams& params, int block_keys) {
  const int64_t key_blocks = (params.seqlen_k + block_keys - 1) / block_keys;
  const int64_t section_pairs = std::clamp<int64_t>(256 / std::max<int64_t>(key_blocks, 1), 8, 16);
  return make_block_order(params, key_blocks, section_pairs, section_pairs);
}

// The forward's order: tile index i is row tile i, counted from the last. The CTAs of a pair share
// K and V.
//
// Cards run 1 to 3 CTAs an SM, 60 to 400 in all. A section has about 256 CTAs, about as many as run
// at once. So hardly more keys are in use at once than with one pair after the other, and the rule
// needs no size of L2. The last section has twice as many CTAs, so that enough short tiles fill the
// gaps that its long tiles leave at the end.
inline BlockOrder fwd_block_order(const attention::FlashFwdParams& params, int block_rows) {
  const int64_t rows = params.seqlen_q * (params.num_heads_q / params.num_heads_kv);
  const int64_t tiles = (rows + block_rows - 1) / block_rows;
  const int64_t section_pairs = std::max<int64_t>(256 / std::max<int64_t>(tiles, 1), 1);
  return make_block_order(params, tiles, section_pairs, 2 * section_pairs);
}

SA_HOST_DEVICE BlockCoord block_coord(const BlockOrder& order, int block) {
  const int section_blocks = order.section_pairs * order.blocks_per_pair;
  const int last = order.num_sections - 1;
  const int section = block / section_blocks < last ? block / section_blocks : last;
  const int first_pair = section * order.section_pairs;
  const int pairs = section < last ? order.section_pairs : order.num_pairs - first_pair;
  const int in_section = block - section * section_blocks;
  const int tile_idx = in_section / pairs;
  const int pair = first_pair + in_section - tile_idx * pairs;
  const int batch_idx = pair / order.num_heads_kv;
  return {batch_idx, pair - batch_idx * order.num_heads_kv, tile_idx};
}

}  // namespace sink_attention::cuda
