// What an instruction set offers: tables of functions, one table an arithmetic. Knows no
// instruction set itself.
//
// The files beside csrc/cpu/simd decide who computes what and hold the memory; the functions here
// compute.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/block_list.h"
#include "attention/mask.h"
#include "attention/params.h"

namespace sink_attention::cpu {

// kv heads that a job of the forward takes at once, at most: enough to read a cache [token][head]
// in the order in which it lies.
constexpr int64_t kMaxHeadsPerJob = 32;

// How a forward problem is cut, and the bytes that its pieces take. A tile is tile_positions query
// positions of one sequence with all query heads of one kv head; keys come in blocks of block_keys,
// counted from key 0, so that a row's sums are taken in the same order whatever tile, batch or
// split it is computed in.
struct FwdPlan {
  int64_t tile_positions;
  int64_t block_keys;
  int64_t packed_k_bytes;  // of one block of keys
  int64_t packed_v_bytes;
  int64_t tile_scratch_bytes;  // a job's scratch takes so many for each kv head, and, where it
                               // packs as it goes, a packed block for each
  int64_t partial_bytes;       // of one tile's partial result in one split, for each kv head
};

// A tile of each of the kv heads [kv_head_begin, kv_head_end) against a part of the key blocks that
// it sees: number idx_begin to idx_end - 1 of the list.
struct FwdTask {
  int64_t batch_idx;
  int64_t kv_head_begin, kv_head_end;
  int64_t q_begin, q_end;
  attention::BlockList<int64_t> blocks;
  int64_t idx_begin, idx_end;
  const char* packed;  // the packed blocks of the one kv head, K and V of a block side by side;
                       // null: pack as you go
  attention::BlockList<int64_t> packed_blocks;  // which blocks those are
  char* scratch;                                // aligned to 64
  char* partial;  // null: finish the rows; else leave the first tile's state here, without the sink
  int64_t partial_stride;  // bytes from one kv head's partial result to the next
};

struct BwdPlan {
  int64_t tile_positions;
  int64_t block_keys;
  int64_t blocks_per_piece;  // whose sum a dQ of float32 or float64 banks (simd/banked_sum.h)
  int64_t scratch_bytes;     // of one thread
  int64_t dq_row_bytes;      // of one row of the dQ accumulator
};

// One block of keys: query tiles add to dQ's accumulator, and to dK and dV in scratch.
struct BwdTask {
  int64_t batch_idx, kv_head_idx;
  int64_t block_idx;
  char* scratch;
  const void* delta;  // Real [batch, num_heads_q, seqlen_q] or [num_heads_q, total_q]: D - dlse
  int64_t delta_stride_batch, delta_stride_head;
  char* dq_accumulator;  // Real [seqlen_q * group][columns(head_dim)] of this sequence and kv head
};

// Where new tokens come from and go to. Slots are dealt out to 2^part_bits parts, so that tokens of
// one slot are one job's, which writes them in order.
struct CacheTokens {
  const int64_t* slots;    // [num_tokens]; negative: the token is skipped
  int64_t tokens_per_row;  // of the batch dimension of k and v
  int64_t k_stride_batch, v_stride_batch;
  int part_bits;
};

struct Kernels {
  FwdPlan (*plan_fwd)(const attention::FlashFwdParams&);
  void (*pack_blocks)(const attention::FlashFwdParams&, const FwdPlan&, int64_t batch_idx,
                      int64_t kv_head_begin, int64_t kv_head_end, int64_t block_idx,
                      attention::KeySet readable, char* packed);
  void (*fwd_tile)(const attention::FlashFwdParams&, const FwdPlan&, const FwdTask&);
  // Merges the partial results of one kv head's tile, which lie split_stride bytes apart from
  // task.partial on.
  void (*combine_splits)(const attention::FlashFwdParams&, const FwdPlan&, const FwdTask&,
                         int64_t num_splits, int64_t split_stride);

  BwdPlan (*plan_bwd)(const attention::FlashBwdParams&);
  // delta = <dout, out> - dlse of one head of one sequence; returns its part of ds_aux.
  double (*bwd_preprocess)(const attention::FlashBwdParams&, int64_t batch_idx, int64_t head_idx,
                           void* delta);
  void (*bwd_begin_block)(const attention::FlashBwdParams&, const BwdPlan&, const BwdTask&);
  void (*bwd_tile)(const attention::FlashBwdParams&, const BwdPlan&, const BwdTask&,
                   int64_t q_begin, int64_t q_end);
  void (*bwd_end_block)(const attention::FlashBwdParams&, const BwdPlan&, const BwdTask&);
  // Of the rows of some query positions, where dq is float32 or float64: moves what dQ's
  // accumulator holds to dq.
  void (*bwd_bank_dq)(const attention::FlashBwdParams&, int64_t batch_idx, int64_t kv_head_idx,
                      attention::Range positions, char* dq_accumulator, bool is_first);
  // Writes dq, from dQ's accumulator and, where something was banked, from dq.
  void (*bwd_store_dq)(const attention::FlashBwdParams&, int64_t batch_idx, int64_t kv_head_idx,
                       attention::Range positions, char* dq_accumulator, bool was_banked);

  // Rows [begin, end) of the merged result.
  void (*merge_rows)(const attention::MergeParams&, int64_t begin, int64_t end);
  void (*write_cache)(const attention::KvWriteParams&, const CacheTokens&, int64_t part);
};

struct InstructionSet {
  const char* name;
  const Kernels* float64;
  const Kernels* float32;   // for float16 and 8-bit caches too
  const Kernels* bfloat16;  // bfloat16 q, k and v; float32's where there is no dot product for it
};

}  // namespace sink_attention::cpu
