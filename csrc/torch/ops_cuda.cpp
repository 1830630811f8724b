// The ops on CUDA tensors: torch's current device, stream and allocator.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/backend.h"
#include "torch/cache_ops.h"
#include "torch/kernel_family.h"
#include "torch/op_namespace.h"

// In torch's CUDA library only: weak, so that this library also loads into a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace sink_attention::binding {
namespace {

cuda::Stream current_stream(const Tensor& tensor) {
  check_state(aoti_torch_get_current_cuda_stream != nullptr,
              "this torch has no CUDA, but got a CUDA tensor");
  void* stream = nullptr;
  check_state(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
              "torch has no current stream on CUDA device ", tensor.get_device_index());
  return stream;
}

cuda::Device current_device() {
  cuda::Device device = cuda::current_device();
  device.forced = forced_cuda_family();
  return device;
}

// The device of a call's tensors made current, its stream, and workspace from torch's allocator.
class Call {
 public:
  explicit Call(const Operands& operands)
      : tensor_(operands.first()),
        guard_(tensor_.get_device_index()),
        stream_(current_stream(tensor_)) {}
  cuda::Stream stream() const { return stream_; }
  // Freed with the returned tensor, in the order of the stream.
  Tensor workspace(int64_t bytes) const {
    return torch::stable::new_empty(tensor_, {bytes}, ScalarType::Byte);
  }

 private:
  const Tensor& tensor_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_;
};

struct CudaBackend {
  using Scratch = DeviceScratch;

  static constexpr bool kReadsValues = false;  // not without waiting for the device
  static bool is_capturing(const Tensor& tensor) {
    const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
    return cuda::is_capturing(current_stream(tensor));
  }
  template <class Params>  // FlashFwdParams or FlashBwdParams
  static void fill_unused_rows(const Params& params, const Operands& operands) {
    const Call call(operands);
    cuda::fill_unused_rows(params, call.stream());
  }

  static void check_flash_fwd(const attention::FlashFwdParams& params, const Tensor& tensor) {
    const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
    cuda::plan_flash_fwd(cuda::shape_of(params), current_device());
  }
  static void flash_fwd(const attention::FlashFwdParams& params, const Operands& operands) {
    const Call call(operands);
    const auto plan = cuda::plan_flash_fwd(cuda::shape_of(params), current_device());
    const Tensor workspace = call.workspace(plan.workspace_bytes);
    cuda::flash_fwd(params, plan, workspace.mutable_data_ptr(), call.stream());
  }
  static bool takes_fp8(const attention::FlashFwdFp8Params& params, const Tensor& tensor) {
    const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
    return cuda::plan_flash_fwd_fp8(cuda::shape_of(params), current_device()).takes_call();
  }
  static void flash_fwd_fp8(const attention::FlashFwdFp8Params& params, const Operands& operands) {
    const Call call(operands);
    const auto plan = cuda::plan_flash_fwd_fp8(cuda::shape_of(params), current_device());
    cuda::flash_fwd_fp8(params, plan, call.stream());
  }
  static void flash_bwd(const attention::FlashBwdParams& params, const Operands& operands) {
    const Call call(operands);
    const auto plan = cuda::plan_flash_bwd(cuda::shape_of(params), current_device());
    const Tensor workspace = call.workspace(plan.workspace_bytes);
    cuda::flash_bwd(params, plan, workspace.mutable_data_ptr(), call.stream());
  }
  static void reshape_and_cache(const attention::ReshapeAndCacheParams& params,
                                const Operands& operands) {
    const Call call(operands);
    cuda::reshape_and_cache(params, call.stream());
  }
  static void append_kv(const attention::AppendKvParams& params, const Operands& operands) {
    const Call call(operands);
    cuda::append_kv(params, call.stream());
  }
  static void merge_attn_states(const attention::MergeParams& params, const Operands& operands) {
    const Call call(operands);
    cuda::merge_attn_states(params, call.stream());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SA_OP_NAMESPACE, CUDA, m) {
  Ops<CudaBackend>::register_with(m);
  CacheOps<CudaBackend>::register_with(m);
}

}  // namespace sink_attention::binding
