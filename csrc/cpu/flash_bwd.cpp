// The backward's schedule: five matrix products a tile, and no floating-point atomics.
//
//   job   One block of keys of one sequence and kv head. Its dK and dV stay in the thread's scratch
//         while the thread processes the query tiles, last to first.
//   dQ    One accumulator per sequence and kv head. Blocks add to a tile's dQ in ascending order: a
//         job waits until the block before it has added to the tile.
//
// Jobs start in the order of their blocks, so the job that another waits for has started: there is
// no deadlock. Two threads on one kv head follow each other one tile apart. The order of every sum
// is fixed, so gradients are bitwise the same for any number of threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "attention/block_list.h"
#include "attention/mask.h"
#include "attention/numeric.h"
#include "attention/seqlen_info.h"
#include "cpu/backend.h"
#include "cpu/instruction_set.h"
#include "cpu/parallel.h"

namespace sink_attention::cpu {
namespace {

using attention::BlockList;
using attention::DataType;
using attention::FlashBwdParams;
using attention::FlashFwdParams;
using attention::Range;
using attention::SeqlenInfo;

// The state of one sequence and kv head, shared by the jobs of its blocks.
struct HeadState {
  int64_t batch_idx;
  int64_t kv_head_idx;
  SeqlenInfo info;
  attention::Mask mask;
  int64_t num_tiles;
  int64_t num_blocks;
  std::atomic<int64_t> jobs_left;
  std::atomic<char*> dq_accumulator;  // null until the first job has zeroed it
  // [num_tiles]: the block that adds to the tile's dQ next.
  std::unique_ptr<std::atomic<int64_t>[]> next_block;

  Range positions_of_tile(int64_t tile, const BwdPlan& plan) const {
    const int64_t begin = tile * plan.tile_positions;
    return {begin, std::min(begin + plan.tile_positions, info.seqlen_q)};
  }
  // The blocks of keys that add to a tile's dQ.
  BlockList<int64_t> blocks_of_tile(int64_t tile, const BwdPlan& plan) const {
    const Range positions = positions_of_tile(tile, plan);
    return attention::blocks_of(mask.visible_keys(positions.begin, positions.end), plan.block_keys);
  }
  // Whether entry idx of a tile's blocks is the last of its piece, so that dQ is banked after it
  // (simd/banked_sum.h); and whether dQ was banked before entry idx.
  static bool ends_piece(const BlockList<int64_t>& blocks, int64_t idx, const BwdPlan& plan) {
    return idx + 1 < blocks.count() && blocks.block(idx) / plan.blocks_per_piece !=
                                           blocks.block(idx + 1) / plan.blocks_per_piece;
  }
  static bool was_banked(const BlockList<int64_t>& blocks, int64_t idx, const BwdPlan& plan) {
    return idx > 0 &&
           blocks.block(0) / plan.blocks_per_piece != blocks.block(idx) / plan.blocks_per_piece;
  }
};

// Memory for the dQ accumulators of the kv heads in progress: at most one per thread, and one whose
// next job has not started.
class AccumulatorPool {
 public:
  AccumulatorPool(int64_t count, int64_t bytes)
      : bytes_((bytes + 63) / 64 * 64), memory_(count * bytes_) {
    for (int64_t i = 0; i < count; ++i) free_.push_back(memory_.data() + i * bytes_);
  }
  char* take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    char* piece = free_.back();
    free_.pop_back();
    return piece;
  }
  void give_back(char* piece) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(piece);
  }

 private:
  int64_t bytes_;
  AlignedBuffer memory_;
  std::vector<char*> free_;
  std::mutex mutex_;
};

template <class Ready>
void wait_until(const Ready& ready) {
  for (int spins = 0; !ready(); ++spins) {
    if (spins > 64) std::this_thread::yield();
  }
}

