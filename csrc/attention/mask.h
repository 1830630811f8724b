// Which keys a query sees: the one definition of causal, window and alignment, and what follows for
// intervals.
#pragma once

#include "attention/host_device.h"
#include "attention/problem.h"

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

// A sequence's mask. Query row i stands at key position p = i + seqlen_k - seqlen_q (aligned
// bottom-right) and sees the keys j with  0 <= j < seqlen_k  and  p - window_left <= j <= p +
// window_right;  -1 is no bound.
struct Mask {
  int64_t seqlen_q;
  int64_t seqlen_k;
  int64_t window_left;
  int64_t window_right;

  SA_HOST_DEVICE bool is_visible(int64_t q_idx, int64_t k_idx) const {
    const Range keys = visible_keys(q_idx);
    return keys.begin <= k_idx && k_idx < keys.end;
  }

  SA_HOST_DEVICE Range visible_keys(int64_t q_idx) const { return visible_keys(q_idx, q_idx + 1); }

  // The keys that some query of [q_begin, q_end) sees.
  SA_HOST_DEVICE Range visible_keys(int64_t q_begin, int64_t q_end) const {
    const int64_t shift = seqlen_k - seqlen_q;
    Range keys{0, seqlen_k};
    if (window_left >= 0) keys.begin = max_of(0, q_begin + shift - window_left);
    if (window_right >= 0) keys.end = min_of(seqlen_k, q_end + shift + window_right);
    if (q_begin >= q_end) keys.end = keys.begin;
    return keys;
  }

  // The queries that see some key of [k_begin, k_end).
  SA_HOST_DEVICE Range visible_queries(int64_t k_begin, int64_t k_end) const {
    const int64_t shift = seqlen_k - seqlen_q;
    Range queries{0, seqlen_q};
    if (window_right >= 0) queries.begin = max_of(0, k_begin - shift - window_right);
    if (window_left >= 0) queries.end = min_of(seqlen_q, k_end - shift + window_left);
    if (k_begin >= k_end) queries.end = queries.begin;
    return queries;
  }
};

SA_HOST_DEVICE Mask make_mask(const FlashFwdProblem& problem, int64_t seqlen_q, int64_t seqlen_k) {
  return {seqlen_q, seqlen_k, problem.window_left, problem.window_right};
}

}  // namespace sink_attention::attention
