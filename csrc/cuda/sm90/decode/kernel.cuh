// Decode: the rows of one sequence and kv head against one split of their keys.
//
// CTA (x, y):  x = sequence;  y = kv head * num_splits + split of the keys. The last warp is the
// producer (producer.cuh), the others are consumers (consumer.cuh). They meet only at the ring's
// barriers.
#pragma once

#include "attention/mask.h"
#include "cuda/sm90/decode/consumer.cuh"
#include "cuda/sm90/decode/producer.cuh"

namespace sink_attention::cuda::sm90 {

// Stored_: the element type of the cache. Element_: that of q, out and the tensor cores' operands.
// With an 8-bit cache Element_ is Float16, and q and out may be BFloat16 too.
template <class Element_, class Stored_, class Tiles_>
struct DecodeKernel {
  using Element = Element_;
  using Stored = Stored_;
  using Tiles = Tiles_;
  using Params = DecodeKernelParams;
  using Storage = DecodeStorage<Element, Tiles>;
  using Producer = DecodeProducer<Storage, Tiles>;
  using Consumer = DecodeConsumer<Element, Stored, Storage, Tiles>;
  struct Config {
    static constexpr int kThreads = Tiles::kThreads;
    static constexpr int kMinBlocks = Tiles::kMinBlocks;
    static constexpr int kSharedBytes = static_cast<int>(sizeof(Storage));
  };
  // An SM has 228 KB of shared memory, and each CTA reserves 1 KB of it.
  static_assert(Config::kSharedBytes <= 228 * 1024 / Tiles::kMinBlocks - 1024,
                "kMinBlocks CTAs fit an SM");

  static SA_DEVICE void run(const Params& kernel_params, char* shared) {
    const attention::FlashFwdParams& params = kernel_params.attn;
    Storage& storage = *reinterpret_cast<Storage*>(shared);
    const int batch_idx = primitives::block_idx().x;
    const int kv_head = primitives::block_idx().y / kernel_params.num_splits;
    const int split = primitives::block_idx().y % kernel_params.num_splits;
    const PackGqa rows = pack_gqa(params, batch_idx, kv_head);
    if (rows.num_rows <= 0) return;

    const attention::Mask mask = attention::make_mask(params, rows.info);
    const attention::KeySet visible = mask.visible_keys(0, rows.info.seqlen_q);
    const KeyBlockRange key_blocks = split_key_blocks(attention::blocks_of(visible, Tiles::kBlockN),
                                                      split, kernel_params.num_splits);
    if (key_blocks.begin >= key_blocks.end && kernel_params.num_splits > 1) {
      return store_empty({kernel_params, rows, split, 1.0f});
    }
    const auto keys = key_source<false>(params, batch_idx, kv_head, rows.info, visible);
    const auto values = key_source<true>(params, batch_idx, kv_head, rows.info, visible);

    const int warps_m = static_cast<int>(attention::min_of((rows.num_rows + 15) / 16,
                                                           Tiles::kWarpsM));  // that have rows
    if (primitives::thread_idx() == 0) {
      storage.ring.init(1, warps_m * Tiles::kWarpsN);
      primitives::fence_mbarrier_init();
    }
    primitives::sync_threads();  // the barriers are initialised

    const int warp = primitives::warp_idx();
    const int lane = primitives::lane_idx();
    if (warp == Tiles::kConsumerWarps) {
      Producer{kernel_params, storage, key_blocks, keys, values, kv_head, lane}.run();
      return;
    }
    const int warp_m = warp % Tiles::kWarpsM;
    const int warp_n = warp / Tiles::kWarpsM;
    const float value_scale = cache_scale(params.v_scale, params, kv_head);
    const ScoreScale scale =
        kernel_params.scale.times(cache_scale(params.k_scale, params, kv_head));
    Consumer consumer{kernel_params, storage, key_blocks};
    consumer.seqlen_q = static_cast<int>(rows.info.seqlen_q);
    consumer.seqlen_k = static_cast<int>(rows.info.seqlen_k);
    consumer.qhead_per_khead = rows.qhead_per_khead;
    consumer.tree = mask.tree;
    consumer.lane = lane;
    consumer.warp_row = 16 * warp_m;
    consumer.warp_key = warp_n * Tiles::kWarpKeys;
    consumer.start();
    consumer.load_queries(rows, warp);
    if (warp_m < warps_m) consumer.run(scale);
    // After this barrier no consumer reads the ring.
    primitives::sync_named(Consumer::kBarrier, Consumer::kThreads);
    if (warp_m < warps_m) consumer.store_to_reduction(warp_n, scale.softmax_scale_log2);
    // After this barrier the reduction buffer is complete.
    primitives::sync_named(Consumer::kBarrier, Consumer::kThreads);

    // Recompute the coordinates, so that they occupy no registers in between.
    const int x = primitives::optimisation_barrier(primitives::block_idx().x);
    const int y = primitives::optimisation_barrier(primitives::block_idx().y);
    const PackGqa result_rows = pack_gqa(params, x, y / kernel_params.num_splits);
    const RowResults<Params> results{kernel_params, result_rows, y % kernel_params.num_splits,
                                     value_scale};
    if (Storage::kUpcasts && params.dtype == attention::DataType::kBFloat16) {
      write<attention::BFloat16>(storage, results, warp);
    } else {
      write<Element>(storage, results, warp);
    }
  }

 private:
  template <class OutElement>
  static SA_DEVICE void write(const Storage& storage, const RowResults<Params>& results, int warp) {
    write_merged_rows<OutElement>(storage.reduction_buffer, results, 0, warp,
                                  Tiles::kConsumerWarps);
  }

  // A split without keys stores only its states: the merge does not read its output.
  static SA_DEVICE void store_empty(RowResults<Params> results) {
    for (int row = primitives::thread_idx(); row < results.rows.num_rows; row += Tiles::kThreads) {
      results.write_state(results.partial_index(row),
                          {attention::negative_infinity<float>(), 0.0f});
    }
  }
};

}  // namespace sink_attention::cuda::sm90
