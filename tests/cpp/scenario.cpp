#include "scenario.h"

#include <sstream>

#include "check.h"

namespace sink_attention::tests {
namespace {

using attention::FlashFwdParams;

std::string describe(const Spec& spec) {
  constexpr const char* kLayouts[] = {"dense", "varlen", "paged"};
  std::ostringstream text;
  text << kLayouts[static_cast<int>(spec.layout)] << ' ' << name_of(spec.dtype) << " seqlen "
       << spec.seqlen_q << 'x' << spec.seqlen_k << " window (" << spec.window_left << ','
       << spec.window_right << ") sink tokens " << spec.num_sink_tokens << " softcap "
       << spec.softcap << " sink " << spec.sink << ' ' << name_of(spec.s_aux_dtype) << " heads "
       << spec.num_heads_q << '/' << spec.num_heads_kv << " dims " << spec.head_dim << '/'
       << spec.head_dim_v;
  if (spec.seqused_k) text << " seqused_k";
  if (spec.layout == Layout::kPaged) text << " page_size " << spec.page_size;
  if (spec.head_major) text << " HND";
  if (spec.float8) text << " float8";
  if (spec.num_splits > 0) text << " splits " << spec.num_splits;
  return text.str();
}

std::vector<int32_t> cumulative(const std::vector<int64_t>& lengths) {
  std::vector<int32_t> sums{0};
  for (const int64_t length : lengths) sums.push_back(sums.back() + static_cast<int32_t>(length));
  return sums;
}

// q and out as [rows][heads][dim + 1], so that heads are neither adjacent nor aligned.
void set_queries(Scenario& s, const Spec& spec, int64_t batch, int64_t rows, bool varlen,
                 Random& random) {
  FlashFwdParams& p = s.params;
  s.q_rows = varlen ? rows : batch * rows;
  s.q = Array::normal(spec.dtype, s.q_rows * p.num_heads_q * (p.head_dim + 1), random);
  s.out = Array(spec.dtype, s.q_rows * p.num_heads_q * (p.head_dim_v + 1));
  s.lse = Array(lse_type(spec.dtype), p.num_heads_q * s.q_rows);
  p.q_stride_head = p.head_dim + 1;
  p.q_stride_row = p.num_heads_q * p.q_stride_head;
  p.out_stride_head = p.head_dim_v + 1;
  p.out_stride_row = p.num_heads_q * p.out_stride_head;
  p.lse_stride_head = rows;
  if (!varlen) {
    p.q_stride_batch = rows * p.q_stride_row;
    p.out_stride_batch = rows * p.out_stride_row;
    p.lse_stride_batch = p.num_heads_q * rows;
  }
  p.total_q = s.q_rows;
  p.q = s.q.data();
  p.out = s.out.data();
  p.lse = s.lse.data();
}

// Strides of [outer][rows][heads][dim], or [outer][heads][rows][dim].
void set_kv_strides(FlashFwdParams& p, int64_t rows, bool head_major) {
  p.k_stride_row = head_major ? p.head_dim : p.num_heads_kv * p.head_dim;
  p.k_stride_head = head_major ? rows * p.head_dim : p.head_dim;
  p.k_stride_batch = rows * p.num_heads_kv * p.head_dim;
  p.v_stride_row = head_major ? p.head_dim_v : p.num_heads_kv * p.head_dim_v;
  p.v_stride_head = head_major ? rows * p.head_dim_v : p.head_dim_v;
  p.v_stride_batch = rows * p.num_heads_kv * p.head_dim_v;
}

void set_dense(Scenario& s, const Spec& spec, Random& random) {
  FlashFwdParams& p = s.params;
  p.batch = 2;
  p.seqlen_q = spec.seqlen_q;
  p.seqlen_k = spec.seqlen_k;
  set_queries(s, spec, p.batch, spec.seqlen_q, false, random);
  p.total_k = s.k_rows = p.batch * spec.seqlen_k;
  s.k = Array::normal(spec.dtype, s.k_rows * p.num_heads_kv * p.head_dim, random);
  s.v = Array::normal(spec.dtype, s.k_rows * p.num_heads_kv * p.head_dim_v, random);
  set_kv_strides(p, spec.seqlen_k, spec.head_major);
}

void set_varlen(Scenario& s, const Spec& spec, Random& random) {
  FlashFwdParams& p = s.params;
  const std::vector<int64_t> lengths_q{spec.seqlen_q, 0, spec.seqlen_q / 2 + 1, 3};
  const std::vector<int64_t> lengths_k{spec.seqlen_k, spec.seqlen_k / 3, spec.seqlen_k / 2, 0};
  p.batch = static_cast<int64_t>(lengths_q.size());
  s.cu_seqlens_q = cumulative(lengths_q);
  s.cu_seqlens_k = cumulative(lengths_k);
  constexpr int64_t kUnusedRows = 2;
  p.seqlen_q = std::max<int64_t>(spec.seqlen_q, 3);
  p.seqlen_k = spec.seqlen_k;
  set_queries(s, spec, p.batch, s.cu_seqlens_q.back() + kUnusedRows, true, random);
  p.total_k = s.k_rows = s.cu_seqlens_k.back() + kUnusedRows;
  s.k = Array::normal(spec.dtype, s.k_rows * p.num_heads_kv * p.head_dim, random);
  s.v = Array::normal(spec.dtype, s.k_rows * p.num_heads_kv * p.head_dim_v, random);
  set_kv_strides(p, s.k_rows, spec.head_major);
  p.k_stride_batch = p.v_stride_batch = 0;
  p.cu_seqlens_q = s.cu_seqlens_q.data();
  p.cu_seqlens_k = s.cu_seqlens_k.data();
  if (spec.seqused_k) {
    for (const int64_t length : lengths_k) {
      s.seqused_k.push_back(static_cast<int32_t>(length - length / 4));
    }
    p.seqused_k = s.seqused_k.data();
  }
}

// Pages in random order, a NaN in every slot that no sequence uses, invalid page ids in unused
// table entries.
void set_paged(Scenario& s, const Spec& spec, Random& random) {
  FlashFwdParams& p = s.params;
  const std::vector<int64_t> lengths_q{spec.seqlen_q, 0, spec.seqlen_q / 2 + 1};
  const std::vector<int64_t> lengths_k{spec.seqlen_k / 2, spec.seqlen_k, 1};
  p.batch = static_cast<int64_t>(lengths_k.size());
  const bool varlen = spec.seqlen_q > 1;
  if (varlen) {
    s.cu_seqlens_q = cumulative(lengths_q);
    p.cu_seqlens_q = s.cu_seqlens_q.data();
  }
  p.seqlen_q = std::max(spec.seqlen_q, lengths_q[2]);
  set_queries(s, spec, p.batch, varlen ? s.cu_seqlens_q.back() : p.seqlen_q, varlen, random);
  p.page_size = spec.page_size;
  const int64_t max_pages = spec.seqlen_k / spec.page_size + 2;
  const int64_t num_pages = p.batch * max_pages;
  p.num_pages = num_pages;
  p.seqlen_k = max_pages * spec.page_size;
  p.block_table_stride = max_pages + 1;
  s.block_table.assign(p.batch * p.block_table_stride, -12345);
  std::vector<int32_t> free_pages;
  for (int32_t page = 0; page < num_pages; ++page) free_pages.push_back(page);
  const DataType kv_dtype = spec.float8 ? DataType::kFloat8E4M3 : spec.dtype;
  p.kv_dtype = kv_dtype;
  s.k = Array(kv_dtype, num_pages * p.page_size * p.num_heads_kv * p.head_dim);
  s.v = Array(kv_dtype, num_pages * p.page_size * p.num_heads_kv * p.head_dim_v);
  set_kv_strides(p, p.page_size, spec.head_major);
  for (int64_t b = 0; b < p.batch; ++b) {
    s.seqused_k.push_back(static_cast<int32_t>(lengths_k[b]));
    for (int64_t key = 0; key < lengths_k[b]; ++key) {
      int32_t& page = s.block_table[b * p.block_table_stride + key / p.page_size];
      if (key % p.page_size == 0) {
        const int64_t chosen = random.below(static_cast<int64_t>(free_pages.size()));
        page = free_pages[chosen];
        free_pages.erase(free_pages.begin() + chosen);
      }
      const int64_t slot = key % p.page_size;
      for (int64_t head = 0; head < p.num_heads_kv; ++head) {
        const int64_t k_row =
            page * p.k_stride_batch + slot * p.k_stride_row + head * p.k_stride_head;
        const int64_t v_row =
            page * p.v_stride_batch + slot * p.v_stride_row + head * p.v_stride_head;
        for (int64_t d = 0; d < p.head_dim; ++d) s.k.set(k_row + d, random.normal());
        for (int64_t d = 0; d < p.head_dim_v; ++d) s.v.set(v_row + d, random.normal());
      }
    }
  }
  p.block_table = s.block_table.data();
  p.seqused_k = s.seqused_k.data();
  if (spec.float8) {
    for (int64_t head = 0; head < p.num_heads_kv; ++head) {
      s.k_scale.push_back(0.5f + 0.25f * static_cast<float>(head));
      s.v_scale.push_back(2.0f - 0.125f * static_cast<float>(head));
    }
    p.k_scale = s.k_scale.data();
    p.v_scale = s.v_scale.data();
    p.kv_scale_stride = 1;
  }
}

}  // namespace

Scenario make_scenario(const Spec& spec, unsigned seed) {
  Random random(seed);
  Scenario s;
  s.name = describe(spec);
  FlashFwdParams& p = s.params;
  p.dtype = p.kv_dtype = spec.dtype;
  p.num_heads_q = spec.num_heads_q;
  p.num_heads_kv = spec.num_heads_kv;
  p.head_dim = spec.head_dim;
  p.head_dim_v = spec.head_dim_v;
  p.window_left = spec.window_left;
  p.window_right = spec.window_right;
  p.num_sink_tokens = spec.num_sink_tokens;
  p.softcap = spec.softcap;
  p.softmax_scale = 1 / std::sqrt(static_cast<double>(spec.head_dim));
  p.num_splits = spec.num_splits;
  if (spec.layout == Layout::kDense) set_dense(s, spec, random);
  if (spec.layout == Layout::kVarlen) set_varlen(s, spec, random);
  if (spec.layout == Layout::kPaged) set_paged(s, spec, random);
  p.k = s.k.data();
  p.v = s.v.data();
  if (!std::isnan(spec.sink)) {
    s.s_aux = Array(spec.s_aux_dtype, spec.num_heads_q);
    for (int64_t head = 0; head < spec.num_heads_q; ++head) {
      s.s_aux.set(head, head == 0 ? spec.sink : spec.sink + random.normal());
    }
    p.s_aux = s.s_aux.data();
    p.s_aux_dtype = spec.s_aux_dtype;
  }
  return s;
}

std::vector<Spec> make_specs(Layout layout, DataType dtype) {
  constexpr int64_t kLengths[][2] = {{1, 1},   {1, 129}, {3, 0},    {0, 5},    {2, 300},
                                     {63, 65}, {64, 64}, {65, 127}, {130, 70}, {129, 200}};
  constexpr int64_t kWindows[][2] = {{-1, -1}, {-1, 0}, {0, 0}, {17, 0}, {5, 7}, {-1, 3}, {130, 0}};
  constexpr int64_t kDims[][2] = {{64, 64}, {1, 1},     {128, 128}, {5, 3},
                                  {80, 40}, {256, 192}, {16, 33}};
  constexpr int64_t kHeads[][2] = {{1, 1}, {4, 2}, {8, 1}, {3, 3}, {6, 2}};
  constexpr double kSinks[] = {NAN, 0.5, 1e4, -1e4, INFINITY, -INFINITY};
  constexpr DataType kSinkTypes[] = {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16,
                                     DataType::kFloat64};
  constexpr int64_t kPageSizes[] = {16, 1, 5, 64};
  constexpr int64_t kSinkTokens[] = {0, 3, 0, 70, 0, 1000};
  std::vector<Spec> specs;
  size_t i =
      static_cast<size_t>(layout) + 3 * static_cast<size_t>(dtype);  // other pairings for each
  for (const auto& lengths : kLengths) {
    for (const auto& window : kWindows) {
      ++i;
      Spec spec;
      spec.layout = layout;
      spec.dtype = dtype;
      spec.seqlen_q = lengths[0];
      spec.seqlen_k = lengths[1];
      spec.window_left = window[0];
      spec.window_right = window[1];
      spec.num_sink_tokens = kSinkTokens[i % std::size(kSinkTokens)];
      spec.softcap = i % 3 == 0 ? 2.0 : 0.0;
      spec.sink = kSinks[i * 5 % std::size(kSinks)];
      spec.s_aux_dtype = kSinkTypes[i / 2 % std::size(kSinkTypes)];
      spec.num_heads_q = kHeads[i * 3 % std::size(kHeads)][0];
      spec.num_heads_kv = kHeads[i * 3 % std::size(kHeads)][1];
      spec.head_dim = kDims[i * 4 % std::size(kDims)][0];
      spec.head_dim_v = kDims[i * 4 % std::size(kDims)][1];
      spec.seqused_k = i % 2 == 0;
      spec.page_size = kPageSizes[i / 3 % std::size(kPageSizes)];
      spec.head_major = i % 4 < 2;
      spec.float8 = layout == Layout::kPaged && i % 5 == 0;
      spec.num_splits = i % 7 < 3 ? static_cast<int64_t>(i % 7 * 3) : 0;
      specs.push_back(spec);
    }
  }
  return specs;
}

void compare(const std::vector<double>& got, const std::vector<double>& expected, double tolerance,
             const std::string& what) {
  check(got.size() == expected.size(), what, ": ", got.size(), " elements, expected ",
        expected.size());
  if (got.size() != expected.size()) return;
  double largest = 0;
  for (const double x : expected)
    largest = std::isfinite(x) ? std::max(largest, std::fabs(x)) : largest;
  size_t worst = 0;
  double worst_excess = -1;
  for (size_t i = 0; i < got.size(); ++i) {
    const double x = got[i], y = expected[i];
    double excess = std::fabs(x - y) - tolerance * (1 + largest);
    if (!std::isfinite(x) || !std::isfinite(y)) {
      const bool same = std::isnan(x) ? std::isnan(y) : x == y;
      excess = same ? -1 : INFINITY;
    }
    if (excess > worst_excess) {
      worst_excess = excess;
      worst = i;
    }
  }
  check(!(worst_excess > 0), what, ": element ", worst, " is ", got.empty() ? 0 : got[worst],
        ", expected ", got.empty() ? 0 : expected[worst], " (tolerance ", tolerance * (1 + largest),
        ")");
}

double tolerance_of(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat64:
      return 1e-12;
    case DataType::kFloat32:
      return 1e-5;
    case DataType::kFloat16:
      return 1e-3;
    default:
      return 8e-3;
  }
}

std::vector<double> out_of(const Scenario& s) {
  const FlashFwdParams& p = s.params;
  std::vector<double> values;
  for (int64_t row = 0; row < s.q_rows * p.num_heads_q; ++row) {
    for (int64_t d = 0; d < p.head_dim_v; ++d) values.push_back(s.out[row * p.out_stride_head + d]);
  }
  return values;
}

std::vector<double> lse_of(const Scenario& s) {
  const FlashFwdParams& p = s.params;
  std::vector<double> values;
  const int64_t batch = p.cu_seqlens_q != nullptr ? 1 : p.batch;
  const int64_t rows = batch == 0 ? 0 : s.q_rows / batch;
  for (int64_t head = 0; head < p.num_heads_q; ++head) {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < rows; ++i) {
        values.push_back(s.lse[b * p.lse_stride_batch + head * p.lse_stride_head + i]);
      }
    }
  }
  return values;
}

}  // namespace sink_attention::tests
