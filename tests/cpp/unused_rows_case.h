// Packed results whose rows are partly in no sequence, and which of them fill_unused_rows writes.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "array.h"
#include "check.h"

namespace sink_attention::tests {

struct UnusedRowsCase {
  DataType dtype;
  std::vector<int32_t> cu_seqlens_q, cu_seqlens_k, seqused_k;  // the last one may be empty
  int64_t total_q, total_k;
  int64_t max_seqlen_q, max_seqlen_k;
  int64_t heads_q = 4, heads_kv = 2, dim = 20, dim_v = 16;
  int64_t gap = 0;  // between the heads of a row
};

// Owns the results of a forward and of its backward, NaN before.
struct UnusedRows {
  UnusedRowsCase c;
  Array out, lse, dq, dk, dv;
  attention::FlashBwdParams params{};  // its fwd is the forward's problem

  explicit UnusedRows(const UnusedRowsCase& given) : c(given) {
    out = Array(c.dtype, c.total_q * c.heads_q * (c.dim_v + c.gap));
    lse = Array(lse_type(c.dtype), c.heads_q * c.total_q);
    dq = Array(c.dtype, c.total_q * c.heads_q * (c.dim + c.gap));
    dk = Array(c.dtype, c.total_k * c.heads_kv * (c.dim + c.gap));
    dv = Array(c.dtype, c.total_k * c.heads_kv * (c.dim_v + c.gap));
    attention::FlashFwdParams& p = params.fwd;
    p.dtype = p.kv_dtype = c.dtype;
    p.out = out.data();
    p.lse = lse.data();
    p.cu_seqlens_q = c.cu_seqlens_q.data();
    p.cu_seqlens_k = c.cu_seqlens_k.data();
    p.seqused_k = c.seqused_k.empty() ? nullptr : c.seqused_k.data();
    p.out_stride_head = c.dim_v + c.gap;
    p.out_stride_row = c.heads_q * p.out_stride_head;
    p.lse_stride_head = c.total_q;
    p.batch = static_cast<int64_t>(c.cu_seqlens_q.size()) - 1;
    p.seqlen_q = c.max_seqlen_q;
    p.seqlen_k = c.max_seqlen_k;
    p.total_q = c.total_q;
    p.total_k = c.total_k;
    p.num_heads_q = c.heads_q;
    p.num_heads_kv = c.heads_kv;
    p.head_dim = c.dim;
    p.head_dim_v = c.dim_v;
    params.dq = dq.data();
    params.dk = dk.data();
    params.dv = dv.data();
    params.dq_stride_head = params.dk_stride_head = c.dim + c.gap;
    params.dv_stride_head = c.dim_v + c.gap;
    params.dq_stride_row = c.heads_q * params.dq_stride_head;
    params.dk_stride_row = c.heads_kv * params.dk_stride_head;
    params.dv_stride_row = c.heads_kv * params.dv_stride_head;
  }

  // Whether attention writes the row.
  static bool is_used(const std::vector<int32_t>& cu_seqlens, int64_t max_seqlen,
                      const std::vector<int32_t>& seqused, int64_t row) {
    for (size_t b = 0; b + 1 < cu_seqlens.size(); ++b) {
      if (row < cu_seqlens[b] || row >= cu_seqlens[b + 1]) continue;
      const int64_t position = row - cu_seqlens[b];
      return position < max_seqlen && (seqused.empty() || position < seqused[b]);
    }
    return false;
  }

  void check_zeroed(const Array& tensor, const std::vector<int32_t>& cu_seqlens, int64_t max_seqlen,
                    const std::vector<int32_t>& seqused, int64_t rows, int64_t dim,
                    const std::string& what) const {
    if (rows == 0) return;
    const int64_t width = tensor.count() / rows;
    for (int64_t row = 0; row < rows; ++row) {
      const bool used = is_used(cu_seqlens, max_seqlen, seqused, row);
      for (int64_t i = 0; i < width; ++i) {
        const double value = tensor[row * width + i];
        const bool in_gap = i % (dim + c.gap) >= dim;
        check(used || in_gap ? std::isnan(value) : value == 0, what, ": row ", row, ", element ", i,
              " is ", value);
      }
    }
  }

  void check_forward(const std::string& what) const {
    check_zeroed(out, c.cu_seqlens_q, c.max_seqlen_q, {}, c.total_q, c.dim_v, what + ": out");
    for (int64_t i = 0; i < lse.count(); ++i) {
      const bool used = is_used(c.cu_seqlens_q, c.max_seqlen_q, {}, i % c.total_q);
      check(used ? std::isnan(lse[i]) : lse[i] == -INFINITY, what, ": lse ", i, " is ", lse[i]);
    }
  }

  void check_backward(const std::string& what) const {
    check_zeroed(dq, c.cu_seqlens_q, c.max_seqlen_q, {}, c.total_q, c.dim, what + ": dq");
    check_zeroed(dk, c.cu_seqlens_k, c.max_seqlen_k, c.seqused_k, c.total_k, c.dim, what + ": dk");
    check_zeroed(dv, c.cu_seqlens_k, c.max_seqlen_k, c.seqused_k, c.total_k, c.dim_v,
                 what + ": dv");
  }
};

// Calls run(rows, params) with the forward's problem, then with the backward's.
template <class Run>
void check_unused_rows(const std::string& where, const Run& run) {
  const auto check_one = [&](const UnusedRowsCase& c) {
    const std::string what = where + ": unused rows of " + name_of(c.dtype) + ", " +
                             std::to_string(c.total_q) + " queries, gap " + std::to_string(c.gap);
    UnusedRows rows(c);
    run(rows, rows.params.fwd);
    rows.check_forward(what);
    run(rows, rows.params);
    rows.check_backward(what);
  };
  for (const DataType dtype :
       {DataType::kFloat64, DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
    for (const int64_t gap : {0, 1, 4}) {
      UnusedRowsCase c{dtype, {0, 3, 3, 8}, {0, 1, 6, 6}, {}, 8, 6, 5, 5};
      c.gap = gap;
      check_one(c);  // none
      c.total_q = 11;
      c.total_k = 40;
      check_one(c);
      c.seqused_k = {1, 2, 0};
      check_one(c);
      c.cu_seqlens_q = {2, 3, 3, 8};
      c.max_seqlen_q = 4;
      c.max_seqlen_k = 3;
      check_one(c);
      c.cu_seqlens_q = {0, 0, 0, 0};
      check_one(c);
    }
  }
  UnusedRowsCase c{DataType::kBFloat16, {0}, {0}, {}, 5, 0, 0, 0};
  check_one(c);  // no sequence
  c.total_q = 0;
  check_one(c);      // no row
  c.total_q = 3000;  // several rows a thread block
  c.total_k = 256 * 33;
  c.heads_q = c.heads_kv = 1;
  c.dim = c.dim_v = 2;
  c.cu_seqlens_q = {0, 7, 2900};
  c.cu_seqlens_k = {0, 4000, 8000};
  c.max_seqlen_q = 2893;
  c.max_seqlen_k = 4000;
  c.seqused_k = {3990, 4000};
  check_one(c);
}

}  // namespace sink_attention::tests
