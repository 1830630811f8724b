// Attention params with the memory that they point to, for each combination that is tested.
#pragma once

#include <string>
#include <vector>

#include "array.h"

namespace sink_attention::tests {

enum class Layout { kDense, kVarlen, kPaged };

// The specification of a scenario. The lengths of the other sequences are derived from the first's;
// some are empty.
struct Spec {
  Layout layout = Layout::kDense;
  DataType dtype = DataType::kFloat32;
  int64_t seqlen_q = 1, seqlen_k = 1;
  int64_t window_left = -1, window_right = -1;
  int64_t num_sink_tokens = 0;
  double softcap = 0;
  double sink = NAN;  // NaN: no s_aux; else its first head, the others being near it
  DataType s_aux_dtype = DataType::kFloat32;
  int64_t num_heads_q = 1, num_heads_kv = 1;
  int64_t head_dim = 64, head_dim_v = 64;
  bool seqused_k = false;   // varlen: count fewer keys than there are
  int64_t page_size = 16;   // paged
  bool head_major = false;  // k and v with heads outside rows (HND)
  bool float8 = false;      // paged
  int64_t num_splits = 0;
};

struct Scenario {
  std::string name;
  Array q, k, v, s_aux, out, lse;
  std::vector<int32_t> cu_seqlens_q, cu_seqlens_k, seqused_k, block_table;
  std::vector<float> k_scale, v_scale;
  attention::FlashFwdParams params{};
  int64_t q_rows = 0, k_rows = 0;  // over the batch; k_rows is 0 where keys are paged
};

Scenario make_scenario(const Spec& spec, unsigned seed);

// Lengths on both sides of tile edges x windows; all other options vary along.
std::vector<Spec> make_specs(Layout layout, DataType dtype);

// got[i] against expected[i]: NaN and infinities at the same places, and |difference| <= tolerance
// * (1 + largest finite expected).
void compare(const std::vector<double>& got, const std::vector<double>& expected, double tolerance,
             const std::string& what);

double tolerance_of(DataType dtype);
std::vector<double> out_of(const Scenario& scenario);  // [rows of q][num_heads_q][head_dim_v]
std::vector<double> lse_of(const Scenario& scenario);  // [num_heads_q][rows of q]

// Calls test(name) once for each instruction set that the machine has, after selecting it.
template <class Test>
void with_each_instruction_set(const Test& test);

}  // namespace sink_attention::tests

#include "cpu/backend.h"

template <class Test>
void sink_attention::tests::with_each_instruction_set(const Test& test) {
  for (const std::string& name : cpu::available_instruction_sets()) {
    cpu::set_instruction_set(name);
    test(name);
  }
}
