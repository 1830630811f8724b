#include "reference.h"

namespace sink_attention::tests {
namespace {

struct Sequence {
  int64_t q_batch, q_row, seqlen_q;
  int64_t k_batch, k_row, seqlen_k;
  int64_t first_q, first_k;  // counted over the batch
};

Sequence sequence_of(const FlashFwdParams& p, int64_t b) {
  Sequence s{};
  const bool varlen_q = p.cu_seqlens_q != nullptr, varlen_k = p.cu_seqlens_k != nullptr;
  s.q_batch = varlen_q ? 0 : b;
  s.q_row = varlen_q ? p.cu_seqlens_q[b] : 0;
  s.seqlen_q = varlen_q ? p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b] : p.seqlen_q;
  s.k_batch = varlen_k ? 0 : b;
  s.k_row = varlen_k ? p.cu_seqlens_k[b] : 0;
  s.seqlen_k = varlen_k ? p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b] : p.seqlen_k;
  if (p.seqused_k != nullptr) s.seqlen_k = p.seqused_k[b];
  s.first_q = varlen_q ? s.q_row : b * p.seqlen_q;
  s.first_k = varlen_k ? s.k_row : b * p.seqlen_k;
  return s;
}

bool is_visible(const FlashFwdParams& p, const Sequence& s, int64_t i, int64_t j) {
  const int64_t position = i + s.seqlen_k - s.seqlen_q;
  return (p.window_left < 0 || j >= position - p.window_left || j < p.num_sink_tokens) &&
         (p.window_right < 0 || j <= position + p.window_right);
}

int64_t kv_head_of(const FlashFwdParams& p, int64_t head) {
  return head / (p.num_heads_q / p.num_heads_kv);
}

double key_element(const FlashFwdParams& p, const Sequence& s, int64_t b, int64_t j,
                   int64_t kv_head, int64_t d) {
  const double scale = p.k_scale == nullptr ? 1 : p.k_scale[kv_head * p.kv_scale_stride];
  int64_t offset = kv_head * p.k_stride_head + d;
  if (p.block_table != nullptr) {
    offset += p.block_table[b * p.block_table_stride + j / p.page_size] * p.k_stride_batch +
              j % p.page_size * p.k_stride_row;
  } else {
    offset += s.k_batch * p.k_stride_batch + (s.k_row + j) * p.k_stride_row;
  }
  return load(p.k, p.kv_dtype, offset) * scale;
}

double value_element(const FlashFwdParams& p, const Sequence& s, int64_t b, int64_t j,
                     int64_t kv_head, int64_t d) {
  const double scale = p.v_scale == nullptr ? 1 : p.v_scale[kv_head * p.kv_scale_stride];
  int64_t offset = kv_head * p.v_stride_head + d;
  if (p.block_table != nullptr) {
    offset += p.block_table[b * p.block_table_stride + j / p.page_size] * p.v_stride_batch +
              j % p.page_size * p.v_stride_row;
  } else {
    offset += s.k_batch * p.v_stride_batch + (s.k_row + j) * p.v_stride_row;
  }
  return load(p.v, p.kv_dtype, offset) * scale;
}

double query_element(const FlashFwdParams& p, const Sequence& s, int64_t i, int64_t head,
                     int64_t d) {
  return load(
      p.q, p.dtype,
      s.q_batch * p.q_stride_batch + (s.q_row + i) * p.q_stride_row + head * p.q_stride_head + d);
}

struct Score {
  double logit;
  double slope;  // of the softcap at it
};

Score score(const FlashFwdParams& p, const Sequence& s, int64_t b, int64_t i, int64_t j,
            int64_t head) {
  double dot = 0;
  for (int64_t d = 0; d < p.head_dim; ++d) {
    dot += query_element(p, s, i, head, d) * key_element(p, s, b, j, kv_head_of(p, head), d);
  }
  dot *= p.softmax_scale;
  if (p.softcap == 0) return {dot, 1};
  const double tanh = std::tanh(dot / p.softcap);
  return {p.softcap * tanh, 1 - tanh * tanh};
}

double sink_of(const FlashFwdParams& p, int64_t head) {
  return p.s_aux == nullptr ? -INFINITY : load(p.s_aux, p.s_aux_dtype, head);
}

}  // namespace

