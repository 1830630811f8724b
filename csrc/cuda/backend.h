// The CUDA backend's entry points, all that csrc/torch sees of it.
//
// A call of attention is planned (plan.h), its workspace allocated by the caller, and run. Pointers
// are the device's. Nothing waits for the device, and no value in its memory is read on the host:
// lengths and tables may change between two replays of a captured graph. A call that cannot be
// started throws std::runtime_error.
#pragma once

#include "attention/fp8_params.h"
#include "cuda/plan.h"

namespace sink_attention::cuda {

Device current_device();

bool is_capturing(Stream stream);  // in a CUDA graph

// plan: of the same params, results set or not. workspace: plan.workspace_bytes, aligned to 256
// bytes; its contents need not be set. A float8 plan that takes no call throws.
void flash_fwd(const attention::FlashFwdParams& params, const FlashFwdPlan& plan, void* workspace,
               Stream stream);
void flash_fwd_fp8(const attention::FlashFwdFp8Params& params, const FlashFwdFp8Plan& plan,
                   Stream stream);
void flash_bwd(const attention::FlashBwdParams& params, const FlashBwdPlan& plan, void* workspace,
               Stream stream);

void reshape_and_cache(const attention::ReshapeAndCacheParams& params, Stream stream);
void merge_attn_states(const attention::MergeParams& params, Stream stream);

}  // namespace sink_attention::cuda
