// Decode's tile sizes on Hopper.
//
// A CTA has kWarpsM x kWarpsN consumer warps and one producer warp. Warps along M own 16 rows each.
// Warps along N share the rows and divide each block of kBlockN keys among them. Each has its own
// online softmax; they are merged once, at the end.
//
// Bytes in flight. An SM's share of the memory bandwidth is 25 bytes/ns (H100) to 36 bytes/ns
// (H200), and the latency under load is about 1 us. With less than 36 KB in flight, memory idles. A
// ring of 96 KB a CTA with two CTAs an SM is four to five times that. So an SM has enough in flight
// while one of its CTAs starts, ends, or waits for lengths and the block table. 8-bit caches stay
// 8-bit in the ring, and their blocks have twice as many keys.
//
// Registers. With two CTAs of 5 warps, or one of 9, some quarter of the SM has 3 warps, which
// leaves 168 registers a thread. Up to head_dim 192 that suffices if Q, an operand of each step of
// the scores, stays in registers only where the output is small. At head_dim 256 the output alone
// takes 128. There an SM has one CTA of 5 warps, with 255 registers a thread and a larger ring.
//
// FewRows: the qhead_per_khead rows of one token. ManyRows: several tokens a sequence (speculative
// decoding), up to four times 16 rows, so that keys are still read once. Warps without rows idle.
#pragma once

namespace sink_attention::cuda::sm90 {

constexpr int kFewRows = 16;
constexpr int kManyRows = 64;

template <int kHeadDim_, int kHeadDimV_, int kStoredBytes_, int kWarpsM_, int kWarpsN_,
          int kBlockN_, bool kKeepsQueries_, int kRingBytes, int kMinBlocks_>
struct DecodeTiles {
  static constexpr int kHeadDim = kHeadDim_;          // of Q and K, padded to it with zeros
  static constexpr int kHeadDimV = kHeadDimV_;        // of V and out
  static constexpr int kStoredBytes = kStoredBytes_;  // of an element of the cache
  static constexpr int kWarpsM = kWarpsM_;
  static constexpr int kWarpsN = kWarpsN_;
  static constexpr int kBlockM = 16 * kWarpsM;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kWarpKeys = kBlockN / kWarpsN;
  static constexpr bool kKeepsQueries = kKeepsQueries_;  // in registers
  static constexpr int kConsumerWarps = kWarpsM * kWarpsN;
  static constexpr int kThreads = 32 * (kConsumerWarps + 1);
  static constexpr int kMinBlocks = kMinBlocks_;  // CTAs an SM
  // A stage is a block of keys or of values, whichever is larger.
  static constexpr int kStageBytes =
      kBlockN * kStoredBytes * (kHeadDim > kHeadDimV ? kHeadDim : kHeadDimV);
  static constexpr int kStages = kRingBytes / kStageBytes;
  static_assert(kStages >= 3 && kStageBytes % 1024 == 0);
  static_assert(kWarpKeys % 16 == 0, "an operand of P has 16 keys");
};

constexpr int kRing = 96 * 1024;        // bytes; two CTAs an SM
constexpr int kLargeRing = 192 * 1024;  // bytes; one CTA an SM

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
