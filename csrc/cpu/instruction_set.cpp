#include "cpu/instruction_set.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/backend.h"

namespace sink_attention::cpu {

// Each is defined in simd/kernels_<isa>.cpp.
namespace isa_portable {
const InstructionSet& instruction_set();
}
#if defined(__x86_64__)
namespace isa_avx2 {
const InstructionSet& instruction_set();
}
namespace isa_avx512 {
const InstructionSet& instruction_set();
}
namespace isa_avx512_bf16 {
const InstructionSet& instruction_set();
}
#endif

namespace {

std::vector<const InstructionSet*> find_available() {
  std::vector<const InstructionSet*> sets{&isa_portable::instruction_set()};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx2) sets.push_back(&isa_avx2::instruction_set());
  if (avx512) sets.push_back(&isa_avx512::instruction_set());
  if (avx512 && __builtin_cpu_supports("avx512bf16"))
    sets.push_back(&isa_avx512_bf16::instruction_set());
#endif
  return sets;
}

const std::vector<const InstructionSet*>& available() {
  static const std::vector<const InstructionSet*> sets = find_available();
  return sets;
}

const InstructionSet* find(const std::string& name) {
  std::string names;
  for (const InstructionSet* set : available()) {
    if (name == set->name) return set;
    names += names.empty() ? set->name : std::string(", ") + set->name;
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' is not available; this machine and build have: " + names);
}

std::atomic<const InstructionSet*>& current() {
  static std::atomic<const InstructionSet*> chosen = [] {
    const char* name = std::getenv("SINK_ATTENTION_CPU_ISA");
    return name != nullptr && name[0] != '\0' ? find(name) : available().back();
  }();
  return chosen;
}

}  // namespace

const InstructionSet& current_instruction_set() { return *current().load(); }

const Kernels& kernels_for(attention::DataType dtype, attention::DataType kv_dtype) {
  using attention::DataType;
  const InstructionSet& set = current_instruction_set();
  if (dtype == DataType::kFloat64) return *set.float64;
  if (dtype == DataType::kBFloat16 && kv_dtype == DataType::kBFloat16) return *set.bfloat16;
  return *set.float32;
}

std::string instruction_set() { return current_instruction_set().name; }

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : available()) names.emplace_back(set->name);
  return names;
}

void set_instruction_set(const std::string& name) { current() = find(name); }

}  // namespace sink_attention::cpu
