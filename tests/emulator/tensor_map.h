// The emulated tensor map: plain data in its 128 bytes, and the addresses of a box.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace emulator {

constexpr int kMaxRank = 5;

struct TensorMapData {
  const char* base;
  int element_bytes;
  int rank;
  int64_t size[kMaxRank];
  int64_t stride[kMaxRank];  // bytes; that of dimension 0 is element_bytes
  int box[kMaxRank];
  int swizzle;  // 0: none; 1, 2, 3: rows of 32, 64, 128 bytes

  int swizzle_bytes() const { return swizzle == 0 ? 0 : 16 << swizzle; }
  int row_bytes() const { return box[0] * element_bytes; }
  int num_rows() const { return box[1] * box[2] * box[3] * box[4]; }
  int box_bytes() const { return row_bytes() * num_rows(); }
  // The alignment of a box in shared memory.
  int alignment() const { return swizzle == 0 ? 128 : 8 * swizzle_bytes(); }
};

// Throws std::runtime_error if the hardware does not support the map.
void encode(const TensorMapData& data, uint64_t (&words)[16]);
// Whether `words` came from encode.
bool decode(const uint64_t (&words)[16], TensorMapData& data);

// The part of a box row that is inside the tensor: `bytes` bytes at `global`, which start `skip`
// bytes into the row. bytes is 0 if there is none.
struct RowPart {
  const char* global;
  int skip;
  int bytes;
};
RowPart row_part(const TensorMapData& map, const int (&at)[kMaxRank], int row);

// Fills the box at `shared`.
void load_box(const TensorMapData& map, const int (&at)[kMaxRank], char* shared);

}  // namespace emulator
