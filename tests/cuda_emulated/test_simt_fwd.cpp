// The float32 and float64 CUDA forward, emulated, against the float64 reference.
#include <cmath>

#include "buffers.h"
#include "check.h"
#include "cuda/backend.h"
#include "emulator/machine.h"
#include "reference.h"
#include "scenario.h"
#include "simt_scenarios.h"

namespace sink_attention::tests {
namespace {

void run_forward(Scenario& s) {
  s.out.fill(NAN);
  s.lse.fill(NAN);
  const emulator::VisibleBuffers visible(buffers_of(s, true));
  cuda::flash_fwd(s.params, cuda::plan_flash_fwd(cuda::shape_of(s.params), {2, 80}), nullptr,
                  nullptr);
}

void check_forward(Scenario& s, const std::string& name) {
  const DataType dtype = s.params.dtype;
  const ReferenceForward expected = reference_forward(s.params, s.q_rows);
  run_forward(s);
  compare(out_of(s), expected.out, tolerance_of(dtype), name + ": out");
  compare(lse_of(s), expected.lse, tolerance_of(dtype), name + ": lse");
}

// Half of the scenarios have aligned rows.
void check_scenarios(Layout layout, DataType dtype, size_t stride) {
  for_each_scenario(
      layout, dtype, stride, [](unsigned seed) { return seed % 2 == 0; },
      [](Scenario& s, unsigned) { check_forward(s, s.name); });
}

// Logits of 1e8, where float32 has only multiples of 8: P is still exact.
void check_large_logits() {
  Spec spec;
  spec.seqlen_q = 4;
  spec.seqlen_k = 80;
  spec.head_dim = spec.head_dim_v = 1;
  Scenario s = make_scenario(spec, 4);
  s.q.fill(8192);
  for (int64_t i = 0; i < s.k.count(); ++i) s.k.set(i, static_cast<double>(12000 + i % 3));
  s.params.softmax_scale = 1;
  check_forward(s, "large logits");
}

// Rows beside the sequences hold NaN.
void check_unused_rows() {
  Spec spec;
  spec.layout = Layout::kVarlen;
  spec.seqlen_q = 20;
  spec.seqlen_k = 70;
  spec.sink = 0.5;
  spec.seqused_k = true;
  Scenario s = make_scenario(spec, 5);
  const int64_t row_elements = s.params.num_heads_kv * s.params.head_dim;
  for (int64_t row = 0; row < s.k_rows; ++row) {
    bool used = false;
    for (int64_t b = 0; b < s.params.batch; ++b) {
      used |= s.cu_seqlens_k[b] <= row && row < s.cu_seqlens_k[b] + s.seqused_k[b];
    }
    for (int64_t i = 0; i < row_elements && !used; ++i) {
      s.k.set(row * row_elements + i, NAN);
      s.v.set(row * row_elements + i, NAN);
    }
  }
  check_forward(s, "NaN in unused rows");
}

// A token's result is bitwise the same as the last of many and alone.
void check_decode_is_prefill() {
  Spec spec = causal_spec(150);
  spec.window_left = 70;
  Scenario s = make_scenario(spec, 6);
  run_forward(s);
  std::vector<double> prefill, decode;
  attention::FlashFwdParams& p = s.params;
  const auto last_row = [&] {
    std::vector<double> values;
    for (int64_t i = 0; i < p.out_stride_row; ++i) {
      if (i % p.out_stride_head < p.head_dim_v) {
        values.push_back(s.out[(spec.seqlen_q - 1) * p.out_stride_row + i]);
      }
    }
    return values;
  };
  prefill = last_row();
  p.batch = 1;
  p.seqlen_q = 1;
  p.q = static_cast<const float*>(p.q) + (spec.seqlen_q - 1) * p.q_stride_row;
  p.out = static_cast<float*>(p.out) + (spec.seqlen_q - 1) * p.out_stride_row;
  run_forward(s);
  decode = last_row();
  check(prefill == decode, "a token alone differs from the same token in a prefill");
}

}  // namespace

SA_SUITE(cuda_simt_fwd) {
  check_scenarios(Layout::kDense, DataType::kFloat32, 1);
  check_scenarios(Layout::kVarlen, DataType::kFloat32, 3);
  check_scenarios(Layout::kPaged, DataType::kFloat32, 2);
  check_scenarios(Layout::kDense, DataType::kFloat64, 5);
  check_scenarios(Layout::kPaged, DataType::kFloat64, 7);
  for_each_scale({-0.3, 1e-30, 40.0}, check_forward);
  check_large_logits();
  check_unused_rows();
  check_decode_is_prefill();
}

}  // namespace sink_attention::tests
