// Launches the merge kernel. The parts' pointers are kernel arguments, so many parts need several
// launches.
#include <algorithm>
#include <stdexcept>

#include "attention/paged_kv.h"
#include "cuda/backend.h"
#include "cuda/kernels/merge_attn_states.cuh"
#include "primitives/launch.h"

namespace sink_attention::cuda {
namespace {

using attention::DataType;
using attention::MergeParams;

template <class Element, int kVectorElems>
void start(MergeParts& parts, Stream stream) {
  using Kernel = MergeAttnStatesKernel<Element, kVectorElems>;
  const MergeParams& params = parts.params;
  parts.lanes_per_row = 1;
  while (parts.lanes_per_row < primitives::kWarpSize &&
         parts.lanes_per_row * kVectorElems < params.head_dim) {
    parts.lanes_per_row *= 2;
  }
  const int64_t threads = params.batch * params.num_heads * params.seqlen * parts.lanes_per_row;
  const int64_t blocks = (threads + Kernel::Config::kThreads - 1) / Kernel::Config::kThreads;
  if (blocks > INT32_MAX)
    throw std::runtime_error("merge_attn_states: more rows than one launch can take");
  primitives::launch<Kernel>(parts, {static_cast<int>(blocks), 1, 1}, stream);
}

template <class Element>
void start(MergeParts& parts, Stream stream) {
  constexpr int kVectorElems = 16 / static_cast<int>(sizeof(Element));
  bool is_vectorised = parts.params.head_dim % kVectorElems == 0 &&
                       reinterpret_cast<uintptr_t>(parts.params.out) % 16 == 0;
  for (int part = 0; part < static_cast<int>(parts.params.num_parts); ++part) {
    is_vectorised = is_vectorised && reinterpret_cast<uintptr_t>(parts.outs[part]) % 16 == 0;
  }
  if (is_vectorised) {
    start<Element, kVectorElems>(parts, stream);
  } else {
    start<Element, 1>(parts, stream);
  }
}

void start(MergeParts& parts, Stream stream) {
  switch (parts.params.dtype) {
    case DataType::kFloat64:
      return start<double>(parts, stream);
    case DataType::kFloat32:
      return start<float>(parts, stream);
    case DataType::kFloat16:
      return start<attention::Float16>(parts, stream);
    default:
      return start<attention::BFloat16>(parts, stream);
  }
}

}  // namespace

// Each launch but the first has the result so far as its last part, so the sum over all parts is a
// sum of each launch's sum. Only the last launch folds the sink in.
void merge_attn_states(const MergeParams& params, Stream stream) {
  int64_t merged = 0;
  do {
    MergeParts parts{};
    parts.params = params;
    int count = 0;
    const bool has_earlier = merged > 0;
    const int room = kMaxMergeParts - (has_earlier ? 1 : 0);
    for (; count < room && merged < params.num_parts; ++merged) {
      parts.outs[count] = params.outs[merged];
      parts.lses[count++] = params.lses[merged];
    }
    if (has_earlier) {
      parts.outs[count] = params.out;
      parts.lses[count++] = params.lse;
    }
    parts.params.num_parts = count;
    if (merged < params.num_parts) parts.params.s_aux = nullptr;
    start(parts, stream);
  } while (merged < params.num_parts);
}

}  // namespace sink_attention::cuda
