// The float32 and float64 CUDA backward, emulated, against the float64 reference; bitwise
// repeatable.
#include <algorithm>
#include <cmath>

#include "buffers.h"
#include "check.h"
#include "cuda/backend.h"
#include "emulator/machine.h"
#include "gradients.h"
#include "reference.h"
#include "scenario.h"
#include "simt_scenarios.h"

namespace sink_attention::tests {
namespace {

void run_backward(const Scenario& s, const Gradients& g) {
  const attention::FlashFwdParams& p = s.params;
  const Array delta(p.dtype, p.num_heads_q * s.q_rows);
  std::vector<emulator::Buffer> buffers = buffers_of(s, false);
  buffers.push_back(readable(g.dout, "dout"));
  buffers.push_back(readable(g.dlse, "dlse"));
  buffers.push_back(writable(delta, "delta"));
  buffers.push_back(writable(g.dq, "dq"));
  buffers.push_back(writable(g.dk, "dk"));
  buffers.push_back(writable(g.dv, "dv"));
  buffers.push_back(writable(g.ds_aux, "ds_aux"));
  const emulator::VisibleBuffers visible(buffers);
  const cuda::FlashBwdPlan plan = cuda::plan_flash_bwd(cuda::shape_of(g.params), {2, 80});
  check(plan.workspace_bytes == delta.count() * attention::bytes_of(p.dtype),
        "the workspace is delta");
  cuda::flash_bwd(g.params, plan, delta.data(), nullptr);
}

void check_backward(Scenario& s, unsigned seed, const std::string& name) {
  s.params.total_q = s.q_rows;
  set_reference_results(s);
  const bool with_dlse = seed % 2 == 0;
  const Gradients g = make_gradients(s, with_dlse, seed);
  const ReferenceBackward expected = reference_backward(g.params, s.q_rows, s.k_rows);
  emulator::settings().seed = seed;
  run_backward(s, g);
  const double tolerance = 4 * tolerance_of(s.params.dtype);
  compare(values_of(g.dq), expected.dq, tolerance, name + ": dq");
  compare(values_of(g.dk), expected.dk, tolerance, name + ": dk");
  compare(values_of(g.dv), expected.dv, tolerance, name + ": dv");
  if (s.params.s_aux == nullptr) return;
  compare(values_of(g.ds_aux), expected.ds_aux,
          std::max(tolerance, tolerance_of(s.params.s_aux_dtype)), name + ": ds_aux");
}

// Half of the scenarios have aligned rows; of those, half have dlse.
void check_scenarios(Layout layout, DataType dtype, size_t stride) {
  for_each_scenario(
      layout, dtype, stride, [](unsigned seed) { return seed % 4 < 2; },
      [](Scenario& s, unsigned seed) { check_backward(s, seed, s.name); });
}

void check_repeats_bitwise() {
  Scenario s = make_scenario(causal_spec(100), 7);
  s.params.total_q = s.q_rows;
  set_reference_results(s);
  std::vector<std::vector<double>> first;
  for (const uint64_t seed : {1, 2}) {  // other orders of blocks and warps
    emulator::settings().seed = seed;
    const Gradients g = make_gradients(s, true, 7);
    run_backward(s, g);
    std::vector<std::vector<double>> all{values_of(g.dq), values_of(g.dk), values_of(g.dv),
                                         values_of(g.ds_aux)};
    if (first.empty()) first = all;
    check(all == first, "gradients differ from run to run");
  }
}

}  // namespace

SA_SUITE(cuda_simt_bwd) {
  check_scenarios(Layout::kDense, DataType::kFloat32, 2);
  check_scenarios(Layout::kVarlen, DataType::kFloat32, 4);
  check_scenarios(Layout::kDense, DataType::kFloat64, 9);
  for_each_scale({-0.3, 1e-30},
                 [](Scenario& s, const std::string& name) { check_backward(s, 3, name); });
  check_repeats_bitwise();
}

}  // namespace sink_attention::tests
