// CuTe's layouts as an independent check of ours: the lane that holds each element of an operand,
// the elements that ldmatrix loads, and their addresses in a swizzled tile.
//
// Compiled by tests/test_cute_oracle.py with the headers of the package nvidia-cutlass.
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/layout.hpp>
#include <cute/swizzle.hpp>
#include <memory>

#include "cuda/tile/gemm.cuh"
#include "emulated.h"

namespace sink_attention::tests {
namespace {

struct Place {
  int row;
  int col;
};

// CuTe's index of element `value` of `lane` in the column-major matrix.
template <class Layout>
Place place_of(const Layout& layout, int lane, int value, int rows) {
  const int i = static_cast<int>(layout(lane, value));
  return {i % rows, i / rows};
}
template <class Traits>
Place place_in_a(int lane, int value) {
  return place_of(typename Traits::ALayout{}, lane, value, 16);
}
// CuTe has B as (n, k); here it is (k, n).
template <class Traits>
Place place_in_b(int lane, int value) {
  const Place place = place_of(typename Traits::BLayout{}, lane, value, 8);
  return {place.col, place.row};
}
template <class Traits>
Place place_in_c(int lane, int value) {
  return place_of(typename Traits::CLayout{}, lane, value, 16);
}

using BFloat16Traits = cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>;
using Float16Traits = cute::MMA_Traits<cute::SM80_16x8x16_F32F16F16F32_TN>;

template <class Element>
uint16_t bits_of_value(int value) {
  return static_cast<uint16_t>(pack<Element>(static_cast<float>(value), 0.0f));
}
uint16_t half_of(const uint32_t* registers, int value) {
  return static_cast<uint16_t>(registers[value / 2] >> 16 * (value % 2));
}

// All registers of a warp's operands; element v of a lane is half v % 2 of register v / 2.
struct Fragments {
  uint16_t a[32][8] = {};
  uint16_t b[32][4] = {};
  float c[32][4] = {};
};

template <class Element>
void multiply(Fragments& fragments) {
  run_warp([&](char*) {
    const int lane = lane_idx();
    uint32_t a[4], b[2];
    memcpy(a, fragments.a[lane], sizeof(a));
    memcpy(b, fragments.b[lane], sizeof(b));
    float acc[4] = {};
    mma_m16n8k16<Element>(acc, a, b);
    memcpy(fragments.c[lane], acc, sizeof(acc));
  });
}

// A single 1 in one register of A or B; the other operand's values are all different along k. The
// product shows at which (row, col) the emulation has the 1.
template <class Traits, class Element>
void check_mma(const char* name) {
  const auto b_at = [](Place place) { return 1 + place.row + 16 * place.col; };
  const auto a_at = [](Place place) { return 1 + place.col + 16 * (place.row % 8); };
  for (int lane = 0; lane < 32; ++lane) {
    for (int value = 0; value < 8; ++value) {
      Fragments fragments;
      fragments.a[lane][value] = bits_of_value<Element>(1);
      for (int i = 0; i < 32 * 4; ++i) {
        fragments.b[i / 4][i % 4] = bits_of_value<Element>(b_at(place_in_b<Traits>(i / 4, i % 4)));
      }
      multiply<Element>(fragments);
      const Place one = place_in_a<Traits>(lane, value);
      for (int i = 0; i < 32 * 4; ++i) {
        const Place at = place_in_c<Traits>(i / 4, i % 4);
        const int expected = at.row == one.row ? b_at({one.col, at.col}) : 0;
        check(fragments.c[i / 4][i % 4] == expected, name, ": A of lane ", lane, ", value ", value,
              " is not at (", one.row, ", ", one.col, ")");
      }
    }
    for (int value = 0; value < 4; ++value) {
      Fragments fragments;
      fragments.b[lane][value] = bits_of_value<Element>(1);
      for (int i = 0; i < 32 * 8; ++i) {
        fragments.a[i / 8][i % 8] = bits_of_value<Element>(a_at(place_in_a<Traits>(i / 8, i % 8)));
      }
      multiply<Element>(fragments);
      const Place one = place_in_b<Traits>(lane, value);
      for (int i = 0; i < 32 * 4; ++i) {
        const Place at = place_in_c<Traits>(i / 4, i % 4);
        const int expected = at.col == one.col ? a_at({at.row, one.row}) : 0;
        check(fragments.c[i / 4][i % 4] == expected, name, ": B of lane ", lane, ", value ", value,
              " is not at (", one.row, ", ", one.col, ")");
      }
    }
  }
}

// ldmatrix: a lane's row is 128 bits, and CuTe's layouts give the lane and bit of each.
template <class Traits>
void check_ldmatrix(const char* name,
                    void (*load)(uint32_t (&r)[4], const void* row, emulator::Site)) {
  constexpr int kBits = 16;
  run_warp([&](char* shared) {
    const int lane = lane_idx();
    char* row = shared + (lane * 7 % 32) * 16;
    for (int i = 0; i < 8; ++i) {
      store_shared(reinterpret_cast<uint16_t*>(row) + i, static_cast<uint16_t>(lane * 8 + i));
    }
    sync_warp();
    uint32_t r[4];
    load(r, row, emulator::here());
    for (int value = 0; value < 8; ++value) {
      const int bit = static_cast<int>(typename Traits::DstLayout{}(lane, value * kBits));
      // The source's layout is one row after another: bit 128 * lane + i.
      check(static_cast<int>(typename Traits::SrcLayout{}(bit / 128, bit % 128)) == bit,
            "CuTe's rows of ldmatrix");
      check(half_of(r, value) == bit / kBits, name, ": lane ", lane, ", value ", value, " is ",
            half_of(r, value), ", CuTe says ", bit / kBits);
    }
  });
}

void check_accumulators() {
  for (int lane = 0; lane < 32; ++lane) {
    for (int reg = 0; reg < 4; ++reg) {
      const Place place = place_in_c<BFloat16Traits>(lane, reg);
      check(cuda::accumulator_row(lane, reg) == place.row &&
                cuda::accumulator_col(lane, reg) == place.col,
            "accumulator ", reg, " of lane ", lane, " is at (", place.row, ", ", place.col, ")");
    }
  }
}

// Two neighbouring accumulators become an operand A.
void check_accumulators_as_operand() {
  using Element = attention::BFloat16;
  const auto value_at = [](int row, int col) { return row * 16 + col; };
  run_warp([&](char*) {
    const int lane = lane_idx();
    cuda::Accumulators<1, 4> acc;
    for (int n = 0; n < 4; ++n) {
      for (int reg = 0; reg < 4; ++reg) {
        const Place place = place_in_c<BFloat16Traits>(lane, reg);
        acc.c[0][n][reg] = static_cast<float>(value_at(place.row, place.col + n % 2 * 8) * (n / 2));
      }
    }
    uint32_t a[4];
    cuda::to_operand_a<Element>(acc, 0, 1, a);
    for (int value = 0; value < 8; ++value) {
      const Place place = place_in_a<BFloat16Traits>(lane, value);
      check(half_of(a, value) == bits_of_value<Element>(value_at(place.row, place.col)),
            "accumulators as operand A: lane ", lane, ", value ", value);
    }
  });
}

// The address of (row, col) in a tile: CuTe's swizzle of the row-major layout, slab after slab.
template <int kCols, class Swizzle>
void check_swizzle(const Swizzle& swizzle) {
  constexpr int kRows = 64;
  using Tile = cuda::SmemTile<attention::BFloat16, kRows, kCols>;
  constexpr int kSlab = Tile::kSlabCols;
  const auto slab = cute::make_layout(cute::make_shape(cute::Int<kRows>{}, cute::Int<kSlab>{}),
                                      cute::make_stride(cute::Int<kSlab>{}, cute::Int<1>{}));
  for (int row = 0; row < kRows; ++row) {
    for (int col = 0; col < kCols; ++col) {
      const int expected =
          col / kSlab * kRows * kSlab + static_cast<int>(swizzle(slab(row, col % kSlab)));
      const int found = Tile::offset(row, col / 8) + col % 8;
      check(found == expected, "tile of ", kCols, " columns: (", row, ", ", col, ") at ", found,
            ", CuTe says ", expected);
    }
  }
}

// The elements that the kernels' loads put into each register.
template <int kCols>
void check_operand_loads() {
  constexpr int kRows = 32;
  using Tile = cuda::SmemTile<attention::BFloat16, kRows, kCols>;
  const auto value_at = [](int row, int col) { return static_cast<uint16_t>(row * 256 + col); };
  run_block(32, sizeof(Tile), [&](char* shared) {
    auto& tile = *reinterpret_cast<Tile*>(shared);
    const int lane = lane_idx();
    for (int col = 0; col < kCols; ++col) {
      store_shared(reinterpret_cast<uint16_t*>(tile.at(lane, col)), value_at(lane, col));
    }
    sync_warp();
    constexpr int kStart = 16;  // of rows, or of columns
    uint32_t a[4], b[2][2];
    const auto check_a = [&](const char* name, const auto& expected) {
      for (int value = 0; value < 8; ++value) {
        const Place place = place_in_a<BFloat16Traits>(lane, value);
        check(half_of(a, value) == expected(place.row, place.col), name, ", ", kCols,
              " columns: lane ", lane, ", value ", value);
      }
    };
    const auto check_b = [&](const char* name, const auto& expected) {
      for (int value = 0; value < 8; ++value) {
        const Place place = place_in_b<BFloat16Traits>(lane, value % 4);
        check(half_of(b[value / 4], value % 4) == expected(place.row, place.col + value / 4 * 8),
              name, ", ", kCols, " columns: lane ", lane, ", value ", value);
      }
    };
    cuda::load_operand_a(tile, kStart, 1, a);
    check_a("load_operand_a", [&](int m, int k) { return value_at(kStart + m, 16 + k); });
    cuda::load_operand_a_trans(tile, kStart, 16, a);
    check_a("load_operand_a_trans", [&](int m, int k) { return value_at(kStart + k, 16 + m); });
    cuda::load_operand_b(tile, kStart, 1, b[0], b[1]);
    check_b("load_operand_b", [&](int k, int n) { return value_at(kStart + n, 16 + k); });
    cuda::load_operand_b_trans(tile, kStart, 16, b[0], b[1]);
    check_b("load_operand_b_trans", [&](int k, int n) { return value_at(kStart + k, 16 + n); });
  });
}

}  // namespace

SA_SUITE(cute_mma) {
  check_mma<BFloat16Traits, attention::BFloat16>("bfloat16");
  check_mma<Float16Traits, attention::Float16>("float16");
}

SA_SUITE(cute_ldmatrix) {
  check_ldmatrix<cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>>("ldmatrix_x4", ldmatrix_x4);
  check_ldmatrix<cute::Copy_Traits<cute::SM75_U16x8_LDSM_T>>("ldmatrix_x4_trans",
                                                             ldmatrix_x4_trans);
}

SA_SUITE(cute_fragments) {
  check_accumulators();
  check_accumulators_as_operand();
}

SA_SUITE(cute_tiles) {
  check_swizzle<64>(cute::Swizzle<3, 3, 3>{});
  check_swizzle<128>(cute::Swizzle<3, 3, 3>{});
  check_swizzle<32>(cute::Swizzle<2, 3, 3>{});
  check_swizzle<96>(cute::Swizzle<2, 3, 3>{});
  check_operand_loads<64>();
  check_operand_loads<128>();
  check_operand_loads<32>();
  check_operand_loads<96>();
}

}  // namespace sink_attention::tests
