#include "emulator/wgmma_operands.h"

#include <algorithm>
#include <cstring>

#include "attention/numeric.h"

namespace emulator {
namespace {

using namespace sink_attention;

constexpr int kChunkBytes = 16;

// GCC's and Clang's vector extension: operators work on all four elements.
using FourFloats = float __attribute__((vector_size(16)));

FourFloats load(const float* four) {
  FourFloats vector;
  memcpy(&vector, four, sizeof(vector));
  return vector;
}
void add_to(float* four, FourFloats sum) {
  const FourFloats all = load(four) + sum;
  memcpy(four, &all, sizeof(all));
}

// Without branches, so that the loop over a chunk is vectorised.
float upcast(attention::Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  const uint32_t finite = attention::bits_of(attention::float_of(magnitude) * 0x1p112f);
  const uint32_t infinite = 0u - static_cast<uint32_t>(magnitude >= 0x0f800000u);  // or NaN
  return attention::float_of(sign | finite | (infinite & 0x7f800000u));
}
float upcast(attention::BFloat16 value) { return attention::to_float(value); }
float upcast(attention::Float8E4M3 value) { return attention::to_float(value); }

template <class Element>
constexpr int kPerChunk = kChunkBytes / static_cast<int>(sizeof(Element));

template <class Element>
void upcast_vector(const void* chunk, float* values) {
  Element elements[kPerChunk<Element>];
  memcpy(elements, chunk, kChunkBytes);
  for (int i = 0; i < kPerChunk<Element>; ++i) values[i] = upcast(elements[i]);
}

template <class Element>
void unpack_shared_of(const OperandLayout& layout, int count, const char* memory,
                      OperandValues& values) {
  constexpr int kPer = kPerChunk<Element>;
  constexpr int kDepth = 2 * kPer;
  if (layout.mn_major) {
    for (int k = 0; k < kDepth; ++k) {
      for (int mn = 0; mn < count; mn += kPer) {
        upcast_vector<Element>(memory + layout.address(mn, k), &values.rows[k][mn]);
      }
    }
    return;
  }
  for (int mn = 0; mn < count; ++mn) {
    for (int k = 0; k < kDepth; k += kPer) {
      float chunk[kPer];
      upcast_vector<Element>(memory + layout.address(mn, k), chunk);
      for (int i = 0; i < kPer; ++i) values.rows[k + i][mn] = chunk[i];
    }
  }
}

// PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16" and "...k32", matrix A:
//
//   row = groupID                                for a_i where i / kPair % 2 == 0, else groupID + 8
//   col = threadID_in_group * kPair + i % kPair  for the first half of the a_i, else + depth / 2
//
// A register holds kPair elements (2 or 4). In a warp, groupID = lane / 4 and
// threadID_in_group = lane % 4. Warp w holds rows 16 w ... 16 w + 15.
template <class Element>
void unpack_registers_of(const uint32_t* const* lanes, OperandValues& values) {
  constexpr int kPair = 4 / static_cast<int>(sizeof(Element));
  for (int thread = 0; thread < 128; ++thread) {
    Element elements[4 * kPair];
    memcpy(elements, lanes[thread], sizeof(elements));
    const int group = thread % 32 >> 2;
    const int in_group = thread % 4;
    for (int i = 0; i < 4 * kPair; ++i) {
      const int row = thread / 32 * 16 + group + (i / kPair % 2 == 0 ? 0 : 8);
      const int col = in_group * kPair + i % kPair + (i < 2 * kPair ? 0 : 4 * kPair);
      values.rows[col][row] = upcast(elements[i]);
    }
  }
}

}  // namespace

// PTX ISA, "Matrix Descriptor Format" of wgmma.
OperandLayout::OperandLayout(uint64_t descriptor, bool mn_major, ElementType type)
    : mn_major(mn_major), element_bytes(bytes_of(type)) {
  const auto field = [&](int bit) { return static_cast<int>(descriptor >> bit & 0x3fff) << 4; };
  start = field(0);
  leading = field(16);
  stride = field(32);
  constexpr int kRowChunks[] = {1, 8, 4, 2};
  row_chunks = kRowChunks[descriptor >> 62];
  const uint64_t fields =
      uint64_t{0x3fff} | uint64_t{0x3fff} << 16 | uint64_t{0x3fff} << 32 | uint64_t{3} << 62;
  reserved = (descriptor & ~fields) != 0 ? 1 : 0;
}

// PTX ISA, "Strides": the canonical layouts, in chunks of T = 16 / element_bytes elements, with
// LBO = leading and SBO = stride:
//
//                      K-major  (mn), (k)              MN-major  (mn), (k)
//   no swizzle     ((8,m),(T,2)):((1T,SBO),(1,LBO))    ((T,1,m),(8,2)):((1,T,SBO),(1T,LBO))
//   32 bytes       ((8,m),(T,2)):((2T,SBO),(1,T))      ((T,2,m),(8,2)):((1,T,LBO),(2T,SBO))
//   64 bytes       ((8,m),(T,2)):((4T,SBO),(1,T))      ((T,4,m),(8,2)):((1,T,LBO),(4T,SBO))
//   128 bytes      ((8,m),(T,2)):((8T,SBO),(1,T))      ((T,8,m),(8,2)):((1,T,LBO),(8T,SBO))
// A swizzle then permutes chunks: the address's bits 4 ... are xored with its bits 7 ...,
// log2(row_chunks) of them.
int OperandLayout::address(int mn, int k) const {
  const int per_chunk = kChunkBytes / element_bytes;
  const int row_bytes = row_chunks * kChunkBytes;
  int address = start;
  if (mn_major) {
    const int chunk = mn / per_chunk;
    address += mn % per_chunk * element_bytes + chunk % row_chunks * kChunkBytes +
               chunk / row_chunks * (row_chunks == 1 ? stride : leading);
    address += k % 8 * row_bytes + k / 8 * (row_chunks == 1 ? leading : stride);
  } else {
    address += mn % 8 * row_bytes + mn / 8 * stride;
    address +=
        k % per_chunk * element_bytes + k / per_chunk * (row_chunks == 1 ? leading : kChunkBytes);
  }
  return address ^ (address >> 3 & (row_chunks - 1) * kChunkBytes);
}

const char* OperandLayout::refusal(int count) const {
  if (reserved != 0) return "has bits outside of its fields (the base offset must be 0)";
  const int row_bytes = row_chunks * kChunkBytes;
  const int used = mn_major ? std::min(count * element_bytes, row_bytes) : 2 * kChunkBytes;
  if (row_chunks > 1 && start % row_bytes + used > row_bytes) {
    return "starts so far into a row of the swizzle that the operand's rows cross its end";
  }
  if (mn_major && element_bytes == 1) return "is not K-major, which 8-bit elements must be";
  return nullptr;
}

bool append_ranges(const OperandLayout& layout, int count, std::vector<ByteRange>& ranges) {
  constexpr int kWordBits = 64;
  constexpr int kWords = (1 << 18) / kChunkBytes / kWordBits;
  uint64_t touched[kWords] = {};  // one bit per chunk
  const int per_chunk = kChunkBytes / layout.element_bytes;
  const int depth = 2 * per_chunk;
  const int mn_step = layout.mn_major ? per_chunk : 1;
  const int k_step = layout.mn_major ? 1 : per_chunk;
  for (int mn = 0; mn < count; mn += mn_step) {
    for (int k = 0; k < depth; k += k_step) {
      const int chunk = layout.address(mn, k) / kChunkBytes;
      if (chunk >= kWords * kWordBits) return false;
      touched[chunk / kWordBits] |= uint64_t{1} << (chunk % kWordBits);
    }
  }
  for (int word = 0; word < kWords; ++word) {
    for (int bit = 0; touched[word] >> bit != 0;) {
      bit += __builtin_ctzll(touched[word] >> bit);
      const uint64_t rest = ~(touched[word] >> bit);
      const int run = rest == 0 ? kWordBits : __builtin_ctzll(rest);
      ranges.push_back({(word * kWordBits + bit) * kChunkBytes, run * kChunkBytes});
      bit += run;
      if (bit == kWordBits) break;
    }
  }
  return true;
}

void unpack_shared(const OperandLayout& layout, ElementType type, int count, const char* memory,
                   OperandValues& values) {
  switch (type) {
    case ElementType::kBFloat16:
      return unpack_shared_of<attention::BFloat16>(layout, count, memory, values);
    case ElementType::kFloat16:
      return unpack_shared_of<attention::Float16>(layout, count, memory, values);
    case ElementType::kFloat8E4M3:
      return unpack_shared_of<attention::Float8E4M3>(layout, count, memory, values);
  }
}

void unpack_registers(ElementType type, const uint32_t* const* lanes, OperandValues& values) {
  switch (type) {
    case ElementType::kBFloat16:
      return unpack_registers_of<attention::BFloat16>(lanes, values);
    case ElementType::kFloat16:
      return unpack_registers_of<attention::Float16>(lanes, values);
    case ElementType::kFloat8E4M3:
      return unpack_registers_of<attention::Float8E4M3>(lanes, values);
  }
}

// Tiles of 4 rows and 8 columns: 8 vectors of sums, which stay in registers.
void multiply(const OperandValues& a, const OperandValues& b, int depth, int n, float* acc) {
  for (int col = 0; col < n; col += 8) {
    for (int row = 0; row < kProductRows; row += 4) {
      FourFloats sums[4][2] = {};
      for (int k = 0; k < depth; ++k) {
        const FourFloats left = load(&b.rows[k][col]);
        const FourFloats right = load(&b.rows[k][col + 4]);
        const float* factors = &a.rows[k][row];
        for (int i = 0; i < 4; ++i) {
          sums[i][0] += factors[i] * left;
          sums[i][1] += factors[i] * right;
        }
      }
      for (int i = 0; i < 4; ++i) {
        add_to(acc + (row + i) * n + col, sums[i][0]);
        add_to(acc + (row + i) * n + col + 4, sums[i][1]);
      }
    }
  }
}

}  // namespace emulator
