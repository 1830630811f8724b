// The CUDA fill_unused_rows, emulated: nothing but unused rows is written.
#include "buffers.h"
#include "cuda/backend.h"
#include "emulator/machine.h"
#include "unused_rows_case.h"

namespace sink_attention::tests {
namespace {

template <class Params>
void run(UnusedRows& rows, const Params& params) {
  const emulator::VisibleBuffers visible({writable(rows.out, "out"), writable(rows.lse, "lse"),
                                          writable(rows.dq, "dq"), writable(rows.dk, "dk"),
                                          writable(rows.dv, "dv"),
                                          buffer(rows.c.cu_seqlens_q, false, "cu_seqlens_q"),
                                          buffer(rows.c.cu_seqlens_k, false, "cu_seqlens_k"),
                                          buffer(rows.c.seqused_k, false, "seqused_k")});
  cuda::fill_unused_rows(params, nullptr);
}

}  // namespace

SA_SUITE(cuda_unused_rows) {
  check_unused_rows("cuda", [](UnusedRows& rows, const auto& params) { run(rows, params); });
  // Where cu_seqlens falls, a row is filled unless some sequence has it.
  UnusedRows rows(
      {DataType::kFloat16, {6, 9, -4, 20, 2, 5}, {0, 0, 0, 0, 0, 0}, {}, 12, 0, 12, 12});
  run(rows, rows.params.fwd);
  for (int64_t i = 0; i < rows.lse.count(); ++i) {
    const bool used = UnusedRows::is_used(rows.c.cu_seqlens_q, 12, {}, i % 12);
    check(used || rows.lse[i] == -INFINITY, "lse ", i, " is ", rows.lse[i]);
  }
  // Dense results have no unused rows.
  UnusedRows dense({DataType::kFloat16, {0, 1}, {0, 1}, {}, 4, 4, 4, 4});
  dense.params.fwd.cu_seqlens_q = dense.params.fwd.cu_seqlens_k = nullptr;
  run(dense, dense.params.fwd);
  run(dense, dense.params);
  check(std::isnan(dense.out[0]) && std::isnan(dense.dq[0]), "dense results are left alone");
}

}  // namespace sink_attention::tests
