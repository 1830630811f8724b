// wgmma's operands: where a matrix descriptor says that they lie, as numbers; and their product.
#pragma once

#include <cstdint>
#include <vector>

namespace emulator {

constexpr int kProductRows = 64;
constexpr int kMaxProductCols = 256;
constexpr int kMaxProductDepth = 32;

enum class ElementType { kBFloat16, kFloat16, kFloat8E4M3 };

inline int bytes_of(ElementType type) { return type == ElementType::kFloat8E4M3 ? 1 : 2; }
// How many products are summed: 32 bytes of a row.
inline int depth_of(ElementType type) { return 32 / bytes_of(type); }

// A descriptor's fields, in bytes.
struct OperandLayout {
  OperandLayout(uint64_t descriptor, bool mn_major, ElementType type);
  // The address in shared memory of element (mn, k) of A or of B's transpose.
  int address(int mn, int k) const;
  // Why an operand of `count` rows cannot lie so; nullptr if it can.
  const char* refusal(int count) const;

  bool mn_major;
  int element_bytes;
  int start;
  int leading;
  int stride;
  int row_chunks;  // of 16 bytes, in a row of the swizzle: 1 (none), 2, 4 or 8
  int reserved;    // bits that must be zero
};

// Bytes of shared memory, multiples of 16.
struct ByteRange {
  int begin;
  int bytes;
};
// Appends the ranges that the first `count` rows (mn) of an operand fill; false if they reach
// beyond what descriptors can address.
bool append_ranges(const OperandLayout& layout, int count, std::vector<ByteRange>& ranges);

// Numbers [k][mn], so that both operands are rows of k.
constexpr int kNumbersStride = kMaxProductCols + 16;  // apart in the processor's cache
struct Numbers {
  alignas(64) float rows[kMaxProductDepth][kNumbersStride];
};

// From shared memory at `memory`, which is readable at all of the operand's addresses.
void unpack_shared(const OperandLayout& layout, ElementType type, int count, const char* memory,
                   Numbers& numbers);
// A from the registers of 128 lanes.
void unpack_registers(ElementType type, const uint32_t* const* lanes, Numbers& numbers);

// acc [64][n] += A B, each sum in the order of k from 0, then added to acc.
void multiply(const Numbers& a, const Numbers& b, int depth, int n, float* acc);
// The same of 8-bit numbers, 32 deep, as the tensor cores cut its terms and sums
// (wgmma_float8.cpp).
void multiply_float8(const Numbers& a, const Numbers& b, int n, float* acc);

}  // namespace emulator
