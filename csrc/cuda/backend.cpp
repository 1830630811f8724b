#include "cuda/backend.h"

#include <stdexcept>

#include "cuda/registry.h"

namespace sink_attention::cuda {
namespace {

// With the plan's bounded counts.
attention::FlashFwdParams bounded_by(const CallShape& shape, attention::FlashFwdParams params) {
  params.seqlen_k = shape.seqlen_k;
  params.num_pages = shape.num_pages;
  return params;
}

bool has_rows(const CallShape& shape) {
  return shape.batch > 0 && shape.seqlen_q > 0 && shape.num_heads_q > 0;
}

}  // namespace

void flash_fwd(const attention::FlashFwdParams& params, const FlashFwdPlan& plan, void* workspace,
               Stream stream) {
  if (!has_rows(plan.shape)) return;
  plan.row->launch({bounded_by(plan.shape, params), plan, workspace, stream});
}

void flash_fwd_fp8(const attention::FlashFwdFp8Params& given, const FlashFwdFp8Plan& plan,
                   Stream stream) {
  if (!plan.takes_call()) {
    throw std::runtime_error(
        "sink_attention_ext: no kernel takes these float8 q, k and v as they are");
  }
  if (!has_rows(plan.shape)) return;
  attention::FlashFwdFp8Params params = given;
  params.fwd = bounded_by(plan.shape, given.fwd);
  plan.row->launch({params, plan, nullptr, stream});
}

// Without rows or keys there still are gradients to be set to 0.
void flash_bwd(const attention::FlashBwdParams& given, const FlashBwdPlan& plan, void* workspace,
               Stream stream) {
  if (plan.shape.num_heads_q == 0) return;
  attention::FlashBwdParams params = given;
  params.fwd = bounded_by(plan.shape, given.fwd);
  plan.row->launch({params, plan, workspace, stream});
}

}  // namespace sink_attention::cuda
