// The CUDA backend's entry points, all that csrc/torch sees of it.
//
// Pointers are the device's. Nothing waits for the device, and no value in its memory is read on
// the host: lengths and tables may change between two replays of a captured graph. A workspace is
// allocated by the caller, aligned to 256 bytes, of the size that ..._workspace_bytes says for the
// same problem; its contents need not be set. A call that cannot be started throws
// std::runtime_error.
#pragma once

#include "attention/problem.h"

namespace sink_attention::cuda {

using Stream = void*;  // a cudaStream_t

struct Device {
  int num_sms;
  int arch;  // 10 * major + minor of the compute capability
};
Device current_device();

bool is_capturing(Stream stream);  // in a CUDA graph

// Dense, varlen and paged.
int64_t flash_fwd_workspace_bytes(const attention::FlashFwdProblem& problem, const Device& device);
void flash_fwd(const attention::FlashFwdProblem& problem, const Device& device, void* workspace,
               Stream stream);

int64_t flash_bwd_workspace_bytes(const attention::FlashBwdProblem& problem, const Device& device);
void flash_bwd(const attention::FlashBwdProblem& problem, const Device& device, void* workspace,
               Stream stream);

void reshape_and_cache(const attention::ReshapeAndCacheProblem& problem, Stream stream);
void merge_attn_states(const attention::MergeProblem& problem, Stream stream);

}  // namespace sink_attention::cuda
