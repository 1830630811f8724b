// wgmma against plain products of integers, exactly, for every layout of an operand.
//
// Operands are written to shared memory as rows of a tile, by the contract (primitives/wgmma.h) and
// the swizzle's table (primitives/tma.h), not by the addresses that the emulation decodes.
#include <cmath>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "emulated.h"
#include "primitives/bulk.h"
#include "primitives/wgmma.h"

namespace sink_attention::tests {
namespace {

constexpr int kRows = 64;

template <class Element>
Element element_of(float value) {
  if constexpr (std::is_same_v<Element, attention::Float8E4M3>) {
    return attention::to_float8_e4m3(value);
  } else {
    return Element{static_cast<uint16_t>(pack<Element>(value, 0.0f))};
  }
}

struct Matrix {
  Matrix(int rows, int cols) : cols(cols), values(static_cast<size_t>(rows) * cols) {}
  float& at(int row, int col) { return values[static_cast<size_t>(row) * cols + col]; }
  int cols;
  std::vector<float> values;
};

// Integers that each format holds exactly, and whose sums of products are exact.
Matrix whole_numbers(int rows, int cols, uint32_t seed) {
  std::mt19937 random(seed);
  Matrix matrix(rows, cols);
  for (float& value : matrix.values) value = static_cast<int>(random() % 17) - 8;
  return matrix;
}

constexpr int row_bytes(Swizzle swizzle) { return 16 << static_cast<int>(swizzle); }

// A tile of `rows` rows and `cols` columns in slabs as wide as the swizzle's rows.
template <class Element>
struct Slabs {
  int rows;
  Swizzle swizzle;
  int at;  // where it starts in shared memory