void store_element(double value, void* base, DataType dtype, int64_t idx) {
  switch (dtype) {
    case DataType::kFloat64:
      static_cast<double*>(base)[idx] = value;
      return;
    case DataType::kFloat32:
      static_cast<float*>(base)[idx] = static_cast<float>(value);
      return;
    case DataType::kBFloat16:
      static_cast<attention::BFloat16*>(base)[idx] =
          attention::to_bfloat16(static_cast<float>(value));
      return;
    default:
      static_cast<attention::Float16*>(base)[idx] =
          attention::to_float16(static_cast<float>(value));
  }
}

// delta of every row, in the layout of a contiguous lse.
struct Delta {
  AlignedBuffer memory;
  int64_t stride_batch;
  int64_t stride_head;
};

// Computes delta, and ds_aux as a sum over rows and sequences in their order.
Delta preprocess(const FlashBwdParams& params, const Kernels& kernels, int64_t real_bytes,
                 const Executor& executor) {
  const FlashFwdParams& fwd = params.fwd;
  const bool varlen = fwd.cu_seqlens_q != nullptr;
  const int64_t head_rows = varlen ? fwd.cu_seqlens_q[fwd.batch] : fwd.seqlen_q;
  const int64_t delta_batch = varlen ? 1 : fwd.batch;
  Delta delta{AlignedBuffer(delta_batch * fwd.num_heads_q * head_rows * real_bytes),
              varlen ? 0 : fwd.num_heads_q * head_rows, head_rows};
  std::vector<double> ds_aux(fwd.batch * fwd.num_heads_q);
  parallel_jobs(executor, fwd.batch * fwd.num_heads_q, 0, [&](int64_t job, char*) {
    const int64_t batch_idx = job / fwd.num_heads_q;
    const int64_t head_idx = job % fwd.num_heads_q;
    const SeqlenInfo info = attention::seqlen_info(fwd, batch_idx);
    char* rows = delta.memory.data() +
                 (info.q_batch * delta.stride_batch + head_idx * delta.stride_head + info.q_row) *
                     real_bytes;
    ds_aux[job] = kernels.bwd_preprocess(params, batch_idx, head_idx, rows);
  });
  if (params.ds_aux != nullptr) {
    for (int64_t head_idx = 0; head_idx < fwd.num_heads_q; ++head_idx) {
      double sum = 0;
      for (int64_t batch_idx = 0; batch_idx < fwd.batch; ++batch_idx) {
        sum += ds_aux[batch_idx * fwd.num_heads_q + head_idx];
      }
      store_element(sum, params.ds_aux, fwd.s_aux_dtype, head_idx);
    }
  }
  return delta;
}

}  // namespace

