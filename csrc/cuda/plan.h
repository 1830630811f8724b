// Which kernel runs a call, into how many parts it divides the keys, and what workspace it needs:
// decided once, before anything starts.
//
// A plan follows from the call's shape (call_shape.h) and the device alone, through the kernel
// table (registry.h). Nothing else decides: supports(), error messages, gpu_check and the tests'
// table of choices read the same plan.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/call_shape.h"

namespace sink_attention::cuda {

using Stream = void*;  // a cudaStream_t

// The architectures that this library was built for, in torch's notation ("8.0;9.0a+PTX"); null
// where the kernels run on any device, as in the emulator.
extern const char* const kBuildArchs;

struct Device {
  int num_sms;
  int arch;  // 10 * major + minor of the compute capability
  // The family whose kernels attention must run, of forceable_family(); null: the best that take a
  // call. Kernels for one architecture alone then run every call or throw; the others give way to
  // no kernels for one architecture alone.
  const char* forced = nullptr;
  const char* build_archs = kBuildArchs;
};

constexpr int kMaxTables = 8;  // of an op

// A family is the kernels for one kind of hardware, in the folder of that name: "simt" for float32
// and float64, "sm80" and "sm90" on tensor cores. The name, if a device's `forced` may be of that
// family; else null.
const char* forceable_family(const std::string& name);

template <class Params>
struct KernelTable;
template <class Params>
struct KernelRow;

// `Params` is the op's struct: FlashFwdParams, FlashFwdFp8Params or FlashBwdParams.
template <class Params>
struct Plan {
  CallShape shape;  // with those counts bounded that kernels hold in ints
  const KernelTable<Params>* table = nullptr;
  const KernelRow<Params>* row = nullptr;  // null: no kernel takes the call
  int num_sms = 0;
  int num_splits = 1;  // parts of each row's keys
  int64_t workspace_bytes = 0;
  // Of each table, in the order of registry.cpp, why its kernels do not take the call; null for the
  // one that runs and those after it.
  const char* why_not[kMaxTables] = {};

  bool takes_call() const { return row != nullptr; }
  std::string kernel_name() const;  // "sm90::flash_fwd_hdim64"
};

using FlashFwdPlan = Plan<attention::FlashFwdParams>;
using FlashFwdFp8Plan = Plan<attention::FlashFwdFp8Params>;
using FlashBwdPlan = Plan<attention::FlashBwdParams>;

// Throw std::runtime_error where no kernel takes the call, with each one's reason, or where one
// launch cannot take so many rows or keys. float8 q, k and v that no kernel takes are no error
// unless sm90's kernels are forced: the plan then has no row, and the caller dequantises.
FlashFwdPlan plan_flash_fwd(const CallShape& shape, const Device& device);
FlashFwdFp8Plan plan_flash_fwd_fp8(const CallShape& shape, const Device& device);
FlashBwdPlan plan_flash_bwd(const CallShape& shape, const Device& device);

}  // namespace sink_attention::cuda
