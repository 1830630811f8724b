// ldmatrix.x4 and .x4.trans, element by element, from rows at any address.
#include "emulated.h"

namespace sink_attention::tests {

SA_SUITE(emulated_ldmatrix) {
  constexpr int kChunks = 64;  // of 16 bytes; the 32 rows take some of them, in no order
  const auto chunk_of = [](int matrix, int row) { return (matrix * 8 + row) * 37 % kChunks; };
  const auto value_at = [](int matrix, int row, int col) {
    return static_cast<uint16_t>(matrix * 1000 + row * 10 + col);
  };
  uint32_t plain[32][4], transposed[32][4];
  run_warp([&](char* shared) {
    const int lane = lane_idx();
    char* row = shared + 16 * chunk_of(lane / 8, lane % 8);
    for (int col = 0; col < 8; ++col) {
      store_shared(reinterpret_cast<uint16_t*>(row) + col, value_at(lane / 8, lane % 8, col));
    }
    sync_warp();
    uint32_t r[4];
    ldmatrix_x4(r, row);
    memcpy(plain[lane], r, sizeof(r));
    ldmatrix_x4_trans(r, row);
    memcpy(transposed[lane], r, sizeof(r));
  });
  // The figure of the PTX ISA, read from the matrix's side: element (row, col) goes to lane
  // 4 row + col / 2, the even columns to the low half.
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int row = 0; row < 8; ++row) {
      for (int col = 0; col < 8; ++col) {
        const auto element = [&](const uint32_t (&r)[32][4], int major, int minor) {
          return static_cast<uint16_t>(r[4 * major + minor / 2][matrix] >> 16 * (minor % 2));
        };
        const uint16_t expected = value_at(matrix, row, col);
        check(element(plain, row, col) == expected, "ldmatrix_x4: matrix ", matrix, " (", row, ", ",
              col, "): ", element(plain, row, col));
        check(element(transposed, col, row) == expected, "ldmatrix_x4_trans: matrix ", matrix, " (",
              row, ", ", col, "): ", element(transposed, col, row));
      }
    }
  }
}

}  // namespace sink_attention::tests
