// The debug switch: the values of tensors on a device, checked as those of CPU tensors always are
// (check_values.h), by way of copies in host memory. That waits for the device, so it is off unless
// someone asks for it.
#pragma once

#include <vector>

#include "attention/problem.h"
#include "torch/make_problem.h"

namespace sink_attention::binding {

bool debug_checks();  // whether the switch is on, for all threads

// A problem whose lengths, block table, tree mask, slots and scales lie in host memory, for
// check_values; its other pointers are the device's still.
template <class Problem>
struct OnHost {
  Problem problem;
  std::vector<Tensor> copies;  // what it points to
};
OnHost<attention::FlashFwdProblem> on_host(const attention::FlashFwdProblem& problem,
                                           const VarlenArgs& varlen);
OnHost<attention::FlashFwdProblem> on_host(const attention::FlashFwdProblem& problem,
                                           const PagedArgs& paged);
OnHost<attention::ReshapeAndCacheProblem> on_host(const attention::ReshapeAndCacheProblem& problem,
                                                  const CacheArgs& args);

}  // namespace sink_attention::binding
