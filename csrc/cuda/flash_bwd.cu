// The backward's entry: which kernel and tiles, and what workspace.
#include <algorithm>

#include "attention/online_softmax.h"
#include "cuda/backend.h"
#include "cuda/bounded.h"
#include "cuda/common/bwd_workspace.h"
#include "cuda/family.h"
#include "cuda/simt/backend.h"
#include "cuda/sm80/flash_bwd/config.h"
#include "cuda/sm80/flash_bwd/problem.h"
#include "cuda/sm90/flash_bwd/entry.h"
#include "cuda/tile/copy.cuh"

namespace sink_attention::cuda {
namespace {

using attention::DataType;
using attention::FlashBwdProblem;
using attention::FlashFwdProblem;

// A head_dim class: how a query tile is cut, and the kernel.
struct HeadDimClass {
  int tile_rows;
  int head_dim;
  void (*run)(const sm80::FlashBwdKernelProblem& problem, Stream stream);
};

template <int kHeadDim, int kHeadDimV>
HeadDimClass make_class(void (*run)(const sm80::FlashBwdKernelProblem&, Stream)) {
  return {sm80::FlashBwdTilesOf<kHeadDim, kHeadDimV>::kBlockM, kHeadDim, run};
}

HeadDimClass class_of(const FlashFwdProblem& problem) {
  const int64_t dim = problem.head_dim;
  const int64_t dim_v = problem.head_dim_v;
  const int64_t larger = std::max(dim, dim_v);
  if (larger <= 32) return make_class<32, 32>(sm80::flash_bwd_hdim32);
  if (larger <= 64) return make_class<64, 64>(sm80::flash_bwd_hdim64);
  if (larger <= 96) return make_class<96, 96>(sm80::flash_bwd_hdim96);
  if (larger <= 128) return make_class<128, 128>(sm80::flash_bwd_hdim128);
  if (dim <= 192 && dim_v <= 128) return make_class<192, 128>(sm80::flash_bwd_hdim192_128);
  if (larger <= 192) return make_class<192, 192>(sm80::flash_bwd_hdim192);
  return make_class<256, 256>(sm80::flash_bwd_hdim256);
}

void set_score_scale(const FlashFwdProblem& problem, sm80::FlashBwdKernelProblem& kernel_problem) {
  kernel_problem.capped = problem.softcap > 0;
  const double scale = problem.softmax_scale;
  kernel_problem.to_tanh =
      kernel_problem.capped ? static_cast<float>(scale / problem.softcap) : 0.0f;
  kernel_problem.to_log2 =
      static_cast<float>((kernel_problem.capped ? problem.softcap : scale) * attention::kLog2E);
}

void set_chunks(const FlashBwdProblem& bwd, sm80::FlashBwdKernelProblem& kernel_problem) {
  const FlashFwdProblem& fwd = bwd.fwd;
  kernel_problem.q_in_chunks =
      rows_are_chunks(fwd.q, fwd.head_dim, fwd.q_stride_batch, fwd.q_stride_row, fwd.q_stride_head);
  kernel_problem.k_in_chunks =
      rows_are_chunks(fwd.k, fwd.head_dim, fwd.k_stride_batch, fwd.k_stride_row, fwd.k_stride_head);
  kernel_problem.v_in_chunks = rows_are_chunks(fwd.v, fwd.head_dim_v, fwd.v_stride_batch,
                                               fwd.v_stride_row, fwd.v_stride_head);
  kernel_problem.dout_in_chunks = rows_are_chunks(bwd.dout, fwd.head_dim_v, bwd.dout_stride_batch,
                                                  bwd.dout_stride_row, bwd.dout_stride_head);
  kernel_problem.dk_in_chunks = rows_are_chunks(bwd.dk, fwd.head_dim, bwd.dk_stride_batch,
                                                bwd.dk_stride_row, bwd.dk_stride_head);
  kernel_problem.dv_in_chunks = rows_are_chunks(bwd.dv, fwd.head_dim_v, bwd.dv_stride_batch,
                                                bwd.dv_stride_row, bwd.dv_stride_head);
}

// Which kernels run a problem: on Hopper sm90's, where they take it.
Family choose_family(const FlashBwdProblem& problem, const Device& device) {
  const char* why_not = why_not_sm90(device);
  if (why_not == nullptr) why_not = sm90::why_not_flash_bwd(problem);
  if (why_not == nullptr) return Family::kSm90;
  must_not_be_forced(device, "backward", why_not);
  const DataType dtype = problem.fwd.dtype;
  const bool tensor_cores = dtype == DataType::kBFloat16 || dtype == DataType::kFloat16;
  return tensor_cores ? Family::kSm80 : Family::kSimt;
}

void run_simt(const FlashBwdProblem& problem, void* memory, Stream stream) {
  if (problem.fwd.dtype == DataType::kFloat32) {
    flash_bwd_rows_float32(problem, static_cast<float*>(memory), stream);
    flash_bwd_float32(problem, static_cast<float*>(memory), stream);
  } else {
    flash_bwd_rows_float64(problem, static_cast<double*>(memory), stream);
    flash_bwd_float64(problem, static_cast<double*>(memory), stream);
  }
}

void run_sm80(const FlashBwdProblem& problem, void* memory, Stream stream) {
  const FlashFwdProblem& fwd = problem.fwd;
  const HeadDimClass chosen = class_of(fwd);
  sm80::FlashBwdKernelProblem kernel_problem{};
  kernel_problem.bwd = problem;
  lay_out(problem, chosen.tile_rows, chosen.tile_rows, chosen.head_dim, memory,
          kernel_problem.workspace);
  kernel_problem.group = static_cast<int>(fwd.num_heads_q / fwd.num_heads_kv);
  set_score_scale(fwd, kernel_problem);
  set_chunks(problem, kernel_problem);
  bwd_preprocess(problem, kernel_problem.workspace, stream);
  chosen.run(kernel_problem, stream);
  bwd_postprocess(problem, kernel_problem.workspace, stream);
}

}  // namespace

Family flash_bwd_family(const FlashBwdProblem& problem, const Device& device) {
  return choose_family(problem, device);
}

int64_t flash_bwd_workspace_bytes(const FlashBwdProblem& given, const Device& device) {
  FlashBwdProblem problem = given;
  problem.fwd = bounded(given.fwd);
  const FlashFwdProblem& fwd = problem.fwd;
  switch (choose_family(problem, device)) {
    case Family::kSimt: {
      const size_t number = fwd.dtype == DataType::kFloat32 ? sizeof(float) : sizeof(double);
      return fwd.total_q * fwd.num_heads_q * static_cast<int64_t>(number);
    }
    case Family::kSm80: {
      const HeadDimClass chosen = class_of(fwd);
      BwdWorkspace workspace{};
      return lay_out(problem, chosen.tile_rows, chosen.tile_rows, chosen.head_dim, nullptr,
                     workspace);
    }
    case Family::kSm90:  // a build without these kernels does not refer to them
      if constexpr (kHasSm90) return sm90::flash_bwd_workspace_bytes(problem);
  }
  return 0;
}

void flash_bwd(const FlashBwdProblem& given, const Device& device, void* memory, Stream stream) {
  if (given.fwd.num_heads_q == 0) return;
  FlashBwdProblem problem = given;
  problem.fwd = bounded(given.fwd);
  switch (choose_family(problem, device)) {
    case Family::kSimt:
      return run_simt(problem, memory, stream);
    case Family::kSm80:
      return run_sm80(problem, memory, stream);
    case Family::kSm90:
      if constexpr (kHasSm90) sm90::flash_bwd(problem, device, memory, stream);
  }
}

}  // namespace sink_attention::cuda