  static constexpr int kBytes = sizeof(Element);
  int slab_cols() const { return row_bytes(swizzle) / kBytes; }
  int slab_bytes() const { return rows * row_bytes(swizzle); }
  int place(int row, int col) const {
    const int byte = col % slab_cols() * kBytes;
    const int chunk = byte / 16;
    const int swizzled = swizzle == Swizzle::k128  ? chunk ^ (row % 8)
                         : swizzle == Swizzle::k64 ? chunk ^ (row / 2 % 4)
                         : swizzle == Swizzle::k32 ? chunk ^ (row / 4 % 2)
                                                   : chunk;
    return at + col / slab_cols() * slab_bytes() + row * row_bytes(swizzle) + swizzled * 16 +
           byte % 16;
  }
  // All threads of a block write.
  void write(char* shared, int cols, Matrix& values, int num_threads) const {
    struct Pair {
      Element elements[2];
    };
    for (int i = 2 * thread_idx(); i < rows * cols; i += 2 * num_threads) {
      const int row = i / cols;
      const int col = i % cols;
      store_shared(reinterpret_cast<Pair*>(shared + place(row, col)),
                   Pair{element_of<Element>(values.at(row, col)),
                        element_of<Element>(values.at(row, col + 1))});
    }
  }
  // Columns [col, ...) from row 8 r on, which are summed over.
  uint64_t k_major(char* shared, int row, int col) const {
    const int start = at + col / slab_cols() * slab_bytes() + row * row_bytes(swizzle) +
                      col % slab_cols() * kBytes;
    return matrix_descriptor(shared + start, swizzle == Swizzle::kNone ? slab_bytes() : 0,
                             8 * row_bytes(swizzle), swizzle);
  }
  // Rows [row, ...), a multiple of 8, which are summed over; columns from a slab's first on.
  uint64_t mn_major(char* shared, int row, int col) const {
    const int start = at + col / slab_cols() * slab_bytes() + row * row_bytes(swizzle);
    const int next_rows = 8 * row_bytes(swizzle);
    if (swizzle == Swizzle::kNone) {
      return matrix_descriptor(shared + start, next_rows, slab_bytes(), swizzle);
    }
    return matrix_descriptor(shared + start, slab_bytes(), next_rows, swizzle);
  }
  uint64_t operand(Major major, char* shared, int mn, int k) const {
    return major == Major::kK ? k_major(shared, mn, k) : mn_major(shared, k, mn);
  }
};

// The inverse of the accumulators' table: the thread and the element that hold (row, col).
template <int kTilesN>
void check_accumulators(const char* name, const float (&acc)[kTilesN][4], Matrix& expected) {
  const int thread = thread_idx() % 128;
  for (int i = 0; i < kTilesN * 4; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    const int col = i / 4 * 8 + thread % 4 * 2 + i % 2;
    const float found = acc[i / 4][i % 4];
    check(found == expected.at(row, col), name, ": (", row, ", ", col, ") is ", found, " for ",
          expected.at(row, col));
  }
}

// The registers of an operand A of 64 x 32 bytes.
template <class Element>
void registers_of(Matrix& a, int k, uint32_t (&registers)[4]) {
  constexpr int kPer = 4 / sizeof(Element);
  Element elements[4 * kPer];
  const int thread = thread_idx() % 128;
  for (int i = 0; i < 4 * kPer; ++i) {
    const int reg = i / kPer;  // row, row + 8, and the same of the other half of k
    const int row = thread / 32 * 16 + thread % 32 / 4 + reg % 2 * 8;
    const int col = k + reg / 2 * 4 * kPer + thread % 4 * kPer + i % kPer;
    elements[i] = element_of<Element>(a.at(row, col));
  }
  memcpy(registers, elements, sizeof(registers));
}

constexpr const char* kSwizzleNames[] = {"no swizzle", "32 bytes", "64 bytes", "128 bytes"};

// A of 64 x kDepth, from registers or shared memory, times B of kDepth x 8 kTilesN, twice: the
// second product is added to what the first has left.
template <class Element, Major kMajorA, Major kMajorB, int kTilesN, bool kRegisters>
void check_product(Swizzle a_swizzle, Swizzle b_swizzle) {
  constexpr int kN = 8 * kTilesN;
  constexpr int kStep = 32 / sizeof(Element);
  constexpr int kDepth = 128 / sizeof(Element) * 2;  // two slabs of the widest swizzle
  Matrix a = whole_numbers(kRows, kDepth, 1);
  Matrix b = whole_numbers(kDepth, kN, 2);
  Matrix expected(kRows, kN);
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kN; ++n) {
      for (int k = 0; k < kDepth; ++k) expected.at(m, n) += 2 * a.at(m, k) * b.at(k, n);
    }
  }
  // As tiles: rows are m or n where K-major, else k.
  const auto transposed = [](Matrix& matrix) {
    Matrix transposed(matrix.cols, static_cast<int>(matrix.values.size()) / matrix.cols);
    for (int row = 0; row < transposed.cols; ++row) {
      for (int col = 0; col < matrix.cols; ++col) transposed.at(col, row) = matrix.at(row, col);
    }
    return transposed;
  };
  Matrix a_tile = kMajorA == Major::kK ? a : transposed(a);
  Matrix b_tile = kMajorB == Major::kK ? transposed(b) : b;
  // MN-major rows are filled up to whole slabs.
  const auto whole_slabs = [](Matrix& tile, int slab_cols) {
    Matrix wide(static_cast<int>(tile.values.size()) / tile.cols,
                (tile.cols + slab_cols - 1) / slab_cols * slab_cols);
    for (int i = 0; i < static_cast<int>(tile.values.size()); ++i) {
      wide.at(i / tile.cols, i % tile.cols) = tile.values[i];
    }
    return wide;
  };
  a_tile = whole_slabs(a_tile, row_bytes(a_swizzle) / static_cast<int>(sizeof(Element)));
  b_tile = whole_slabs(b_tile, row_bytes(b_swizzle) / static_cast<int>(sizeof(Element)));
  const auto rows_of = [](Matrix& tile) {
    return static_cast<int>(tile.values.size()) / tile.cols;
  };
  const int a_bytes = static_cast<int>(a_tile.values.size() * sizeof(Element));
  const int b_at = (a_bytes + 1023) / 1024 * 1024;
  const int b_bytes = static_cast<int>(b_tile.values.size() * sizeof(Element));
  const Slabs<Element> a_slabs{rows_of(a_tile), a_swizzle, 0};
  const Slabs<Element> b_slabs{rows_of(b_tile), b_swizzle, b_at};
  const std::string name =
      std::string(kRegisters ? "RS" : "SS") + ", " + std::to_string(sizeof(Element)) +
      " bytes, A " + (kMajorA == Major::kK ? "K" : "M") + "-major, " +
      kSwizzleNames[static_cast<int>(a_swizzle)] + ", B " + (kMajorB == Major::kK ? "K" : "N") +
      "-major, " + kSwizzleNames[static_cast<int>(b_swizzle)] + ", " + std::to_string(kN);
  run_block(128, b_at + b_bytes, [&](char* shared) {
    a_slabs.write(shared, a_tile.cols, a_tile, 128);
    b_slabs.write(shared, b_tile.cols, b_tile, 128);
    fence_proxy_async();
    sync_threads();
    float acc[kTilesN][4];
    for (auto& tile : acc) {
      for (float& value : tile) value = NAN;  // overwritten
    }
    uint32_t registers[kDepth / kStep][4];
    for (int k = 0; k < kDepth; k += kStep) registers_of<Element>(a, k, registers[k / kStep]);
    for (int round = 0; round < 2; ++round) {
      warpgroup_fence_operand(acc);
      warpgroup_arrive();
      for (int k = 0; k < kDepth; k += kStep) {
        const bool accumulate = k > 0 || round > 0;
        const uint64_t b_operand = b_slabs.operand(kMajorB, shared, 0, k);
        if constexpr (kRegisters) {
          wgmma_rs<Element, kMajorB>(acc, registers[k / kStep], b_operand, accumulate);
        } else {
          wgmma_ss<Element, kMajorA, kMajorB>(acc, a_slabs.operand(kMajorA, shared, 0, k),
                                              b_operand, accumulate);
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
      warpgroup_fence_operand(acc);
    }
    check_accumulators(name.c_str(), acc, expected);
  });
}

constexpr Swizzle kSwizzles[] = {Swizzle::kNone, Swizzle::k32, Swizzle::k64, Swizzle::k128};

template <class Element, Major kMajorA, Major kMajorB, int kTilesN>
void check_swizzles() {
  for (const Swizzle b : kSwizzles) {
    for (const Swizzle a : kSwizzles) {
      check_product<Element, kMajorA, kMajorB, kTilesN, false>(a, b);
    }
    if constexpr (kMajorA == Major::kK) {
      check_product<Element, kMajorA, kMajorB, kTilesN, true>(Swizzle::k128, b);
    }
  }
}

template <class Element, int kTilesN>
void check_majors() {
  check_swizzles<Element, Major::kK, Major::kK, kTilesN>();
  if constexpr (sizeof(Element) == 2) {
    check_swizzles<Element, Major::kK, Major::kMn, kTilesN>();
    check_swizzles<Element, Major::kMn, Major::kK, kTilesN>();
    check_swizzles<Element, Major::kMn, Major::kMn, kTilesN>();
  }
}

template <int... kTilesN>
void check_widths(std::integer_sequence<int, kTilesN...>) {
  (check_product<attention::BFloat16, Major::kK, Major::kMn, kTilesN + 1, false>(Swizzle::k128,
                                                                                 Swizzle::k128),
   ...);
}

// Products into two accumulators, in three groups that end one after the other.
void check_groups() {
  using Element = attention::BFloat16;
  Matrix a = whole_numbers(kRows, 16, 3);
  Matrix b = whole_numbers(16, 64, 4);
  Matrix product(kRows, 64), doubled(kRows, 64);
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < 64; ++n) {
      for (int k = 0; k < 16; ++k) product.at(m, n) += a.at(m, k) * b.at(k, n);
      doubled.at(m, n) = 2 * product.at(m, n);
    }
  }
  const Slabs<Element> a_slabs{kRows, Swizzle::k32, 0};
  const Slabs<Element> b_slabs{16, Swizzle::k128, 2048};
  // Two warpgroups, each with products of its own.
  run_block(256, 4096, [&](char* shared) {
    a_slabs.write(shared, 16, a, 256);
    b_slabs.write(shared, 64, b, 256);
    fence_proxy_async();
    sync_threads();
    float first[8][4], second[8][4];
    const auto start = [&](float (&acc)[8][4], bool accumulate) {
      wgmma_ss<Element, Major::kK, Major::kMn>(acc, a_slabs.k_major(shared, 0, 0),
                                               b_slabs.mn_major(shared, 0, 0), accumulate);
      wgmma_commit();
    };
    warpgroup_arrive();
    start(first, false);
    start(second, false);
    start(first, true);
    wgmma_wait<1>();
    check_accumulators("the second group's", second, product);
    wgmma_wait<0>();
    check_accumulators("the first and third group's", first, doubled);
    warpgroup_arrive();
    start(second, true);
    wgmma_commit();  // an empty group
    wgmma_wait<1>();
    check_accumulators("before an empty group", second, doubled);
  });
}

