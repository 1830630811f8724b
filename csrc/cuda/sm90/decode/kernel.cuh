// Decode: the rows of one sequence and kv head against a part of their keys.
//
// Thread block (x, y):  x = sequence;  y = kv head * num_splits + split of the keys. Its last warp
// fills the ring (producer.cuh), the others compute (consumer.cuh); they meet at the ring's
// barriers only.
#pragma once

#include "attention/mask.h"
#include "cuda/sm90/decode/consumer.cuh"
#include "cuda/sm90/decode/producer.cuh"

namespace sink_attention::cuda::sm90 {

// Stored_: of the cache's numbers. Element_: of q and out, and of the tensor cores' operands; where
// the cache has 8 bits it is Float16, and q and out may be BFloat16 too.
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
  // An SM has 228 KB, of which each block takes one for itself.
  static_assert(Config::kSharedBytes <= 228 * 1024 / Tiles::kMinBlocks - 1024, "blocks of an SM");

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
    const DecodeWalk walk =
        decode_walk(attention::blocks_of(visible, Tiles::kBlockN), split, kernel_params.num_splits);
    if (walk.begin >= walk.end && kernel_params.num_splits > 1) {
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
    primitives::sync_threads();  // the barriers are there

    const int warp = primitives::warp_idx();
    const int lane = primitives::lane_idx();
    if (warp == Tiles::kConsumerWarps) {
      Producer{kernel_params, storage, walk, keys, values, kv_head, lane}.run();
      return;
    }
    const int warp_m = warp % Tiles::kWarpsM;
    const int warp_n = warp / Tiles::kWarpsM;
    const float value_scale = cache_scale(params.v_scale, params, kv_head);
    const ScoreScale scale =
        kernel_params.scale.times(cache_scale(params.k_scale, params, kv_head));
    Consumer consumer{kernel_params,
                      storage,
                      walk,
                      static_cast<int>(rows.info.seqlen_q),
                      static_cast<int>(rows.info.seqlen_k),
                      rows.qhead_per_khead,
                      mask.tree,
                      lane,
                      16 * warp_m,
                      warp_n * Tiles::kWarpKeys,
                      {},
                      {},
                      {}};
    consumer.start();
    consumer.load_queries(rows, warp);
    if (warp_m < warps_m) consumer.run(scale);
    primitives::sync_named(Consumer::kBarrier, Consumer::kThreads);  // the ring is no longer read
    if (warp_m < warps_m) consumer.store_to_reduction(warp_n, scale.softmax_scale_log2);
    primitives::sync_named(Consumer::kBarrier, Consumer::kThreads);  // all parts of rows are there

    // The place anew: what only the ends need shall take no registers between them.
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

  // A split without keys: of its rows only the states are read.
  static SA_DEVICE void store_empty(RowResults<Params> results) {
    for (int row = primitives::thread_idx(); row < results.rows.num_rows; row += Tiles::kThreads) {
      results.write_state(results.partial_index(row),
                          {attention::negative_infinity<float>(), 0.0f});
    }
  }
};

}  // namespace sink_attention::cuda::sm90
