// A ring of buffers between a warp that fills them and warps that use them.
//
// Each stage has two barriers: `full`, which ends when its contents are there, and `empty`, when
// all users are done with them. Both sides go through the stages in the same order; a Place counts
// how often they have come around.
#pragma once

#include "primitives/mbarrier.h"

namespace sink_attention::cuda::sm90 {

template <int kStages_>
struct Ring {
  static constexpr int kStages = kStages_;
  primitives::Mbarrier full[kStages];
  primitives::Mbarrier empty[kStages];

  // By one thread.
  SA_DEVICE void init(int fillers, int users) {
    SA_UNROLL
    for (int stage = 0; stage < kStages; ++stage) {
      primitives::mbarrier_init(&full[stage], fillers);
      primitives::mbarrier_init(&empty[stage], users);
    }
  }

  struct Place {
    int stage = 0;
    int parity = 0;
    SA_DEVICE void advance() {
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
    SA_DEVICE Place previous() const {
      return stage == 0 ? Place{kStages - 1, parity ^ 1} : Place{stage - 1, parity};
    }
  };

  SA_DEVICE void wait_until_full(const Place& at) {
    primitives::mbarrier_wait(&full[at.stage], at.parity);
  }
  // A new ring is empty: the first round's wait returns at once.
  SA_DEVICE void wait_until_empty(const Place& at) {
    primitives::mbarrier_wait(&empty[at.stage], at.parity ^ 1);
  }
};

}  // namespace sink_attention::cuda::sm90
