// Tensors that an op writes have memory of their own: no two elements in one place, none in common
// with another tensor of the call.
#pragma once

#include <initializer_list>
#include <optional>

#include "torch/checks.h"

namespace sink_attention::binding {

struct NamedTensor {
  const char* name;
  const Tensor* tensor;  // null: not given

  NamedTensor(const char* name, const Tensor& tensor) : name(name), tensor(&tensor) {}
  NamedTensor(const char* name, const std::optional<Tensor>& tensor)
      : name(name), tensor(tensor ? &*tensor : nullptr) {}
};

// read: may share memory among each other. Costs next to nothing where byte ranges are apart.
void check_memory(std::initializer_list<NamedTensor> written,
                  std::initializer_list<NamedTensor> read);

// Whether values are the first columns of the keys, in the caches and in what is written to them,
// as latent attention (MLA) has them: then both writes put the same bytes in the same places.
bool values_are_part_of_keys(const Tensor& k, const Tensor& v, const Tensor& k_cache,
                             const Tensor& v_cache);

// The second half of that alone: no element of `read` lies in one of `written`.
void check_read_memory(std::initializer_list<NamedTensor> written,
                       std::initializer_list<NamedTensor> read);

}  // namespace sink_attention::binding
