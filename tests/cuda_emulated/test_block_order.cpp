// The order in which thread blocks start, on the host.
#include <algorithm>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/device/block_order.h"

namespace sink_attention::tests {
namespace {

using attention::FlashFwdParams;
using cuda::BlockCoord;
using cuda::BlockOrder;

FlashFwdParams make_params(int64_t batch, int64_t num_heads_kv, int64_t rows, int64_t keys) {
  FlashFwdParams params{};
  params.batch = batch;
  params.num_heads_q = 2 * num_heads_kv;  // two rows a position
  params.num_heads_kv = num_heads_kv;
  params.seqlen_q = rows / 2;
  params.seqlen_k = keys;
  return params;
}

// Every block of every pair runs once, in the order of the pair's tile indices. At most `most_open`
// pairs are begun and not ended. After the last pair's first tile there remain the other blocks of
// `last_pairs` pairs, or of all pairs if there are fewer.
void check_order(const BlockOrder& order, int64_t batch, int64_t heads, int64_t blocks_per_pair,
                 int64_t most_open, int64_t last_pairs) {
  const std::string name = "order of " + std::to_string(batch) + "x" + std::to_string(heads) +
                           " pairs, " + std::to_string(blocks_per_pair) + " blocks each: ";
  const int64_t pairs = batch * heads;
  check(order.num_blocks() == pairs * blocks_per_pair, name, order.num_blocks(), " blocks");
  std::vector<int64_t> next_tile(pairs, 0);
  std::set<int64_t> open;
  int64_t last_first = -1;
  size_t open_at_once = 0;
  bool in_turn = true;
  for (int block = 0; block < order.num_blocks(); ++block) {
    const BlockCoord coord = cuda::block_coord(order, block);
    if (coord.batch_idx < 0 || coord.batch_idx >= batch || coord.kv_head < 0 ||
        coord.kv_head >= heads) {
      return check(false, name, "block ", block, " is of no pair");
    }
    const int64_t pair = coord.batch_idx * heads + coord.kv_head;
    in_turn = in_turn && coord.tile_idx == next_tile[pair]++;
    if (coord.tile_idx == 0) {
      last_first = block;
      open.insert(pair);
    }
    open_at_once = std::max(open_at_once, open.size());
    if (coord.tile_idx == blocks_per_pair - 1) open.erase(pair);
  }
  for (const int64_t count : next_tile) in_turn = in_turn && count == blocks_per_pair;
  check(in_turn, name, "a pair's blocks are not all there, in their order");
  check(static_cast<int64_t>(open_at_once) <= most_open, name, open_at_once, " pairs open");
  const int64_t after = order.num_blocks() - 1 - last_first;
  check(after >= std::min(pairs, last_pairs) * (blocks_per_pair - 1), name, after,
        " blocks after the last first one");
}

void check_bwd(int64_t batch, int64_t heads, int64_t keys, int64_t section_pairs) {
  const BlockOrder order = cuda::bwd_block_order(make_params(batch, heads, 128, keys), 64);
  check_order(order, batch, heads, (keys + 63) / 64, 2 * section_pairs - 1, section_pairs);
}

void check_fwd(int64_t batch, int64_t heads, int64_t rows, int64_t section_pairs) {
  const BlockOrder order = cuda::fwd_block_order(make_params(batch, heads, rows, 64), 128);
  check_order(order, batch, heads, (rows + 127) / 128, 3 * section_pairs - 1, 2 * section_pairs);
}

template <class Make>
void check_too_many(const char* name, const Make& make) {
  check(make(2).num_blocks() == INT32_MAX - 1, name, ": as many as there can be");
  std::string message;
  try {
    make(3);
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  check(message == "sink_attention_ext: more rows or keys than one launch can take", name,
        ": too many blocks: ", message);
}

}  // namespace

SA_SUITE(cuda_block_order) {
  for (const int64_t batch : {0, 1, 2, 5, 13}) {
    for (const int64_t heads : {1, 3, 8, 16}) {
      check_bwd(batch, heads, 64, 16);        // 1 block a pair
      check_bwd(batch, heads, 1000, 16);      // 16
      check_bwd(batch, heads, 64 * 20, 12);   // 20
      check_bwd(batch, heads, 64 * 100, 8);   // 100
      check_fwd(batch, heads, 2, 256);        // 1
      check_fwd(batch, heads, 1000, 32);      // 8
      check_fwd(batch, heads, 128 * 100, 2);  // 100
      check_fwd(batch, heads, 128 * 300, 1);  // 300
    }
  }
  // Nothing to do: an empty grid.
  check(cuda::bwd_block_order(make_params(2, 3, 0, 0), 64).num_blocks() == 0, "no keys");
  check(cuda::fwd_block_order(make_params(2, 3, 0, 0), 128).num_blocks() == 0, "no rows");
  // Few pairs of very many blocks: nothing in between is larger than the number of all.
  const BlockOrder order = cuda::bwd_block_order(make_params(1, 1, 128, INT32_MAX), 1);
  check(order.num_blocks() == INT32_MAX, "one pair of ", order.num_blocks(), " blocks");
  check(cuda::block_coord(order, INT32_MAX - 1).tile_idx == INT32_MAX - 1, "its last block");
  constexpr int64_t kHalf = INT32_MAX / 2;
  check_too_many("backward", [](int64_t batch) {
    return cuda::bwd_block_order(make_params(batch, kHalf / 9, 128, 64 * 9), 64);
  });
  check_too_many("forward", [](int64_t batch) {
    return cuda::fwd_block_order(make_params(batch, kHalf / 9, 128 * 9, 64), 128);
  });
}

}  // namespace sink_attention::tests
