// Forward, dense and varlen and paged, of every instruction set against the float64 reference.
#include "check.h"
#include "reference.h"
#include "scenario.h"
#include "thread_executor.h"

namespace sink_attention::tests {
namespace {

constexpr DataType kDtypes[] = {DataType::kFloat64, DataType::kFloat32, DataType::kFloat16,
                                DataType::kBFloat16};

void run_grid(Layout layout) {
  for (const DataType dtype : kDtypes) {
    unsigned seed = 0;
    for (const Spec& spec : make_specs(layout, dtype)) {
      Scenario scenario = make_scenario(spec, ++seed);
      const ReferenceForward expected = reference_forward(scenario.params, scenario.q_rows);
      with_each_instruction_set([&](const std::string& isa) {
        scenario.out.fill(NAN);
        scenario.lse.fill(NAN);
        cpu::flash_fwd(scenario.params, thread_executor(3));
        const std::string name = isa + ": " + scenario.name;
        compare(out_of(scenario), expected.out, tolerance_of(dtype), name + ": out");
        compare(lse_of(scenario), expected.lse, tolerance_of(lse_type(dtype)), name + ": lse");
      });
    }
  }
}

}  // namespace

SA_SUITE(flash_fwd) {
  run_grid(Layout::kDense);
  run_grid(Layout::kVarlen);
}

SA_SUITE(paged_attn) { run_grid(Layout::kPaged); }

}  // namespace sink_attention::tests