// A sum has the same bits in every row and column: all rows of A and columns of B are equal.
void check_order_of_sums() {
  using Element = attention::Float16;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  Matrix a(kRows, 64), b(64, 128);
  for (int k = 0; k < 64; ++k) {
    const float left = normal(random), right = normal(random);
    for (int m = 0; m < kRows; ++m) a.at(m, k) = left;
    for (int n = 0; n < 128; ++n) b.at(k, n) = right;
  }
  const Slabs<Element> a_slabs{kRows, Swizzle::k128, 0};
  const Slabs<Element> b_slabs{64, Swizzle::k128, 8192};
  float sum = 0;
  const auto check_all = [&](const auto& acc) {
    for (const auto& tile : acc) {
      for (const float value : tile) {
        if (sum == 0) sum = value;
        check(value == sum && sum != 0, "sums of the same terms: ", value, " and ", sum);
      }
    }
  };
  run_block(128, 8192 + 16384, [&](char* shared) {
    a_slabs.write(shared, 64, a, 128);
    b_slabs.write(shared, 128, b, 128);
    fence_proxy_async();
    sync_threads();
    float wide[16][4], narrow[3][4];
    warpgroup_arrive();
    for (int k = 0; k < 64; k += 16) {
      const uint64_t left = a_slabs.k_major(shared, 0, k);
      const uint64_t right = b_slabs.mn_major(shared, k, 0);
      wgmma_ss<Element, Major::kK, Major::kMn>(wide, left, right, k > 0);
      wgmma_ss<Element, Major::kK, Major::kMn>(narrow, left, right, k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    check_all(wide);
    check_all(narrow);
  });
}

// Infinities, NaNs and the smallest values, as A in registers times 1.
template <class Element>
void check_special_numbers(const char* name, std::initializer_list<uint16_t> bits) {
  const Slabs<Element> ones{8, Swizzle::k32, 0};
  Matrix one(8, 16);
  for (int n = 0; n < 8; ++n) one.at(n, 0) = 1.0f;  // B(0, n)
  for (const uint16_t value : bits) {
    run_block(128, 1024, [&](char* shared) {
      ones.write(shared, 16, one, 128);
      fence_proxy_async();
      sync_threads();
      // Column 0 belongs to the lanes that are a multiple of 4.
      const uint32_t column = lane_idx() % 4 == 0 ? value : 0;
      const uint32_t a[4] = {column, column, 0, 0};
      float acc[1][4];
      warpgroup_arrive();
      wgmma_rs<Element, Major::kK>(acc, a, ones.k_major(shared, 0, 0), false);
      wgmma_commit();
      wgmma_wait<0>();
      const float expected = attention::to_float(Element{value});
      for (const float found : acc[0]) {
        check(found == expected || (std::isnan(found) && std::isnan(expected)), name, " ", value,
              ": ", found, " for ", expected);
      }
    });
  }
}

}  // namespace

SA_SUITE(emulated_wgmma) {
  check_majors<attention::BFloat16, 16>();
  check_majors<attention::BFloat16, 10>();
  check_majors<attention::Float16, 5>();
  check_majors<attention::Float8E4M3, 12>();
  check_groups();
  check_order_of_sums();
  check_special_numbers<attention::Float16>(
      "float16", {0x0001, 0x83ff, 0x0400, 0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e00, 0x3555, 0x8000});
  check_special_numbers<attention::BFloat16>("bfloat16", {0x0001, 0x7f80, 0xff80, 0x7fc0, 0x3eab});
  check_widths(std::make_integer_sequence<int, 32>{});
}

}  // namespace sink_attention::tests
