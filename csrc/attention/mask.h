// Which keys a query sees: the one definition of alignment, causal masks, windows, sink tokens and
// token trees, for one query and for ranges of queries and keys.
#pragma once

#include "attention/host_device.h"
#include "attention/params.h"
#include "attention/seqlen_info.h"

namespace sink_attention::attention {

struct Range {  // [begin, end), empty where end <= begin
  int64_t begin;
  int64_t end;
};

SA_HOST_DEVICE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
SA_HOST_DEVICE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
SA_HOST_DEVICE Range intersect(Range a, Range b) {
  return {max_of(a.begin, b.begin), min_of(a.end, b.end)};
}

// The keys [0, sink_end) and those of `window`. Where the two touch or overlap, `window` holds both
// and sink_end is 0. An empty window is an empty set.
struct KeySet {
  int64_t sink_end;
  Range window;

  SA_HOST_DEVICE bool is_empty() const { return window.begin >= window.end; }
  SA_HOST_DEVICE bool holds(int64_t key) const {
    return key < sink_end || (window.begin <= key && key < window.end);
  }
  SA_HOST_DEVICE bool holds_all(Range keys) const {
    return keys.end <= sink_end || (window.begin <= keys.begin && keys.end <= window.end);
  }
  // The smallest range that holds all keys of the set in `block`.
  SA_HOST_DEVICE Range within(Range block) const {
    Range keys = intersect(window, block);
    if (block.begin < sink_end) {
      if (keys.begin >= keys.end) keys.end = min_of(sink_end, block.end);
      keys.begin = block.begin;
    }
    return keys;
  }
};

SA_HOST_DEVICE int64_t count_bits(uint64_t word) {
  word -= (word >> 1) & 0x5555555555555555u;
  word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
  word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return static_cast<int64_t>((word * 0x0101010101010101u) >> 56);
}

constexpr int64_t kMaxDraftTokens = 64;  // of a sequence with a tree mask: one bit each

// A sequence's mask. Query i stands at key position p = i + seqlen_k - seqlen_q (aligned
// bottom-right). It sees the keys j of the sequence with
//
//     j <= p + window_right   and   (p - window_left <= j  or  j < num_sink_tokens)
//
// A bound of -1 is no bound. The first num_sink_tokens tokens stay visible beside a sliding window
// (StreamingLLM, arXiv 2309.17453); without a left bound they change nothing.
//
// With a tree mask (SpecInfer, arXiv 2305.09781) the queries are draft tokens: query i is draft i,
// and its key is key context + i, where context = seqlen_k - seqlen_q. Bit d of tree[i] is set
// where draft d is draft i or one of its ancestors. Draft i stands at p = context + depth, where
// depth is the number of its ancestors. It sees the context by the rule above. Among the drafts it
// sees its ancestors and itself; the window and sink-token rules apply to their positions, as if
// the path were the sequence. window_right is 0. For example, with context = 10:
//
//     draft     0     1     2     3     4             0 -+- 1 --- 3
//     key       10    11    12    13    14               +- 2 --- 4
//     depth     0     1     1     2     2
//     position  10    11    11    12    12
//     tree      00001 00011 00101 01011 10101         (bit 0 is the last digit)
//
// Draft 3's path is drafts 0, 1, 3 at positions 10, 11, 12, so it sees keys 10, 11, 13 and the
// whole context. With window_left = 1 it sees positions 11 and 12: keys 11 and 13, and no context.
struct Mask {
  int64_t seqlen_q;
  int64_t seqlen_k;
  int64_t window_left;
  int64_t window_right;
  int64_t num_sink_tokens;  // at most seqlen_k
  const int64_t* tree;      // [seqlen_q], null unless there is a tree mask

  // The number of keys before the first query's own.
  SA_HOST_DEVICE int64_t context() const { return seqlen_k - seqlen_q; }

  SA_HOST_DEVICE bool is_visible(int64_t q_idx, int64_t k_idx) const {
    if (tree != nullptr && k_idx >= context()) {
      return k_idx <= q_idx + context() &&
             ((visible_drafts(q_idx) >> (k_idx - context())) & 1) != 0;
    }
    return visible_keys(q_idx).holds(k_idx);
  }