ReferenceForward reference_forward(const FlashFwdParams& p, int64_t q_rows) {
  ReferenceForward result;
  result.out.assign(q_rows * p.num_heads_q * p.head_dim_v, NAN);
  result.lse.assign(p.num_heads_q * q_rows, NAN);
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    for (int64_t head = 0; head < p.num_heads_q; ++head) {
      for (int64_t i = 0; i < s.seqlen_q; ++i) {
        const double sink = sink_of(p, head);
        double max = sink;
        std::vector<double> logits(s.seqlen_k, -INFINITY);
        for (int64_t j = 0; j < s.seqlen_k; ++j) {
          if (is_visible(p, s, i, j)) logits[j] = score(p, s, b, i, j, head).logit;
          max = std::fmax(max, logits[j]);
        }
        // P is exp(logit - max), also for the sink. If max is -inf, no key is visible. A sink of
        // +inf leaves P = 0 for all keys.
        double sum = sink == -INFINITY ? 0 : (sink == max ? 1 : std::exp(sink - max));
        double* out = &result.out[((s.first_q + i) * p.num_heads_q + head) * p.head_dim_v];
        for (int64_t d = 0; d < p.head_dim_v; ++d) out[d] = 0;
        for (int64_t j = 0; j < s.seqlen_k && std::isfinite(max); ++j) {
          if (logits[j] == -INFINITY) continue;
          const double p_ij = std::exp(logits[j] - max);
          sum += p_ij;
          for (int64_t d = 0; d < p.head_dim_v; ++d) {
            out[d] += p_ij * value_element(p, s, b, j, kv_head_of(p, head), d);
          }
        }
        for (int64_t d = 0; d < p.head_dim_v && sum > 0; ++d) out[d] /= sum;
        result.lse[head * q_rows + s.first_q + i] = max + std::log(sum);
      }
    }
  }
  return result;
}

ReferenceBackward reference_backward(const FlashBwdParams& params, int64_t q_rows, int64_t k_rows) {
  const FlashFwdParams& p = params.fwd;
  ReferenceBackward result;
  result.dq.assign(q_rows * p.num_heads_q * p.head_dim, NAN);
  result.dk.assign(k_rows * p.num_heads_kv * p.head_dim, NAN);
  result.dv.assign(k_rows * p.num_heads_kv * p.head_dim_v, NAN);
  result.ds_aux.assign(p.num_heads_q, 0);
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    const auto dk_at = [&](int64_t j, int64_t kv_head) {
      return &result.dk[((s.first_k + j) * p.num_heads_kv + kv_head) * p.head_dim];
    };
    const auto dv_at = [&](int64_t j, int64_t kv_head) {
      return &result.dv[((s.first_k + j) * p.num_heads_kv + kv_head) * p.head_dim_v];
    };
    for (int64_t j = 0; j < s.seqlen_k; ++j) {
      for (int64_t kv_head = 0; kv_head < p.num_heads_kv; ++kv_head) {
        for (int64_t d = 0; d < p.head_dim; ++d) dk_at(j, kv_head)[d] = 0;
        for (int64_t d = 0; d < p.head_dim_v; ++d) dv_at(j, kv_head)[d] = 0;
      }
    }
    for (int64_t head = 0; head < p.num_heads_q; ++head) {
      const int64_t kv_head = kv_head_of(p, head);
      for (int64_t i = 0; i < s.seqlen_q; ++i) {
        const int64_t row = s.q_row + i;
        const int64_t out_offset =
            s.q_batch * p.out_stride_batch + row * p.out_stride_row + head * p.out_stride_head;
        const int64_t dout_offset = s.q_batch * params.dout_stride_batch +
                                    row * params.dout_stride_row + head * params.dout_stride_head;
        const double lse = load(p.lse, lse_type(p.dtype),
                                s.q_batch * p.lse_stride_batch + head * p.lse_stride_head + row);
        const auto dout = [&](int64_t d) { return load(params.dout, p.dtype, dout_offset + d); };
        double delta = 0;
        for (int64_t d = 0; d < p.head_dim_v; ++d) {
          delta += dout(d) * load(p.out, p.dtype, out_offset + d);
        }
        if (params.dlse != nullptr) {
          delta -= load(params.dlse, lse_type(p.dtype),
                        s.q_batch * params.dlse_stride_batch + head * params.dlse_stride_head +
                            row * params.dlse_stride_row);
        }
        // Read as the kernels read it: a float64 sink with float32 queries is rounded to float32.
        const double exact_sink = sink_of(p, head);
        const double sink =
            p.dtype == DataType::kFloat64 ? exact_sink : static_cast<float>(exact_sink);
        if (sink == INFINITY) {
          result.ds_aux[head] -= delta;  // the sink's probability is 1
        } else if (sink != -INFINITY) {
          result.ds_aux[head] -= std::exp(sink - lse) * delta;
        }
        double* dq = &result.dq[((s.first_q + i) * p.num_heads_q + head) * p.head_dim];
        for (int64_t d = 0; d < p.head_dim; ++d) dq[d] = 0;
        for (int64_t j = 0; j < s.seqlen_k; ++j) {
          if (!is_visible(p, s, i, j)) continue;
          const Score of_key = score(p, s, b, i, j, head);
          const double p_ij = std::exp(of_key.logit - lse);
          double dp = 0;
          for (int64_t d = 0; d < p.head_dim_v; ++d) {
            dp += dout(d) * value_element(p, s, b, j, kv_head, d);
            dv_at(j, kv_head)[d] += p_ij * dout(d);
          }
          const double dscore = p_ij * (dp - delta) * of_key.slope * p.softmax_scale;
          for (int64_t d = 0; d < p.head_dim; ++d) {
            dq[d] += dscore * key_element(p, s, b, j, kv_head, d);
            dk_at(j, kv_head)[d] += dscore * query_element(p, s, i, head, d);
          }
        }
      }
    }
  }
  return result;
}

}  // namespace sink_attention::tests
