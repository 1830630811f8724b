// The CUDA backward in the emulator, dense and varlen, against the float64 reference. Kernels may
// access only the buffers that they are given; elements that they do not write stay NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/backend.h"
#include "emulator/machine.h"
#include "reference.h"
#include "scenario.h"

namespace sink_attention::tests {

// What a case adds to a Spec.
struct Options {
  int arch = 80;        // the device's compute capability
  bool aligned = true;  // rows aligned to 16 bytes; else one element between heads
  bool with_dlse = false;
  bool deterministic = false;
  double softmax_scale = NAN;  // NaN: the usual one
};

struct Gradients {
  Array dout, dlse, dq, dk, dv, ds_aux;
  attention::FlashBwdParams params{};
};

// [rows][heads][dim + pad], dense: [batch][rows] ...
inline void set_strides(int64_t heads, int64_t width, int64_t rows, bool varlen, int64_t& batch,
                        int64_t& row, int64_t& head) {
  head = width;
  row = heads * width;
  batch = varlen ? 0 : rows * row;
}

inline void align_queries(Scenario& s) {
  FlashFwdParams& p = s.params;
  const bool varlen = p.cu_seqlens_q != nullptr;
  set_strides(p.num_heads_q, p.head_dim, p.seqlen_q, varlen, p.q_stride_batch, p.q_stride_row,
              p.q_stride_head);
  set_strides(p.num_heads_q, p.head_dim_v, p.seqlen_q, varlen, p.out_stride_batch, p.out_stride_row,
              p.out_stride_head);
}

inline Gradients make_gradients(const Scenario& s, const Options& options, unsigned seed) {
  Random random(seed);
  Gradients g;
  attention::FlashBwdParams& b = g.params;
  b.fwd = s.params;
  b.deterministic = options.deterministic;
  const FlashFwdParams& p = b.fwd;
  const bool varlen = p.cu_seqlens_q != nullptr;
  const int64_t width = p.head_dim + (options.aligned ? 0 : 1);
  const int64_t width_v = p.head_dim_v + (options.aligned ? 0 : 1);
  g.dout = Array::normal(p.dtype, s.q_rows * p.num_heads_q * width_v, random);
  g.dq = Array(p.dtype, s.q_rows * p.num_heads_q * width);
  g.dk = Array(p.dtype, s.k_rows * p.num_heads_kv * width);
  g.dv = Array(p.dtype, s.k_rows * p.num_heads_kv * width_v);
  b.dout = g.dout.data();
  b.dq = g.dq.data();
  b.dk = g.dk.data();
  b.dv = g.dv.data();
  set_strides(p.num_heads_q, width_v, p.seqlen_q, varlen, b.dout_stride_batch, b.dout_stride_row,
              b.dout_stride_head);
  set_strides(p.num_heads_q, width, p.seqlen_q, varlen, b.dq_stride_batch, b.dq_stride_row,
              b.dq_stride_head);
  set_strides(p.num_heads_kv, width, p.seqlen_k, varlen, b.dk_stride_batch, b.dk_stride_row,
              b.dk_stride_head);
  set_strides(p.num_heads_kv, width_v, p.seqlen_k, varlen, b.dv_stride_batch, b.dv_stride_row,
              b.dv_stride_head);
  if (options.with_dlse) {  // with a row stride that lse itself never has
    constexpr int64_t kRowStride = 2;
    g.dlse = Array::normal(DataType::kFloat32, s.lse.count() * kRowStride, random);
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

// The forward's results by the definition, rounded to their dtypes.
inline void set_reference_results(Scenario& s) {
  const FlashFwdParams& p = s.params;
  const ReferenceForward forward = reference_forward(p, s.q_rows);
  for (int64_t row = 0; row < s.q_rows * p.num_heads_q; ++row) {
    for (int64_t d = 0; d < p.head_dim_v; ++d) {
      s.out.set(row * p.out_stride_head + d, forward.out[row * p.head_dim_v + d]);
    }
  }
  const int64_t batch = p.cu_seqlens_q != nullptr ? 1 : p.batch;
  const int64_t rows = std::max<int64_t>(s.q_rows / batch, 1);
  for (int64_t head = 0; head < p.num_heads_q; ++head) {
    for (int64_t row = 0; row < s.q_rows; ++row) {
      s.lse.set(row / rows * p.lse_stride_batch + head * p.lse_stride_head + row % rows,
                forward.lse[head * s.q_rows + row]);
    }
  }
}

struct Visible {
  std::vector<emulator::Buffer> buffers;

  void add(const void* data, int64_t bytes, bool writable, const char* name) {
    if (data == nullptr || bytes == 0) return;
    const char* begin = static_cast<const char*>(data);
    buffers.push_back({begin, begin + bytes, writable, name});
  }
  void add(const Array& array, bool writable, const char* name) {
    add(array.data(), array.count() * attention::bytes_of(array.dtype()), writable, name);
  }
};

// Returns the kernels' workspace after the call.
inline std::vector<char> run_emulated(const Scenario& s, Gradients& g, int arch) {
  const cuda::Device device{2, arch};
  constexpr size_t kAlignment = 256;
  const int64_t bytes = cuda::flash_bwd_workspace_bytes(g.params, device);
  const std::unique_ptr<void, decltype(&std::free)> workspace(
      std::aligned_alloc(kAlignment, (bytes + kAlignment) / kAlignment * kAlignment), std::free);
  std::memset(workspace.get(), 0xff, bytes);  // NaN
  Visible visible;
  visible.add(s.q, false, "q");
  visible.add(s.k, false, "k");
  visible.add(s.v, false, "v");
  visible.add(s.s_aux, false, "s_aux");
  visible.add(s.out, false, "out");
  visible.add(s.lse, false, "lse");
  visible.add(g.dout, false, "dout");
  visible.add(g.dlse, false, "dlse");
  visible.add(g.dq, true, "dq");
  visible.add(g.dk, true, "dk");
  visible.add(g.dv, true, "dv");
  visible.add(g.ds_aux, true, "ds_aux");
  visible.add(workspace.get(), bytes, true, "workspace");
  const emulator::VisibleBuffers seen(visible.buffers);
  cuda::flash_bwd(g.params, device, workspace.get(), nullptr);
  const char* left = static_cast<const char*>(workspace.get());
  return {left, left + bytes};
}

// Elements [rows * heads][dim] of rows that are `stride` apart. Elements between rows are
// unwritten.
inline std::vector<double> values_of(const Array& array, int64_t stride, int64_t dim,
                                     const std::string& what) {
  std::vector<double> values;
  bool untouched = true;
  for (int64_t i = 0; i < array.count(); ++i) {
    if (i % stride < dim) {
      values.push_back(array[i]);
    } else {
      untouched = untouched && std::isnan(array[i]);
    }
  }
  check(untouched, what, ": written between its rows");
  return values;
}

// P, dS and the results are rounded once each; sums are float32. The bound is one unit in the last
// place of the largest value; the results' own rounding is half of it.
inline double gradient_tolerance(DataType dtype) {
  return dtype == DataType::kFloat16 ? 0x1p-11 : 0x1p-8;
}

inline void check_backward(const Spec& spec, const Options& options, unsigned seed) {
  Scenario scenario = make_scenario(spec, seed);
  FlashFwdParams& p = scenario.params;
  p.total_q = scenario.q_rows;
  p.total_k = scenario.k_rows;
  if (!std::isnan(options.softmax_scale)) p.softmax_scale = options.softmax_scale;
  if (options.aligned) align_queries(scenario);
  set_reference_results(scenario);
  Gradients got = make_gradients(scenario, options, seed);
  const ReferenceBackward expected =
      reference_backward(got.params, scenario.q_rows, scenario.k_rows);
  std::string name = scenario.name +
                     (options.arch == 80 ? "" : " arch " + std::to_string(options.arch)) +
                     (options.aligned ? "" : " unaligned") + (options.with_dlse ? " dlse" : "") +
                     (options.deterministic ? " deterministic" : "");
  if (options.arch == 90) {
    check(cuda::flash_bwd_family(got.params, {2, 90}) == cuda::Family::kSm90, name,
          ": not Hopper's kernels");
  }
  emulator::settings().seed = seed + 1;
  try {
    run_emulated(scenario, got, options.arch);
  } catch (const std::exception& error) {
    check(false, name, ": ", error.what());
    return;
  }
  const attention::FlashBwdParams& b = got.params;
  const double tolerance = gradient_tolerance(spec.dtype);
  compare(values_of(got.dq, b.dq_stride_head, p.head_dim, name + ": dq"), expected.dq, tolerance,
          name + ": dq");
  compare(values_of(got.dk, b.dk_stride_head, p.head_dim, name + ": dk"), expected.dk, tolerance,
          name + ": dk");
  compare(values_of(got.dv, b.dv_stride_head, p.head_dim_v, name + ": dv"), expected.dv, tolerance,
          name + ": dv");
  if (p.s_aux == nullptr) return;
  constexpr double kRows = 1e-5;  // exp2 and float32 sums
  compare(values_of(got.ds_aux, 1, 1, name), expected.ds_aux,
          std::max(kRows, tolerance_of(spec.s_aux_dtype) / 2), name + ": ds_aux");
}

inline Spec make_spec(int64_t seqlen_q, int64_t seqlen_k, int64_t heads_q, int64_t heads_kv,
                      int64_t dim, int64_t dim_v) {
  Spec spec;
  spec.dtype = DataType::kBFloat16;
  spec.seqlen_q = seqlen_q;
  spec.seqlen_k = seqlen_k;
  spec.num_heads_q = heads_q;
  spec.num_heads_kv = heads_kv;
  spec.head_dim = dim;
  spec.head_dim_v = dim_v;
  return spec;
}

// More (sequence, kv head) pairs than a section of thread blocks has; the last section is larger.
inline void check_sections(Options options) {
  options.deterministic = true;
  for (const Layout layout : {Layout::kDense, Layout::kVarlen}) {
    const int64_t heads = layout == Layout::kDense ? 17 : 9;
    Spec spec = make_spec(20, 300, heads, heads, 64, 64);
    spec.layout = layout;
    spec.window_right = 0;
    spec.sink = 0.5;
    check_backward(spec, options, 700);
  }
}

// Deterministic gradients are the same bits whatever the order in which blocks and warps run. The
// workspace holds dQ before it is rounded.
inline void check_repeats_bitwise(const Spec& spec, Options options) {
  Scenario scenario = make_scenario(spec, 7);
  scenario.params.total_q = scenario.q_rows;
  scenario.params.total_k = scenario.k_rows;
  if (options.aligned) align_queries(scenario);
  set_reference_results(scenario);
  options.deterministic = true;
  std::vector<char> first;
  for (const uint64_t seed : {1, 2, 3}) {
    Gradients g = make_gradients(scenario, options, 7);
    emulator::settings().seed = seed;
    emulator::settings().resident_blocks = static_cast<int>(seed) + 1;
    std::vector<char> all = run_emulated(scenario, g, options.arch);
    for (const Array* array : {&g.dq, &g.dk, &g.dv, &g.ds_aux}) {
      const char* data = static_cast<const char*>(array->data());
      all.insert(all.end(), data, data + array->count() * attention::bytes_of(array->dtype()));
    }
    if (first.empty()) first = all;
    check(all == first, scenario.name, ": gradients differ with seed ", seed);
  }
  emulator::settings().resident_blocks = 2;
}

}  // namespace sink_attention::tests