void flash_bwd(const FlashBwdParams& params, const Executor& executor) {
  const FlashFwdParams& fwd = params.fwd;
  const Kernels& kernels = kernels_for(fwd.dtype, fwd.kv_dtype);
  const int64_t real_bytes = fwd.dtype == DataType::kFloat64 ? 8 : 4;
  const Delta delta = preprocess(params, kernels, real_bytes, executor);
  if (fwd.num_heads_q == 0) return;
  const BwdPlan plan = kernels.plan_bwd(params);
  // A 16-bit dQ cannot hold a banked total, and is less precise than the error that banking avoids.
  const bool banks_dq = fwd.dtype == DataType::kFloat32 || fwd.dtype == DataType::kFloat64;
  const int64_t qhead_per_khead = fwd.num_heads_q / fwd.num_heads_kv;

  std::vector<std::unique_ptr<HeadState>> heads;
  struct Job {
    HeadState* head;
    int64_t block_idx;
  };
  std::vector<Job> jobs;
  int64_t accumulator_bytes = 0;
  for (int64_t batch_idx = 0; batch_idx < fwd.batch; ++batch_idx) {
    for (int64_t kv_head_idx = 0; kv_head_idx < fwd.num_heads_kv; ++kv_head_idx) {
      auto head = std::make_unique<HeadState>();
      head->batch_idx = batch_idx;
      head->kv_head_idx = kv_head_idx;
      head->info = attention::seqlen_info(fwd, batch_idx);
      head->mask = attention::make_mask(fwd, head->info);
      head->num_tiles = (head->info.seqlen_q + plan.tile_positions - 1) / plan.tile_positions;
      // A sequence without keys has one job too: it writes dQ = 0.
      head->num_blocks =
          std::max<int64_t>(1, attention::tiles_of({0, head->info.seqlen_k}, plan.block_keys).end);
      head->jobs_left = head->num_blocks;
      head->next_block = std::make_unique<std::atomic<int64_t>[]>(head->num_tiles);
      for (int64_t tile = 0; tile < head->num_tiles; ++tile) {
        head->next_block[tile] = head->blocks_of_tile(tile, plan).block(0);
      }
      accumulator_bytes =
          std::max(accumulator_bytes, head->info.seqlen_q * qhead_per_khead * plan.dq_row_bytes);
      for (int64_t block = 0; block < head->num_blocks; ++block)
        jobs.push_back({head.get(), block});
      heads.push_back(std::move(head));
    }
  }
  AccumulatorPool pool(
      std::min<int64_t>(std::max(executor.num_threads, 1) + 1, static_cast<int64_t>(heads.size())),
      std::max<int64_t>(accumulator_bytes, 64));

  parallel_jobs(
      executor, static_cast<int64_t>(jobs.size()), plan.scratch_bytes,
      [&](int64_t job, char* scratch) {
        HeadState& head = *jobs[job].head;
        const int64_t block_idx = jobs[job].block_idx;
        if (block_idx == 0) {
          char* accumulator = pool.take();
          std::fill_n(accumulator, head.info.seqlen_q * qhead_per_khead * plan.dq_row_bytes, 0);
          head.dq_accumulator.store(accumulator, std::memory_order_release);
        }
        BwdJob bwd_job{};
        bwd_job.batch_idx = head.batch_idx;
        bwd_job.kv_head_idx = head.kv_head_idx;
        bwd_job.block_idx = block_idx;
        bwd_job.scratch = scratch;
        bwd_job.delta = delta.memory.data();
        bwd_job.delta_stride_batch = delta.stride_batch;
        bwd_job.delta_stride_head = delta.stride_head;
        kernels.bwd_begin_block(params, plan, bwd_job);
        wait_until([&] { return head.dq_accumulator.load(std::memory_order_acquire) != nullptr; });
        bwd_job.dq_accumulator = head.dq_accumulator.load(std::memory_order_acquire);
        const Range keys{block_idx * plan.block_keys,
                         std::min((block_idx + 1) * plan.block_keys, head.info.seqlen_k)};
        const Range queries = head.mask.visible_queries(keys.begin, keys.end);
        const Range tiles = attention::tiles_of(queries, plan.tile_positions);
        for (int64_t tile = tiles.end - 1; tile >= tiles.begin; --tile) {
          const Range positions = head.positions_of_tile(tile, plan);
          const BlockList<int64_t> blocks = head.blocks_of_tile(tile, plan);
          wait_until(
              [&] { return head.next_block[tile].load(std::memory_order_acquire) >= block_idx; });
          kernels.bwd_tile(params, plan, bwd_job, positions.begin, positions.end);
          const int64_t idx = blocks.index(block_idx);
          if (banks_dq && HeadState::ends_piece(blocks, idx, plan)) {
            kernels.bwd_bank_dq(params, head.batch_idx, head.kv_head_idx, positions,
                                bwd_job.dq_accumulator, !HeadState::was_banked(blocks, idx, plan));
          }
          head.next_block[tile].store(blocks.block(idx + 1), std::memory_order_release);
        }
        kernels.bwd_end_block(params, plan, bwd_job);
        if (head.jobs_left.fetch_sub(1) == 1) {
          for (int64_t tile = 0; tile < head.num_tiles; ++tile) {
            const BlockList<int64_t> blocks = head.blocks_of_tile(tile, plan);
            kernels.bwd_store_dq(
                params, head.batch_idx, head.kv_head_idx, head.positions_of_tile(tile, plan),
                bwd_job.dq_accumulator,
                banks_dq && HeadState::was_banked(blocks, blocks.count() - 1, plan));
          }
          pool.give_back(bwd_job.dq_accumulator);
        }
      });
}

}  // namespace sink_attention::cpu
