// A ring of shared-memory stages between producer and consumer warps.
//
// Each stage has two mbarriers. `full` completes when the stage's contents are there. `empty`
// completes when all consumers have read them. Both sides visit the stages in the same order; a
// PipelineState holds the stage and the parity of its current phase.
#pragma once

#include "primitives/mbarrier.h"

namespace sink_attention::cuda::sm90 {

template <int kStages_>
struct Ring {
  static constexpr int kStages = kStages_;
  primitives::Mbarrier full[kStages];
  primitives::Mbarrier empty[kStages];

  // By one thread. producers, consumers: arrivals that complete `full` and `empty`.
  SA_DEVICE void init(int producers, int consumers) {
    SA_UNROLL
    for (int stage = 0; stage < kStages; ++stage) {
      primitives::mbarrier_init(&full[stage], producers);
      primitives::mbarrier_init(&empty[stage], consumers);
    }
  }

  struct PipelineState {
    int stage = 0;
    int parity = 0;
    SA_DEVICE void advance() {
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
    SA_DEVICE PipelineState previous() const {
      return stage == 0 ? PipelineState{kStages - 1, parity ^ 1} : PipelineState{stage - 1, parity};
    }
  };

  SA_DEVICE void wait_until_full(const PipelineState& state) {
    primitives::mbarrier_wait(&full[state.stage], state.parity);
  }
  // A new ring is empty: in the first round the wait returns at once.
  SA_DEVICE void wait_until_empty(const PipelineState& state) {
    primitives::mbarrier_wait(&empty[state.stage], state.parity ^ 1);
  }
};

}  // namespace sink_attention::cuda::sm90
