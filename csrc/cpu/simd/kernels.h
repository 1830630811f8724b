// The interface of the kernels: one table of functions per instruction set and arithmetic.
//
// csrc/cpu schedules jobs over threads and owns the memory; csrc/cpu/simd computes. The loops nest:
//
//   job      What a thread takes at once. FwdJob: a tile of one or several kv heads, against some
//            key blocks. BwdJob: one key block of one kv head, against all tiles that see it.
//   tile     tile_positions query positions of one sequence, with all query heads of one kv head.
//            Row r of a tile is position q_begin + r / qhead_per_khead, query head
//            kv_head * qhead_per_khead + r % qhead_per_khead (FlashAttention's PackGQA).
//   block    block_keys keys of a sequence. Blocks are counted from key 0, so a row's sums have the
//            same order in any tile, batch or split.
//   strip    kTileRows rows of a tile: the rows of one register tile. Its scores stay in L1.
//   panel    kPanel columns of a packed operand: the columns of one register tile.
//   unit     One lane of a packed operand: an element, or a pair of bfloat16 elements that are
//            neighbours along the summed dimension (arithmetic.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/block_list.h"
#include "attention/mask.h"
#include "attention/params.h"

namespace sink_attention::cpu {

// The most kv heads that a forward job takes: enough to read a cache [token][head] in memory order.
constexpr int64_t kMaxHeadsPerJob = 32;

// The sizes of the forward's tiles and blocks, and of their memory.
struct FwdPlan {
  int64_t tile_positions;
  int64_t block_keys;
  int64_t packed_k_bytes;  // of one block of keys
  int64_t packed_v_bytes;
  // Scratch of one tile. A job's scratch holds one for each of its kv heads, then, where the job
  // packs its own keys, a packed block for each.
  int64_t tile_scratch_bytes;
  int64_t partial_bytes;  // a tile's partial result in one split
};

// One tile of each of the kv heads [kv_head_begin, kv_head_end), against the entries
// [idx_begin, idx_end) of the list of key blocks that the tile sees.
struct FwdJob {
  int64_t batch_idx;
  int64_t kv_head_begin, kv_head_end;
  int64_t q_begin, q_end;
  attention::BlockList<int64_t> blocks;
  int64_t idx_begin, idx_end;
  // Blocks packed ahead, of the job's only kv head: K and V of each block side by side. Null: the
  // job packs its own keys, or reads them in place (in_place.h).
  const char* packed;
  attention::BlockList<int64_t> packed_blocks;  // the blocks in `packed`
  char* scratch;                                // aligned to 64 bytes
  // Null: write out and lse. Else write the tiles' partial results here, without the sink.
  char* partial;
  int64_t partial_stride;  // bytes from one kv head's partial result to the next
};

struct BwdPlan {
  int64_t tile_positions;
  int64_t block_keys;
  int64_t blocks_per_piece;  // key blocks in one piece of a float32 or float64 dQ (banked_sum.h)
  int64_t scratch_bytes;     // of one thread
  int64_t dq_row_bytes;      // of one row of the dQ accumulator
};

// One block of keys of one kv head: its query tiles add to dQ's accumulator, and to dK and dV in
// scratch.
struct BwdJob {
  int64_t batch_idx, kv_head_idx;
  int64_t block_idx;
  char* scratch;
  const void* delta;  // Real [batch, num_heads_q, seqlen_q] or [num_heads_q, total_q]
  int64_t delta_stride_batch, delta_stride_head;
  // Real [seqlen_q * qhead_per_khead][columns(head_dim)] of this sequence and kv head.
  char* dq_accumulator;
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
  void (*fwd_job)(const attention::FlashFwdParams&, const FwdPlan&, const FwdJob&);
  // Merges a tile's partial results, num_splits of them split_stride bytes apart, at job.partial.
  // Adds the sink and writes out and lse.
  void (*combine_splits)(const attention::FlashFwdParams&, const FwdPlan&, const FwdJob&,
                         int64_t num_splits, int64_t split_stride);

  BwdPlan (*plan_bwd)(const attention::FlashBwdParams&);
  // Writes delta = <dout, out> - dlse of one head of one sequence; returns its part of ds_aux.
  double (*bwd_preprocess)(const attention::FlashBwdParams&, int64_t batch_idx, int64_t head_idx,
                           void* delta);
  void (*bwd_begin_block)(const attention::FlashBwdParams&, const BwdPlan&, const BwdJob&);
  void (*bwd_tile)(const attention::FlashBwdParams&, const BwdPlan&, const BwdJob&, int64_t q_begin,
                   int64_t q_end);
  void (*bwd_end_block)(const attention::FlashBwdParams&, const BwdPlan&, const BwdJob&);
  // Banks the accumulator's rows of some query positions in dq, which is float32 or float64
  // (banked_sum.h).
  void (*bwd_bank_dq)(const attention::FlashBwdParams&, int64_t batch_idx, int64_t kv_head_idx,
                      attention::Range positions, char* dq_accumulator, bool is_first);
  // Writes the final dq: scaled, from the accumulator and, if was_banked, from dq itself.
  void (*bwd_store_dq)(const attention::FlashBwdParams&, int64_t batch_idx, int64_t kv_head_idx,
                       attention::Range positions, char* dq_accumulator, bool was_banked);

  // Rows [begin, end) of the merged result.
  void (*merge_rows)(const attention::MergeParams&, int64_t begin, int64_t end);
  void (*write_cache)(const attention::KvWriteParams&, const CacheTokens&, int64_t part);
};

struct InstructionSet {
  const char* name;
  const Kernels* float64;
  const Kernels* float32;   // also float16, and 8-bit caches
  const Kernels* bfloat16;  // bfloat16 q, k and v; the float32 table without a bfloat16 dot product
};

}  // namespace sink_attention::cpu
