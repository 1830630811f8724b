// CuTe's layouts of wgmma's operands and fragments as an independent check of ours: the emulator's
// decoding of descriptors, the kernels' descriptors of their tiles, and the lane of each element.
//
// Compiled by tests/test_cute_oracle.py with the headers of the package nvidia-cutlass.
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "cuda/sm90/operands.cuh"
#include "emulated.h"
#include "emulator/wgmma_operands.h"
#include "primitives/bulk.h"

namespace sink_attention::tests {
namespace {

namespace gmma = cute::SM90::GMMA;
using cute::_1;
using cute::_2;
using cute::Int;
using emulator::ElementType;
using emulator::OperandLayout;

constexpr gmma::Major major_of(Major major) {
  return major == Major::kK ? gmma::Major::K : gmma::Major::MN;
}

// CuTe's layout of kMn x kK elements, whole numbers of atoms.
template <class Atom, int kMn, int kK, bool kMnFirst>
auto tile_of() {
  const auto shape = cute::make_shape(Int<kMn>{}, Int<kK>{});
  if constexpr (kMnFirst) {
    return cute::tile_to_shape(Atom{}, shape);
  } else {
    return cute::tile_to_shape(Atom{}, shape, cute::Step<_2, _1>{});
  }
}

// The index of an element in shared memory that starts at the start of a swizzle pattern. (Such a
// layout leaves the swizzle to the pointer.)
template <class Layout>
int index_of(const Layout& layout, int mn, int k) {
  return static_cast<int>(cute::as_position_independent_swizzle_layout(layout)(mn, k));
}

// The descriptor of the operand that starts at (mn, k). On the host CuTe knows no addresses in
// shared memory (and says so); where the operand starts is what CuTe adds to the tile's own
// descriptor.
template <Major kMajor, class Element, int kCount, int kDepth, class Layout>
uint64_t cute_descriptor(const Layout& layout, int mn, int k) {
  static const uint64_t of_tile = [&] {
    static Element memory[1];
    const auto tile = cute::make_tensor(cute::make_smem_ptr(memory), layout);
    const auto operand = cute::local_tile(tile, cute::make_shape(Int<kCount>{}, Int<kDepth>{}),
                                          cute::make_coord(0, 0));
    return static_cast<uint64_t>(gmma::make_gmma_desc<major_of(kMajor)>(operand));
  }();
  const auto start =
      static_cast<uint64_t>(cute::get_nonswizzle_portion(layout)(mn, k)) * sizeof(Element);
  return of_tile + start / 16;
}

// The emulator's address of each element of each operand of a tile, by CuTe's descriptors.
template <Major kMajor, ElementType kType, class Element, class Atom, bool kMnFirst = true>
void check_decoding(const char* name) {
  constexpr int kMn = 128;
  constexpr int kK = 256 / sizeof(Element);
  constexpr int kDepth = 32 / sizeof(Element);
  const auto layout = tile_of<Atom, kMn, kK, kMnFirst>();
  for (int first = 0; first < kMn; first += 64) {
    for (int step = 0; step < kK; step += kDepth) {
      const uint64_t descriptor = cute_descriptor<kMajor, Element, 64, kDepth>(layout, first, step);
      const OperandLayout decoded(descriptor, kMajor == Major::kMn, kType);
      check(decoded.refusal(64) == nullptr, name, ": refused");
      for (int mn = 0; mn < 64; ++mn) {
        for (int k = 0; k < kDepth; ++k) {
          const int expected =
              index_of(layout, first + mn, step + k) * static_cast<int>(sizeof(Element));
          const int found = decoded.address(mn, k);
          check(found == expected, name, ": (", first + mn, ", ", step + k, ") at ", found,
                ", CuTe says ", expected);
        }
      }
    }
  }
}

// The kernels' descriptors of a tile: their addresses, and their fields against CuTe's, for both
// majors. A tile's rows are mn in a K-major operand, and k in an MN-major one.
template <int kRows, int kCols>
void check_tile() {
  using Element = attention::BFloat16;
  using Tile = cuda::SmemTile<Element, kRows, kCols>;
  using Operand = cuda::sm90::Operand<Tile>;
  constexpr bool kWide = Tile::kSlabCols == 64;
  using KAtom = std::conditional_t<kWide, gmma::Layout_K_SW128_Atom<cute::bfloat16_t>,
                                   gmma::Layout_K_SW64_Atom<cute::bfloat16_t>>;
  using MnAtom = std::conditional_t<kWide, gmma::Layout_MN_SW128_Atom<cute::bfloat16_t>,
                                    gmma::Layout_MN_SW64_Atom<cute::bfloat16_t>>;
  // A slab is all rows: tiles of atoms go down the rows first.
  const auto by_rows = tile_of<KAtom, kRows, kCols, true>();
  const auto by_cols = tile_of<MnAtom, kCols, kRows, false>();
  constexpr int kDepth = 16;
  const auto check_operand = [](const char* name, uint64_t found, uint64_t expected,
                                bool leading_counts, bool mn_major, int count, const auto& at) {
    const auto fields = [&](uint64_t descriptor) {
      return leading_counts ? descriptor : descriptor & ~(uint64_t{0x3fff} << 16);
    };
    check(fields(found) == fields(expected), name, " of ", kRows, " x ", kCols, ": descriptor ",
          std::hex, found, ", CuTe's ", expected);
    const OperandLayout decoded(found, mn_major, ElementType::kBFloat16);
    for (int mn = 0; mn < count; ++mn) {
      for (int k = 0; k < kDepth; ++k) {
        check(decoded.address(mn, k) == 2 * at(mn, k), name, " of ", kRows, " x ", kCols, ": (", mn,
              ", ", k, ") at ", decoded.address(mn, k), ", CuTe says ", 2 * at(mn, k));
      }
    }
  };
  run_block(32, sizeof(Tile), [&](char* shared) {
    if (lane_idx() != 0) return;
    const auto& tile = *reinterpret_cast<const Tile*>(shared);
    constexpr int kCount = kRows % 64 == 0 ? 64 : kRows;
    for (int row = 0; row < kRows; row += kCount) {
      for (int step = 0; step < kCols / kDepth; ++step) {
        // The leading offset of a swizzled K-major operand is not used; CuTe says 1, as we do.
        check_operand("K-major", Operand::k_major(tile, row) + Operand::k_major_step(step),
                      cute_descriptor<Major::kK, cute::bfloat16_t, kCount, kDepth>(by_rows, row,
                                                                                   step * kDepth),
                      true, false, kCount, [&](int mn, int k) {
                        return index_of(by_rows, row + mn, step * kDepth + k);
                      });
      }
    }
    for (int step = 0; step < kRows / kDepth; ++step) {
      // All columns, and one slab of them after another (whose leading offset is not used).
      check_operand(
          "MN-major", Operand::mn_major(tile, 0, 0) + Operand::mn_major_step(step),
          cute_descriptor<Major::kMn, cute::bfloat16_t, kCols, kDepth>(by_cols, 0, step * kDepth),
          kCols > Tile::kSlabCols, true, kCols,
          [&](int mn, int k) { return index_of(by_cols, mn, step * kDepth + k); });
      for (int col = 0; col < kCols; col += Tile::kSlabCols) {
        check_operand(
            "a slab, MN-major", Operand::mn_major(tile, 0, col) + Operand::mn_major_step(step),
            cute_descriptor<Major::kMn, cute::bfloat16_t, Tile::kSlabCols, kDepth>(by_cols, col,
                                                                                   step * kDepth),
            false, true, Tile::kSlabCols,
            [&](int mn, int k) { return index_of(by_cols, col + mn, step * kDepth + k); });
      }
    }
  });
}

template <class Element>
Element element_of(int value) {
  if constexpr (sizeof(Element) == 1) {
    return attention::to_float8_e4m3(static_cast<float>(value));
  } else {
    return Element{static_cast<uint16_t>(pack<Element>(static_cast<float>(value), 0.0f))};
  }
}

// A times a row of unit matrices, so that the accumulators are A at (row, col % depth). A's values
// are parts of its coordinates, which every format holds exactly.
template <class Traits, class Element, bool kRegisters>
void check_fragments(const char* name) {
  constexpr int kDepth = 32 / sizeof(Element);
  constexpr int kN = 64;
  const auto value_at = [](int part, int row, int col) {
    return part == 0 ? row % 8 : part == 1 ? row / 8 : part == 2 ? col % 8 : col / 8;
  };
  for (int part = 0; part < 4; ++part) {
    // Both in rows of 32 bytes of 16-byte chunks, unswizzled: chunk c of row r at 1024 c + 16 r, so
    // that nothing but the fragments is looked at.
    constexpr int kPer = 16 / sizeof(Element);
    run_block(128, 4096, [&](char* shared) {
      for (int i = thread_idx(); i < 2 * 64 * 2; i += 128) {
        const int chunk = i % 2, row = i / 2 % 64;
        const bool is_b = i >= 128;
        struct {
          alignas(16) Element elements[kPer];
        } vector;
        for (int e = 0; e < kPer; ++e) {
          const int k = chunk * kPer + e;
          vector.elements[e] =
              element_of<Element>(is_b ? (row % kDepth == k ? 1 : 0) : value_at(part, row, k));
        }
        Bytes16 bytes;
        memcpy(&bytes, &vector, sizeof(bytes));
        store_shared(
            reinterpret_cast<Bytes16*>(shared + (is_b ? 2048 : 0) + chunk * 1024 + row * 16),
            bytes);
      }
      fence_proxy_async();
      sync_threads();
      const int thread = thread_idx();
      const uint64_t a = matrix_descriptor(shared, 1024, 128, Swizzle::kNone);
      const uint64_t b = matrix_descriptor(shared + 2048, 1024, 128, Swizzle::kNone);
      float acc[kN / 8][4];
      uint32_t registers[4];
      if constexpr (kRegisters) {
        Element elements[16 / sizeof(Element)];
        for (int value = 0; value < static_cast<int>(16 / sizeof(Element)); ++value) {
          const int i = static_cast<int>(typename Traits::ALayout{}(thread, value));
          elements[value] = element_of<Element>(value_at(part, i % 64, i / 64));
        }
        memcpy(registers, elements, sizeof(registers));
      }
      warpgroup_arrive();
      if constexpr (kRegisters) {
        wgmma_rs<Element, Major::kK>(acc, registers, b, false);
      } else {
        wgmma_ss<Element, Major::kK, Major::kK>(acc, a, b, false);
      }
      wgmma_commit();
      wgmma_wait<0>();
      for (int value = 0; value < kN / 2; ++value) {
        const int i = static_cast<int>(typename Traits::CLayout{}(thread, value));
        const int row = i % 64, col = i / 64;
        check(acc[value / 4][value % 4] == value_at(part, row, col % kDepth), name, ": thread ",
              thread, ", value ", value, " is ", acc[value / 4][value % 4], ", CuTe says (", row,
              ", ", col, ")");
      }
    });
  }
}

}  // namespace

SA_SUITE(cute_wgmma_operands) {
  using cute::bfloat16_t;
  using cute::float_e4m3_t;
  constexpr ElementType kBFloat16 = ElementType::kBFloat16;
  constexpr ElementType kFloat8 = ElementType::kFloat8E4M3;
  constexpr Major kK = Major::kK, kMn = Major::kMn;
  check_decoding<kK, kBFloat16, bfloat16_t, gmma::Layout_K_SW128_Atom<bfloat16_t>>("K, 128 bytes");
  check_decoding<kK, kBFloat16, bfloat16_t, gmma::Layout_K_SW64_Atom<bfloat16_t>>("K, 64 bytes");
  check_decoding<kK, kBFloat16, bfloat16_t, gmma::Layout_K_SW32_Atom<bfloat16_t>>("K, 32 bytes");
  check_decoding<kK, kBFloat16, bfloat16_t, gmma::Layout_K_INTER_Atom<bfloat16_t>>("K, no swizzle");
  check_decoding<kMn, kBFloat16, bfloat16_t, gmma::Layout_MN_SW128_Atom<bfloat16_t>>(
      "MN, 128 bytes");
  check_decoding<kMn, kBFloat16, bfloat16_t, gmma::Layout_MN_SW64_Atom<bfloat16_t>>("MN, 64 bytes");
  check_decoding<kMn, kBFloat16, bfloat16_t, gmma::Layout_MN_SW32_Atom<bfloat16_t>>("MN, 32 bytes");
  check_decoding<kMn, kBFloat16, bfloat16_t, gmma::Layout_MN_INTER_Atom<bfloat16_t>>(
      "MN, no swizzle");
  // Atoms that follow each other along k first.
  check_decoding<kK, kBFloat16, bfloat16_t, gmma::Layout_K_SW32_Atom<bfloat16_t>, false>(
      "K, 32 bytes, k first");
  check_decoding<kK, kBFloat16, bfloat16_t, gmma::Layout_K_INTER_Atom<bfloat16_t>, false>(
      "K, no swizzle, k first");
  check_decoding<kMn, kBFloat16, bfloat16_t, gmma::Layout_MN_SW64_Atom<bfloat16_t>, false>(
      "MN, 64 bytes, k first");
  check_decoding<kMn, kBFloat16, bfloat16_t, gmma::Layout_MN_INTER_Atom<bfloat16_t>, false>(
      "MN, no swizzle, k first");
  check_decoding<kK, kFloat8, float_e4m3_t, gmma::Layout_K_SW128_Atom<float_e4m3_t>>("float8, 128");
  check_decoding<kK, kFloat8, float_e4m3_t, gmma::Layout_K_SW64_Atom<float_e4m3_t>>("float8, 64");
  check_decoding<kK, kFloat8, float_e4m3_t, gmma::Layout_K_SW32_Atom<float_e4m3_t>>("float8, 32");
  check_decoding<kK, kFloat8, float_e4m3_t, gmma::Layout_K_INTER_Atom<float_e4m3_t>>("float8, no");
}

SA_SUITE(cute_wgmma_tiles) {
  check_tile<64, 64>();
  check_tile<128, 128>();
  check_tile<192, 64>();
  check_tile<80, 256>();
  check_tile<128, 96>();
  check_tile<64, 32>();
  check_tile<96, 192>();
}

SA_SUITE(cute_wgmma_fragments) {
  using attention::BFloat16;
  using attention::Float16;
  using attention::Float8E4M3;
  constexpr auto kK = gmma::Major::K;
  check_fragments<cute::MMA_Traits<cute::SM90_64x64x16_F32BF16BF16_SS<kK, kK>>, BFloat16, false>(
      "bfloat16, SS");
  check_fragments<cute::MMA_Traits<cute::SM90_64x64x16_F32BF16BF16_RS<kK, kK>>, BFloat16, true>(
      "bfloat16, RS");
  check_fragments<cute::MMA_Traits<cute::SM90_64x64x16_F32F16F16_RS<kK, kK>>, Float16, true>(
      "float16, RS");
  check_fragments<cute::MMA_Traits<cute::SM90_64x64x32_F32E4M3E4M3_SS_TN<>>, Float8E4M3, false>(
      "float8, SS");
  check_fragments<cute::MMA_Traits<cute::SM90_64x64x32_F32E4M3E4M3_RS_TN<>>, Float8E4M3, true>(
      "float8, RS");
}

}  // namespace sink_attention::tests
