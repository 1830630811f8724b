// The forward's schedule, for dense, varlen and paged calls (job, tile, block: simd/kernels.h).
//
//   prefill   A sequence with several tiles. Its K and V are packed first, once per kv head. A job
//             is one tile of one kv head; all tiles share the packed blocks.
//   decode    A sequence with one tile. A job is that tile of several kv heads. It packs each block
//             itself, or reads it in place, so the cache is read once.
//   splits    With fewer jobs than the threads need, each job's key range is split. The partial
//             results are merged, and then the sink is added.
#include <algorithm>
#include <vector>

#include "attention/block_list.h"
#include "attention/mask.h"
#include "attention/seqlen_info.h"
#include "cpu/backend.h"
#include "cpu/instruction_set.h"
#include "cpu/parallel.h"

namespace sink_attention::cpu {
namespace {

using attention::BlockList;
using attention::FlashFwdParams;
using attention::SeqlenInfo;

struct Sequence {
  int64_t batch_idx;
  SeqlenInfo info;
  attention::Mask mask;
  int64_t first_tile;  // index of its first tile in the batch, for one kv head
  int64_t num_tiles;
  BlockList<int64_t> blocks;  // the key blocks that some query sees
  // Index in the packed buffer of kv head 0's first block; -1: not packed ahead.
  int64_t packed_block;
};

struct Schedule {
  std::vector<Sequence> sequences;
  int64_t num_tiles = 0;          // for one kv head
  int64_t num_packed_blocks = 0;  // for all kv heads
};

Schedule make_schedule(const FlashFwdParams& params, const FwdPlan& plan) {
  Schedule schedule;
  for (int64_t batch_idx = 0; batch_idx < params.batch; ++batch_idx) {
    Sequence sequence{};
    sequence.batch_idx = batch_idx;
    sequence.info = attention::seqlen_info(params, batch_idx);
    sequence.mask = attention::make_mask(params, sequence.info);
    sequence.first_tile = schedule.num_tiles;
    sequence.num_tiles = (sequence.info.seqlen_q + plan.tile_positions - 1) / plan.tile_positions;
    sequence.blocks = attention::blocks_of(sequence.mask.visible_keys(0, sequence.info.seqlen_q),
                                           plan.block_keys);
    sequence.packed_block = -1;
    if (sequence.num_tiles > 1) {
      sequence.packed_block = schedule.num_packed_blocks;
      schedule.num_packed_blocks += sequence.blocks.count() * params.num_heads_kv;
    }
    if (sequence.num_tiles == 0) continue;
    schedule.num_tiles += sequence.num_tiles;
    schedule.sequences.push_back(sequence);
  }
  return schedule;
}

constexpr int64_t kMaxSplits = 64;  // as on CUDA; more splits only take memory
// The least keys of a split: fewer are not worth the merge.
constexpr int64_t kMinSplitKeys = 512;
// The most bytes of all partial results. Splits are for calls with few rows, and for these it is
// enough to occupy every thread of a large machine.
constexpr int64_t kMaxPartialBytes = int64_t{64} << 20;
// The most bytes of a thread's scratch for several kv heads. One head is always possible.
constexpr int64_t kMaxScratchBytes = int64_t{16} << 20;

int64_t scratch_bytes_per_head(const FwdPlan& plan) {
  return plan.tile_scratch_bytes + plan.packed_k_bytes + plan.packed_v_bytes;
}

struct Division {
  int64_t num_splits;     // of each job's key range
  int64_t heads_per_job;  // kv heads of one job, for sequences with a single tile
};

// Makes enough jobs for the threads. First it splits key ranges (if the caller did not fix
// num_splits): jobs then still read the cache in memory order. Then it gives each job fewer kv
// heads.
Division divide(const FlashFwdParams& params, const FwdPlan& plan, const Schedule& schedule,
                int num_threads) {
  const int64_t wanted = num_threads == 1 ? 1 : 2 * num_threads;
  int64_t max_blocks = 1;
  for (const Sequence& sequence : schedule.sequences) {
    max_blocks = std::max(max_blocks, sequence.blocks.count());
  }
  const auto jobs_of = [&](int64_t heads_per_job) {
    int64_t jobs = 0;
    for (const Sequence& sequence : schedule.sequences) {
      jobs += sequence.num_tiles > 1 ? sequence.num_tiles * params.num_heads_kv
                                     : (params.num_heads_kv + heads_per_job - 1) / heads_per_job;
    }
    return jobs;
  };
  const int64_t max_heads =
      std::clamp<int64_t>(kMaxScratchBytes / scratch_bytes_per_head(plan), 1, kMaxHeadsPerJob);
  Division division{params.num_splits, std::min(params.num_heads_kv, max_heads)};
  if (division.num_splits <= 0) {
    const int64_t jobs = jobs_of(division.heads_per_job);
    const int64_t worthwhile = max_blocks * plan.block_keys / kMinSplitKeys;
    division.num_splits = jobs >= wanted ? 1 : std::clamp<int64_t>(worthwhile, 1, wanted / jobs);
  }
  // No more splits than blocks: an empty split takes as much memory as any other.
  const int64_t split_bytes = schedule.num_tiles * params.num_heads_kv * plan.partial_bytes;
  const int64_t affordable = std::max<int64_t>(kMaxPartialBytes / split_bytes, 1);
  division.num_splits = std::min({division.num_splits, kMaxSplits, max_blocks, affordable});
  while (division.heads_per_job > 1 &&
         jobs_of(division.heads_per_job) * division.num_splits < wanted) {
    division.heads_per_job = (division.heads_per_job + 1) / 2;
  }
  return division;
}

}  // namespace

void flash_fwd(const FlashFwdParams& params, const Executor& executor) {
  if (params.batch == 0 || params.num_heads_q == 0) return;
  const Kernels& kernels = kernels_for(params.dtype, params.kv_dtype);
  const FwdPlan plan = kernels.plan_fwd(params);
  const Schedule schedule = make_schedule(params, plan);
  if (schedule.sequences.empty()) return;
  const int64_t block_bytes = plan.packed_k_bytes + plan.packed_v_bytes;
  const int64_t num_heads = params.num_heads_kv;

  // Pack. A kv head's blocks are contiguous.
  const KeptBuffer<Use::kPacked> packed(schedule.num_packed_blocks * block_bytes);
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
      for (int64_t idx = 0; idx < sequence.blocks.count(); ++idx) {
        pack_jobs.push_back({&sequence, head, sequence.blocks.block(idx)});
      }
    }
  }
  parallel_jobs(executor, static_cast<int64_t>(pack_jobs.size()), 0, [&](int64_t job, char*) {
    const PackJob& pack = pack_jobs[job];
    const Sequence& sequence = *pack.sequence;
    kernels.pack_blocks(params, plan, sequence.batch_idx, pack.kv_head_idx, pack.kv_head_idx + 1,
                        pack.block_idx, sequence.mask.visible_keys(0, sequence.info.seqlen_q),
                        packed.data() + job * block_bytes);
  });

  // Attend. Jobs of one kv head follow each other, so that its packed keys stay in cache. The last
  // tile comes first: under a causal mask it has the most keys.
  const auto [num_splits, heads_per_job] = divide(params, plan, schedule, executor.num_threads);
  struct TileCoord {
    const Sequence* sequence;
    int64_t kv_head_begin, kv_head_end;
    int64_t tile_idx;
  };
  std::vector<TileCoord> tiles;
  for (const Sequence& sequence : schedule.sequences) {
    const int64_t step = sequence.num_tiles > 1 ? 1 : heads_per_job;
    for (int64_t head = 0; head < num_heads; head += step) {
      for (int64_t tile = sequence.num_tiles - 1; tile >= 0; --tile) {
        tiles.push_back({&sequence, head, std::min(head + step, num_heads), tile});
      }
    }
  }
  // Partial results: [tile of the batch][kv head][split].
  const int64_t split_stride = plan.partial_bytes;
  const int64_t head_stride = num_splits * split_stride;
  const AlignedBuffer partials(num_splits > 1 ? schedule.num_tiles * num_heads * head_stride : 0);

  const auto make_job = [&](const TileCoord& tile, int64_t split, char* scratch) {
    const Sequence& sequence = *tile.sequence;
    FwdJob job{};
    job.batch_idx = sequence.batch_idx;
    job.kv_head_begin = tile.kv_head_begin;
    job.kv_head_end = tile.kv_head_end;
    job.q_begin = tile.tile_idx * plan.tile_positions;
    job.q_end = std::min(job.q_begin + plan.tile_positions, sequence.info.seqlen_q);
    job.blocks =
        attention::blocks_of(sequence.mask.visible_keys(job.q_begin, job.q_end), plan.block_keys);
    const int64_t num_blocks = job.blocks.count();
    job.idx_begin = num_blocks * split / num_splits;
    job.idx_end = num_blocks * (split + 1) / num_splits;
    if (sequence.packed_block >= 0) {
      job.packed =
          packed.data() +
          (sequence.packed_block + tile.kv_head_begin * sequence.blocks.count()) * block_bytes;
      job.packed_blocks = sequence.blocks;
    }
    if (num_splits > 1) {
      const int64_t idx = (sequence.first_tile + tile.tile_idx) * num_heads + tile.kv_head_begin;
      job.partial = partials.data() + idx * head_stride + split * split_stride;
      job.partial_stride = head_stride;
    }
    job.scratch = scratch;
    return job;
  };
  const int64_t scratch_bytes = heads_per_job * scratch_bytes_per_head(plan);
  parallel_jobs(executor, static_cast<int64_t>(tiles.size()) * num_splits, scratch_bytes,
                [&](int64_t job, char* scratch) {
                  kernels.fwd_job(params, plan,
                                  make_job(tiles[job / num_splits], job % num_splits, scratch));
                });
  if (num_splits == 1) return;
  parallel_jobs(
      executor, schedule.num_tiles * num_heads, scratch_bytes, [&](int64_t idx, char* scratch) {
        const int64_t tile = idx / num_heads;
        const auto after = std::upper_bound(
            schedule.sequences.begin(), schedule.sequences.end(), tile,
            [](int64_t t, const Sequence& sequence) { return t < sequence.first_tile; });
        const Sequence& sequence = *(after - 1);
        const TileCoord coord{&sequence, idx % num_heads, idx % num_heads + 1,
                              tile - sequence.first_tile};
        kernels.combine_splits(params, plan, make_job(coord, 0, scratch), num_splits, split_stride);
      });
}

}  // namespace sink_attention::cpu
