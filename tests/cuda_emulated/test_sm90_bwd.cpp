// Hopper's backward.
#include "backward.h"

namespace sink_attention::tests {
namespace {

Options hopper() {
  Options options;
  options.arch = 90;
  return options;
}

// Each head_dim class, full and partial, with lengths on both sides of a block's edge, groups of
// which a tile is a multiple or not, and all else varied along.
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

}  // namespace

SA_SUITE(emulated_sm90_bwd) { check_head_dims(); }

}  // namespace sink_attention::tests
