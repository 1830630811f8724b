// An append to a KV cache, and what it must leave: what reshape_and_cache writes at the slots that
// the definition of the append names.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "array.h"
#include "check.h"
#include "thread_executor.h"

namespace sink_attention::tests {

struct AppendCase {
  DataType dtype;
  DataType cache_dtype;
  bool token_scales = false;
  bool head_major = false;
  bool is_packed = false;
  bool is_paged = true;
  bool has_results = false;                // out and lse, only packed
  std::vector<int32_t> cache_seqlens{};    // of each sequence
  std::vector<int32_t> new_lengths{};      // packed; dense: all seqlen_new
  int64_t seqlen_new = 0;                  // dense; packed: max_seqlen_q
  int64_t first_row = 0, padded_rows = 0;  // packed rows before and after the sequences
  int64_t heads = 2, dim = 64, dim_v = 64;
  int64_t page_size = 4, pages_per_seq = 5;
};

// Owns what an append reads and writes. Caches and results are NaN before.
struct Append {
  static constexpr int64_t kHeadsQ = 4;

  AppendCase c;
  int64_t batch, num_tokens, num_pages;
  Array k, v, k_cache, v_cache, k_token_scales, v_token_scales, out, lse;
  std::vector<float> k_scale, v_scale;
  std::vector<int32_t> cu_seqlens_q, block_table, seqused_k, page_table;
  std::vector<int64_t> token_row;  // of k and v, in elements of one head's width: row of each token
  attention::AppendKvParams params{};

  explicit Append(const AppendCase& given) : c(given) {
    Random random(static_cast<unsigned>(c.dim + c.page_size));
    batch = static_cast<int64_t>(c.cache_seqlens.size());
    if (c.is_packed) {
      cu_seqlens_q.push_back(static_cast<int32_t>(c.first_row));
      for (const int32_t length : c.new_lengths) {
        cu_seqlens_q.push_back(cu_seqlens_q.back() + length);
      }
      num_tokens = cu_seqlens_q.back() + c.padded_rows;
    } else {
      num_tokens = batch * c.seqlen_new;
    }
    // A dense k has a row between two sequences that belongs to none.
    const int64_t rows_per_batch = c.seqlen_new + 1;
    for (int64_t token = 0; token < num_tokens; ++token) {
      token_row.push_back(
          c.is_packed ? token : token / c.seqlen_new * rows_per_batch + token % c.seqlen_new);
    }
    const int64_t rows = c.is_packed ? num_tokens : batch * rows_per_batch;
    k = Array::normal(c.dtype, rows * c.heads * c.dim, random);
    v = Array::normal(c.dtype, rows * c.heads * c.dim_v, random);
    num_pages = c.is_paged ? batch * c.pages_per_seq + 3 : batch;
    const int64_t slots = num_pages * c.page_size;
    k_cache = Array(c.cache_dtype, slots * c.heads * c.dim);
    v_cache = Array(c.cache_dtype, slots * c.heads * c.dim_v);
    k_token_scales = Array(DataType::kFloat32, slots * c.heads);
    v_token_scales = Array(DataType::kFloat32, slots * c.heads);
    for (int64_t head = 0; head < c.heads; ++head) {
      k_scale.push_back(0.5f + 0.25f * static_cast<float>(head));
      v_scale.push_back(0.01f * static_cast<float>(head + 1));
    }
    if (c.is_paged) {
      for (int64_t i = 0; i < batch * c.pages_per_seq; ++i) {
        block_table.push_back(static_cast<int32_t>((i * 7 + 2) % (batch * c.pages_per_seq)));
      }
    }
    seqused_k.assign(batch, -77);
    page_table.assign(batch, -77);
    out = Array(c.dtype, num_tokens * kHeadsQ * c.dim_v);
    lse = Array(lse_type(c.dtype), kHeadsQ * num_tokens);
    describe(rows_per_batch);
  }

  // A cache's strides, of k's dim or v's.
  void set_cache_strides(int64_t dim, int64_t& page, int64_t& slot, int64_t& head) const {
    page = c.page_size * c.heads * dim;
    slot = c.head_major ? dim : c.heads * dim;
    head = c.head_major ? c.page_size * dim : dim;
  }

