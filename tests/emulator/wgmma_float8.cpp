// wgmma's product of 8-bit elements, which Hopper's tensor cores do not sum in float32.
//
// The hardware's arithmetic is undocumented; it was measured. This is the model of P. Xie et al.,
// "MMA-Sim: Bit-Accurate Reference Model of Tensor Cores and Matrix Cores" (arXiv:2511.10909),
// which they compared with the hardware bit by bit. Two other reports agree:
//
//   * DeepSeek-V3 (arXiv:2412.19437, 3.5.2): products and the accumulator are aligned to the
//     largest exponent and cut to 14 bits.
//   * SageAttention2 (arXiv:2411.10958): the lowest 10 bits of a float32 accumulator become zero
//     when nothing is added to it.
//
// A sum has 33 terms: 32 products and the accumulator. A product's exponent is the sum of its
// factors' exponents (each at least -6, as e4m3 stores them); its significand may be 2 or more.
// Then
//
//   1. all terms are cut toward zero to multiples of 2^(largest exponent - 13);
//   2. their exact sum is cut toward zero to 13 bits after its leading one.
#include <bit>
#include <cmath>

#include "emulator/wgmma_operands.h"

namespace emulator {
namespace {

using FourFloats = float __attribute__((vector_size(16)));
using FourInts = int32_t __attribute__((vector_size(16)));

constexpr int kLanes = 4;
constexpr uint32_t kExponentBits = 0x7f800000;
constexpr int32_t kKeptBits = ~0x3ff;  // sign, exponent, 13 bits of the significand
constexpr float kUnits = 0x1p13f;      // in the largest term's power of two

FourFloats load(const float* four) {
  FourFloats vector;
  __builtin_memcpy(&vector, four, sizeof(vector));
  return vector;
}
FourFloats cut(FourFloats sums) {
  return std::bit_cast<FourFloats>(std::bit_cast<FourInts>(sums) & kKeptBits);
}
FourFloats power_of_two(FourFloats values) {
  const int32_t mask = static_cast<int32_t>(kExponentBits);
  return std::bit_cast<FourFloats>(std::bit_cast<FourInts>(values) & mask);
}

struct Factors {
  OperandValues values;               // 0 for NaN
  OperandValues powers;               // of two; 0 for 0
  float not_a_number[kValuesStride];  // NaN for a row of A (column of B) that holds one, else 0
};

void take(const OperandValues& values, int count, Factors& factors) {
  for (int mn = 0; mn < count; ++mn) factors.not_a_number[mn] = 0.0f;
  for (int k = 0; k < kMaxProductDepth; ++k) {
    for (int mn = 0; mn < count; ++mn) {
      const float value = values.rows[k][mn];
      const float power = std::bit_cast<float>(std::bit_cast<uint32_t>(value) & kExponentBits);
      factors.values.rows[k][mn] = std::isnan(value) ? 0.0f : value;
      factors.powers.rows[k][mn] = value == 0.0f || std::isnan(value) ? 0.0f
                                   : power < 0x1p-6f                  ? 0x1p-6f
                                                                      : power;
      factors.not_a_number[mn] += value - value;
    }
  }
}

// The sums of one row and four columns.
FourFloats sum_of(const Factors& a, int row, const Factors& b, int col, FourFloats acc) {
  const FourFloats zero = {};
  const FourFloats not_finite = a.not_a_number[row] + load(&b.not_a_number[col]) + (acc - acc);
  const FourFloats finite_acc = not_finite == zero ? acc : zero;
  FourFloats largest = zero;
  for (int k = 0; k < kMaxProductDepth; ++k) {
    const FourFloats power = a.powers.rows[k][row] * load(&b.powers.rows[k][col]);
    largest = power > largest ? power : largest;
  }
  const FourInts has_products = largest > zero;
  const FourFloats acc_power = power_of_two(finite_acc);
  largest = has_products ? largest : zero + 1.0f;  // without products the sum is acc
  largest = acc_power > largest ? acc_power : largest;
  const FourFloats units = kUnits / largest;
  FourInts sum = __builtin_convertvector(finite_acc * units, FourInts);  // toward zero
  for (int k = 0; k < kMaxProductDepth; ++k) {
    const FourFloats product = a.values.rows[k][row] * load(&b.values.rows[k][col]);
    sum += __builtin_convertvector(product * units, FourInts);
  }
  const FourFloats cut_sum = cut(__builtin_convertvector(sum, FourFloats) * (largest / kUnits));
  const FourFloats finite = has_products ? cut_sum : cut(finite_acc);
  return not_finite == zero ? finite : acc + a.not_a_number[row] + load(&b.not_a_number[col]);
}

}  // namespace

void multiply_float8(const OperandValues& a, const OperandValues& b, int n, float* acc) {
  static Factors left, right;  // one product at a time
  take(a, kProductRows, left);
  take(b, n, right);
  for (int row = 0; row < kProductRows; ++row) {
    for (int col = 0; col < n; col += kLanes) {
      float* four = acc + row * n + col;
      const FourFloats sums = sum_of(left, row, right, col, load(four));
      __builtin_memcpy(four, &sums, sizeof(sums));
    }
  }
}

}  // namespace emulator
