// The ops on CPU tensors, computed by the CUDA kernels in the emulator. tests/emulated.py
// substitutes them for the CPU's ops.
//
// Results are NaN before a kernel runs. A kernel may access only the elements of its operands.
#include "cuda/backend.h"
#include "emulator/machine.h"
#include "torch/cache_ops.h"
#include "torch/kernel_family.h"
#include "torch/op_namespace.h"

namespace sink_attention::binding {
namespace {

int num_sms = 4;
int arch = 80;
bool pretends_to_capture = false;

emulator::Buffer buffer_of(const Tensor& tensor, bool writable, const std::string& name) {
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  const int64_t elements = tensor.numel() == 0 ? 0 : last + 1;
  return {begin, begin + elements * tensor.element_size(), writable, name};
}

// Names the operands to the emulator during a call.
struct Visible {
  explicit Visible(const Operands& operands) : buffers(list(operands)) {}
  static std::vector<emulator::Buffer> list(const Operands& operands) {
    std::vector<emulator::Buffer> found;
    int i = 0;
    for (const Tensor& tensor : operands.written) {
      found.push_back(buffer_of(tensor, true, "result " + std::to_string(i++)));
    }
    i = 0;
    for (const Tensor& tensor : operands.read) {
      found.push_back(buffer_of(tensor, false, "operand " + std::to_string(i++)));
    }
    return found;
  }
  emulator::VisibleBuffers buffers;
};

// Adds a workspace, filled with NaN, to the operands; it is visible while `workspace` lives.
Operands with_workspace(Operands operands, const Tensor& like, int64_t bytes, Tensor& workspace,
                        void*& data) {
  workspace = torch::stable::fill_(
      torch::stable::new_empty(like, {(bytes + 3) / 4 + 64}, ScalarType::Float),
      std::numeric_limits<double>::quiet_NaN());
  const uintptr_t address = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr());
  data = reinterpret_cast<void*>((address + 255) / 256 * 256);
  operands.written.push_back(workspace);
  return operands;
}

struct EmulatedBackend {
  using Scratch = DeviceScratch;

  static constexpr bool kReadsValues = false;  // as on CUDA: under the debug switch only
  static bool is_capturing(const Tensor&) { return pretends_to_capture; }
  template <class Params>  // FlashFwdParams or FlashBwdParams
  static void fill_unused_rows(const Params& params, const Operands& operands) {
    poison(operands);
    const Visible visible(operands);
    cuda::fill_unused_rows(params, nullptr);
  }

  static cuda::Device device() { return {num_sms, arch, forced_cuda_family(), build_archs()}; }

  static void check_flash_fwd(const attention::FlashFwdParams& params, const Tensor&) {
    cuda::plan_flash_fwd(cuda::shape_of(params), device());
  }
  static void flash_fwd(const attention::FlashFwdParams& params, const Operands& operands) {
    if (params.cu_seqlens_q == nullptr) poison(operands);
    void* workspace = nullptr;
    Tensor memory;
    const auto plan = cuda::plan_flash_fwd(cuda::shape_of(params), device());
    const Operands all =
        with_workspace(operands, operands.first(), plan.workspace_bytes, memory, workspace);
    const Visible visible(all);
    cuda::flash_fwd(params, plan, workspace, nullptr);
  }
  static bool takes_fp8(const attention::FlashFwdFp8Params& params, const Tensor&) {
    return cuda::plan_flash_fwd_fp8(cuda::shape_of(params), device()).takes_call();
  }
  static void flash_fwd_fp8(const attention::FlashFwdFp8Params& params, const Operands& operands) {
    if (params.fwd.cu_seqlens_q == nullptr) poison(operands);
    const Visible visible(operands);
    cuda::flash_fwd_fp8(params, cuda::plan_flash_fwd_fp8(cuda::shape_of(params), device()),
                        nullptr);
  }
  static void flash_bwd(const attention::FlashBwdParams& params, const Operands& operands) {
    if (params.fwd.cu_seqlens_q == nullptr) poison(operands);
    void* workspace = nullptr;
    Tensor memory;
    const auto plan = cuda::plan_flash_bwd(cuda::shape_of(params), device());
    const Operands all =
        with_workspace(operands, operands.first(), plan.workspace_bytes, memory, workspace);
    const Visible visible(all);
    cuda::flash_bwd(params, plan, workspace, nullptr);
  }
  static void reshape_and_cache(const attention::ReshapeAndCacheParams& params,
                                const Operands& operands) {
    const Visible visible(operands);
    cuda::reshape_and_cache(params, nullptr);
  }
  // Results come last: the rows that it fills, and those that attention does afterwards.
  static void append_kv(const attention::AppendKvParams& params, const Operands& operands) {
    if (params.out != nullptr) {
      for (size_t i = operands.written.size() - 2; i < operands.written.size(); ++i) {
        const Tensor& written = operands.written[i];
        Tensor result = written;
        torch::stable::fill_(result, std::numeric_limits<double>::quiet_NaN());
      }
    }
    const Visible visible(operands);
    cuda::append_kv(params, nullptr);
  }
  static void merge_attn_states(const attention::MergeParams& params, const Operands& operands) {
    poison(operands);
    const Visible visible(operands);
    cuda::merge_attn_states(params, nullptr);
  }

