// The ops on CPU tensors.
#include "cpu/backend.h"
#include "torch/executor.h"
#include "torch/op_namespace.h"
#include "torch/ops.h"

namespace sink_attention::binding {
namespace {

struct CpuBackend {
  static constexpr bool kReadsValues = true;
  static bool may_leave_rows(const attention::FlashFwdProblem& problem, const Extent& extent) {
    return problem.cu_seqlens_q[problem.batch] < extent.q_rows ||
           (problem.cu_seqlens_k != nullptr && problem.cu_seqlens_k[problem.batch] < extent.k_rows);
  }
  static void check_flash_fwd(const attention::FlashFwdProblem&, const Tensor&) {}
  static void flash_fwd(const attention::FlashFwdProblem& problem, const Operands&) {
    cpu::flash_fwd(problem, TorchExecutor());
  }
  static bool takes_float8(const attention::FlashFwdFloat8Problem&, const Tensor&) { return false; }
  static void flash_fwd_float8(const attention::FlashFwdFloat8Problem&, const Operands&) {}
  static void flash_bwd(const attention::FlashBwdProblem& problem, const Operands&) {
    cpu::flash_bwd(problem, TorchExecutor());
  }
  static void reshape_and_cache(const attention::ReshapeAndCacheProblem& problem, const Operands&) {
    cpu::reshape_and_cache(problem, TorchExecutor());
  }
  static void merge_attn_states(const attention::MergeProblem& problem, const Operands&) {
    cpu::merge_attn_states(problem, TorchExecutor());
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

STABLE_TORCH_LIBRARY_IMPL(SA_OP_NAMESPACE, CPU, m) { Ops<CpuBackend>::register_with(m); }

STABLE_TORCH_LIBRARY_IMPL(SA_OP_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
  m.impl("cpu_instruction_sets", TORCH_BOX(&cpu_instruction_sets));
  m.impl("set_cpu_instruction_set", TORCH_BOX(&set_cpu_instruction_set));
}

}  // namespace sink_attention::binding
