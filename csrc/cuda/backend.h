// The CUDA backend's entry points, all that csrc/torch sees of it.
//
// Pointers are the device's. Nothing waits for the device, and no value in its memory is read on
// the host: lengths and tables may change between two replays of a captured graph. A workspace is
// allocated by the caller, aligned to 256 bytes, of the size that ..._workspace_bytes says for the
// same problem; its contents need not be set. A call that cannot be started throws
// std::runtime_error.
#pragma once

#include <optional>

#include "attention/fp8_params.h"

namespace sink_attention::cuda {

using Stream = void*;  // a cudaStream_t

// Kernels for one kind of hardware, in the folder of that name: kSimt for float32 and float64, the
// others on tensor cores. kSm80 runs on every card, kSm90 on compute capability 9.0 only.
enum class Family { kSimt, kSm80, kSm90 };
const char* family_name(Family family);  // "simt", "sm80", "sm90"

struct Device {
  int num_sms;
  int arch;  // 10 * major + minor of the compute capability
  // Whose kernels attention must run in bfloat16 and float16; otherwise the best that take a
  // problem do. kSm90 throws where they do not take it.
  std::optional<Family> forced{};
};
Device current_device();

bool is_capturing(Stream stream);  // in a CUDA graph

// Dense, varlen and paged. Whatever flash_fwd would refuse, flash_fwd_workspace_bytes does; it
// looks at no results, which need not be set, and launches nothing.
int64_t flash_fwd_workspace_bytes(const attention::FlashFwdParams& params, const Device& device);
void flash_fwd(const attention::FlashFwdParams& params, const Device& device, void* workspace,
               Stream stream);

// On float8 q, k and v. Whether this device has kernels for the problem, whose results need not be
// set: Hopper only, and there not for every layout. Throws std::runtime_error if sm90's kernels are
// forced and do not take it. And the forward of a problem that is taken, without a workspace.
bool takes_flash_fwd_fp8(const attention::FlashFwdFp8Params& params, const Device& device);
void flash_fwd_fp8(const attention::FlashFwdFp8Params& params, const Device& device, Stream stream);

int64_t flash_bwd_workspace_bytes(const attention::FlashBwdParams& params, const Device& device);
void flash_bwd(const attention::FlashBwdParams& params, const Device& device, void* workspace,
               Stream stream);

// Whose kernels the same call runs; throws as it does.
Family flash_fwd_family(const attention::FlashFwdParams& params, const Device& device);
Family flash_bwd_family(const attention::FlashBwdParams& params, const Device& device);

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
