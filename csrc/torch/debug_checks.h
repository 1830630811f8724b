// The debug switch: the values of tensors on a device, checked as those of CPU tensors always are
// (check_values.h), by way of copies in host memory. That waits for the device, so it is off unless
// someone asks for it.
#pragma once

#include <vector>

#include "attention/params.h"
#include "torch/make_params.h"

namespace sink_attention::binding {

bool debug_checks();  // whether the switch is on, for all threads

// A problem whose lengths, block table, tree mask, slots and scales lie in host memory, for
// check_values; its other pointers are the device's still.
template <class Params>
struct OnHost {
  Params params;
  std::vector<Tensor> copies;  // what it points to
};
OnHost<attention::FlashFwdParams> on_host(const attention::FlashFwdParams& params,
                                          const VarlenArgs& varlen);
OnHost<attention::FlashFwdParams> on_host(const attention::FlashFwdParams& params,
                                          const PagedArgs& paged);
OnHost<attention::ReshapeAndCacheParams> on_host(const attention::ReshapeAndCacheParams& params,
                                                 const CacheArgs& args);

}  // namespace sink_attention::binding
