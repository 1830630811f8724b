// The rounding of sums of 8-bit products in the tensor cores (emulator/wgmma_float8.cpp).
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "emulated.h"
#include "primitives/wgmma.h"

namespace sink_attention::tests {
namespace {

using attention::Float8E4M3;

constexpr int kRows = 64;
constexpr int kCols = 8;
constexpr int kDepth = 32;

struct Product {
  Float8E4M3 a[kRows][kDepth];
  Float8E4M3 b[kCols][kDepth];
  float c[kRows][kCols];

  // acc += A B^T, `steps` times; `check_sum(found, row, col)` of each.
  template <class Check>
  void run(int steps, const Check& check_sum) const {
    run_block(128, 256, [&](char* shared) {
      // Without a swizzle, rows of 16 bytes: columns 0 ... 15, then 16 ... 31.
      if (thread_idx() < 16) {
        const int row = thread_idx() % 8, half = thread_idx() / 8;
        Bytes16 bytes;
        memcpy(&bytes, b[row] + 16 * half, sizeof(bytes));
        store_shared(reinterpret_cast<Bytes16*>(shared + 128 * half + 16 * row), bytes);
      }
      fence_proxy_async();
      sync_threads();
      const int row = thread_idx() / 32 * 16 + thread_idx() % 32 / 4;
      const int col = thread_idx() % 4 * 2;
      uint32_t registers[4];
      for (int i = 0; i < 4; ++i) {
        memcpy(&registers[i], &a[row + i % 2 * 8][i / 2 * 16 + thread_idx() % 4 * 4], 4);
      }
      float acc[1][4];
      for (int i = 0; i < 4; ++i) acc[0][i] = c[row + i / 2 * 8][col + i % 2];
      warpgroup_fence_operand(acc);
      warpgroup_arrive();
      const uint64_t operand = matrix_descriptor(shared, 128, 128, Swizzle::kNone);
      for (int step = 0; step < steps; ++step) {
        wgmma_rs<Float8E4M3, Major::kK>(acc, registers, operand, true);
      }
      wgmma_commit();
      wgmma_wait<0>();
      for (int i = 0; i < 4; ++i) check_sum(acc[0][i], row + i / 2 * 8, col + i % 2);
    });
  }
};

// The same sum everywhere.
struct Term {
  float left;
  float right;
};
void check_sum(const char* name, float c, const std::vector<Term>& terms, float expected,
               int steps = 1) {
  Product product{};
  for (int k = 0; k < static_cast<int>(terms.size()); ++k) {
    for (auto& row : product.a) row[k] = attention::to_float8_e4m3(terms[k].left);
    for (auto& row : product.b) row[k] = attention::to_float8_e4m3(terms[k].right);
  }
  for (auto& row : product.c) {
    for (float& value : row) value = c;
  }
  product.run(steps, [&](float found, int row, int col) {
    check(found == expected || (std::isnan(found) && std::isnan(expected)), name, ": (", row, ", ",
          col, ") is ", found, " for ", expected);
  });
}

// The formula, term by term. An exponent of 0 is -inf.
float expected_sum(const Float8E4M3* a, const Float8E4M3* b, float c) {
  const auto exponent = [](double value, int least) {
    return value == 0 ? -1000 : std::max(std::ilogb(value), least);
  };
  int largest = exponent(c, -126);
  for (int k = 0; k < kDepth; ++k) {
    largest = std::max(
        largest, exponent(attention::to_float(a[k]), -6) + exponent(attention::to_float(b[k]), -6));
  }
  const auto cut = [](double value, int unit) {
    return std::ldexp(std::trunc(std::ldexp(value, -unit)), unit);
  };
  double sum = cut(c, largest - 13);
  for (int k = 0; k < kDepth; ++k) {
    sum += cut(static_cast<double>(attention::to_float(a[k])) * attention::to_float(b[k]),
               largest - 13);
  }
  return static_cast<float>(sum == 0 ? 0 : cut(sum, std::ilogb(sum) - 13));
}

// Any values but NaN, and accumulators as large as their products, much larger, and much smaller.
void check_random_sums() {
  std::mt19937 random(7);
  const auto draw = [&](Float8E4M3& value, int exponents) {
    do {
      value.bits = static_cast<uint8_t>(random());
      // Of fewer exponents, so that all terms count.
      value.bits =
          static_cast<uint8_t>((value.bits & 0x87) | (value.bits >> 3 & 15) % exponents << 3);
    } while ((value.bits & 0x7f) == 0x7f);
  };
  for (int round = 0; round < 24; ++round) {
    Product product;
    const int exponents = round % 3 == 0 ? 16 : round % 3 == 1 ? 4 : 1;
    for (auto& row : product.a) {
      for (Float8E4M3& value : row) draw(value, exponents);
    }
    for (auto& row : product.b) {
      for (Float8E4M3& value : row) draw(value, exponents);
    }
    for (auto& row : product.c) {
      for (float& value : row) {
        value = std::ldexp(static_cast<float>(static_cast<int32_t>(random())),
                           static_cast<int>(random() % 64) - 64);
      }
    }
    product.run(2, [&](float found, int row, int col) {
      float expected = product.c[row][col];
      for (int step = 0; step < 2; ++step) {
        expected = expected_sum(product.a[row], product.b[col], expected);
      }
      check(found == expected, "random sums, round ", round, ": (", row, ", ", col, ") is ", found,
            " for ", expected);
    });
  }
}

}  // namespace

SA_SUITE(emulated_wgmma_float8) {
  const Term one{1, 1}, four{2, 2}, twelve{6, 2}, large{256, 256}, none{0, 0};
  check_sum("small whole numbers", 3, {one, four, {-7, 13}, twelve}, 3 + 1 + 4 - 91 + 12);
  check_sum("of the accumulator, 13 bits", 1 + 0x1p-13f, {none}, 1 + 0x1p-13f);
  check_sum("of the accumulator, no more", 1 + 0x1p-13f + 0x1p-14f, {none}, 1 + 0x1p-13f);
  check_sum("a negative accumulator", -1 - 0x1p-14f, {none}, -1);
  check_sum("an accumulator beyond all products", 0x1p100f + 0x1p80f, {large}, 0x1p100f);
  check_sum("an accumulator below all products", 0x1p-100f, {one}, 1);
  // Multiples of 8 beside 2^16.
  check_sum("beside a large product", 0, {large, twelve}, 65536 + 8);
  check_sum("beside a large accumulator", 65536, {twelve}, 65536 + 8);
  check_sum("toward zero", 65536, {{-6, 2}}, 65536 - 8);
  check_sum("each term for itself", 65536, std::vector<Term>(32, four), 65536);
  check_sum("also where large ones cancel", 0, {large, {-256, 256}, four}, 0);
  // 3.515625 has the exponent 0 of its factors, 2^-18 that of stored ones: -12.
  check_sum("a product of 2 and more", 0,
            {{1.875f, 1.875f}, {0x1p-6f, 0x1p-7f}, {0x1p-6f, 0x1p-7f}}, 3.515625f + 0x1p-12f);
  check_sum("the smallest product", 0x1p-26f, {{0x1p-9f, 0x1p-9f}}, 0x1p-18f);
  check_sum("13 bits of the result", 0x1p-8f, std::vector<Term>(32, {1.875f, 1.875f}), 112.5f);
  check_sum("ones, which do not count beyond 2^14", 0, std::vector<Term>(32, one), 16384, 1024);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  check_sum("NaN", 1, {one, {NAN, 0}}, NAN);
  check_sum("infinity", -kInfinity, {large}, -kInfinity);
  check_sum("infinity and NaN", kInfinity, {{1, NAN}}, NAN);
  check_random_sums();
}

}  // namespace sink_attention::tests