  void describe(int64_t rows_per_batch) {
    attention::AppendKvParams& p = params;
    p.dtype = c.dtype;
    p.cache_dtype = c.cache_dtype;
    p.k = k.data();
    p.v = v.data();
    p.k_cache = k_cache.data();
    p.v_cache = v_cache.data();
    p.k_stride_head = c.dim;
    p.v_stride_head = c.dim_v;
    p.k_stride_token = c.heads * c.dim;
    p.v_stride_token = c.heads * c.dim_v;
    p.k_stride_batch = c.is_packed ? 0 : rows_per_batch * p.k_stride_token;
    p.v_stride_batch = c.is_packed ? 0 : rows_per_batch * p.v_stride_token;
    set_cache_strides(c.dim, p.k_cache_stride_page, p.k_cache_stride_slot, p.k_cache_stride_head);
    set_cache_strides(c.dim_v, p.v_cache_stride_page, p.v_cache_stride_slot, p.v_cache_stride_head);
    if (c.token_scales) {
      p.k_token_scales = static_cast<float*>(k_token_scales.data());
      p.v_token_scales = static_cast<float*>(v_token_scales.data());
      set_cache_strides(1, p.k_scale_stride_page, p.k_scale_stride_slot, p.k_scale_stride_head);
      set_cache_strides(1, p.v_scale_stride_page, p.v_scale_stride_slot, p.v_scale_stride_head);
    } else if (c.cache_dtype != c.dtype) {
      p.k_scale = k_scale.data();
      p.v_scale = v_scale.data();
      p.kv_scale_stride = 1;
    }
    p.num_tokens = num_tokens;
    p.num_heads_kv = c.heads;
    p.head_dim = c.dim;
    p.head_dim_v = c.dim_v;
    p.num_pages = num_pages;
    p.page_size = c.page_size;
    if (c.is_packed) p.cu_seqlens_q = cu_seqlens_q.data();
    p.cache_seqlens = c.cache_seqlens.data();
    if (c.is_paged) p.block_table = block_table.data();
    p.seqused_k = seqused_k.data();
    if (!c.is_paged) p.page_table = page_table.data();
    p.block_table_stride = c.pages_per_seq;
    p.batch = batch;
    p.seqlen_new = c.seqlen_new;
    p.max_pages_per_seq = c.is_paged ? c.pages_per_seq : 1;
    if (c.has_results) {
      p.out = out.data();
      p.lse = lse.data();
      p.out_dtype = c.dtype;
      p.out_stride_row = kHeadsQ * c.dim_v;
      p.out_stride_head = c.dim_v;
      p.lse_stride_head = num_tokens;
      p.num_heads_q = kHeadsQ;
    }
  }

  std::string name() const {
    return std::string("append of ") + name_of(c.dtype) + " as " + name_of(c.cache_dtype) +
           (c.token_scales ? ", token scales" : "") + (c.head_major ? ", HND" : "") +
           (c.is_packed ? ", packed" : ", dense") + (c.is_paged ? ", paged" : ", rows") +
           ", batch " + std::to_string(batch) + ", tokens " + std::to_string(num_tokens) +
           ", dims " + std::to_string(c.dim) + "/" + std::to_string(c.dim_v);
  }

  int64_t capacity() const { return (c.is_paged ? c.pages_per_seq : 1) * c.page_size; }
  int64_t first_of(int64_t b) const { return c.is_packed ? cu_seqlens_q[b] : b * c.seqlen_new; }
  int64_t new_of(int64_t b) const { return c.is_packed ? c.new_lengths[b] : c.seqlen_new; }

  // The definition: the slot of each token, -1 where it has none.
  std::vector<int64_t> slots() const {
    std::vector<int64_t> found(num_tokens, -1);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < new_of(b); ++i) {
        const int64_t position = c.cache_seqlens[b] + i;
        if (position < 0 || position >= capacity()) continue;
        const int64_t page =
            c.is_paged ? block_table[b * c.pages_per_seq + position / c.page_size] : b;
        if (page < 0 || page >= num_pages) continue;
        found[first_of(b) + i] = page * c.page_size + position % c.page_size;
      }
    }
    return found;
  }

  // After the append has run.
  void check_results(const std::string& where) const {
    const std::string what = where + ": " + name();
    Append expected(c);  // the same values, caches not written
    expected.block_table = block_table;
    const std::vector<int64_t> slot_mapping = slots();
    const Array k_tokens = tokens_of(k, c.dim), v_tokens = tokens_of(v, c.dim_v);
    attention::ReshapeAndCacheParams write{};
    static_cast<attention::KvWriteParams&>(write) = expected.params;
    write.k = k_tokens.data();
    write.v = v_tokens.data();
    write.slot_mapping = slot_mapping.data();
    cpu::reshape_and_cache(write, thread_executor(1));
    check(same_bytes(k_cache, expected.k_cache), what, ": k_cache");
    check(same_bytes(v_cache, expected.v_cache), what, ": v_cache");
    check(same_bytes(k_token_scales, expected.k_token_scales), what, ": k's scales");
    check(same_bytes(v_token_scales, expected.v_token_scales), what, ": v's scales");
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t length = std::clamp<int64_t>(c.cache_seqlens[b] + new_of(b), 0, capacity());
      check(seqused_k[b] == length, what, ": seqused_k[", b, "] is ", seqused_k[b], ", not ",
            length);
      check(page_table[b] == (c.is_paged ? -77 : b), what, ": page_table[", b, "] is ",
            page_table[b]);
    }
    if (c.is_packed) check_rows(what);
  }

  void check_rows(const std::string& what) const {
    std::vector<bool> used(num_tokens, !c.has_results);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < std::min<int64_t>(new_of(b), c.seqlen_new); ++i) {
        used[first_of(b) + i] = true;
      }
    }
    for (int64_t row = 0; row < num_tokens; ++row) {
      for (int64_t head = 0; head < kHeadsQ; ++head) {
        const double of_lse = lse[head * num_tokens + row];
        check(used[row] ? std::isnan(of_lse) : of_lse == -INFINITY, what, ": lse of row ", row,
              " is ", of_lse);
        for (int64_t d = 0; d < c.dim_v; ++d) {
          const double value = out[(row * kHeadsQ + head) * c.dim_v + d];
          check(used[row] ? std::isnan(value) : value == 0, what, ": out of row ", row, " is ",
                value);
        }
      }
    }
  }

  Array tokens_of(const Array& rows, int64_t dim) const {
    const int64_t width = c.heads * dim;
    Array tokens(c.dtype, num_tokens * width);
    for (int64_t token = 0; token < num_tokens; ++token) {
      for (int64_t i = 0; i < width; ++i) {
        tokens.set(token * width + i, rows[token_row[token] * width + i]);
      }
    }
    return tokens;
  }

  static bool same_bytes(const Array& a, const Array& b) {
    return std::memcmp(a.data(), b.data(), a.count() * attention::bytes_of(a.dtype())) == 0;
  }
};

