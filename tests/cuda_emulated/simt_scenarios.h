// The scenarios that simt's forward and backward suites share.
#pragma once

#include <string>
#include <vector>

#include "buffers.h"
#include "emulator/machine.h"
#include "scenario.h"

namespace sink_attention::tests {

// Calls check(scenario, seed) for every stride-th scenario of the test matrix. Rows are aligned
// where closes_gaps(seed).
template <class Closes, class Check>
void for_each_scenario(Layout layout, DataType dtype, size_t stride, const Closes& closes_gaps,
                       const Check& check) {
  unsigned seed = 0;
  const std::vector<Spec> specs = make_specs(layout, dtype);
  for (size_t i = 0; i < specs.size(); i += stride) {
    Scenario s = make_scenario(specs[i], ++seed);
    if (closes_gaps(seed)) close_gaps(s);
    emulator::settings().seed = seed;
    check(s, seed);
  }
}

// Calls check(scenario, name) for softmax scales that reverse the order of scores, make all scores
// equal or P one-hot; each with and without softcap.
template <class Check>
void for_each_scale(const std::vector<double>& softmax_scales, const Check& check) {
  for (const double softmax_scale : softmax_scales) {
    for (const double softcap : {0.0, 5.0}) {
      Spec spec;
      spec.seqlen_q = 9;
      spec.seqlen_k = 70;
      spec.window_right = 0;
      spec.softcap = softcap;
      spec.sink = 0.25;
      spec.head_dim = 24;
      spec.head_dim_v = 8;
      Scenario s = make_scenario(spec, 3);
      s.params.softmax_scale = softmax_scale;
      check(s, s.name + " scale " + std::to_string(softmax_scale));
    }
  }
}

// 4 query heads on 2 of keys, causal, with a sink.
inline Spec causal_spec(int64_t seqlen) {
  Spec spec;
  spec.seqlen_q = spec.seqlen_k = seqlen;
  spec.window_right = 0;
  spec.sink = 0.5;
  spec.num_heads_q = 4;
  spec.num_heads_kv = 2;
  return spec;
}

}  // namespace sink_attention::tests
