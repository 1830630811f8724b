#include "torch/check_memory.h"

#include <array>

#include "torch/strided_memory.h"

namespace sink_attention::binding {
namespace {

struct Region {
  const char* name;
  const Tensor* tensor;
  StridedMemory memory;
};

// Of the tensors that are given, in place: a call has this on its way.
struct Regions {
  static constexpr int kMost = 12;

  std::array<Region, kMost> all;
  int count = 0;

  explicit Regions(std::initializer_list<NamedTensor> tensors) {
    for (const NamedTensor& named : tensors) {
      if (named.tensor != nullptr) all[count++] = {named.name, named.tensor, memory_of(named)};
    }
  }
  const Region* begin() const { return all.data(); }
  const Region* end() const { return all.data() + count; }

 private:
  static StridedMemory memory_of(const NamedTensor& named) {
    const Tensor& tensor = *named.tensor;
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    check(sizes.size() <= StridedMemory::kMaxDims, named.name, " must have at most ",
          StridedMemory::kMaxDims, " dimensions, got shape ", shape_of(tensor));
    StridedMemory memory{};
    memory.data = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    memory.item_bytes = static_cast<int64_t>(tensor.element_size());
    memory.last_byte = memory.item_bytes - 1;
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] == 0) memory.is_empty = true;
      if (sizes[i] <= 1) continue;
      const Term dim{strides[i] * memory.item_bytes, sizes[i] - 1};
      memory.dims[memory.num_dims++] = dim;
      memory.last_byte += dim.step * dim.most;
    }
    return memory;
  }
};

void check_read(const Regions& written, const Regions& read) {
  for (const Region& reader : read) {
    for (const Region& writer : written) {
      check(!overlap(writer.memory, reader.memory), reader.name, " must not share memory with ",
            writer.name, ", which is written: pass ", reader.name, ".clone()");
    }
  }
}

}  // namespace

void check_memory(std::initializer_list<NamedTensor> written_tensors,
                  std::initializer_list<NamedTensor> read_tensors) {
  const Regions written(written_tensors);
  for (const Region& region : written) {
    const auto strides = region.tensor->strides();
    check(!overlaps_itself(region.memory), region.name,
          " must have memory of its own for each element, since it is written; got strides ",
          Shape{strides.data(), region.tensor->dim()}, " for shape ", shape_of(*region.tensor));
    for (const Region* before = written.begin(); before != &region; ++before) {
      check(!overlap(before->memory, region.memory), region.name, " must not share memory with ",
            before->name, ": both are written");
    }
  }
  check_read(written, Regions(read_tensors));
}

namespace {

bool is_first_columns(const Tensor& part, const Tensor& whole) {
  if (part.const_data_ptr() != whole.const_data_ptr() || part.dim() != whole.dim()) return false;
  for (int64_t dim = 0; dim + 1 < part.dim(); ++dim) {
    if (part.size(dim) > 1 && part.stride(dim) != whole.stride(dim)) return false;
  }
  return part.size(part.dim() - 1) <= whole.size(whole.dim() - 1);
}

}  // namespace

bool values_are_part_of_keys(const Tensor& k, const Tensor& v, const Tensor& k_cache,
                             const Tensor& v_cache) {
  return k.scalar_type() == k_cache.scalar_type() && is_first_columns(v_cache, k_cache) &&
         is_first_columns(v, k);
}

void check_read_memory(std::initializer_list<NamedTensor> written,
                       std::initializer_list<NamedTensor> read) {
  check_read(Regions(written), Regions(read));
}

}  // namespace sink_attention::binding
