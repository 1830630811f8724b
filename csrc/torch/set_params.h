// What make_params.cpp and make_cache_params.cpp set alike.
#pragma once

#include "torch/make_params.h"

namespace sink_attention::binding {

// head_dim, which is a size of the tensor, is from 1 to kMaxHeadDim.
void check_head_dim(int64_t head_dim, const Tensor& tensor, const char* name, const char* dim_name);

// params.dtype is set.
void set_mask(attention::FlashFwdParams& params, const MaskArgs& mask);

// Null without s_aux; dtype is then left alone.
const void* sink_data(const std::optional<Tensor>& s_aux, int64_t num_heads, const Tensor& q,
                      DataType& dtype);

struct KeyNames {  // in messages
  const char* k;
  const char* v;
  const char* dims[2];  // before (num_heads_kv, head_dim)
};

// Heads, head dims, dtypes, strides and data of q, k and v, whose ranks are right.
void set_qkv(attention::FlashFwdParams& params, const Tensor& q, const Tensor& k, const Tensor& v,
             const KeyNames& names, Numbers numbers = Numbers::kFloat);

}  // namespace sink_attention::binding
