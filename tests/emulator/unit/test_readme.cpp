// The kernel that README.md shows, and the fault that it shows.
#include "emulated.h"

namespace sink_attention::tests {
namespace {

template <bool kBarrier>
struct Reverse {
  struct Config {
    static constexpr int kThreads = 64, kMinBlocks = 1, kSharedBytes = 64 * sizeof(float);
  };
  struct Params {
    const float* in;
    float* out;
  };
  static SA_DEVICE void run(const Params& params, char* shared) {
    auto* row = reinterpret_cast<float*>(shared);
    store_shared(row + thread_idx(), load_global(params.in + thread_idx()));
    if (kBarrier) sync_threads();
    if (!kBarrier) sync_warp();
    store_global(params.out + thread_idx(), load_shared(row + 63 - thread_idx()));
  }
};

}  // namespace

SA_SUITE(emulated_readme) {
  DeviceArray<float> in("in", 64), out("out", 64);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  const VisibleBuffers buffers({in.readable(), out.writable()});
  launch<Reverse<true>>({in.data(), out.data()}, {1, 1, 1}, nullptr);
  for (size_t i = 0; i < 64; ++i) check(out[i] == in[63 - i], "reversed: ", out[i]);
  const auto without = [&] { launch<Reverse<false>>({in.data(), out.data()}, {1, 1, 1}, nullptr); };
  // The warp that runs first reads what the other has not written yet.
  expect_fault("the barrier of README.md",
               {"load_shared at test_readme.cpp", "which nobody has written"}, without);
}

}  // namespace sink_attention::tests
