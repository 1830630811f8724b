// Shared by the tests of injected wgmma faults: small products, and kernels with operands in shared
// memory.
#pragma once

#include "emulated.h"
#include "primitives/bulk.h"
#include "primitives/wgmma.h"

namespace sink_attention::tests {

using Element = attention::BFloat16;

constexpr int kBytes = 8192;  // of A, 64 rows of 128 bytes; B, 32 rows, follows
constexpr int kBBytes = 4096;
constexpr int kTilesN = 4;
using Acc = float[kTilesN][4];
using Registers = uint32_t[4];

// Both operands are 32 or 64 rows of 64 columns, of which a product takes 16.
inline uint64_t operand(char* shared, int at) {
  return matrix_descriptor(shared + at, 0, 1024, Swizzle::k128);
}

inline void fill(char* shared, int bytes) {
  for (int at = thread_idx() * 16; at < bytes; at += 128 * 16) {
    store_shared(reinterpret_cast<Bytes16*>(shared + at), Bytes16{}, tests::at("fill"));
  }
}

// A kernel of one warpgroup with operands in shared memory.
inline void run_filled(const std::function<void(char*)>& body) {
  run_block(128, kBytes + kBBytes, [&](char* shared) {
    fill(shared, kBytes + kBBytes);
    fence_proxy_async();
    sync_threads();
    body(shared);
  });
}

inline void start(Acc& acc, char* shared, bool accumulate = false) {
  wgmma_ss<Element, Major::kK, Major::kK>(acc, operand(shared, 0), operand(shared, 8192),
                                          accumulate, at("product"));
}
inline void start(Acc& acc, const Registers& a, char* shared) {
  wgmma_rs<Element, Major::kK>(acc, a, operand(shared, 8192), false, at("product"));
}

}  // namespace sink_attention::tests
