// A small matrix product through all the parts of a kernel: correct, and with wrong fragments.
// Wrong fragments break no rule of the emulator, so the comparison must find them.
#include <random>

#include "emulated.h"

namespace sink_attention::tests {
namespace {

using Element = attention::BFloat16;

constexpr int kM = 32;
constexpr int kN = 16;
constexpr int kK = 64;
constexpr int kStages = 2;
constexpr int kSliceK = 16;

enum class Mistake { kNone, kRegistersOfA, kRegistersOfB, kAccumulator, kNotTransposed, kStage };

struct Gemm {
  struct Config {
    static constexpr int kThreads = 64;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = kStages * (kM + kN) * kSliceK * 2;
  };
  struct Params {
    const uint16_t* a;  // (kM, kK)
    const uint16_t* b;  // (kK, kN)
    float* c;           // (kM, kN)
    Mistake mistake;
  };

  static SA_DEVICE void load_slice(const Params& params, char* stage, int slice) {
    // A slice has rows of two chunks: 32 rows of A, then 16 of B.
    for (int chunk = thread_idx(); chunk < (kM + kN) * 2; chunk += Config::kThreads) {
      const int row = chunk / 2;
      const int col = chunk % 2 * 8;
      const uint16_t* source = row < kM ? params.a + row * kK + slice * kSliceK + col
                                        : params.b + (slice * kSliceK + row - kM) * kN + col;
      cp_async_16(stage + chunk * 16, source, true);
    }
  }

  static SA_DEVICE void multiply(const Params& params, const char* stage, float (&acc)[2][4]) {
    const int lane = lane_idx();
    const int row = warp_idx() * 16 + lane % 16;
    uint32_t a[4];
    ldmatrix_x4(a, stage + row * 32 + lane / 16 * 16);
    uint32_t b[4];  // matrices (k, n) in the order (0, 0), (8, 0), (0, 8), (8, 8)
    const char* b_row = stage + (kM + lane % 16) * 32 + lane / 16 * 16;
    if (params.mistake == Mistake::kNotTransposed) {
      ldmatrix_x4(b, b_row);
    } else {
      ldmatrix_x4_trans(b, b_row);
    }
    if (params.mistake == Mistake::kRegistersOfA) std::swap(a[1], a[2]);
    if (params.mistake == Mistake::kRegistersOfB) std::swap(b[1], b[2]);
    for (int half = 0; half < 2; ++half) {
      const uint32_t pair[2] = {b[2 * half], b[2 * half + 1]};
      mma_m16n8k16<Element>(acc[half], a, pair);
    }
  }

  static SA_DEVICE void store(const Params& params, const float (&acc)[2][4]) {
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        const int from = params.mistake == Mistake::kAccumulator ? (i ^ 3) : i;
        const int row = warp_idx() * 16 + lane_idx() / 4 + i / 2 * 8;
        const int col = half * 8 + lane_idx() % 4 * 2 + i % 2;
        store_global(params.c + row * kN + col, acc[half][from]);
      }
    }
  }

  static SA_DEVICE void run(const Params& params, char* shared) {
    const auto stage = [&](int slice) {
      return shared + slice % kStages * (Config::kSharedBytes / kStages);
    };
    load_slice(params, stage(0), 0);
    cp_async_commit();
    float acc[2][4] = {};
    for (int slice = 0; slice < kK / kSliceK; ++slice) {
      if (slice + 1 < kK / kSliceK) load_slice(params, stage(slice + 1), slice + 1);
      cp_async_commit();
      if (params.mistake != Mistake::kStage) cp_async_wait<1>();
      if (params.mistake == Mistake::kStage) cp_async_wait<2>();
      sync_threads();
      multiply(params, stage(slice), acc);
      sync_threads();
    }
    cp_async_wait<0>();
    store(params, acc);
  }
};

int num_wrong(Mistake mistake, uint64_t seed) {
  std::mt19937 random(11);
  DeviceArray<uint16_t> a("a", kM * kK);
  DeviceArray<uint16_t> b("b", kK * kN);
  DeviceArray<float> c("c", kM * kN, NAN);
  const auto fill = [&](DeviceArray<uint16_t>& matrix) {
    for (uint16_t& element : matrix) {
      const auto value = static_cast<float>(static_cast<int>(random() % 17) - 8);
      element = static_cast<uint16_t>(pack<Element>(value, 0.0f));
    }
  };
  fill(a);
  fill(b);
  emulator::settings().seed = seed;
  const VisibleBuffers buffers({a.readable(), b.readable(), c.writable()});
  launch<Gemm>({a.data(), b.data(), c.data(), mistake}, {1, 1, 1}, nullptr);
  int wrong = 0;
  for (int row = 0; row < kM; ++row) {
    for (int col = 0; col < kN; ++col) {
      float sum = 0;
      for (int k = 0; k < kK; ++k) {
        sum += attention::to_float(Element{a[row * kK + k]}) *
               attention::to_float(Element{b[k * kN + col]});
      }
      wrong += c[row * kN + col] == sum ? 0 : 1;
    }
  }
  return wrong;
}

}  // namespace

SA_SUITE(emulated_gemm) {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    check(num_wrong(Mistake::kNone, seed) == 0, "the product, seed ", seed);
  }
  for (const Mistake mistake : {Mistake::kRegistersOfA, Mistake::kRegistersOfB,
                                Mistake::kAccumulator, Mistake::kNotTransposed}) {
    const int wrong = num_wrong(mistake, 1);
    std::printf("  mistake %d: %d of %d elements wrong\n", static_cast<int>(mistake), wrong,
                kM * kN);
    check(wrong > kM * kN / 2, "mistake ", static_cast<int>(mistake), ": only ", wrong, " wrong");
  }
  expect_fault(
      "a pipeline that waits one stage late",
      {"ldmatrix_x4 at test_gemm.cpp", "before the copy of thread", "cp_async_16 at test_gemm.cpp"},
      [] { num_wrong(Mistake::kStage, 1); });
  emulator::settings().seed = 1;
}

}  // namespace sink_attention::tests
