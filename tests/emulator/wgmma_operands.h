// wgmma's operands: their addresses by the matrix descriptor, their values, and their product.
#pragma once

#include <cstdint>
#include <vector>

namespace emulator {

constexpr int kProductRows = 64;
constexpr int kMaxProductCols = 256;
constexpr int kMaxProductDepth = 32;

enum class ElementType { kBFloat16, kFloat16, kFloat8E4M3 };

inline int bytes_of(ElementType type) { return type == ElementType::kFloat8E4M3 ? 1 : 2; }
// The depth of a product: 32 bytes of a row.
inline int depth_of(ElementType type) { return 32 / bytes_of(type); }

// A descriptor's fields, in bytes.
struct OperandLayout {
  OperandLayout(uint64_t descriptor, bool mn_major, ElementType type);
  // The address in shared memory of element (mn, k) of A or of B's transpose.
  int address(int mn, int k) const;
  // Why no operand of `count` rows can have this layout; nullptr if one can.
  const char* refusal(int count) const;

  bool mn_major;
  int element_bytes;
  int start;
  int leading;
  int stride;
  int row_chunks;  // 16-byte chunks of a swizzle row: 1 (no swizzle), 2, 4 or 8
  int reserved;    // bits that must be zero
};

// Bytes of shared memory, multiples of 16.
struct ByteRange {
  int begin;
  int bytes;
};
// Appends the ranges of the first `count` rows (mn) of an operand. Returns false if they extend
// beyond the addresses of descriptors.
bool append_ranges(const OperandLayout& layout, int count, std::vector<ByteRange>& ranges);

// An operand's values as [k][mn], so that a product reads rows of both.
constexpr int kValuesStride = kMaxProductCols + 16;  // rows do not map to the same cache sets
struct OperandValues {
  alignas(64) float rows[kMaxProductDepth][kValuesStride];
};

// Reads an operand from shared memory at `memory`. All its addresses have been checked.
void unpack_shared(const OperandLayout& layout, ElementType type, int count, const char* memory,
                   OperandValues& values);
// Reads A from the registers of 128 lanes.
void unpack_registers(ElementType type, const uint32_t* const* lanes, OperandValues& values);

// acc [64][n] += A B. Each sum runs over k from 0, in order, and is then added to acc.
void multiply(const OperandValues& a, const OperandValues& b, int depth, int n, float* acc);
// The same for 8-bit elements, 32 deep, with terms and sums cut as in the tensor cores
// (wgmma_float8.cpp).
void multiply_float8(const OperandValues& a, const OperandValues& b, int n, float* acc);

}  // namespace emulator
