// The ops on CPU tensors.
#include <array>

#include "cpu/backend.h"
#include "torch/cache_ops.h"
#include "torch/executor.h"
#include "torch/op_namespace.h"

namespace sink_attention::binding {
namespace {

struct CpuBackend {
  // Of a few sequences without an allocation.
  class Scratch {
   public:
    Scratch(const Tensor&, int64_t count) : data_(few_.data()) {
      if (count <= static_cast<int64_t>(few_.size())) return;
      many_.resize(count);
      data_ = many_.data();
    }
    Scratch(const Scratch&) = delete;
    int32_t* data() { return data_; }
    void add_to(std::vector<TensorRef>&) const {}

   private:
    std::array<int32_t, 128> few_{};
    std::vector<int32_t> many_;
    int32_t* data_;
  };

  static constexpr bool kReadsValues = true;
  template <class Params>  // FlashFwdParams or FlashBwdParams
  static void fill_unused_rows(const Params& params, const Operands&) {
    cpu::fill_unused_rows(params);
  }
  static void check_flash_fwd(const attention::FlashFwdParams&, const Tensor&) {}
  static void flash_fwd(const attention::FlashFwdParams& params, const Operands&) {
    cpu::flash_fwd(params, TorchExecutor());
  }
  static bool takes_fp8(const attention::FlashFwdFp8Params&, const Tensor&) { return false; }
  static void flash_fwd_fp8(const attention::FlashFwdFp8Params&, const Operands&) {}
  static void flash_bwd(const attention::FlashBwdParams& params, const Operands&) {
    cpu::flash_bwd(params, TorchExecutor());
  }
  static void reshape_and_cache(const attention::ReshapeAndCacheParams& params, const Operands&) {
    cpu::reshape_and_cache(params, TorchExecutor());
  }
  static void append_kv(const attention::AppendKvParams& params, const Operands&) {
    cpu::append_kv(params, TorchExecutor());
  }
  static void merge_attn_states(const attention::MergeParams& params, const Operands&) {
    cpu::merge_attn_states(params, TorchExecutor());
  }
};

std::string cpu_instruction_set() { return cpu::instruction_set(); }

std::string cpu_instruction_sets() {
  std::string names;
  for (const std::string& name : cpu::available_instruction_sets())
    names += (names.empty() ? "" : ",") + name;
  return names;
}

void set_cpu_instruction_set(const std::string& name) { cpu::set_instruction_set(name); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SA_OP_NAMESPACE, CPU, m) {
  Ops<CpuBackend>::register_with(m);
  CacheOps<CpuBackend>::register_with(m);
}

STABLE_TORCH_LIBRARY_IMPL(SA_OP_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
  m.impl("cpu_instruction_sets", TORCH_BOX(&cpu_instruction_sets));
  m.impl("set_cpu_instruction_set", TORCH_BOX(&set_cpu_instruction_set));
}

}  // namespace sink_attention::binding
