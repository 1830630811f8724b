// mma.m16n8k16 against a plain product of integers, exactly. The fragments are filled by the
// inverse of the PTX ISA's tables: the lane and the element that hold (row, col).
#include <random>

#include "emulated.h"

namespace sink_attention::tests {
namespace {

struct Place {
  int lane;
  int element;
};
Place place_in_a(int row, int col) {
  return {row % 8 * 4 + col % 8 / 2, (col >= 8 ? 4 : 0) + (row >= 8 ? 2 : 0) + col % 2};
}
Place place_in_b(int row, int col) { return {col * 4 + row % 8 / 2, (row >= 8 ? 2 : 0) + row % 2}; }
Place place_in_c(int row, int col) { return {row % 8 * 4 + col / 2, (row >= 8 ? 2 : 0) + col % 2}; }

template <class Element>
uint16_t bits_of_value(float value) {
  return static_cast<uint16_t>(pack<Element>(value, 0.0f));
}

template <class Element>
void check_products(const char* name) {
  std::mt19937 random(7);
  const auto value = [&] { return static_cast<float>(static_cast<int>(random() % 33) - 16); };
  for (int round = 0; round < 20; ++round) {
    float a[16][16], b[16][8], c[16][8], expected[16][8];
    uint16_t a_elements[32][8], b_elements[32][4];
    float c_elements[32][4];
    for (int row = 0; row < 16; ++row) {
      for (int col = 0; col < 16; ++col) {
        const Place place = place_in_a(row, col);
        a[row][col] = value();
        a_elements[place.lane][place.element] = bits_of_value<Element>(a[row][col]);
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int col = 0; col < 8; ++col) {
        const Place in_b = place_in_b(row, col);
        b[row][col] = value();
        b_elements[in_b.lane][in_b.element] = bits_of_value<Element>(b[row][col]);
        const Place in_c = place_in_c(row, col);
        c[row][col] = value();
        c_elements[in_c.lane][in_c.element] = c[row][col];
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int col = 0; col < 8; ++col) {
        expected[row][col] = c[row][col];
        for (int k = 0; k < 16; ++k) expected[row][col] += a[row][k] * b[k][col];
      }
    }
    run_warp([&](char*) {
      const int lane = lane_idx();
      uint32_t a_registers[4], b_registers[2];
      memcpy(a_registers, a_elements[lane], sizeof(a_registers));
      memcpy(b_registers, b_elements[lane], sizeof(b_registers));
      float acc[4];
      memcpy(acc, c_elements[lane], sizeof(acc));
      mma_m16n8k16<Element>(acc, a_registers, b_registers);
      memcpy(c_elements[lane], acc, sizeof(acc));
    });
    for (int row = 0; row < 16; ++row) {
      for (int col = 0; col < 8; ++col) {
        const Place place = place_in_c(row, col);
        const float found = c_elements[place.lane][place.element];
        check(found == expected[row][col], name, " (", row, ", ", col, "): ", found, " for ",
              expected[row][col]);
      }
    }
  }
}

}  // namespace

SA_SUITE(emulated_mma) {
  check_products<attention::BFloat16>("bfloat16");
  check_products<attention::Float16>("float16");
}

}  // namespace sink_attention::tests
