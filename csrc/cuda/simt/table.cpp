// simt's rows of the kernel table: float32 and float64, on the cores that every card has.
#include "cuda/simt/entry.h"

namespace sink_attention::cuda::simt {
namespace {

using attention::DataType;
using attention::FlashBwdParams;
using attention::FlashFwdParams;

constexpr const char* kFamily = "simt";
constexpr const char* kWrongArch = "they need compute capability 8.0 or later";

template <DataType kType>
const char* why_not(const CallShape& shape) {
  return shape.dtype == kType ? nullptr : "q is neither float32 nor float64";
}

Resources fwd_resources(const CallShape& shape, const Bucket& bucket, const Device&) {
  blocks_of(shape, divide_up(shape.pack_gqa_rows(), bucket.tile_rows));  // throws if too many
  return {1, 0};
}

template <class Real>
Resources bwd_resources(const CallShape& shape, const Bucket& bucket, const Device&) {
  blocks_of(shape, divide_up(shape.pack_gqa_rows(), bucket.tile_rows));
  blocks_of(shape, divide_up(shape.seqlen_k, bucket.tile_rows));
  return {1, shape.total_q * shape.num_heads_q * static_cast<int64_t>(sizeof(Real))};
}

template <class Real, int kHeadDim>
constexpr KernelRow<FlashFwdParams> flash_fwd() {
  using Tiles = FlashFwdTiles<Real, kHeadDim>;
  return {{kHeadDim, kHeadDim, Tiles::kBlockM, Tiles::kBlockN}, &launch_flash_fwd<Tiles>};
}

template <class Real, int kHeadDim>
constexpr KernelRow<FlashBwdParams> flash_bwd() {
  using Tiles = FlashBwdTiles<Real, kHeadDim>;
  return {{kHeadDim, kHeadDim, Tiles::kBlockM, Tiles::kBlockN}, &launch_flash_bwd<Tiles>};
}

template <class Real>
const KernelRow<FlashFwdParams> kFlashFwdRows[] = {
    flash_fwd<Real, 64>(),   //
    flash_fwd<Real, 128>(),  //
    flash_fwd<Real, 256>(),  //
};

template <class Real>
const KernelRow<FlashBwdParams> kFlashBwdRows[] = {
    flash_bwd<Real, 64>(),   //
    flash_bwd<Real, 128>(),  //
    flash_bwd<Real, 256>(),  //
};

}  // namespace

const KernelTable<FlashFwdParams> kFlashFwdFloat32Table{
    kFamily,       "flash_fwd_float32", 80, kAnyArch, kWrongArch, why_not<DataType::kFloat32>,
    fwd_resources, kFlashFwdRows<float>};
const KernelTable<FlashFwdParams> kFlashFwdFloat64Table{
    kFamily,       "flash_fwd_float64",  80, kAnyArch, kWrongArch, why_not<DataType::kFloat64>,
    fwd_resources, kFlashFwdRows<double>};
const KernelTable<FlashBwdParams> kFlashBwdFloat32Table{kFamily,
                                                        "flash_bwd_float32",
                                                        80,
                                                        kAnyArch,
                                                        kWrongArch,
                                                        why_not<DataType::kFloat32>,
                                                        bwd_resources<float>,
                                                        kFlashBwdRows<float>};
const KernelTable<FlashBwdParams> kFlashBwdFloat64Table{kFamily,
                                                        "flash_bwd_float64",
                                                        80,
                                                        kAnyArch,
                                                        kWrongArch,
                                                        why_not<DataType::kFloat64>,
                                                        bwd_resources<double>,
                                                        kFlashBwdRows<double>};

}  // namespace sink_attention::cuda::simt