 private:
  static void poison(const Operands& operands) {
    for (Tensor tensor : operands.written) {
      torch::stable::fill_(tensor, std::numeric_limits<double>::quiet_NaN());
    }
  }
};

void configure(int64_t seed, int64_t multiprocessors, int64_t architecture) {
  emulator::settings().seed = static_cast<uint64_t>(seed);
  num_sms = static_cast<int>(multiprocessors);
  arch = static_cast<int>(architecture);
}
// "8.0;9.0a+PTX", as TORCH_CUDA_ARCH_LIST has it; empty: kernels that run on any device.
void pretend_to_be_built_for(const std::string& archs) {
  static std::string kept;
  kept = archs;
  build_archs() = kept.empty() ? nullptr : kept.c_str();
}
void pretend_to_capture(bool on) { pretends_to_capture = on; }

// What causal attention over a cache wants as workspace.
int64_t paged_workspace_bytes(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                              const OptionalTensor& block_table, const Tensor& cache_seqlens,
                              int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t window_left,
                              int64_t num_splits) {
  const OptionalTensor none;
  const attention::FlashFwdParams params = make_paged_params(
      q, k_cache, v_cache, none,
      {block_table, cache_seqlens, none, none, none, max_seqlen_q, max_seqlen_k, num_splits, none},
      {0.1, true, window_left, 0, 0.0, 0});
  return cuda::plan_flash_fwd(cuda::shape_of(params), EmulatedBackend::device()).workspace_bytes;
}

// The number of thread blocks run so far by kernels of sink_attention::cuda::<family>; of all
// families if family is empty.
int64_t blocks_run(const std::string& family) {
  int64_t sum = 0;
  for (const auto& [kernel, blocks] : emulator::settings().blocks_of) {
    if (kernel.rfind("sink_attention::cuda::" + family, 0) == 0) sum += blocks;
  }
  return sum;
}

// Launches so far of kernels whose C++ name contains the text; all where it is empty.
int64_t launches(const std::string& text) {
  int64_t sum = 0;
  for (const auto& [kernel, count] : emulator::settings().launches_of) {
    if (kernel.find(text) != std::string::npos) sum += count;
  }
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SA_OP_NAMESPACE, m) {
  m.def("configure(int seed, int multiprocessors, int arch) -> ()");
  m.def("pretend_to_capture(bool on) -> ()");
  m.def("pretend_to_be_built_for(str archs) -> ()");
  m.def("blocks_run(str family) -> int");
  m.def("launches(str text) -> int");
  m.def(
      "paged_workspace_bytes(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? block_table, Tensor "
      "cache_seqlens, int max_seqlen_q, int max_seqlen_k, int window_left, int num_splits) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(SA_OP_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&configure));
  m.impl("pretend_to_be_built_for", TORCH_BOX(&pretend_to_be_built_for));
  m.impl("pretend_to_capture", TORCH_BOX(&pretend_to_capture));
  m.impl("blocks_run", TORCH_BOX(&blocks_run));
  m.impl("launches", TORCH_BOX(&launches));
  m.impl("paged_workspace_bytes", TORCH_BOX(&paged_workspace_bytes));
}
STABLE_TORCH_LIBRARY_IMPL(SA_OP_NAMESPACE, CPU, m) {
  Ops<EmulatedBackend>::register_with(m);
  CacheOps<EmulatedBackend>::register_with(m);
}

}  // namespace sink_attention::binding
