// The check that tensors which an op writes do not overlap: neither within themselves, nor with
// another tensor of the call.
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

// Tensors in `read` may overlap each other. The check is cheap if byte ranges are disjoint.
void check_memory(std::initializer_list<NamedTensor> written,
                  std::initializer_list<NamedTensor> read);

// Whether values are the first columns of the keys, both in the caches and in the new tokens, as in
// latent attention (MLA). Both writes then put the same bytes at the same addresses.
bool values_are_part_of_keys(const Tensor& k, const Tensor& v, const Tensor& k_cache,
                             const Tensor& v_cache);

// Only the second half of check_memory: no tensor of `read` overlaps one of `written`.
void check_read_memory(std::initializer_list<NamedTensor> written,
                       std::initializer_list<NamedTensor> read);

}  // namespace sink_attention::binding
