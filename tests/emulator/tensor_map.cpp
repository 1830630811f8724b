#include "emulator/tensor_map.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace emulator {
namespace {

constexpr uint64_t kMark = 0x7a50;  // in the top bits of the last word in use
constexpr int kMaxBox = 256;

[[noreturn]] void refuse(const std::string& what) {
  throw std::runtime_error("encode_tensor_map: " + what);
}

// "size[2] = 0".
std::string entry(const char* name, int i, int64_t value) {
  return std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(value);
}

void check(const TensorMapData& data) {
  if (data.element_bytes != 1 && data.element_bytes != 2) {
    refuse("element_bytes = " + std::to_string(data.element_bytes) + ", not 1 or 2");
  }
  if (data.rank < 3 || data.rank > kMaxRank) {
    refuse("rank = " + std::to_string(data.rank) + ", not 3, 4 or 5");
  }
  if (data.base == nullptr) refuse("base is null");
  if (reinterpret_cast<uintptr_t>(data.base) % 16 != 0) refuse("base is not aligned to 16 bytes");
  if (data.swizzle < 0 || data.swizzle > 3) refuse("no such swizzle");
  for (int i = 0; i < data.rank; ++i) {
    if (data.size[i] < 1 || data.size[i] > int64_t{1} << 32) {
      refuse(entry("size", i, data.size[i]) + ", not in 1 .. 2^32");
    }
    if (data.box[i] < 1 || data.box[i] > kMaxBox) {
      refuse(entry("box", i, data.box[i]) + ", not in 1 .. 256");
    }
    const int64_t stride = data.stride[i];
    if (i > 0 && (stride % 16 != 0 || stride < 0 || stride >= int64_t{1} << 40)) {
      refuse(entry("stride_bytes", i, stride) + ", not a multiple of 16 below 2^40");
    }
  }
  if (data.row_bytes() % 16 != 0) {
    refuse("a box row of " + std::to_string(data.row_bytes()) + " bytes, not a multiple of 16");
  }
  if (data.swizzle != 0 && data.row_bytes() != data.swizzle_bytes()) {
    refuse("a box row of " + std::to_string(data.row_bytes()) + " bytes with a swizzle of " +
           std::to_string(data.swizzle_bytes()));
  }
}

}  // namespace

void encode(const TensorMapData& data, uint64_t (&words)[16]) {
  check(data);
  std::fill_n(words, 16, 0);
  words[0] = reinterpret_cast<uintptr_t>(data.base);
  for (int i = 0; i < data.rank; ++i) {
    words[1 + i] = static_cast<uint64_t>(data.size[i]);
    words[6 + i] = static_cast<uint64_t>(i == 0 ? data.element_bytes : data.stride[i]);
    words[11 + i / 3] |= static_cast<uint64_t>(data.box[i]) << i % 3 * 16;
  }
  words[13] = static_cast<uint64_t>(data.element_bytes) | static_cast<uint64_t>(data.rank) << 8 |
              static_cast<uint64_t>(data.swizzle) << 16 | kMark << 48;
}

bool decode(const uint64_t (&words)[16], TensorMapData& data) {
  if (words[13] >> 48 != kMark) return false;
  data.base = reinterpret_cast<const char*>(words[0]);
  data.element_bytes = static_cast<int>(words[13] & 0xff);
  data.rank = static_cast<int>(words[13] >> 8 & 0xff);
  data.swizzle = static_cast<int>(words[13] >> 16 & 0xff);
  for (int i = 0; i < kMaxRank; ++i) {
    const bool used = i < data.rank;
    data.size[i] = used ? static_cast<int64_t>(words[1 + i]) : 1;
    data.stride[i] = used ? static_cast<int64_t>(words[6 + i]) : 0;
    data.box[i] = used ? static_cast<int>(words[11 + i / 3] >> i % 3 * 16 & 0xffff) : 1;
  }
  return true;
}

RowPart row_part(const TensorMapData& map, const int (&at)[kMaxRank], int row) {
  const char* global = map.base;
  for (int i = 1; i < kMaxRank; ++i) {
    const int64_t index = int64_t{at[i]} + row % map.box[i];
    row /= map.box[i];
    if (index < 0 || index >= map.size[i]) return {nullptr, 0, 0};
    global += index * map.stride[i];
  }
  const int64_t begin = std::max<int64_t>(at[0], 0);
  const int64_t end = std::min<int64_t>(int64_t{at[0]} + map.box[0], map.size[0]);
  if (begin >= end) return {nullptr, 0, 0};
  return {global + begin * map.element_bytes, static_cast<int>((begin - at[0]) * map.element_bytes),
          static_cast<int>((end - begin) * map.element_bytes)};
}

// The swizzle by addresses: bits 4 ... of a byte's offset are xored with its bits 7 ... .
void load_box(const TensorMapData& map, const int (&at)[kMaxRank], char* shared) {
  const int row_bytes = map.row_bytes();
  const int mask = (1 << map.swizzle) - 1;
  char line[kMaxBox * 2];
  for (int row = 0; row < map.num_rows(); ++row) {
    const RowPart part = row_part(map, at, row);
    std::fill_n(line, row_bytes, '\0');
    if (part.bytes > 0) memcpy(line + part.skip, part.global, part.bytes);
    for (int byte = 0; byte < row_bytes; byte += 16) {
      const int offset = row * row_bytes + byte;
      memcpy(shared + (offset ^ (offset >> 7 & mask) << 4), line + byte, 16);
    }
  }
}

}  // namespace emulator