  // The draft tokens that draft q_idx sees, as bits. Of its path, the last window_left + 1 tokens
  // are in the window, and the first num_sink_tokens - context() are sink tokens.
  SA_HOST_DEVICE uint64_t visible_drafts(int64_t q_idx) const {
    uint64_t visible = static_cast<uint64_t>(tree[q_idx]);
    if (window_left < 0) return visible;
    const int64_t before_window = count_bits(visible) - 1 - window_left;
    uint64_t rest = visible;
    for (int64_t i = 0; i < before_window; ++i) {
      const uint64_t first = rest & (~rest + 1);
      rest ^= first;
      const bool is_sink_token = num_sink_tokens > 0 && context() + i < num_sink_tokens;
      if (!is_sink_token) visible ^= first;
    }
    return visible;
  }

  // The window part of the visible keys: all but the sink tokens before it. With a tree: a
  // superset, since a draft's index >= its depth.
  SA_HOST_DEVICE Range window_keys(int64_t q_idx) const {
    const int64_t depth =
        tree == nullptr ? q_idx : count_bits(static_cast<uint64_t>(tree[q_idx])) - 1;
    return window_keys_of(depth, q_idx, q_idx + 1);
  }

  // The keys that a query, or any query of [q_begin, q_end), sees. With a tree mask: a superset
  // from context() on.
  SA_HOST_DEVICE KeySet visible_keys(int64_t q_idx) const {
    return with_sink_tokens(window_keys(q_idx));
  }
  SA_HOST_DEVICE KeySet visible_keys(int64_t q_begin, int64_t q_end) const {
    return with_sink_tokens(window_keys_of(tree == nullptr ? q_begin : 0, q_begin, q_end));
  }

  // The keys that every query of [q_begin, q_end) sees, without sink tokens before the window.
  SA_HOST_DEVICE Range keys_seen_by_all(int64_t q_begin, int64_t q_end) const {
    Range keys{0, seqlen_k};
    if (window_left >= 0) keys.begin = max_of(0, q_end - 1 + context() - window_left);
    if (window_right >= 0) keys.end = min_of(seqlen_k, q_begin + 1 + context() + window_right);
    if (tree != nullptr) keys.end = context();
    return keys;
  }

  // The range of queries that see some key of [k_begin, k_end). Not for a tree mask.
  SA_HOST_DEVICE Range visible_queries(int64_t k_begin, int64_t k_end) const {
    Range queries{0, seqlen_q};
    if (window_right >= 0) queries.begin = max_of(0, k_begin - context() - window_right);
    if (window_left >= 0 && k_begin >= num_sink_tokens) {
      queries.end = min_of(seqlen_q, k_end - context() + window_left);
    }
    if (k_begin >= k_end) queries.end = queries.begin;
    return queries;
  }

 private:
  // For queries [q_begin, q_end) that all stand at position context() + first_depth or later.
  SA_HOST_DEVICE Range window_keys_of(int64_t first_depth, int64_t q_begin, int64_t q_end) const {
    Range keys{0, seqlen_k};
    // In a tree, drafts that are sink tokens may have any index, so the window must hold them.
    const bool has_sink_drafts = tree != nullptr && num_sink_tokens > context();
    if (window_left >= 0 && !has_sink_drafts) {
      keys.begin = max_of(0, first_depth + context() - window_left);
    }
    if (window_right >= 0) keys.end = min_of(seqlen_k, q_end + context() + window_right);
    if (q_begin >= q_end) keys.end = keys.begin;
    return keys;
  }

  SA_HOST_DEVICE KeySet with_sink_tokens(Range window) const {
    if (num_sink_tokens == 0 || window.begin >= window.end) return {0, window};
    if (num_sink_tokens >= window.begin) return {0, {0, window.end}};
    return {num_sink_tokens, window};
  }
};

SA_HOST_DEVICE Mask make_mask(const FlashFwdParams& params, int64_t seqlen_q, int64_t seqlen_k,
                              const int64_t* tree = nullptr) {
  return {seqlen_q,
          seqlen_k,
          params.window_left,
          params.window_right,
          min_of(params.num_sink_tokens, seqlen_k),
          tree};
}

// A sequence's rows of the tree mask; null without one.
SA_HOST_DEVICE const int64_t* tree_of(const FlashFwdParams& params, const SeqlenInfo& info) {
  return params.tree_mask == nullptr
             ? nullptr
             : params.tree_mask + info.q_batch * params.tree_mask_stride + info.q_row;
}

SA_HOST_DEVICE Mask make_mask(const FlashFwdParams& params, const SeqlenInfo& info) {
  return make_mask(params, info.seqlen_q, info.seqlen_k, tree_of(params, info));
}

}  // namespace sink_attention::attention
