// The CUDA append, emulated: one launch, and the cache that the CPU's write leaves.
#include "append_case.h"
#include "buffers.h"
#include "cuda/backend.h"
#include "emulator/machine.h"

namespace sink_attention::tests {
namespace {

int64_t launches() {
  int64_t sum = 0;
  for (const auto& [kernel, count] : emulator::settings().launches_of) sum += count;
  return sum;
}

void run(Append& a) {
  const emulator::VisibleBuffers visible(
      {readable(a.k, "k"), readable(a.v, "v"), writable(a.k_cache, "k_cache"),
       writable(a.v_cache, "v_cache"), writable(a.k_token_scales, "k_token_scales"),
       writable(a.v_token_scales, "v_token_scales"), writable(a.out, "out"), writable(a.lse, "lse"),
       buffer(a.k_scale, false, "k_scale"), buffer(a.v_scale, false, "v_scale"),
       buffer(a.cu_seqlens_q, false, "cu_seqlens_q"),
       buffer(a.c.cache_seqlens, false, "cache_seqlens"),
       buffer(a.block_table, false, "block_table"), buffer(a.seqused_k, true, "seqused_k"),
       buffer(a.page_table, true, "page_table")});
  const int64_t before = launches();
  cuda::append_kv(a.params, nullptr);
  const int64_t expected = a.batch + a.num_tokens > 0 ? 1 : 0;
  check(launches() - before == expected, a.name(), ": ", launches() - before, " launches");
}

}  // namespace

SA_SUITE(cuda_append_kv) {
  for (const DataType dtype :
       {DataType::kFloat64, DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
    check_appends(dtype, "cuda", run);
  }
  check_long_appends("cuda", run);
  // Nothing of cu_seqlens_q is trusted.
  AppendCase c{DataType::kBFloat16, DataType::kBFloat16};
  c.is_packed = c.has_results = true;
  c.cache_seqlens = {1, 2, 3};
  c.new_lengths = {2, 2, 2};
  c.seqlen_new = 2;
  for (const std::vector<int32_t>& cu_seqlens : std::vector<std::vector<int32_t>>{
           {5, 3, -9, 6}, {-2147483647, 2147483647, 0, 2147483647}, {9, 9, 9, 9}, {0, 6, 2, 4}}) {
    Append append(c);
    append.cu_seqlens_q = cu_seqlens;
    append.params.cu_seqlens_q = append.cu_seqlens_q.data();
    run(append);  // within its buffers, or the emulator throws
    for (const int32_t length : append.seqused_k) {
      check(0 <= length && length <= append.capacity(), "seqused_k is ", length);
    }
  }
}

}  // namespace sink_attention::tests
