// Hopper's backward.
#include "backward.h"

namespace sink_attention::tests {
namespace {

Options hopper() {
  Options options;
  options.arch = 90;
  return options;
}

// Each head-dim bucket, full and partial, with lengths on both sides of a block's edge.
// qhead_per_khead divides a tile's rows, or does not. All other options vary along.
void check_head_dims() {
  constexpr int64_t kDims[][2] = {{64, 64},   {96, 96},   {128, 128}, {192, 128},
                                  {192, 192}, {256, 256}, {40, 64},   {72, 40},
                                  {104, 120}, {136, 72},  {160, 184}, {200, 256}};
  unsigned seed = 100;
  for (const auto& dims : kDims) {
    for (const DataType dtype : {DataType::kBFloat16, DataType::kFloat16}) {
      ++seed;
      const bool causal = seed % 2 == 0;
      const bool boxes = seed % 4 < 2;
      Spec spec =
          make_spec(causal ? 70 : 49, causal ? 129 : 200, boxes ? 4 : 3, 1, dims[0], dims[1]);
      spec.layout = seed % 8 < 4 ? Layout::kDense : Layout::kVarlen;
      spec.dtype = dtype;
      spec.window_right = causal ? 0 : -1;
      spec.window_left = seed % 3 == 0 ? 40 : -1;
      spec.softcap = seed % 5 == 0 ? 1.5 : 0.0;
      spec.seqused_k = seed % 8 == 2;
      spec.sink = 0.5;
      Options options = hopper();
      options.with_dlse = causal;
      options.deterministic = seed % 3 == 1;
      check_backward(spec, options, seed);
    }
  }
}

// Lengths x windows, sink tokens, dense and varlen; all other options vary along.
void check_grid(Layout layout, DataType dtype) {
  constexpr int64_t kDims[][2] = {{64, 64}, {40, 64}, {48, 8}, {80, 40}, {128, 128}};
  unsigned seed = 0;
  for (Spec spec : make_specs(layout, dtype)) {
    ++seed;
    spec.head_dim = kDims[seed % std::size(kDims)][0];
    spec.head_dim_v = kDims[seed % std::size(kDims)][1];
    Options options = hopper();
    options.with_dlse = seed % 2 == 0;
    options.deterministic = seed % 3 == 0;
    check_backward(spec, options, seed);
  }
}

void check_groups_and_scales() {
  unsigned seed = 500;
  constexpr int64_t kHeads[][2] = {{1, 1}, {6, 2}, {8, 1}, {16, 2}, {40, 1}, {64, 1}};
  constexpr double kScales[] = {NAN, 0.0, -0.25, NAN, 0.5, -0.1};
  for (size_t i = 0; i < std::size(kHeads); ++i) {
    ++seed;
    Spec spec = make_spec(75, 290, kHeads[i][0], kHeads[i][1], i % 3 == 0 ? 128 : 64, 64);
    spec.window_left = 31;
    spec.window_right = 0;
    spec.num_sink_tokens = i % 2 == 0 ? 5 : 0;
    spec.sink = i % 2 == 0 ? 1.0 : 1e4;
    spec.s_aux_dtype = DataType::kFloat64;
    spec.layout = i % 4 < 2 ? Layout::kDense : Layout::kVarlen;
    Options options = hopper();
    options.softmax_scale = kScales[i];
    options.deterministic = i % 2 == 1;
    check_backward(spec, options, seed);
  }
}

// qhead_per_khead that does not divide a tile: tiles hold whole positions, or, where too many rows
// would be unused (qhead_per_khead of 22 for 64 rows, 71), rows are copied by cp.async. Packed
// sequences end within a tile, beside another's rows.
void check_odd_groups() {
  unsigned seed = 600;
  constexpr int64_t kGroups[][2] = {{3, 64},  {5, 64},   {6, 128}, {7, 128}, {5, 128},
                                    {7, 64},  {22, 128}, {71, 64}, {3, 192}, {5, 256},
                                    {13, 96}, {22, 256}, {6, 64}};
  for (const auto& [group, dim] : kGroups) {
    for (const Layout layout : {Layout::kDense, Layout::kVarlen}) {
      ++seed;
      const bool causal = seed % 3 != 0;
      Spec spec = make_spec(group > 20 ? 21 : 70, group > 20 ? 75 : 150, group, 1, dim, dim);
      spec.layout = layout;
      spec.window_right = causal ? 0 : -1;
      spec.window_left = seed % 4 == 0 ? 40 : -1;
      spec.num_sink_tokens = seed % 8 == 0 ? 3 : 0;
      spec.softcap = seed % 5 == 0 ? 1.5 : 0.0;
      spec.sink = 0.5;
      Options options = hopper();
      options.with_dlse = causal;
      options.deterministic = seed % 4 < 2;
      check_backward(spec, options, seed);
    }
  }
}

// The same bits in several orders of warps, with more concurrent blocks than wait for the dq
// semaphore.
void check_seeds() {
  for (const int64_t dim : {64, 96, 128, 192, 256}) {
    Spec spec = make_spec(150, 300, 2, 1, dim, dim);
    spec.window_right = 0;
    spec.window_left = 100;
    spec.num_sink_tokens = 3;
    spec.sink = 0.5;
    for (const bool deterministic : {false, true}) {
      for (unsigned seed = 1; seed <= 3; ++seed) {
        Options options = hopper();
        options.deterministic = deterministic;
        check_backward(spec, options, seed);
      }
    }
  }
}

void poison_rows(Array& array, int64_t begin, int64_t end, int64_t stride_row) {
  for (int64_t i = begin * stride_row; i < end * stride_row; ++i) array.set(i, NAN);
}

std::vector<double> gradients_of(const Gradients& g) {
  std::vector<double> all;
  for (const Array* array : {&g.dq, &g.dk, &g.dv}) {
    for (int64_t i = 0; i < array->count(); ++i) all.push_back((*array)[i]);
  }
  return all;
}

// NaNs of neighbouring rows do not spread: of keys without a query, queries without a key, and keys
// beyond seqused_k. Each follows rows in whose tile it would be loaded.
void check_neighbours(int64_t group) {
  for (const int64_t dim : {64, 128, 192}) {
    Spec spec = make_spec(75, 90, group, 1, dim, dim);
    spec.layout = Layout::kVarlen;
    spec.seqused_k = dim == 128;
    Scenario scenario = make_scenario(spec, 3);
    FlashFwdParams& p = scenario.params;
    p.total_q = scenario.q_rows;
    p.total_k = scenario.k_rows;
    align_queries(scenario);
    set_reference_results(scenario);
    Options options = hopper();
    options.deterministic = true;
    Gradients clean = make_gradients(scenario, options, 3);
    Gradients got = make_gradients(scenario, options, 3);
    run_emulated(scenario, clean, options.arch);
    const std::vector<int32_t>& cu_q = scenario.cu_seqlens_q;
    const std::vector<int32_t>& cu_k = scenario.cu_seqlens_k;
    poison_rows(scenario.q, cu_q[3], cu_q[4], p.q_stride_row);
    poison_rows(got.dout, cu_q[3], cu_q[4], got.params.dout_stride_row);
    poison_rows(scenario.k, cu_k[1], cu_k[2], p.k_stride_row);
    poison_rows(scenario.v, cu_k[1], cu_k[2], p.v_stride_row);
    if (spec.seqused_k) {
      poison_rows(scenario.k, cu_k[0] + scenario.seqused_k[0], cu_k[1], p.k_stride_row);
      poison_rows(scenario.v, cu_k[0] + scenario.seqused_k[0], cu_k[1], p.v_stride_row);
    }
    run_emulated(scenario, got, options.arch);
    compare(gradients_of(got), gradients_of(clean), 0.0, scenario.name + ": NaN beside");
  }
}

}  // namespace

SA_SUITE(emulated_sm90_bwd) {
  check_head_dims();
  check_groups_and_scales();
  check_odd_groups();
  check_sections(hopper());
  check_seeds();
  for (const int64_t group : {4, 5, 22}) check_neighbours(group);
  for (const int64_t dim : {64, 192}) {
    Spec spec = make_spec(140, 500, 2, 1, dim, dim);
    spec.window_right = 0;
    spec.sink = 0.5;
    check_repeats_bitwise(spec, hopper());
  }
  for (const auto& [group, dim] : {std::pair<int64_t, int64_t>{3, 128}, {5, 64}, {7, 128}}) {
    Spec spec = make_spec(60, 300, group, 1, dim, dim);
    spec.layout = Layout::kVarlen;
    spec.window_right = 0;
    spec.sink = 0.5;
    check_repeats_bitwise(spec, hopper());
  }
  check_grid(Layout::kDense, DataType::kBFloat16);
  check_grid(Layout::kVarlen, DataType::kFloat16);
}

}  // namespace sink_attention::tests
