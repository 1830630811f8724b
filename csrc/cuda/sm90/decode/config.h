// Decode's tile sizes on Hopper.
//
// A block has kWarpsM x kWarpsN warps that compute and one that copies. Warps along M own 16 rows
// each; warps along N share rows and divide each block of kBlockN keys among them, each with a
// softmax of its own, merged once at the end.
//
// Bytes in flight. An SM gets 25 bytes/ns (H100) to 36 bytes/ns (H200) of the memory's bandwidth,
// and a loaded memory answers after about 1 us: with less than 36 KB under way it idles. A ring of
// 96 KB a block, two blocks an SM, has four to five times that, so that an SM still has enough
// while one of its blocks starts, ends, or waits for the lengths and the block table that lead to
// its keys. Caches of 8 bits stay so in the ring, and a block of theirs has twice as many keys.
//
// Registers. A block of 5 warps leaves some quarter of the SM with 3 warps of two blocks, which
// then have 168 registers each; so has one of 9 warps. That is enough up to head_dim 192 if q, an
// operand of each step of the scores, is kept in registers only where the output is small. At
// head_dim 256 the output alone takes 128: there an SM has one block of 5 warps, with 255, and a
// larger ring.
//
// Few rows: one token's group of query heads. Many rows: several tokens a sequence (speculative
// decoding), four times 16 rows, so that keys are still read once. Warps without rows do nothing.
#pragma once

namespace sink_attention::cuda::sm90 {

constexpr int kFewRows = 16;
constexpr int kManyRows = 64;

template <int kHeadDim_, int kHeadDimV_, int kStoredBytes_, int kWarpsM_, int kWarpsN_,
          int kBlockN_, bool kKeepsQueries_, int kRingBytes, int kMinBlocks_>
struct DecodeTiles {
  static constexpr int kHeadDim = kHeadDim_;          // of Q and K, padded to it with zeros
  static constexpr int kHeadDimV = kHeadDimV_;        // of V and out
  static constexpr int kStoredBytes = kStoredBytes_;  // of a number of the cache
  static constexpr int kWarpsM = kWarpsM_;
  static constexpr int kWarpsN = kWarpsN_;
  static constexpr int kBlockM = 16 * kWarpsM;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kWarpKeys = kBlockN / kWarpsN;
  static constexpr bool kKeepsQueries = kKeepsQueries_;  // in registers
  static constexpr int kConsumerWarps = kWarpsM * kWarpsN;
  static constexpr int kThreads = 32 * (kConsumerWarps + 1);
  static constexpr int kMinBlocks = kMinBlocks_;  // of an SM
  // A stage is a block of keys or of values, whichever is larger.
  static constexpr int kStageBytes =
      kBlockN * kStoredBytes * (kHeadDim > kHeadDimV ? kHeadDim : kHeadDimV);
  static constexpr int kStages = kRingBytes / kStageBytes;
  static_assert(kStages >= 3 && kStageBytes % 1024 == 0);
  static_assert(kWarpKeys % 16 == 0, "weights are operands of 16 keys");
};

constexpr int kRing = 96 * 1024;        // of a block beside another
constexpr int kLargeRing = 192 * 1024;  // of an SM's only block

template <int kHeadDim, int kHeadDimV, int kStoredBytes>
struct FewRows : DecodeTiles<kHeadDim, kHeadDimV, kStoredBytes, 1, 4, 128 / kStoredBytes,
                             kHeadDim <= 128, kRing, 2> {};
template <int kStoredBytes>
struct FewRows<256, 256, kStoredBytes>
    : DecodeTiles<256, 256, kStoredBytes, 1, 4, 128 / kStoredBytes, false, kLargeRing, 1> {};

template <int kHeadDim, int kHeadDimV, int kStoredBytes>
struct ManyRows
    : DecodeTiles<kHeadDim, kHeadDimV, kStoredBytes, 4, 2, kHeadDim <= 96 ? 128 / kStoredBytes : 64,
                  kHeadDim <= 96, kLargeRing, 1> {};
template <int kStoredBytes>
struct ManyRows<256, 256, kStoredBytes>
    : DecodeTiles<256, 256, kStoredBytes, 4, 1, 64, false, 160 * 1024, 1> {};

}  // namespace sink_attention::cuda::sm90
