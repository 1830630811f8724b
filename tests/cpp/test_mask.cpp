// A mask's ranges and blocks, against its visibility of each query and key.
#include <cstdint>
#include <string>
#include <vector>

#include "attention/block_list.h"
#include "attention/mask.h"
#include "check.h"

namespace sink_attention::tests {
namespace {

using attention::KeySet;
using attention::Mask;
using attention::Range;

std::string describe(const Mask& mask) {
  return std::to_string(mask.seqlen_q) + " queries, " + std::to_string(mask.seqlen_k) +
         " keys, window (" + std::to_string(mask.window_left) + ", " +
         std::to_string(mask.window_right) + "), " + std::to_string(mask.num_sink_tokens) +
         " sink tokens" + (mask.tree == nullptr ? "" : ", tree");
}

// Exact if the queries are a sequence. With a tree, some draft tokens may be visible to no query.
void check_sets(const Mask& mask, int64_t q_begin, int64_t q_end) {
  const std::string name = describe(mask);
  const KeySet keys = mask.visible_keys(q_begin, q_end);
  const Range all = mask.keys_seen_by_all(q_begin, q_end);
  for (int64_t key = 0; key < mask.seqlen_k; ++key) {
    int64_t count = 0;
    for (int64_t q = q_begin; q < q_end; ++q) count += mask.is_visible(q, key);
    const bool is_exact = mask.tree == nullptr || key < mask.context();
    check(keys.holds(key) || count == 0, name, ": key ", key, " is left out");
    // A tile of a tree begins with the depth of its first token at the least.
    if (is_exact && (mask.tree == nullptr || q_begin == 0)) {
      check(keys.holds(key) == (count > 0), name, ": key ", key, " seen by ", count);
    }
    if (all.begin <= key && key < all.end) {
      check(count == q_end - q_begin, name, ": key ", key, " is not visible to all rows");
    }
  }
  for (const int64_t block_keys : {1, 4, 16}) {
    const auto blocks = attention::blocks_of(keys, block_keys);
    std::vector<bool> listed((mask.seqlen_k + block_keys - 1) / block_keys);
    for (int64_t idx = 0; idx < blocks.count(); ++idx) {
      const int64_t block = blocks.block(idx);
      check(blocks.index(block) == idx, name, ": place of block ", block);
      check(!listed.at(block), name, ": block ", block, " comes twice");
      listed.at(block) = true;
    }
    for (size_t block = 0; block < listed.size(); ++block) {
      const Range range{static_cast<int64_t>(block) * block_keys,
                        (static_cast<int64_t>(block) + 1) * block_keys};
      const Range seen = keys.within(range);
      int64_t first = range.end, last = range.begin, count = 0;
      for (int64_t key = range.begin; key < range.end; ++key) {
        if (!keys.holds(key)) continue;
        first = attention::min_of(first, key);
        last = key + 1;
        ++count;
      }
      check(listed[block] == first < last, name, ": block ", block, " of ", block_keys);
      if (first < last) {
        check(seen.begin == first && seen.end == last, name, ": hull of block ", block);
        check(keys.holds_all(seen) == (count == last - first), name, ": hole of block ", block);
      } else {
        check(seen.begin >= seen.end, name, ": block ", block, " is not seen");
      }
    }
  }
}

void check_queries(const Mask& mask) {
  const std::string name = describe(mask);
  for (int64_t begin = 0; begin < mask.seqlen_k; begin += 5) {
    const int64_t end = attention::min_of(begin + 5, mask.seqlen_k);
    const Range queries = mask.visible_queries(begin, end);
    for (int64_t q = 0; q < mask.seqlen_q; ++q) {
      bool sees = false;
      for (int64_t key = begin; key < end; ++key) sees = sees || mask.is_visible(q, key);
      check((queries.begin <= q && q < queries.end) == sees, name, ": query ", q, " and keys from ",
            begin);
    }
  }
}

constexpr int64_t kLengths[][2] = {{1, 40}, {7, 40}, {20, 20}, {20, 9}, {3, 2}, {0, 5}, {4, 0}};
constexpr int64_t kWindows[][2] = {{-1, -1}, {-1, 0}, {0, 0}, {3, 0}, {17, 0}, {2, 5}, {4, -1}};
constexpr int64_t kSinkTokens[] = {0, 1, 4, 18, 100};

}  // namespace

SA_SUITE(mask_intervals) {
  for (const auto& [seqlen_q, seqlen_k] : kLengths) {
    for (const auto& [left, right] : kWindows) {
      for (const int64_t sinks : kSinkTokens) {
        const Mask mask{seqlen_q, seqlen_k, left, right, attention::min_of(sinks, seqlen_k),
                        nullptr};
        for (int64_t q = 0; q < seqlen_q; ++q) {
          check_sets(mask, q, q + 1);
          check_sets(mask, q, attention::min_of(q + 4, seqlen_q));
        }
        check_sets(mask, 0, seqlen_q);
        check_queries(mask);
      }
    }
  }
}

SA_SUITE(mask_tree_intervals) {
  unsigned state = 1;
  for (const auto& [seqlen_q, seqlen_k] : kLengths) {
    std::vector<int64_t> tree(seqlen_q);
    for (int64_t i = 0; i < seqlen_q; ++i) {
      state = state * 1664525u + 1013904223u;
      const int64_t parent = static_cast<int64_t>(state >> 8) % (i + 1) - 1;
      tree[i] = (parent < 0 ? 0 : tree[parent]) | int64_t{1} << i;
    }
    for (const int64_t left : {-1, 0, 2, 5, 17}) {
      for (const int64_t sinks : kSinkTokens) {
        const Mask mask{seqlen_q,   seqlen_k, left, 0, attention::min_of(sinks, seqlen_k),
                        tree.data()};
        for (int64_t q = 0; q < seqlen_q; ++q) {
          check_sets(mask, q, q + 1);
          check_sets(mask, q, attention::min_of(q + 4, seqlen_q));
        }
        check_sets(mask, 0, seqlen_q);
      }
    }
  }
}

// The last of 64 draft tokens has the sign bit.
SA_SUITE(mask_tree_of_64_tokens) {
  std::vector<int64_t> chain(64);
  for (int i = 0; i < 64; ++i) chain[i] = static_cast<int64_t>(~uint64_t{0} >> (63 - i));
  for (const int64_t left : {-1, 0, 5, 63, 70}) {
    for (const int64_t sinks : {0, 3, 20, 100}) {
      const Mask tree{64, 80, left, 0, attention::min_of(sinks, 80), chain.data()};
      const Mask causal{64, 80, left, 0, attention::min_of(sinks, 80), nullptr};
      for (int64_t q = 0; q < 64; ++q) {
        for (int64_t key = 0; key < 80; ++key) {
          check(tree.is_visible(q, key) == causal.is_visible(q, key), describe(tree), ": query ", q,
                " and key ", key);
        }
      }
    }
  }
}

}  // namespace sink_attention::tests
