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

// One launch, which writes seqused_k and the unused rows of out and lse, too.
void append_kv(const attention::AppendKvParams& params, Stream stream);

// The rows of packed results that flash_fwd, flash_fwd_fp8 and flash_bwd leave alone, in one launch
// before theirs: out = 0 and lse = -inf in rows of no sequence; dq, dk and dv = 0 there and beyond
// seqused_k. So are rows beyond max_seqlen_q and max_seqlen_k. Dense: nothing.
void fill_unused_rows(const attention::FlashFwdParams& params, Stream stream);
void fill_unused_rows(const attention::FlashBwdParams& params, Stream stream);

}  // namespace sink_attention::cuda
