// The backward on tensor cores (sm80), bfloat16 and float16.
#include <stdexcept>
#include <string>

#include "backward.h"

namespace sink_attention::tests {
namespace {

// Each head-dim bucket, full and partial, and lengths on both sides of a block's edge.
void check_head_dims() {
  constexpr int64_t kDims[][2] = {{32, 32},   {64, 64},   {96, 96},   {128, 128}, {192, 128},
                                  {192, 192}, {256, 256}, {16, 24},   {40, 64},   {72, 40},
                                  {104, 120}, {136, 72},  {160, 184}, {200, 256}};
  unsigned seed = 100;
  for (const auto& dims : kDims) {
    for (const DataType dtype : {DataType::kBFloat16, DataType::kFloat16}) {
      ++seed;
      const bool causal = seed % 2 == 0;
      Spec spec = make_spec(causal ? 70 : 49, causal ? 129 : 200, 3, 1, dims[0], dims[1]);
      spec.layout = seed % 4 < 2 ? Layout::kDense : Layout::kVarlen;
      spec.dtype = dtype;
      spec.window_right = causal ? 0 : -1;
      spec.window_left = seed % 3 == 0 ? 40 : -1;
      spec.softcap = seed % 5 == 0 ? 1.5 : 0.0;
      spec.seqused_k = seed % 8 == 2;
      spec.sink = 0.5;
      Options options;
      options.aligned = seed % 7 != 0;
      options.with_dlse = causal;
      options.deterministic = seed % 3 == 1;
      check_backward(spec, options, seed);
    }
  }
}

// Lengths x windows, dense and varlen; all other options vary along. Small head_dims save time.
void check_grid(Layout layout, DataType dtype) {
  constexpr int64_t kDims[][2] = {{64, 64}, {1, 1}, {32, 32}, {5, 3}, {80, 40}, {16, 33}, {40, 64}};
  unsigned seed = 0;
  for (Spec spec : make_specs(layout, dtype)) {
    ++seed;
    spec.head_dim = kDims[seed % std::size(kDims)][0];
    spec.head_dim_v = kDims[seed % std::size(kDims)][1];
    Options options;
    options.aligned = seed % 3 != 0;
    options.with_dlse = seed % 2 == 0;
    options.deterministic = seed % 5 == 0;
    check_backward(spec, options, seed);
  }
}

void check_groups_and_scales() {
  unsigned seed = 500;
  constexpr int64_t kHeads[][2] = {{1, 1}, {6, 2}, {8, 1}, {16, 2}, {40, 1}};
  constexpr double kScales[] = {NAN, 0.0, -0.25, NAN, 0.5};
  for (size_t i = 0; i < std::size(kHeads); ++i) {
    ++seed;
    Spec spec = make_spec(75, 190, kHeads[i][0], kHeads[i][1], 64, 64);
    spec.window_left = 31;
    spec.window_right = 0;
    spec.sink = i % 2 == 0 ? 1.0 : 1e4;
    spec.s_aux_dtype = DataType::kFloat64;
    Options options;
    options.softmax_scale = kScales[i];
    options.deterministic = i % 2 == 1;
    check_backward(spec, options, seed);
  }
}

// Before a workspace for them is allocated.
void check_too_many_rows() {
  const auto message_for = [](int64_t rows, int arch, DataType dtype) {
    attention::FlashBwdParams params{};
    params.fwd.dtype = params.fwd.kv_dtype = dtype;
    params.fwd.batch = params.fwd.num_heads_q = params.fwd.num_heads_kv = 1;
    params.fwd.seqlen_q = params.fwd.total_q = rows;
    params.fwd.seqlen_k = params.fwd.total_k = 10;
    params.fwd.head_dim = params.fwd.head_dim_v = 64;
    try {
      return std::to_string(cuda::flash_bwd_workspace_bytes(params, {4, arch, {}}) > 0);
    } catch (const std::runtime_error& error) {
      return std::string(error.what());
    }
  };
  for (const int arch : {80, 90}) {
    for (const DataType dtype : {DataType::kBFloat16, DataType::kFloat32}) {
      check(message_for(INT32_MAX - 1023, arch, dtype) == "1", "as many rows as there can be");
      const std::string message = message_for(INT32_MAX, arch, dtype);
      check(message == "sink_attention_ext: more rows or keys than one launch can take",
            "too many rows: ", message);
    }
  }
}

}  // namespace

SA_SUITE(emulated_flash_bwd) {
  check_too_many_rows();
  check_head_dims();
  check_groups_and_scales();
  check_sections({});
  for (const int64_t dim : {64, 192}) {
    Spec spec = make_spec(40, 500, 2, 1, dim, dim);
    spec.window_right = 0;
    spec.sink = 0.5;
    Options options;
    options.aligned = false;
    check_repeats_bitwise(spec, options);
  }
  check_grid(Layout::kDense, DataType::kBFloat16);
  check_grid(Layout::kVarlen, DataType::kFloat16);
}

}  // namespace sink_attention::tests
