// reshape_and_cache and merge_attn_states of every instruction set, and the choice of instruction
// set itself.
#include <algorithm>
#include <stdexcept>

#include "check.h"
#include "reference.h"
#include "scenario.h"
#include "thread_executor.h"

namespace sink_attention::tests {
namespace {

constexpr DataType kDtypes[] = {DataType::kFloat64, DataType::kFloat32, DataType::kFloat16,
                                DataType::kBFloat16};

// Some tokens are skipped, and one slot is written twice: the last write stays. All other slots
// keep their contents.
void check_cache(DataType dtype, DataType cache_dtype, bool head_major, const std::string& isa) {
  constexpr int64_t kTokens = 7, kHeads = 3, kDim = 20, kDimV = 9, kPages = 4, kPageSize = 5;
  const std::vector<int64_t> slots{3, -1, 19, 0, 3, -1, 11};
  Random random(1);
  const Array k = Array::normal(dtype, kTokens * kHeads * kDim, random);
  const Array v = Array::normal(dtype, kTokens * kHeads * kDimV, random);
  const bool scaled = attention::is_8_bit(cache_dtype);
  Array k_cache(cache_dtype, kPages * kPageSize * kHeads * kDim);
  Array v_cache(cache_dtype, kPages * kPageSize * kHeads * kDimV);
  const std::vector<float> k_scale{0.5f, 0.01f, 3.0f}, v_scale{1.0f, 0.003f, 0.25f};
  attention::ReshapeAndCacheParams p{};
  p.dtype = dtype;
  p.cache_dtype = cache_dtype;
  p.k = k.data();
  p.v = v.data();
  p.k_cache = k_cache.data();
  p.v_cache = v_cache.data();
  p.slot_mapping = slots.data();
  p.k_stride_token = kHeads * kDim;
  p.k_stride_head = kDim;
  p.v_stride_token = kHeads * kDimV;
  p.v_stride_head = kDimV;
  p.k_cache_stride_page = kPageSize * kHeads * kDim;
  p.k_cache_stride_slot = head_major ? kDim : kHeads * kDim;
  p.k_cache_stride_head = head_major ? kPageSize * kDim : kDim;
  p.v_cache_stride_page = kPageSize * kHeads * kDimV;
  p.v_cache_stride_slot = head_major ? kDimV : kHeads * kDimV;
  p.v_cache_stride_head = head_major ? kPageSize * kDimV : kDimV;
  if (scaled) {
    p.k_scale = k_scale.data();
    p.v_scale = v_scale.data();
    p.kv_scale_stride = 1;
  }
  p.num_tokens = kTokens;
  p.num_heads_kv = kHeads;
  p.head_dim = kDim;
  p.head_dim_v = kDimV;
  p.num_pages = kPages;
  p.page_size = kPageSize;
  cpu::reshape_and_cache(p, thread_executor(2));

  const auto expect = [&](const Array& cache, const Array& tokens, const std::vector<float>& scale,
                          int64_t dim, const char* which) {
    std::vector<double> got, expected;
    for (int64_t slot = 0; slot < kPages * kPageSize; ++slot) {
      int64_t token = kTokens - 1;
      while (token >= 0 && slots[token] != slot) --token;
      for (int64_t head = 0; head < kHeads; ++head) {
        for (int64_t d = 0; d < dim; ++d) {
          const int64_t in_page =
              head_major ? head * kPageSize + slot % kPageSize : slot % kPageSize * kHeads + head;
          got.push_back(cache[(slot / kPageSize * kPageSize * kHeads + in_page) * dim + d]);
          if (token < 0) {
            Array untouched(cache_dtype, 1);
            expected.push_back(untouched[0]);
            continue;
          }
          const double value = tokens[(token * kHeads + head) * dim + d];
          Array rounded(cache_dtype, 1);
          rounded.set(0, scaled ? static_cast<float>(value) / scale[head] : value);
          expected.push_back(rounded[0]);
        }
      }
    }
    compare(got, expected, 0,
            isa + ": cache of " + name_of(dtype) + " as " + name_of(cache_dtype) + ": " + which);
  };
  expect(k_cache, k, k_scale, kDim, "k");
  expect(v_cache, v, v_scale, kDimV, "v");
}

// One kv head and enough tokens for several threads, on slots that are given many times over, some of
// them beyond the cache: what one thread writes, which keeps the last token of a slot.
void check_parts(DataType cache_dtype, const std::string& isa) {
  constexpr int64_t kTokens = 5000, kDim = 128, kPages = 40, kPageSize = 16;
  Random random(3);
  const Array k = Array::normal(DataType::kFloat32, kTokens * kDim, random);
  std::vector<int64_t> slots;
  for (int64_t token = 0; token < kTokens; ++token) {
    slots.push_back(random.below(kPages * kPageSize + 20) - 10);
  }
  attention::ReshapeAndCacheParams p{};
  p.dtype = DataType::kFloat32;
  p.cache_dtype = cache_dtype;
  p.k = p.v = k.data();
  p.slot_mapping = slots.data();
  p.k_stride_token = p.v_stride_token = kDim;
  p.k_cache_stride_page = p.v_cache_stride_page = kPageSize * kDim;
  p.k_cache_stride_slot = p.v_cache_stride_slot = kDim;
  p.k_scale_stride_page = p.v_scale_stride_page = kPageSize;
  p.k_scale_stride_slot = p.v_scale_stride_slot = 1;
  p.num_tokens = kTokens;
  p.num_heads_kv = 1;
  p.head_dim = p.head_dim_v = kDim;
  p.num_pages = kPages;
  p.page_size = kPageSize;
  const bool scaled = attention::is_8_bit(cache_dtype);
  std::vector<std::vector<double>> results;
  for (const int threads : {1, 4}) {
    const Array k_cache(cache_dtype, kPages * kPageSize * kDim),
        v_cache(cache_dtype, kPages * kPageSize * kDim);
    const Array k_scales(DataType::kFloat32, kPages * kPageSize),
        v_scales(DataType::kFloat32, kPages * kPageSize);
    p.k_cache = k_cache.data();
    p.v_cache = v_cache.data();
    p.k_token_scales = scaled ? static_cast<float*>(k_scales.data()) : nullptr;
    p.v_token_scales = scaled ? static_cast<float*>(v_scales.data()) : nullptr;
    cpu::reshape_and_cache(p, thread_executor(threads));
    std::vector<double> result;
    for (const Array* array : {&k_cache, &v_cache, &k_scales, &v_scales}) {
      for (int64_t i = 0; i < array->count(); ++i) result.push_back((*array)[i]);
    }
    results.push_back(result);
  }
  compare(results[1], results[0], 0, isa + ": cache in parts as " + name_of(cache_dtype));
  for (int64_t slot = 0; slot < kPages * kPageSize && !scaled; ++slot) {
    int64_t token = kTokens - 1;
    while (token >= 0 && slots[token] != slot) --token;
    check(token < 0 || results[1][slot * kDim] == k[token * kDim], isa, ": slot ", slot,
          " does not hold its last token ", token);
  }
}

// Parts of which one is empty (lse -inf or, in another convention, +inf, with garbage in out), and
// a sink.
void check_merge(DataType dtype, double sink, const std::string& isa) {
  constexpr int64_t kParts = 4, kBatch = 2, kSeqlen = 150, kHeads = 3, kDim = 72;
  Random random(2);
  std::vector<Array> outs, lses;
  std::vector<const void*> out_data, lse_data;
  for (int64_t part = 0; part < kParts; ++part) {
    outs.push_back(Array::normal(dtype, kBatch * kSeqlen * kHeads * kDim, random));
    lses.push_back(Array::normal(lse_type(dtype), kBatch * kHeads * kSeqlen, random));
    if (part == 1 || part == 2) {
      outs.back().fill(NAN);
      lses.back().fill(part == 1 ? -INFINITY : INFINITY);
    }
    out_data.push_back(outs.back().data());
    lse_data.push_back(lses.back().data());
  }
  lses[0].set(5, -INFINITY);  // a row that no part has
  lses[3].set(5, -INFINITY);
  Array s_aux(DataType::kFloat32, kHeads), out(dtype, outs[0].count()),
      lse(lse_type(dtype), lses[0].count());
  s_aux.fill(sink);
  attention::MergeParams p{};
  p.dtype = dtype;
  p.s_aux_dtype = DataType::kFloat32;
  p.outs = out_data.data();
  p.lses = lse_data.data();
  p.s_aux = std::isnan(sink) ? nullptr : s_aux.data();
  p.out = out.data();
  p.lse = lse.data();
  p.num_parts = kParts;
  p.batch = kBatch;
  p.seqlen = kSeqlen;
  p.num_heads = kHeads;
  p.head_dim = kDim;
  cpu::merge_attn_states(p, thread_executor(3));

  std::vector<double> got_out, got_lse, expected_out, expected_lse;
  for (int64_t i = 0; i < lse.count(); ++i) {
    const int64_t row = i % kSeqlen, head = i / kSeqlen % kHeads, batch = i / kSeqlen / kHeads;
    const double a = std::exp(lses[0][i]), b = std::exp(lses[3][i]);
    const double z = a + b;
    // log(z + e^sink), without overflow.
    double expected = std::log(z);
    if (!std::isnan(sink)) {
      const double max = std::max(sink, std::log(z));
      expected = std::isfinite(max)
                     ? max + std::log(std::exp(sink - max) + std::exp(std::log(z) - max))
                     : max;
    }
    got_lse.push_back(lse[i]);
    expected_lse.push_back(expected);
    for (int64_t d = 0; d < kDim; ++d) {
      const int64_t at = ((batch * kSeqlen + row) * kHeads + head) * kDim + d;
      got_out.push_back(out[at]);
      expected_out.push_back(z == 0 || expected == INFINITY
                                 ? 0
                                 : (a * outs[0][at] + b * outs[3][at]) / z *
                                       std::exp(std::log(z) - expected));
    }
  }
  const std::string name = isa + ": merge " + name_of(dtype) + " sink " + std::to_string(sink);
  compare(got_out, expected_out, tolerance_of(dtype), name + ": out");
  compare(got_lse, expected_lse, tolerance_of(lse_type(dtype)), name + ": lse");
}

}  // namespace

SA_SUITE(reshape_and_cache) {
  with_each_instruction_set([](const std::string& isa) {
    for (const DataType dtype : kDtypes) {
      for (const bool head_major : {false, true}) {
        for (const DataType cache : {dtype, DataType::kFloat8E4M3, DataType::kInt8}) {
          check_cache(dtype, cache, head_major, isa);
        }
      }
    }
  });
}

SA_SUITE(reshape_and_cache_parts) {
  with_each_instruction_set([](const std::string& isa) {
    check_parts(DataType::kFloat32, isa);
    check_parts(DataType::kInt8, isa);
  });
}

SA_SUITE(merge_attn_states) {
  with_each_instruction_set([](const std::string& isa) {
    for (const DataType dtype : kDtypes) {
      for (const double sink : {double{NAN}, 0.5, 1e4, -1e4, double{INFINITY}, -double{INFINITY}}) {
        check_merge(dtype, sink, isa);
      }
    }
  });
}

SA_SUITE(backend) {
  const std::vector<std::string> names = cpu::available_instruction_sets();
  check(!names.empty() && names.front() == "portable", "portable comes first");
  for (const std::string& name : names) {
    cpu::set_instruction_set(name);
    check(cpu::instruction_set() == name, "instruction set ", name, " was asked for");
  }
  bool refused = false;
  try {
    cpu::set_instruction_set("abacus");
  } catch (const std::invalid_argument& error) {
    refused = std::string(error.what()).find("abacus") != std::string::npos;
  }
  check(refused, "an unknown instruction set is refused by name");
  check(cpu::instruction_set() == names.back(), "a refused choice changes nothing");
}

}  // namespace sink_attention::tests
