// CuTe's addresses of a swizzled tile's elements, against those of our TMA box.
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/layout.hpp>
#include <cute/swizzle.hpp>

#include "emulated.h"

namespace sink_attention::tests {
namespace {

constexpr int kRows = 64;

// A box of 64 rows of one swizzle row each; the value of each 16-bit element is its index.
template <class Atom>
void check_box(Swizzle swizzle, const char* name) {
  const int cols = 8 << static_cast<int>(swizzle);
  DeviceArray<uint16_t> source("source", static_cast<size_t>(kRows * cols));
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<uint16_t>(i + 1);
  const VisibleBuffers buffers({source.readable()});
  const TensorMap map = encode_tensor_map({source.data(),
                                           2,
                                           3,
                                           {cols, kRows, 1},
                                           {2, 2 * cols, 2 * cols * kRows},
                                           {cols, kRows, 1},
                                           swizzle});
  // The layout that CuTe's TMA copies fill, in bytes (its atoms swizzle the bits of byte
  // addresses): the atom, repeated over the rows.
  const auto layout =
      cute::tile_to_shape(Atom{}, cute::make_shape(cute::Int<kRows>{}, cute::size<1>(Atom{})));
  check(static_cast<int>(cute::size<1>(Atom{})) == 2 * cols, name, ": columns");
  constexpr int kBarrierByte = 2 * kRows * 64;
  run_block(32, kBarrierByte + 8, [&](char* shared) {
    auto* barrier = reinterpret_cast<Mbarrier*>(shared + kBarrierByte);
    if (thread_idx() == 0) {
      mbarrier_init(barrier, 1);
      fence_mbarrier_init();
      mbarrier_arrive_expect_tx(barrier, 2 * kRows * cols);
      tma_load(shared, &map, barrier, {0, 0, 0});
    }
    sync_threads();
    mbarrier_wait(barrier, 0);
    for (int i = thread_idx(); i < kRows * cols; i += 32) {
      const int row = i / cols;
      const int col = i % cols;
      const int place = static_cast<int>(layout(row, 2 * col)) / 2;
      const auto found = load_shared(reinterpret_cast<const uint16_t*>(shared) + place);
      check(found == i + 1, name, ", row ", row, ", column ", col, " at ", place, ": ", int{found});
    }
  });
}

}  // namespace

SA_SUITE(cute_tma) {
  using Byte = uint8_t;
  check_box<cute::GMMA::Layout_K_SW128_Atom<Byte>>(Swizzle::k128, "128 bytes");
  check_box<cute::GMMA::Layout_K_SW64_Atom<Byte>>(Swizzle::k64, "64 bytes");
  check_box<cute::GMMA::Layout_K_SW32_Atom<Byte>>(Swizzle::k32, "32 bytes");
  check_box<cute::GMMA::Layout_K_INTER_Atom<Byte>>(Swizzle::kNone, "no swizzle");
}

}  // namespace sink_attention::tests
