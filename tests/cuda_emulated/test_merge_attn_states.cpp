// The CUDA merge, emulated, against the CPU's.
#include <cmath>

#include "buffers.h"
#include "check.h"
#include "cuda/backend.h"
#include "emulator/machine.h"
#include "gradients.h"
#include "thread_executor.h"

namespace sink_attention::tests {
namespace {

struct MergeCase {
  DataType dtype;
  double sink;  // NaN: none
  int64_t num_parts;
  int64_t batch, seqlen, heads, dim;
};

std::string describe(const MergeCase& c) {
  return std::string("merge of ") + std::to_string(c.num_parts) + " " + name_of(c.dtype) +
         " sink " + std::to_string(c.sink) + " rows " + std::to_string(c.batch) + "x" +
         std::to_string(c.seqlen) + "x" + std::to_string(c.heads) + " dim " + std::to_string(c.dim);
}

// Every third part is empty, with garbage in out, in one convention or the other; one row is empty
// in all parts, and in one row a part's lse is NaN.
void check_merge(const MergeCase& c) {
  Random random(static_cast<unsigned>(c.num_parts));
  const int64_t rows = c.batch * c.seqlen * c.heads;
  std::vector<Array> outs, lses;
  std::vector<const void*> out_data, lse_data;
  for (int64_t part = 0; part < c.num_parts; ++part) {
    outs.push_back(Array::normal(c.dtype, rows * c.dim, random));
    lses.push_back(Array::normal(lse_type(c.dtype), rows, random));
    if (part % 3 == 1) {
      outs.back().fill(NAN);
      lses.back().fill(part % 2 == 1 ? -INFINITY : INFINITY);
    }
    if (rows > 5) lses.back().set(5, -INFINITY);
    if (rows > 9 && part == c.num_parts / 2) lses.back().set(9, NAN);
    out_data.push_back(outs.back().data());
    lse_data.push_back(lses.back().data());
  }
  Array s_aux(DataType::kBFloat16, c.heads);
  s_aux.fill(c.sink);
  const Array out(c.dtype, rows * c.dim), lse(lse_type(c.dtype), rows);
  const Array expected_out(c.dtype, rows * c.dim), expected_lse(lse_type(c.dtype), rows);
  attention::MergeParams p{};
  p.dtype = c.dtype;
  p.s_aux_dtype = s_aux.dtype();
  p.outs = out_data.data();
  p.lses = lse_data.data();
  p.s_aux = std::isnan(c.sink) ? nullptr : s_aux.data();
  p.num_parts = c.num_parts;
  p.batch = c.batch;
  p.seqlen = c.seqlen;
  p.num_heads = c.heads;
  p.head_dim = c.dim;
  p.out = expected_out.data();
  p.lse = expected_lse.data();
  cpu::merge_attn_states(p, thread_executor(1));

  p.out = out.data();
  p.lse = lse.data();
  std::vector<emulator::Buffer> buffers{writable(out, "out"), writable(lse, "lse"),
                                        readable(s_aux, "s_aux")};
  for (int64_t part = 0; part < c.num_parts; ++part) {
    buffers.push_back(readable(outs[part], "outs"));
    buffers.push_back(readable(lses[part], "lses"));
  }
  const emulator::VisibleBuffers visible(buffers);
  cuda::merge_attn_states(p, nullptr);
  compare(values_of(out), values_of(expected_out), tolerance_of(c.dtype), describe(c) + ": out");
  compare(values_of(lse), values_of(expected_lse), tolerance_of(lse_type(c.dtype)),
          describe(c) + ": lse");
}

}  // namespace

SA_SUITE(cuda_merge_attn_states) {
  constexpr double kSinks[] = {NAN, 0.5, 1e4, -1e4, INFINITY, -INFINITY};
  for (const DataType dtype :
       {DataType::kFloat64, DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
    for (const double sink : kSinks) check_merge({dtype, sink, 4, 2, 13, 3, 72});
    for (const int64_t dim : {1, 5, 64, 256, 1024}) check_merge({dtype, 0.5, 3, 1, 3, 4, dim});
    check_merge({dtype, 0.5, 1, 1, 7, 2, 64});
    check_merge({dtype, 0.5, 2, 2, 0, 2, 64});
    for (const int64_t num_parts : {63, 64, 65, 127, 128, 200}) {
      check_merge({dtype, kSinks[num_parts % 6], num_parts, 1, 4, 3, 16});
    }
  }
}

}  // namespace sink_attention::tests
