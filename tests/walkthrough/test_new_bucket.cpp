// The bucket that csrc/README.md adds, in a copy of the tree (tests/test_walkthrough.py): head_dim
// 160 runs in it on both cards, prefill and decode, and is right.
#include "../cuda_emulated/buffers.h"
#include "check.h"
#include "cuda/backend.h"
#include "emulator/machine.h"
#include "reference.h"
#include "scenario.h"

namespace sink_attention::tests {
namespace {

void check_forward(Layout layout, int64_t seqlen_q, int arch, const std::string& kernel) {
  Spec spec;
  spec.layout = layout;
  spec.dtype = DataType::kBFloat16;
  spec.seqlen_q = seqlen_q;
  spec.seqlen_k = 150;
  spec.window_right = 0;
  spec.sink = 0.5;
  spec.num_heads_q = 4;
  spec.num_heads_kv = 2;
  spec.head_dim = spec.head_dim_v = 160;
  Scenario s = make_scenario(spec, 1);
  close_gaps(s);
  s.params.total_q = s.q_rows;
  const ReferenceForward expected = reference_forward(s.params, s.q_rows);
  s.out.fill(NAN);
  s.lse.fill(NAN);
  const cuda::FlashFwdPlan plan = cuda::plan_flash_fwd(cuda::shape_of(s.params), {1, arch});
  check(plan.kernel_name() == kernel, "runs ", plan.kernel_name(), ", not ", kernel);
  check(plan.num_splits == 1, "no workspace is needed");
  const emulator::VisibleBuffers visible(buffers_of(s, true));
  cuda::flash_fwd(s.params, plan, nullptr, nullptr);
  compare(out_of(s), expected.out, 0x1p-7, kernel + ": out");
  compare(lse_of(s), expected.lse, 1e-4, kernel + ": lse");
}

}  // namespace

SA_SUITE(new_bucket) {
  check_forward(Layout::kDense, 150, 80, "sm80::flash_fwd_hdim160");
  check_forward(Layout::kPaged, 1, 80, "sm80::decode_hdim160");
  check_forward(Layout::kDense, 150, 90, "sm90::flash_fwd_hdim160");
}

}  // namespace sink_attention::tests
