// Backward, dense and varlen, of every instruction set against the float64 reference; bitwise
// repeatable.
#include <algorithm>

#include "check.h"
#include "gradients.h"
#include "reference.h"
#include "scenario.h"
#include "thread_executor.h"

namespace sink_attention::tests {
namespace {

void check_backward(const Spec& spec, unsigned seed) {
  Scenario scenario = make_scenario(spec, seed);
  set_reference_results(scenario);
  const bool with_dlse = seed % 2 == 0;
  const Gradients inputs = make_gradients(scenario, with_dlse, seed);
  const ReferenceBackward expected =
      reference_backward(inputs.params, scenario.q_rows, scenario.k_rows);
  with_each_instruction_set([&](const std::string& isa) {
    const Gradients got = make_gradients(scenario, with_dlse, seed);
    cpu::flash_bwd(got.params, thread_executor(3));
    const std::string name = isa + ": " + scenario.name;
    const double tolerance = 4 * tolerance_of(spec.dtype);
    compare(values_of(got.dq), expected.dq, tolerance, name + ": dq");
    compare(values_of(got.dk), expected.dk, tolerance, name + ": dk");
    compare(values_of(got.dv), expected.dv, tolerance, name + ": dv");
    if (scenario.params.s_aux == nullptr) return;
    compare(values_of(got.ds_aux), expected.ds_aux,
            std::max(tolerance, tolerance_of(spec.s_aux_dtype)), name + ": ds_aux");
  });
}

void check_repeats_bitwise() {
  Spec spec;
  spec.seqlen_q = spec.seqlen_k = 300;
  spec.window_right = 0;
  spec.sink = 0.5;
  spec.num_heads_q = 4;
  spec.num_heads_kv = 2;
  Scenario scenario = make_scenario(spec, 7);
  with_each_instruction_set([&](const std::string& isa) {
    cpu::flash_fwd(scenario.params, thread_executor(2));
    std::vector<std::vector<double>> first;
    for (const int num_threads : {1, 2, 5, 5}) {
      const Gradients g = make_gradients(scenario, true, 7);
      cpu::flash_bwd(g.params, thread_executor(num_threads));
      std::vector<std::vector<double>> all{values_of(g.dq), values_of(g.dk), values_of(g.dv),
                                           values_of(g.ds_aux)};
      if (first.empty()) first = all;
      check(all == first, isa, ": gradients with ", num_threads,
            " threads differ from those with 1");
    }
  });
}

}  // namespace

SA_SUITE(flash_bwd) {
  for (const DataType dtype :
       {DataType::kFloat64, DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
    unsigned seed = 0;
    for (const Layout layout : {Layout::kDense, Layout::kVarlen}) {
      for (Spec spec : make_specs(layout, dtype)) {
        spec.num_splits = 0;
        check_backward(spec, ++seed);
      }
    }
  }
  check_repeats_bitwise();
}

}  // namespace sink_attention::tests
