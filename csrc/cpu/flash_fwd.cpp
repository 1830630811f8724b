// The forward's division of work: dense, varlen and paged alike.
//
// A job is one tile: some query positions of one sequence with all query heads of one kv head. Where a sequence has
// several tiles, its keys and values are packed first, once for each kv head, and shared by all of them; where it has
// one (decode), each job packs the blocks that it reads as it goes, so that a cache is read once and never copied.
// Where there are fewer jobs than threads want, the key range of each is split, and the parts are merged with the sink.
#include <vector>

#include "attention/mask.h"
#include "attention/seqlen_info.h"
#include "cpu/backend.h"
#include "cpu/instruction_set.h"
#include "cpu/key_blocks.h"
#include "cpu/parallel.h"

namespace sink_attention::cpu {
namespace {

using attention::FlashFwdProblem;
using attention::Range;
using attention::SeqlenInfo;

struct Sequence {
  int64_t batch_idx;
  SeqlenInfo info;
  attention::Mask mask;
  int64_t first_tile;   // tiles of a kv head, counted over the batch
  int64_t num_tiles;
  Range blocks;         // blocks of keys that some query sees
  int64_t packed_block; // of the first kv head's blocks[0] in the packed buffer; -1: not packed ahead
};

struct Schedule {
  std::vector<Sequence> sequences;
  int64_t num_tiles = 0;           // of one kv head
  int64_t num_packed_blocks = 0;   // of all kv heads
};

Schedule make_schedule(const FlashFwdProblem& problem, const FwdPlan& plan) {
  Schedule schedule;
  for (int64_t batch_idx = 0; batch_idx < problem.batch; ++batch_idx) {
    Sequence sequence{};
    sequence.batch_idx = batch_idx;
    sequence.info = attention::seqlen_info(problem, batch_idx);
    sequence.mask = attention::make_mask(problem, sequence.info.seqlen_q, sequence.info.seqlen_k);
    sequence.first_tile = schedule.num_tiles;
    sequence.num_tiles = (sequence.info.seqlen_q + plan.tile_positions - 1) / plan.tile_positions;
    sequence.blocks = blocks_of(sequence.mask.visible_keys(0, sequence.info.seqlen_q), plan.block_keys);
    sequence.packed_block = -1;
    if (sequence.num_tiles > 1) {
      sequence.packed_block = schedule.num_packed_blocks;
      schedule.num_packed_blocks += (sequence.blocks.end - sequence.blocks.begin) * problem.num_heads_kv;
    }
    if (sequence.num_tiles == 0) continue;
    schedule.num_tiles += sequence.num_tiles;
    schedule.sequences.push_back(sequence);
  }
  return schedule;
}

// Jobs of at least this many keys are worth the merge that splitting them costs.
constexpr int64_t kMinSplitKeys = 512;

int64_t choose_splits(const FlashFwdProblem& problem, const FwdPlan& plan, const Schedule& schedule, int num_threads) {
  if (problem.num_splits > 0) return problem.num_splits;
  const int64_t jobs = schedule.num_tiles * problem.num_heads_kv;
  if (jobs >= 2 * num_threads || num_threads == 1) return 1;
  int64_t longest = 0;
  for (const Sequence& sequence : schedule.sequences) {
    longest = std::max(longest, (sequence.blocks.end - sequence.blocks.begin) * plan.block_keys);
  }
  return std::clamp<int64_t>(longest / kMinSplitKeys, 1, (4 * num_threads + jobs - 1) / jobs);
}

}  // namespace

void flash_fwd(const FlashFwdProblem& problem, const Executor& executor) {
  if (problem.batch == 0 || problem.num_heads_q == 0) return;
  const Kernels& kernels = kernels_for(problem.dtype, problem.kv_dtype);
  const FwdPlan plan = kernels.plan_fwd(problem);
  const Schedule schedule = make_schedule(problem, plan);
  const int64_t block_bytes = plan.packed_k_bytes + plan.packed_v_bytes;
  const int64_t num_heads = problem.num_heads_kv;

  // Pack. A kv head's blocks lie together.
  const AlignedBuffer packed(schedule.num_packed_blocks * block_bytes);
  struct PackJob {
    const Sequence* sequence;
    int64_t kv_head_idx;
    int64_t block_idx;
  };
  std::vector<PackJob> pack_jobs;
  pack_jobs.reserve(schedule.num_packed_blocks);
  for (const Sequence& sequence : schedule.sequences) {
    if (sequence.packed_block < 0) continue;
    for (int64_t head = 0; head < num_heads; ++head) {
      for (int64_t block = sequence.blocks.begin; block < sequence.blocks.end; ++block) {
        pack_jobs.push_back({&sequence, head, block});
      }
    }
  }
  parallel_jobs(executor, static_cast<int64_t>(pack_jobs.size()), 0, [&](int64_t job, char*) {
    const PackJob& pack = pack_jobs[job];
    kernels.pack_block(problem, plan, pack.sequence->batch_idx, pack.kv_head_idx, pack.block_idx,
                       packed.data() + job * block_bytes);
  });

  // Attend. Jobs of one kv head follow each other (its packed keys stay in cache), the last tile, under a causal mask
  // the longest, first.
  const int64_t num_splits = choose_splits(problem, plan, schedule, executor.num_threads);
  struct TileJob {
    const Sequence* sequence;
    int64_t kv_head_idx;
    int64_t tile_idx;
  };
  std::vector<TileJob> tile_jobs;
  tile_jobs.reserve(schedule.num_tiles * num_heads);
  for (const Sequence& sequence : schedule.sequences) {
    for (int64_t head = 0; head < num_heads; ++head) {
      for (int64_t tile = sequence.num_tiles - 1; tile >= 0; --tile) tile_jobs.push_back({&sequence, head, tile});
    }
  }
  const int64_t num_tile_jobs = static_cast<int64_t>(tile_jobs.size());
  const AlignedBuffer partials(num_splits > 1 ? num_tile_jobs * num_splits * plan.partial_bytes : 0);

  const auto make_task = [&](int64_t tile_job, int64_t split, char* scratch) {
    const TileJob& job = tile_jobs[tile_job];
    const Sequence& sequence = *job.sequence;
    FwdTask task{};
    task.batch_idx = sequence.batch_idx;
    task.kv_head_idx = job.kv_head_idx;
    task.q_begin = job.tile_idx * plan.tile_positions;
    task.q_end = std::min(task.q_begin + plan.tile_positions, sequence.info.seqlen_q);
    const Range blocks = blocks_of(sequence.mask.visible_keys(task.q_begin, task.q_end), plan.block_keys);
    const int64_t num_blocks = blocks.end - blocks.begin;
    task.block_begin = blocks.begin + num_blocks * split / num_splits;
    task.block_end = blocks.begin + num_blocks * (split + 1) / num_splits;
    if (sequence.packed_block >= 0) {
      const int64_t head_blocks = sequence.blocks.end - sequence.blocks.begin;
      task.packed = packed.data() +
                    (sequence.packed_block + job.kv_head_idx * head_blocks - sequence.blocks.begin) * block_bytes;
    }
    if (num_splits > 1) task.partial = partials.data() + (tile_job * num_splits + split) * plan.partial_bytes;
    task.scratch = scratch;
    return task;
  };
  parallel_jobs(executor, num_tile_jobs * num_splits, plan.scratch_bytes, [&](int64_t job, char* scratch) {
    kernels.fwd_tile(problem, plan, make_task(job / num_splits, job % num_splits, scratch));
  });
  if (num_splits == 1) return;
  parallel_jobs(executor, num_tile_jobs, plan.scratch_bytes, [&](int64_t job, char* scratch) {
    kernels.combine_splits(problem, plan, make_task(job, 0, scratch), num_splits, plan.partial_bytes);
  });
}

}  // namespace sink_attention::cpu
