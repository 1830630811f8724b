// The CPU's append_kv of every instruction set.
#include "append_case.h"
#include "scenario.h"

namespace sink_attention::tests {

SA_SUITE(append_kv) {
  with_each_instruction_set([](const std::string& isa) {
    const auto run = [](Append& append) { cpu::append_kv(append.params, thread_executor(2)); };
    for (const DataType dtype :
         {DataType::kFloat64, DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
      check_appends(dtype, isa, run);
    }
    check_long_appends(isa, run);
  });
}

}  // namespace sink_attention::tests
