#include "cuda/common/bwd_rows.cuh"
#include "cuda/common/bwd_workspace.h"
#include "primitives/launch.h"

namespace sink_attention::cuda {
namespace {

using attention::BFloat16;
using attention::DataType;
using attention::FlashBwdProblem;
using attention::FlashFwdProblem;
using attention::Float16;

constexpr int64_t kAlignment = 256;

// Gives out parts of a piece of memory, or only counts where there is none.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    char* part = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(part);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

BwdRowsProblem rows_problem(const FlashBwdProblem& problem, const BwdWorkspace& workspace) {
  const FlashFwdProblem& fwd = problem.fwd;
  BwdRowsProblem rows{};
  rows.bwd = problem;
  rows.workspace = workspace;
  rows.out_in_chunks = rows_are_chunks(fwd.out, fwd.head_dim_v, fwd.out_stride_batch,
                                       fwd.out_stride_row, fwd.out_stride_head);
  rows.dout_in_chunks = rows_are_chunks(problem.dout, fwd.head_dim_v, problem.dout_stride_batch,
                                        problem.dout_stride_row, problem.dout_stride_head);
  rows.dq_in_chunks = rows_are_chunks(problem.dq, fwd.head_dim, problem.dq_stride_batch,
                                      problem.dq_stride_row, problem.dq_stride_head);
  return rows;
}

primitives::Index3 tiles_of(const FlashBwdProblem& problem, const BwdWorkspace& workspace) {
  return {workspace.num_tiles, static_cast<int>(problem.fwd.num_heads_kv), 1};
}

}  // namespace

int64_t lay_out(const FlashBwdProblem& problem, int tile_rows, int used_rows, int dq_cols,
                void* memory, BwdWorkspace& workspace) {
  const FlashFwdProblem& fwd = problem.fwd;
  const int64_t group = fwd.num_heads_q / fwd.num_heads_kv;
  const int64_t num_tiles = fwd.total_q * group / used_rows + fwd.batch;
  const int64_t all_tiles = num_tiles * fwd.num_heads_kv;
  Carver carver(memory);
  workspace.tile_rows = tile_rows;
  workspace.used_rows = used_rows;
  workspace.dq_cols = dq_cols;
  workspace.num_tiles = static_cast<int>(num_tiles);
  workspace.lse_log2 = carver.take<float>(all_tiles * tile_rows);
  workspace.delta = carver.take<float>(all_tiles * tile_rows);
  workspace.dq = carver.take<float>(all_tiles * tile_rows * dq_cols);
  workspace.sink_terms =
      fwd.s_aux == nullptr ? nullptr : carver.take<float>(num_tiles * fwd.num_heads_q);
  workspace.turns = problem.deterministic ? carver.take<int>(all_tiles) : nullptr;
  workspace.first_tiles = fwd.cu_seqlens_q == nullptr ? nullptr : carver.take<int>(fwd.batch);
  return carver.used();
}

void bwd_preprocess(const FlashBwdProblem& problem, const BwdWorkspace& workspace, void* stream) {
  const BwdRowsProblem rows = rows_problem(problem, workspace);
  const primitives::Index3 tiles = tiles_of(problem, workspace);
  if (problem.fwd.cu_seqlens_q != nullptr) {
    primitives::launch<BwdFirstTiles>(rows, {1, 1, 1}, stream);
  }
  if (problem.fwd.dtype == DataType::kBFloat16) {
    primitives::launch<BwdPreprocess<BFloat16>>(rows, tiles, stream);
  } else {
    primitives::launch<BwdPreprocess<Float16>>(rows, tiles, stream);
  }
  if (problem.fwd.s_aux != nullptr) {
    const primitives::Index3 heads{static_cast<int>(problem.fwd.num_heads_q), 1, 1};
    primitives::launch<BwdSinkGradient>(rows, heads, stream);
  }
}

void bwd_postprocess(const FlashBwdProblem& problem, const BwdWorkspace& workspace, void* stream) {
  const BwdRowsProblem rows = rows_problem(problem, workspace);
  const primitives::Index3 tiles = tiles_of(problem, workspace);
  if (problem.fwd.dtype == DataType::kBFloat16) {
    primitives::launch<BwdPostprocess<BFloat16>>(rows, tiles, stream);
  } else {
    primitives::launch<BwdPostprocess<Float16>>(rows, tiles, stream);
  }
}

}  // namespace sink_attention::cuda
