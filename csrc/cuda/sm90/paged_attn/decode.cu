// Decode's entry: how many splits, and which head_dim class.
#include <algorithm>
#include <stdexcept>

#include "cuda/bounded.h"
#include "cuda/common/combine.h"
#include "cuda/common/splits.h"
#include "cuda/sm90/paged_attn/entry.h"
#include "cuda/tile/copy.cuh"

namespace sink_attention::cuda::sm90 {
namespace {

using attention::FlashFwdProblem;

// Fewer keys a split are not worth the merge: two blocks of 16-bit keys, one of 8-bit ones.
constexpr int64_t kMinSplitKeys = 128;

// Blocks that the card runs at once.
int64_t slots_of(const FlashFwdProblem& problem, const Device& device) {
  const bool two =
      packed_rows_of(problem) <= kFewRows && std::max(problem.head_dim, problem.head_dim_v) <= 192;
  return std::max<int64_t>(device.num_sms * (two ? 2 : 1), 1);
}

// How long all blocks take, in times that one block would take for all of its keys.
double duration(int64_t blocks, int64_t splits, int64_t slots) {
  const int64_t waves = (blocks * splits + slots - 1) / slots;
  return static_cast<double>(waves) / static_cast<double>(splits);
}

// Lengths in device memory are not known here: the longest that there can be counts. A split of a
// shorter sequence has fewer keys, or none and ends at once.
int64_t wanted_splits(const FlashFwdProblem& problem, const Device& device) {
  if (problem.num_splits > 0) return limit_splits(problem, problem.num_splits);
  const int64_t most = limit_splits(problem, most_keys(problem) / kMinSplitKeys);
  const int64_t slots = slots_of(problem, device);
  const int64_t blocks = std::max<int64_t>(problem.batch * problem.num_heads_kv, 1);
  // Where there are few, as many as run at once.
  if (2 * blocks <= slots) return std::min(slots / blocks, most);
  // Else so many that the last wave of blocks is nearly as full as the others: the fewest that are
  // within a tenth of the best.
  double best = duration(blocks, 1, slots);
  for (int64_t splits = 2; splits <= most; ++splits) {
    best = std::min(best, duration(blocks, splits, slots));
  }
  int64_t splits = 1;
  while (duration(blocks, splits, slots) > 1.1 * best) ++splits;
  return splits;
}

// kv heads and splits lie along one dimension of the grid.
int choose_splits(const FlashFwdProblem& problem, const Device& device) {
  const int64_t most = std::max<int64_t>(kMaxGridY / problem.num_heads_kv, 1);
  return static_cast<int>(std::min(wanted_splits(problem, device), most));
}

}  // namespace

int64_t decode_workspace_bytes(const FlashFwdProblem& problem, const Device& device) {
  if (problem.num_heads_kv > kMaxGridY || problem.batch > INT32_MAX) {
    throw std::runtime_error(
        "sink_attention_ext: more sequences or kv heads than one launch can take");
  }
  const int num_splits = choose_splits(problem, device);
  if (num_splits > 1) check_combine(problem, num_splits);
  return partials_bytes(problem, num_splits);
}

void decode(const FlashFwdProblem& problem, const Device& device, void* workspace, Stream stream) {
  DecodeKernelProblem kernel_problem{};
  kernel_problem.problem = problem;
  kernel_problem.scale = score_scale(problem);
  kernel_problem.q_in_chunks = rows_are_chunks(problem.q, problem.head_dim, problem.q_stride_batch,
                                               problem.q_stride_row, problem.q_stride_head);
  kernel_problem.num_splits = choose_splits(problem, device);
  const Partials partials = partials_in(workspace, problem, kernel_problem.num_splits);
  kernel_problem.partial_state = partials.state;
  kernel_problem.partial_out = partials.out;
  const int64_t dim = problem.head_dim;
  const int64_t dim_v = problem.head_dim_v;
  const int64_t larger = std::max(dim, dim_v);
  if (larger <= 32) {
    decode_hdim32(kernel_problem, stream);
  } else if (larger <= 64) {
    decode_hdim64(kernel_problem, stream);
  } else if (larger <= 96) {
    decode_hdim96(kernel_problem, stream);
  } else if (larger <= 128) {
    decode_hdim128(kernel_problem, stream);
  } else if (dim <= 192 && dim_v <= 128) {
    decode_hdim192_128(kernel_problem, stream);
  } else if (larger <= 192) {
    decode_hdim192(kernel_problem, stream);
  } else {
    decode_hdim256(kernel_problem, stream);
  }
  if (kernel_problem.num_splits > 1) {
    combine(problem, kernel_problem.num_splits, partials, stream);
  }
}

}  // namespace sink_attention::cuda::sm90
