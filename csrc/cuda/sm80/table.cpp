// sm80's rows of the kernel table: tensor cores of every card from compute capability 8.0 on.
#include "cuda/device/block_order.h"
#include "cuda/kernels/bwd_layout.h"
#include "cuda/kernels/partials.h"
#include "cuda/registry.h"
#include "cuda/sm80/flash_bwd/entry.h"
#include "cuda/sm80/flash_fwd/entry.h"

namespace sink_attention::cuda::sm80 {
namespace {

using attention::FlashBwdParams;
using attention::FlashFwdParams;

constexpr const char* kFamily = "sm80";
constexpr const char* kWrongArch = "they need compute capability 8.0 or later";
constexpr const char* kWrongDtype = "q is neither bfloat16 nor float16";
constexpr int64_t kMinSplitKeys = 256;  // fewer keys a split are not worth the merge

const char* why_not_decode(const CallShape& shape) {
  if (!shape.is_16_bit()) return kWrongDtype;
  return is_decode(shape) ? nullptr : "it is no decode of few rows over a cache";
}

const char* why_not_flash_fwd(const CallShape& shape) {
  if (!shape.is_16_bit()) return kWrongDtype;
  return is_decode(shape) ? "it is a decode of few rows over a cache" : nullptr;
}

const char* why_not_flash_bwd(const CallShape& shape) {
  return shape.is_16_bit() ? nullptr : kWrongDtype;
}

// Parts of the keys, so that there is a block for each multiprocessor. Lengths in device memory are
// not known here: the longest that there can be counts.
int choose_splits(const CallShape& shape, const Device& device) {
  if (shape.num_splits > 0) return limit_splits(shape, shape.num_splits);
  if (!is_decode(shape)) return 1;
  const int64_t blocks = std::max<int64_t>(shape.batch * shape.num_heads_kv, 1);
  const int64_t wanted = 2 * device.num_sms / blocks;
  return limit_splits(shape, std::min(wanted, most_keys(shape) / kMinSplitKeys));
}

Resources fwd_resources(const CallShape& shape, const Bucket& bucket, const Device& device) {
  const int num_splits = choose_splits(shape, device);
  fwd_block_order(shape, bucket.tile_rows);  // throws where the blocks are too many
  check_combine(shape, num_splits);
  return {num_splits, partials_bytes(shape, num_splits)};
}

Resources bwd_resources(const CallShape& shape, const Bucket& bucket, const Device&) {
  BwdWorkspace workspace{};
  return {1,
          lay_out(shape, bucket.tile_rows, bucket.tile_rows, bucket.head_dim, nullptr, workspace)};
}

template <class Tiles>
constexpr Bucket bucket_of() {
  return {Tiles::kHeadDim, Tiles::kHeadDimV, Tiles::kBlockM, Tiles::kBlockN};
}

template <class Tiles>
constexpr KernelRow<FlashFwdParams> fwd_row() {
  return {bucket_of<Tiles>(), &launch_flash_fwd<Tiles>};
}

template <class Tiles>
constexpr KernelRow<FlashBwdParams> bwd_row() {
  return {bucket_of<Tiles>(), &launch_flash_bwd<Tiles>};
}

const KernelRow<FlashFwdParams> kDecodeRows[] = {
    fwd_row<Decode<32, 32>>(),    //
    fwd_row<Decode<64, 64>>(),    //
    fwd_row<Decode<96, 96>>(),    //
    fwd_row<Decode<128, 128>>(),  //
    fwd_row<Decode<192, 128>>(),  //
    fwd_row<Decode<192, 192>>(),  //
    fwd_row<Decode<256, 256>>(),  //
};

const KernelRow<FlashFwdParams> kFlashFwdRows[] = {
    fwd_row<Prefill<32, 32>>(),    //
    fwd_row<Prefill<64, 64>>(),    //
    fwd_row<Prefill<96, 96>>(),    //
    fwd_row<Prefill<128, 128>>(),  //
    fwd_row<Prefill<192, 128>>(),  //
    fwd_row<Prefill<192, 192>>(),  //
    fwd_row<Prefill<256, 256>>(),  //
};

const KernelRow<FlashBwdParams> kFlashBwdRows[] = {
    bwd_row<FlashBwdTilesOf<32, 32>>(),    //
    bwd_row<FlashBwdTilesOf<64, 64>>(),    //
    bwd_row<FlashBwdTilesOf<96, 96>>(),    //
    bwd_row<FlashBwdTilesOf<128, 128>>(),  //
    bwd_row<FlashBwdTilesOf<192, 128>>(),  //
    bwd_row<FlashBwdTilesOf<192, 192>>(),  //
    bwd_row<FlashBwdTilesOf<256, 256>>(),  //
};

}  // namespace

const KernelTable<FlashFwdParams> kDecodeTable{
    kFamily, "decode", 80, kAnyArch, kWrongArch, why_not_decode, fwd_resources, kDecodeRows};
const KernelTable<FlashFwdParams> kFlashFwdTable{kFamily,       "flash_fwd",  80,
                                                 kAnyArch,      kWrongArch,   why_not_flash_fwd,
                                                 fwd_resources, kFlashFwdRows};
const KernelTable<FlashBwdParams> kFlashBwdTable{kFamily,       "flash_bwd",  80,
                                                 kAnyArch,      kWrongArch,   why_not_flash_bwd,
                                                 bwd_resources, kFlashBwdRows};

}  // namespace sink_attention::cuda::sm80