// Calls run(append) for appends of every kind, then checks what it left.
template <class Run>
void check_appends(DataType dtype, const std::string& where, const Run& run) {
  const auto check_one = [&](const AppendCase& c, const auto& change) {
    Append append(c);
    change(append);
    run(append);
    append.check_results(where);
  };
  const auto unchanged = [](Append&) {};
  const auto with_bad_pages = [](Append& append) {
    for (size_t i = 0; i < append.block_table.size(); i += 3) {
      append.block_table[i] = i % 2 == 0 ? -3 : static_cast<int32_t>(append.num_pages + i * 1000);
    }
  };
  struct Kind {
    DataType cache_dtype;
    bool token_scales;
  };
  const Kind kinds[] = {{dtype, false},
                        {DataType::kFloat8E4M3, false},
                        {DataType::kFloat8E4M3, true},
                        {DataType::kInt8, false},
                        {DataType::kInt8, true}};
  for (const auto& [cache_dtype, token_scales] : kinds) {
    for (const bool is_paged : {true, false}) {
      AppendCase c{dtype, cache_dtype, token_scales};
      c.head_major = is_paged;
      c.is_paged = is_paged;
      c.cache_seqlens = {0, 3, 17, 5, 20};
      if (!is_paged) c.page_size = 20;
      c.seqlen_new = 3;
      check_one(c, unchanged);  // two sequences run into the end of their table
      c.is_packed = c.has_results = true;
      c.new_lengths = {3, 0, 9, 1, 0};
      c.padded_rows = 4;
      c.seqlen_new = 9;
      check_one(c, unchanged);
      c.first_row = 2;
      c.seqlen_new = 5;  // max_seqlen_q less than a length
      c.heads = 1;
      c.dim = 20;
      c.dim_v = 9;
      c.cache_seqlens = {-2, 19, -5, 1000000000, 2147483647};
      check_one(c, unchanged);
      c.has_results = false;
      check_one(c, unchanged);
    }
  }
  AppendCase c{dtype, dtype};
  c.cache_seqlens = {2, 0, 6, 11};
  c.seqlen_new = 7;
  check_one(c, with_bad_pages);
  c.seqlen_new = 1;
  check_one(c, unchanged);
  c.seqlen_new = 0;  // an append of nothing says the lengths
  check_one(c, unchanged);
  c.is_packed = c.has_results = true;
  c.new_lengths = {0, 0, 0, 0};
  c.padded_rows = 3;
  check_one(c, unchanged);
  c.cache_seqlens.clear();  // rows, but no sequences
  c.new_lengths.clear();
  check_one(c, unchanged);
  c.padded_rows = 0;
  check_one(c, unchanged);
}

// More sequences than a thread block has threads, and more tokens than blocks for one each.
template <class Run>
void check_long_appends(const std::string& where, const Run& run) {
  AppendCase c{DataType::kBFloat16, DataType::kBFloat16};
  c.heads = 1;
  c.dim = 4;
  c.dim_v = 2;
  c.pages_per_seq = 2;
  for (int i = 0; i < 300; ++i) {
    c.cache_seqlens.push_back(i % 7);
    c.new_lengths.push_back(i % 3);
  }
  c.seqlen_new = 2;
  Append dense(c);
  run(dense);
  dense.check_results(where);
  c.is_packed = c.has_results = true;
  c.padded_rows = 400;
  Append packed(c);
  run(packed);
  packed.check_results(where);
}

}  // namespace sink_attention::tests
