// Hopper's backward: which kernel and tiles, and what workspace.
#include <algorithm>

#include "attention/online_softmax.h"
#include "cuda/common/bwd_workspace.h"
#include "cuda/sm90/flash_bwd/config.h"
#include "cuda/sm90/flash_bwd/entry.h"
#include "cuda/sm90/flash_bwd/problem.h"
#include "cuda/sm90/tensor_maps.h"

namespace sink_attention::cuda::sm90 {
namespace {

using attention::FlashBwdProblem;
using attention::FlashFwdProblem;

// A head_dim class: how a query tile is cut, and the kernel.
struct HeadDimClass {
  int tile_rows;
  int head_dim;
  void (*run)(const FlashBwdKernelProblem& problem, Stream stream);
};

template <int kHeadDim, int kHeadDimV>
HeadDimClass make_class(void (*run)(const FlashBwdKernelProblem&, Stream)) {
  return {FlashBwdTilesOf<kHeadDim, kHeadDimV>::kBlockM, kHeadDim, run};
}

HeadDimClass class_of(const FlashFwdProblem& problem) {
  const int64_t dim = problem.head_dim;
  const int64_t dim_v = problem.head_dim_v;
  const int64_t larger = std::max(dim, dim_v);
  if (larger <= 64) return make_class<64, 64>(flash_bwd_hdim64);
  if (larger <= 96) return make_class<96, 96>(flash_bwd_hdim96);
  if (larger <= 128) return make_class<128, 128>(flash_bwd_hdim128);
  if (dim <= 192 && dim_v <= 128) return make_class<192, 128>(flash_bwd_hdim192_128);
  if (larger <= 192) return make_class<192, 192>(flash_bwd_hdim192);
  return make_class<256, 256>(flash_bwd_hdim256);
}

int64_t lay_out_workspace(const FlashBwdProblem& problem, const HeadDimClass& chosen, void* memory,
                          BwdWorkspace& workspace) {
  return lay_out(problem, chosen.tile_rows, rows_of_whole_positions(problem.fwd, chosen.tile_rows),
                 chosen.head_dim, memory, workspace);
}

}  // namespace

int64_t flash_bwd_workspace_bytes(const FlashBwdProblem& problem) {
  BwdWorkspace workspace{};
  return lay_out_workspace(problem, class_of(problem.fwd), nullptr, workspace);
}

void flash_bwd(const FlashBwdProblem& problem, const Device&, void* memory, Stream stream) {
  const FlashFwdProblem& fwd = problem.fwd;
  const HeadDimClass chosen = class_of(fwd);
  FlashBwdKernelProblem kernel_problem{};
  kernel_problem.bwd = problem;
  lay_out_workspace(problem, chosen, memory, kernel_problem.workspace);
  kernel_problem.group = static_cast<int>(fwd.num_heads_q / fwd.num_heads_kv);
  kernel_problem.capped = fwd.softcap > 0;
  const double to_logit = kernel_problem.capped ? fwd.softcap : fwd.softmax_scale;
  kernel_problem.to_log2 = static_cast<float>(to_logit * attention::kLog2E);
  kernel_problem.to_tanh =
      kernel_problem.capped ? static_cast<float>(fwd.softmax_scale / fwd.softcap) : 0.0f;
  bwd_preprocess(problem, kernel_problem.workspace, stream);
  chosen.run(kernel_problem, stream);
  bwd_postprocess(problem, kernel_problem.workspace, stream);
}

}  // namespace sink_attention::cuda::sm90
