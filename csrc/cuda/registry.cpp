// All tables, in the order in which a plan asks them.
#include "cuda/registry.h"

namespace sink_attention::cuda {
namespace {

using attention::FlashBwdParams;
using attention::FlashFwdFp8Params;
using attention::FlashFwdParams;

template <class Params, int kCount>
Tables<Params> tables(const KernelTable<Params>* const (&all)[kCount]) {
  static_assert(kCount <= kMaxTables);
  return {all, all + kCount};
}

}  // namespace

#if defined(SINK_CUDA_ARCHS)
const char* const kBuildArchs = SINK_CUDA_ARCHS;
#else
const char* const kBuildArchs = nullptr;
#endif

// Those that compute the same calls on different hardware; simt's have theirs to themselves.
const char* forceable_family(const std::string& name) {
  for (const KernelTable<FlashFwdParams>* table : flash_fwd_tables()) {
    if (name == table->family && name != simt::kFlashFwdFloat32Table.family) return table->family;
  }
  return nullptr;
}

// Decode's before prefill's: few rows over a cache are faster there.
Tables<FlashFwdParams> flash_fwd_tables() {
  static const KernelTable<FlashFwdParams>* const all[] = {
      &sm90::kDecodeTable,   &sm80::kDecodeTable,          &sm90::kFlashFwdTable,
      &sm80::kFlashFwdTable, &simt::kFlashFwdFloat32Table, &simt::kFlashFwdFloat64Table};
  return tables(all);
}

Tables<FlashFwdFp8Params> flash_fwd_fp8_tables() {
  static const KernelTable<FlashFwdFp8Params>* const all[] = {&sm90::kFlashFwdFp8Table};
  return tables(all);
}

Tables<FlashBwdParams> flash_bwd_tables() {
  static const KernelTable<FlashBwdParams>* const all[] = {
      &sm90::kFlashBwdTable, &sm80::kFlashBwdTable, &simt::kFlashBwdFloat32Table,
      &simt::kFlashBwdFloat64Table};
  return tables(all);
}

}  // namespace sink_attention::cuda
