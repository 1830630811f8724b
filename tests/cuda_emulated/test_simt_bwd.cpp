// The float32 and float64 CUDA backward, emulated, against the float64 reference; bitwise
// repeatable.
#include <algorithm>
#include <cmath>

#include "buffers.h"
#include "check.h"
#include "cuda/simt/backend.h"
#include "emulator/machine.h"
#include "gradients.h"
#include "reference.h"
#include "scenario.h"

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
  if (p.dtype == DataType::kFloat32) {
    cuda::flash_bwd_rows_float32(g.params, static_cast<float*>(delta.data()), nullptr);
    cuda::flash_bwd_float32(g.params, static_cast<const float*>(delta.data()), nullptr);
  } else {
    cuda::flash_bwd_rows_float64(g.params, static_cast<double*>(delta.data()), nullptr);
    cuda::flash_bwd_float64(g.params, static_cast<const double*>(delta.data()), nullptr);
  }
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

// Every stride-th scenario of the test matrix; half of them with aligned rows.
void run_grid(Layout layout, DataType dtype, size_t stride) {
  unsigned seed = 0;
  const std::vector<Spec> specs = make_specs(layout, dtype);
  for (size_t i = 0; i < specs.size(); i += stride) {
    Scenario s = make_scenario(specs[i], ++seed);
    if (seed % 4 < 2) close_gaps(s);
    check_backward(s, seed, s.name);
  }
}

void check_scales() {
  for (const double softmax_scale : {-0.3, 1e-30}) {
    for (const double softcap : {0.0, 5.0}) {
      Spec spec;
      spec.seqlen_q = 9;
      spec.seqlen_k = 70;
      spec.window_right = 0;
      spec.softcap = softcap;
      spec.sink = 0.25;
      spec.head_dim = 24;
      spec.head_dim_v = 8;
      Scenario s = make_scenario(spec, 3);
      s.params.softmax_scale = softmax_scale;
      check_backward(s, 3, s.name + " scale " + std::to_string(softmax_scale));
    }
  }
}

void check_repeats_bitwise() {
  Spec spec;
  spec.seqlen_q = spec.seqlen_k = 100;
  spec.window_right = 0;
  spec.sink = 0.5;
  spec.num_heads_q = 4;
  spec.num_heads_kv = 2;
  Scenario s = make_scenario(spec, 7);
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
  run_grid(Layout::kDense, DataType::kFloat32, 2);
  run_grid(Layout::kVarlen, DataType::kFloat32, 4);
  run_grid(Layout::kDense, DataType::kFloat64, 9);
  check_scales();
  check_repeats_bitwise();
}

}  // namespace sink_attention::tests
