// Warp-wide operations: shfl, shfl_xor, any, first_lane, and sync_warp's order.
#include "emulated.h"

namespace sink_attention::tests {

SA_SUITE(emulated_warp) {
  for (int mask = 0; mask < 32; ++mask) {
    run_block(64, 0, [mask](char*) {
      const int lane = lane_idx();
      const int warp = warp_idx();
      const int base = 100 * warp;
      check(shfl_xor(base + lane, mask) == base + (lane ^ mask), "shfl_xor of int, mask ", mask);
      check(shfl(base + lane, mask) == base + mask, "shfl of one lane, ", mask);
      check(shfl(base + lane, lane + mask) == base + (lane + mask) % 32, "shfl wraps, ", mask);
      check(shfl_xor(0.5f * lane, mask) == 0.5f * (lane ^ mask), "shfl_xor of float");
      check(shfl(uint32_t{0xffffff00u} + lane, 31 - lane) == 0xffffff00u + 31 - lane,
            "shfl of uint32_t");
      check(any(lane == mask && warp == 1) == (warp == 1), "any of lane ", mask);
      check(!any(false), "any of none");
      check(first_lane(lane >= mask && warp == 1) == (warp == 1 ? mask : 32),
            "first_lane from lane ", mask);
    });
  }
  // Sums in a tree of shuffles, the way a row's maximum is found.
  run_block(128, 0, [](char*) {
    float sum = static_cast<float>(thread_idx());
    for (int mask = 16; mask > 0; mask /= 2) sum += shfl_xor(sum, mask);
    const int warp = warp_idx();
    check(sum == 32 * 32 * warp + 496, "sum of warp ", warp, ": ", sum);
  });
  expect_no_fault("sync_warp orders lanes", [] {
    run_warp([](char* shared) {
      auto* words = reinterpret_cast<int*>(shared);
      for (int round = 0; round < 3; ++round) {
        store_shared(words + lane_idx(), round * 32 + lane_idx());
        sync_warp();
        const int other = (lane_idx() + 5) % 32;
        check(load_shared(words + other) == round * 32 + other, "a neighbour's word");
        sync_warp();
      }
    });
  });
}

}  // namespace sink_attention::tests
