// What make_params.cpp and make_cache_params.cpp set alike.
#pragma once

#include "torch/make_params.h"

namespace sink_attention::binding {

constexpr int64_t kMaxHeadDim = 256;

void check_dim_range(const char* name, int64_t value, int64_t largest);

// params.dtype is set.
void set_mask(attention::FlashFwdParams& params, const MaskArgs& mask);

// Null without s_aux; dtype is then left alone.
const void* sink_data(const std::optional<Tensor>& s_aux, int64_t num_heads, const Tensor& q,
                      DataType& dtype);

// Heads, head dims, dtypes, strides and data of q, k and v, whose ranks are right.
void set_qkv(attention::FlashFwdParams& params, const Tensor& q, const Tensor& k, const Tensor& v,
             const char* k_name, const char* v_name, Numbers numbers = Numbers::kFloat);

}  // namespace sink_attention::binding
