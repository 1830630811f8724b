// Backward, dense and varlen, of every instruction set against the float64 reference; bitwise
// repeatable.
#include <algorithm>

#include "check.h"
#include "reference.h"
#include "scenario.h"
#include "thread_executor.h"

namespace sink_attention::tests {
namespace {

// Contiguous gradients [rows][heads][dim], NaN until written.
struct Gradients {
  Array dout, dlse, dq, dk, dv, ds_aux;
  attention::FlashBwdProblem problem{};
};

Gradients make_gradients(const Scenario& s, bool with_dlse, unsigned seed) {
  Random random(seed);
  Gradients g;
  attention::FlashBwdProblem& b = g.problem;
  b.fwd = s.problem;
  const attention::FlashFwdProblem& p = b.fwd;
  const bool varlen = p.cu_seqlens_q != nullptr;
  g.dout = Array::normal(p.dtype, s.q_rows * p.num_heads_q * p.head_dim_v, random);
  g.dq = Array(p.dtype, s.q_rows * p.num_heads_q * p.head_dim);
  g.dk = Array(p.dtype, s.k_rows * p.num_heads_kv * p.head_dim);
  g.dv = Array(p.dtype, s.k_rows * p.num_heads_kv * p.head_dim_v);
  b.dout = g.dout.data();
  b.dq = g.dq.data();
  b.dk = g.dk.data();
  b.dv = g.dv.data();
  const auto set = [&](int64_t heads, int64_t dim, int64_t rows, int64_t& batch, int64_t& row,
                       int64_t& head) {
    head = dim;
    row = heads * dim;
    batch = varlen ? 0 : rows * row;
  };
  set(p.num_heads_q, p.head_dim_v, p.seqlen_q, b.dout_stride_batch, b.dout_stride_row,
      b.dout_stride_head);
  set(p.num_heads_q, p.head_dim, p.seqlen_q, b.dq_stride_batch, b.dq_stride_row, b.dq_stride_head);
  set(p.num_heads_kv, p.head_dim, p.seqlen_k, b.dk_stride_batch, b.dk_stride_row, b.dk_stride_head);
  set(p.num_heads_kv, p.head_dim_v, p.seqlen_k, b.dv_stride_batch, b.dv_stride_row,
      b.dv_stride_head);
  if (with_dlse) {  // with a row stride that lse itself never has
    constexpr int64_t kRowStride = 2;
    g.dlse = Array::normal(lse_type(p.dtype), s.lse.count() * kRowStride, random);
    b.dlse = g.dlse.data();
    b.dlse_stride_batch = p.lse_stride_batch * kRowStride;
    b.dlse_stride_head = p.lse_stride_head * kRowStride;
    b.dlse_stride_row = kRowStride;
  }
  if (p.s_aux != nullptr) {
    g.ds_aux = Array(p.s_aux_dtype, p.num_heads_q);
    b.ds_aux = g.ds_aux.data();
  }
  return g;
}

std::vector<double> values_of(const Array& array) {
  std::vector<double> values;
  for (int64_t i = 0; i < array.count(); ++i) values.push_back(array[i]);
  return values;
}

// The forward's results as the definition has them, rounded to their dtypes.
void set_reference_results(Scenario& s) {
  const attention::FlashFwdProblem& p = s.problem;
  const ReferenceForward forward = reference_forward(p, s.q_rows);
  for (int64_t row = 0; row < s.q_rows * p.num_heads_q; ++row) {
    for (int64_t d = 0; d < p.head_dim_v; ++d) {
      s.out.set(row * p.out_stride_head + d, forward.out[row * p.head_dim_v + d]);
    }
  }
  const int64_t batch = p.cu_seqlens_q != nullptr ? 1 : p.batch, rows = s.q_rows / batch;
  for (int64_t head = 0; head < p.num_heads_q; ++head) {
    for (int64_t row = 0; row < s.q_rows; ++row) {
      s.lse.set(row / std::max<int64_t>(rows, 1) * p.lse_stride_batch + head * p.lse_stride_head +
                    row % std::max<int64_t>(rows, 1),
                forward.lse[head * s.q_rows + row]);
    }
  }
}

void check_backward(const Spec& spec, unsigned seed) {
  Scenario scenario = make_scenario(spec, seed);
  set_reference_results(scenario);
  const bool with_dlse = seed % 2 == 0;
  const Gradients inputs = make_gradients(scenario, with_dlse, seed);
  const ReferenceBackward expected =
      reference_backward(inputs.problem, scenario.q_rows, scenario.k_rows);
  with_each_instruction_set([&](const std::string& isa) {
    const Gradients got = make_gradients(scenario, with_dlse, seed);
    cpu::flash_bwd(got.problem, thread_executor(3));
    const std::string name = isa + ": " + scenario.name;
    const double tolerance = 4 * tolerance_of(spec.dtype);
    compare(values_of(got.dq), expected.dq, tolerance, name + ": dq");
    compare(values_of(got.dk), expected.dk, tolerance, name + ": dk");
    compare(values_of(got.dv), expected.dv, tolerance, name + ": dv");
    if (scenario.problem.s_aux == nullptr) return;
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
    cpu::flash_fwd(scenario.problem, thread_executor(2));
    std::vector<std::vector<double>> first;
    for (const int num_threads : {1, 2, 5, 5}) {
      const Gradients g = make_gradients(scenario, true, 7);
      cpu::flash_bwd(g.problem, thread_executor(num_threads));
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
