// The forward's entry: which kernel family and tiles, how many splits, what workspace.
#include <algorithm>

#include "cuda/backend.h"
#include "cuda/bounded.h"
#include "cuda/common/block_order.h"
#include "cuda/common/combine.h"
#include "cuda/common/splits.h"
#include "cuda/family.h"
#include "cuda/simt/backend.h"
#include "cuda/sm80/flash_fwd/config.h"
#include "cuda/sm80/flash_fwd/entry.h"
#include "cuda/sm90/flash_fwd/entry.h"
#include "cuda/sm90/paged_attn/entry.h"
#include "cuda/tile/copy.cuh"

namespace sink_attention::cuda {
namespace {

using attention::DataType;
using attention::FlashFwdProblem;

constexpr int kMinSplitKeys = 256;  // fewer keys a split are not worth the merge

int64_t group_of(const FlashFwdProblem& problem) {
  return problem.num_heads_q / problem.num_heads_kv;
}

bool has_tensor_core_kernels(const FlashFwdProblem& problem) {
  return problem.dtype == DataType::kBFloat16 || problem.dtype == DataType::kFloat16;
}

// Decode tiles are for caches, and divide a row's sums among warps. With num_splits = 1, and in
// dense and varlen calls, all rows go through prefill tiles: a row's sums then have one order,
// whatever the rows and the lengths beside it.
bool is_sm80_decode(const FlashFwdProblem& problem) {
  return problem.block_table != nullptr && problem.num_splits != 1 &&
         problem.seqlen_q * group_of(problem) <= sm80::kDecodeRows;
}

// Parts of the keys, so that there is a block for each multiprocessor. Lengths in device memory are
// not known here: the longest that there can be counts.
int choose_splits(const FlashFwdProblem& problem, const Device& device) {
  if (problem.num_splits > 0) return limit_splits(problem, problem.num_splits);
  if (!is_sm80_decode(problem)) return 1;
  const int64_t blocks = std::max<int64_t>(problem.batch * problem.num_heads_kv, 1);
  const int64_t wanted = 2 * device.num_sms / blocks;
  return limit_splits(problem, std::min(wanted, most_keys(problem) / kMinSplitKeys));
}

struct Plan {
  Family family;
  bool decode;     // tiles for few rows over a cache
  int num_splits;  // parts of each row's keys, joined at the end; sm90's decode has its own
};

// Which kernels run a problem. On Hopper sm90's do where they take it: the decode over a cache, or
// the prefill where the caller lets the keys stay in one part.
Plan make_plan(const FlashFwdProblem& problem, const Device& device) {
  Plan plan{Family::kSimt, false, 1};
  if (has_tensor_core_kernels(problem)) {
    plan = {Family::kSm80, is_sm80_decode(problem), choose_splits(problem, device)};
  }
  const char* why_not = why_not_sm90(device);
  if (why_not == nullptr) {
    why_not = sm90::why_not_decode(problem);
    if (why_not == nullptr) return {Family::kSm90, true, 1};
    if (!plan.decode) {
      why_not = sm90::why_not_flash_fwd(problem);
      if (why_not == nullptr && problem.num_splits > 1) {
        why_not = "num_splits is above 1, and these are too many rows to decode";
      }
      if (why_not == nullptr) return {Family::kSm90, false, 1};
    }
  }
  must_not_be_forced(device, "forward", why_not);
  return plan;
}

// ---- sm80 ----

// A head_dim class: rows of a prefill tile, and the kernels.
struct HeadDimClass {
  int prefill_rows;
  void (*run)(const sm80::FlashFwdKernelProblem& problem, bool decode, Stream stream);
};

template <int kHeadDim, int kHeadDimV>
HeadDimClass make_class(void (*run)(const sm80::FlashFwdKernelProblem&, bool, Stream)) {
  static_assert(sm80::Decode<kHeadDim, kHeadDimV>::kBlockM == sm80::kDecodeRows);
  return {sm80::Prefill<kHeadDim, kHeadDimV>::kBlockM, run};
}

HeadDimClass class_of(const FlashFwdProblem& problem) {
  const int64_t dim = problem.head_dim;
  const int64_t dim_v = problem.head_dim_v;
  const int64_t larger = std::max(dim, dim_v);
  if (larger <= 32) return make_class<32, 32>(sm80::flash_fwd_hdim32);
  if (larger <= 64) return make_class<64, 64>(sm80::flash_fwd_hdim64);
  if (larger <= 96) return make_class<96, 96>(sm80::flash_fwd_hdim96);
  if (larger <= 128) return make_class<128, 128>(sm80::flash_fwd_hdim128);
  if (dim <= 192 && dim_v <= 128) return make_class<192, 128>(sm80::flash_fwd_hdim192_128);
  if (larger <= 192) return make_class<192, 192>(sm80::flash_fwd_hdim192);
  return make_class<256, 256>(sm80::flash_fwd_hdim256);
}

int64_t sm80_workspace_bytes(const FlashFwdProblem& problem, const Plan& plan) {
  fwd_block_order(problem, plan.decode ? sm80::kDecodeRows : class_of(problem).prefill_rows);
  if (plan.num_splits > 1) check_combine(problem, plan.num_splits);
  return partials_bytes(problem, plan.num_splits);
}

void run_sm80(const FlashFwdProblem& problem, const Plan& plan, void* workspace, Stream stream) {
  sm80::FlashFwdKernelProblem kernel_problem{};
  kernel_problem.problem = problem;
  kernel_problem.scale = score_scale(problem);
  kernel_problem.q_in_chunks = rows_are_chunks(problem.q, problem.head_dim, problem.q_stride_batch,
                                               problem.q_stride_row, problem.q_stride_head);
  kernel_problem.k_in_chunks = rows_are_chunks(problem.k, problem.head_dim, problem.k_stride_batch,
                                               problem.k_stride_row, problem.k_stride_head);
  kernel_problem.v_in_chunks =
      rows_are_chunks(problem.v, problem.head_dim_v, problem.v_stride_batch, problem.v_stride_row,
                      problem.v_stride_head);
  kernel_problem.out_in_chunks =
      rows_are_chunks(problem.out, problem.head_dim_v, problem.out_stride_batch,
                      problem.out_stride_row, problem.out_stride_head);
  kernel_problem.num_splits = plan.num_splits;
  const Partials partials = partials_in(workspace, problem, plan.num_splits);
  kernel_problem.partial_state = partials.state;
  kernel_problem.partial_out = partials.out;
  class_of(problem).run(kernel_problem, plan.decode, stream);
  if (plan.num_splits > 1) {
    combine(problem, plan.num_splits, partials, stream);
  }
}

// ---- sm90: a build without these kernels does not refer to them ----

int64_t sm90_workspace_bytes([[maybe_unused]] const FlashFwdProblem& problem,
                             [[maybe_unused]] const Plan& plan,
                             [[maybe_unused]] const Device& device) {
  if constexpr (kHasSm90) {
    if (plan.decode) return sm90::decode_workspace_bytes(problem, device);
    sm90::check_flash_fwd(problem);
  }
  return 0;
}

void run_sm90([[maybe_unused]] const FlashFwdProblem& problem, [[maybe_unused]] const Plan& plan,
              [[maybe_unused]] const Device& device, [[maybe_unused]] void* workspace,
              [[maybe_unused]] Stream stream) {
  if constexpr (kHasSm90) {
    plan.decode ? sm90::decode(problem, device, workspace, stream)
                : sm90::flash_fwd(problem, device, stream);
  }
}

}  // namespace

Family flash_fwd_family(const FlashFwdProblem& problem, const Device& device) {
  return make_plan(problem, device).family;
}

int64_t flash_fwd_workspace_bytes(const FlashFwdProblem& given, const Device& device) {
  const FlashFwdProblem problem = bounded(given);
  const Plan plan = make_plan(problem, device);
  switch (plan.family) {
    case Family::kSimt:
      problem.dtype == DataType::kFloat32 ? check_flash_fwd_float32(problem)
                                          : check_flash_fwd_float64(problem);
      return 0;
    case Family::kSm80:
      return sm80_workspace_bytes(problem, plan);
    case Family::kSm90:
      return sm90_workspace_bytes(problem, plan, device);
  }
  return 0;
}

void flash_fwd(const FlashFwdProblem& given, const Device& device, void* workspace, Stream stream) {
  if (given.batch == 0 || given.seqlen_q == 0 || given.num_heads_q == 0) return;
  const FlashFwdProblem problem = bounded(given);
  const Plan plan = make_plan(problem, device);
  switch (plan.family) {
    case Family::kSimt:
      return problem.dtype == DataType::kFloat32 ? flash_fwd_float32(problem, stream)
                                                 : flash_fwd_float64(problem, stream);
    case Family::kSm80:
      return run_sm80(problem, plan, workspace, stream);
    case Family::kSm90:
      return run_sm90(problem, plan, device, workspace, stream);
  }
}

}  // namespace sink_attention::cuda
