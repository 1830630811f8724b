// sm90's rows of the kernel table: wgmma, TMA and setmaxnreg, of compute capability 9.0 only.
#include <stdexcept>

#include "cuda/kernels/bwd_layout.h"
#include "cuda/registry.h"
#include "cuda/sm90/decode/entry.h"
#include "cuda/sm90/decode/splits.h"
#include "cuda/sm90/flash_bwd/entry.h"
#include "cuda/sm90/flash_fwd/entry.h"
#include "cuda/sm90/flash_fwd_fp8/entry.h"

namespace sink_attention::cuda::sm90 {
namespace {

using attention::FlashBwdParams;
using attention::FlashFwdFp8Params;
using attention::FlashFwdParams;

constexpr const char* kFamily = "sm90";
constexpr const char* kWrongArch = "they run on compute capability 9.0 only";

Resources decode_resources(const CallShape& shape, const Bucket&, const Device& device) {
  if (shape.num_heads_kv > kMaxGridY || shape.batch > INT32_MAX) {
    throw std::runtime_error(
        "sink_attention_ext: more sequences or kv heads than one launch can take");
  }
  const int num_splits = choose_splits(shape, device);
  check_combine(shape, num_splits);
  return {num_splits, partials_bytes(shape, num_splits)};
}

Resources fwd_resources(const CallShape& shape, const Bucket& bucket, const Device&) {
  const int64_t tiles = (shape.pack_gqa_rows() + bucket.tile_rows - 1) / bucket.tile_rows;
  if (tiles * shape.batch * shape.num_heads_kv > INT32_MAX) {
    throw std::runtime_error("sink_attention_ext: more rows than one launch can take");
  }
  return {1, 0};
}

Resources bwd_resources(const CallShape& shape, const Bucket& bucket, const Device&) {
  BwdWorkspace workspace{};
  return {1, lay_out(shape, bucket.tile_rows, rows_of_whole_positions(shape, bucket.tile_rows),
                     bucket.head_dim, nullptr, workspace)};
}

// The tiles of few rows of a 16-bit cache; the launch takes others for many rows, or 8 bits.
template <int kHeadDim, int kHeadDimV>
constexpr KernelRow<FlashFwdParams> decode() {
  using Tiles = FewRows<kHeadDim, kHeadDimV, 2>;
  return {{kHeadDim, kHeadDimV, Tiles::kBlockM, Tiles::kBlockN},
          &launch_decode<kHeadDim, kHeadDimV>};
}

template <int kHeadDim, int kHeadDimV>
constexpr KernelRow<FlashFwdParams> flash_fwd() {
  using Tiles = FlashFwdTilesOf<kHeadDim, kHeadDimV>;
  return {{kHeadDim, kHeadDimV, Tiles::kBlockM, Tiles::kBlockN},
          &launch_flash_fwd<kHeadDim, kHeadDimV>};
}

template <int kHeadDim>
constexpr KernelRow<FlashFwdFp8Params> flash_fwd_fp8() {
  using Tiles = FlashFwdFloat8TilesOf<kHeadDim>;
  return {{kHeadDim, kHeadDim, Tiles::kBlockM, Tiles::kBlockN}, &launch_flash_fwd_fp8<kHeadDim>};
}

template <int kHeadDim, int kHeadDimV>
constexpr KernelRow<FlashBwdParams> flash_bwd() {
  using Tiles = FlashBwdTilesOf<kHeadDim, kHeadDimV>;
  return {{kHeadDim, kHeadDimV, Tiles::kBlockM, Tiles::kBlockN},
          &launch_flash_bwd<kHeadDim, kHeadDimV>};
}

const KernelRow<FlashFwdParams> kDecodeRows[] = {
    decode<32, 32>(),    //
    decode<64, 64>(),    //
    decode<96, 96>(),    //
    decode<128, 128>(),  //
    decode<192, 128>(),  //
    decode<192, 192>(),  //
    decode<256, 256>(),  //
};

const KernelRow<FlashFwdParams> kFlashFwdRows[] = {
    flash_fwd<64, 64>(),    //
    flash_fwd<96, 96>(),    //
    flash_fwd<128, 128>(),  //
    flash_fwd<192, 128>(),  //
    flash_fwd<192, 192>(),  //
    flash_fwd<256, 256>(),  //
};

const KernelRow<FlashFwdFp8Params> kFlashFwdFp8Rows[] = {
    flash_fwd_fp8<64>(),   //
    flash_fwd_fp8<128>(),  //
    flash_fwd_fp8<256>(),  //
};

const KernelRow<FlashBwdParams> kFlashBwdRows[] = {
    flash_bwd<64, 64>(),    //
    flash_bwd<96, 96>(),    //
    flash_bwd<128, 128>(),  //
    flash_bwd<192, 128>(),  //
    flash_bwd<192, 192>(),  //
    flash_bwd<256, 256>(),  //
};

}  // namespace

const KernelTable<FlashFwdParams> kDecodeTable{
    kFamily, "decode", 90, 90, kWrongArch, why_not_decode, decode_resources, kDecodeRows};
const KernelTable<FlashFwdParams> kFlashFwdTable{
    kFamily, "flash_fwd", 90, 90, kWrongArch, why_not_flash_fwd, fwd_resources, kFlashFwdRows};
const KernelTable<FlashFwdFp8Params> kFlashFwdFp8Table{
    kFamily,       "flash_fwd_fp8", 90, 90, kWrongArch, why_not_flash_fwd_fp8,
    fwd_resources, kFlashFwdFp8Rows};
const KernelTable<FlashBwdParams> kFlashBwdTable{
    kFamily, "flash_bwd", 90, 90, kWrongArch, why_not_flash_bwd, bwd_resources, kFlashBwdRows};

}  // namespace sink_attention::cuda::sm90
