// The CUDA cache write, emulated, against the CPU's: bit for bit.
#include <cmath>
#include <cstring>
#include <utility>

#include "buffers.h"
#include "check.h"
#include "cuda/backend.h"
#include "emulator/machine.h"
#include "thread_executor.h"

namespace sink_attention::tests {
namespace {

struct CacheCase {
  DataType dtype;
  DataType cache_dtype;
  bool token_scales;
  bool head_major;
  int64_t num_tokens;
  int64_t heads, dim, dim_v;
  int64_t gap;  // between the rows of k and v
};

std::string describe(const CacheCase& c) {
  return std::string("cache of ") + name_of(c.dtype) + " as " + name_of(c.cache_dtype) +
         (c.token_scales ? ", a scale for each token and head" : "") +
         (c.head_major ? " HND" : "") + " tokens " + std::to_string(c.num_tokens) + " dims " +
         std::to_string(c.dim) + "/" + std::to_string(c.dim_v) + " gap " + std::to_string(c.gap);
}

// Values of all magnitudes, so that 8-bit elements saturate, round and become subnormal.
Array random_elements(DataType dtype, int64_t count, Random& random) {
  Array array(dtype, count);
  for (int64_t i = 0; i < count; ++i) {
    array.set(i, random.normal() * std::exp2(static_cast<double>(random.below(24)) - 12));
  }
  if (count > 3) {
    array.set(0, INFINITY);
    array.set(1, -INFINITY);
    array.set(2, 0.0);
    array.set(3, -0.0);
  }
  return array;
}

bool same_bytes(const Array& a, const Array& b) {
  return std::memcmp(a.data(), b.data(), a.count() * attention::bytes_of(a.dtype())) == 0;
}

void check_cache(const CacheCase& c) {
  constexpr int64_t kPageSize = 5;
  const int64_t pages = c.num_tokens / kPageSize + 2;
  const int64_t num_slots = pages * kPageSize;
  Random random(static_cast<unsigned>(c.num_tokens + c.dim));
  const Array k = random_elements(c.dtype, c.num_tokens * c.heads * (c.dim + c.gap), random);
  const Array v = random_elements(c.dtype, c.num_tokens * c.heads * (c.dim_v + c.gap), random);
  const DataType cache_dtype = c.cache_dtype;
  const int64_t k_count = num_slots * c.heads * c.dim, v_count = num_slots * c.heads * c.dim_v;
  const Array k_cache(cache_dtype, k_count), v_cache(cache_dtype, v_count);
  const Array k_expected(cache_dtype, k_count), v_expected(cache_dtype, v_count);
  std::vector<float> k_scale, v_scale;
  for (int64_t head = 0; head < c.heads; ++head) {
    k_scale.push_back(0.5f + 0.3f * static_cast<float>(head));
    v_scale.push_back(0.003f * static_cast<float>(head + 1));
  }
  // Some tokens skipped, some beyond the cache, some slots given twice.
  std::vector<int64_t> slots, valid_slots;
  for (int64_t token = 0; token < c.num_tokens; ++token) {
    slots.push_back(random.below(num_slots));
    if (token % 5 == 1) slots.back() = -1;
    if (token % 7 == 3) slots.back() = num_slots + random.below(1000) * 12345678;
    if (token % 11 == 5) slots.back() = -5 - token;
    const bool valid = 0 <= slots.back() && slots.back() < num_slots;
    valid_slots.push_back(valid ? slots.back() : -1);
  }

  attention::ReshapeAndCacheParams p{};
  p.dtype = c.dtype;
  p.cache_dtype = cache_dtype;
  p.k = k.data();
  p.v = v.data();
  p.k_stride_head = c.dim + c.gap;
  p.k_stride_token = c.heads * p.k_stride_head;
  p.v_stride_head = c.dim_v + c.gap;
  p.v_stride_token = c.heads * p.v_stride_head;
  p.k_cache_stride_page = kPageSize * c.heads * c.dim;
  p.k_cache_stride_slot = c.head_major ? c.dim : c.heads * c.dim;
  p.k_cache_stride_head = c.head_major ? kPageSize * c.dim : c.dim;
  p.v_cache_stride_page = kPageSize * c.heads * c.dim_v;
  p.v_cache_stride_slot = c.head_major ? c.dim_v : c.heads * c.dim_v;
  p.v_cache_stride_head = c.head_major ? kPageSize * c.dim_v : c.dim_v;
  if (c.token_scales) {  // heads first
    p.k_scale_stride_page = p.v_scale_stride_page = kPageSize * c.heads;
    p.k_scale_stride_slot = p.v_scale_stride_slot = 1;
    p.k_scale_stride_head = p.v_scale_stride_head = kPageSize;
  } else if (c.cache_dtype != c.dtype) {
    p.k_scale = k_scale.data();
    p.v_scale = v_scale.data();
    p.kv_scale_stride = 1;
  }
  const Array k_written(DataType::kFloat32, num_slots * c.heads),
      v_written(DataType::kFloat32, num_slots * c.heads),
      k_scales_expected(DataType::kFloat32, num_slots * c.heads),
      v_scales_expected(DataType::kFloat32, num_slots * c.heads);
  p.num_tokens = c.num_tokens;
  p.num_heads_kv = c.heads;
  p.head_dim = c.dim;
  p.head_dim_v = c.dim_v;
  p.num_pages = pages;
  p.page_size = kPageSize;
  p.deterministic = true;

  attention::ReshapeAndCacheParams on_cpu = p;
  on_cpu.k_cache = k_expected.data();
  on_cpu.v_cache = v_expected.data();
  on_cpu.slot_mapping = valid_slots.data();
  if (c.token_scales) {
    on_cpu.k_token_scales = static_cast<float*>(k_scales_expected.data());
    on_cpu.v_token_scales = static_cast<float*>(v_scales_expected.data());
    p.k_token_scales = static_cast<float*>(k_written.data());
    p.v_token_scales = static_cast<float*>(v_written.data());
  }
  cpu::reshape_and_cache(on_cpu, thread_executor(1));

  p.k_cache = k_cache.data();
  p.v_cache = v_cache.data();
  p.slot_mapping = slots.data();
  const emulator::VisibleBuffers visible(
      {readable(k, "k"), readable(v, "v"), writable(k_cache, "k_cache"),
       writable(v_cache, "v_cache"), buffer(slots, false, "slot_mapping"),
       buffer(k_scale, false, "k_scale"), buffer(v_scale, false, "v_scale"),
       writable(k_written, "k_token_scales"), writable(v_written, "v_token_scales")});
  cuda::reshape_and_cache(p, nullptr);
  check(same_bytes(k_cache, k_expected), describe(c), ": k differs from the CPU's");
  check(same_bytes(v_cache, v_expected), describe(c), ": v differs from the CPU's");
  check(same_bytes(k_written, k_scales_expected), describe(c), ": k's scales differ");
  check(same_bytes(v_written, v_scales_expected), describe(c), ": v's scales differ");
}

// Without `deterministic`, several blocks of threads and several tokens a block. Slots of one token
// hold it; each element of a shared slot is one of its tokens', and other slots are left alone.
void check_shared_slots() {
  constexpr int64_t kTokens = 700, kDim = 24, kPages = 50, kPageSize = 10;
  const auto value_of = [](int64_t token) { return static_cast<double>(token); };
  Array values(DataType::kFloat32, kTokens * kDim);
  std::vector<int64_t> slots;
  for (int64_t token = 0; token < kTokens; ++token) {
    slots.push_back(token < 400 ? token : token % 20);
    for (int64_t d = 0; d < kDim; ++d) values.set(token * kDim + d, value_of(token));
  }
  const Array k_cache(DataType::kFloat32, kPages * kPageSize * kDim),
      v_cache(DataType::kFloat32, kPages * kPageSize * kDim);
  attention::ReshapeAndCacheParams p{};
  p.dtype = p.cache_dtype = DataType::kFloat32;
  p.k = p.v = values.data();
  p.k_cache = k_cache.data();
  p.v_cache = v_cache.data();
  p.slot_mapping = slots.data();
  p.k_stride_token = p.v_stride_token = kDim;
  p.k_cache_stride_page = p.v_cache_stride_page = kPageSize * kDim;
  p.k_cache_stride_slot = p.v_cache_stride_slot = kDim;
  p.num_tokens = kTokens;
  p.num_heads_kv = 1;
  p.head_dim = p.head_dim_v = kDim;
  p.num_pages = kPages;
  p.page_size = kPageSize;
  const emulator::VisibleBuffers visible({readable(values, "k"), writable(k_cache, "k_cache"),
                                          writable(v_cache, "v_cache"),
                                          buffer(slots, false, "slot_mapping")});
  cuda::reshape_and_cache(p, nullptr);
  for (const Array* cache : {&k_cache, &v_cache}) {
    for (int64_t i = 0; i < cache->count(); ++i) {
      const int64_t slot = i / kDim;
      const double value = (*cache)[i];
      const bool is_right = slot >= 400  ? std::isnan(value)
                            : slot >= 20 ? value == value_of(slot)
                                         : std::fmod(value, 20) == static_cast<double>(slot) &&
                                               (value < 20 || value >= 400);
      check(is_right, "shared slots: element ", i, " is ", value);
    }
  }
}

}  // namespace

SA_SUITE(cuda_reshape_and_cache) {
  constexpr int64_t kShapes[][4] = {{3, 20, 9, 0}, {2, 64, 64, 0}, {1, 256, 192, 8},
                                    {8, 8, 4, 4},  {1, 1, 33, 0},  {2, 64, 32, 2}};
  for (const DataType dtype :
       {DataType::kFloat64, DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
    const std::pair<DataType, bool> kinds[] = {{dtype, false},
                                               {DataType::kFloat8E4M3, false},
                                               {DataType::kFloat8E4M3, true},
                                               {DataType::kInt8, false},
                                               {DataType::kInt8, true}};
    for (const auto& [cache_dtype, token_scales] : kinds) {
      for (const bool head_major : {false, true}) {
        for (const auto& [heads, dim, dim_v, gap] : kShapes) {
          check_cache({dtype, cache_dtype, token_scales, head_major, 29, heads, dim, dim_v, gap});
        }
      }
      check_cache({dtype, cache_dtype, token_scales, false, 0, 2, 64, 64, 0});
      check_cache({dtype, cache_dtype, token_scales, false, 1, 2, 64, 64, 0});
    }
  }
  // More than one token a block, then as many as a block takes.
  constexpr DataType kBFloat16 = DataType::kBFloat16;
  check_cache({kBFloat16, kBFloat16, false, false, 1000, 1, 4, 2, 0});
  check_cache({kBFloat16, DataType::kFloat8E4M3, false, true, 256 * 33, 1, 1, 1, 0});
  check_cache({kBFloat16, DataType::kInt8, true, true, 256 * 33, 1, 1, 1, 0});
  check_shared_slots();
}

}  // namespace sink_attention::tests
