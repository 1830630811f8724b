#include "torch/check_memory.h"

#include <vector>

#include "torch/strided_memory.h"

namespace sink_attention::binding {
namespace {

struct Region {
  const char* name;
  const Tensor* tensor;
  StridedMemory memory;
};

std::vector<Region> regions_of(std::initializer_list<NamedTensor> tensors) {
  std::vector<Region> regions;
  regions.reserve(tensors.size());
  for (const NamedTensor& named : tensors) {
    if (named.tensor == nullptr) continue;
    const Tensor& tensor = *named.tensor;
    const auto bytes = static_cast<int64_t>(tensor.element_size());
    StridedMemory memory{reinterpret_cast<uintptr_t>(tensor.const_data_ptr()), bytes, {}, false};
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    memory.dims.reserve(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] == 0) memory.is_empty = true;
      if (sizes[i] > 1) memory.dims.push_back({strides[i] * bytes, sizes[i] - 1});
    }
    regions.push_back({named.name, named.tensor, std::move(memory)});
  }
  return regions;
}

void check_read(const std::vector<Region>& written, const std::vector<Region>& read) {
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
  const std::vector<Region> written = regions_of(written_tensors), read = regions_of(read_tensors);
  for (size_t i = 0; i < written.size(); ++i) {
    const Region& region = written[i];
    const auto strides = region.tensor->strides();
    check(!overlaps_itself(region.memory), region.name,
          " must have memory of its own for each element, since it is written; got strides ",
          Shape{strides.data(), region.tensor->dim()}, " for shape ", shape_of(*region.tensor));
    for (size_t before = 0; before < i; ++before) {
      check(!overlap(written[before].memory, region.memory), region.name,
            " must not share memory with ", written[before].name, ": both are written");
    }
  }
  check_read(written, read);
}

void check_read_memory(std::initializer_list<NamedTensor> written,
                       std::initializer_list<NamedTensor> read) {
  check_read(regions_of(written), regions_of(read));
}

}  // namespace sink_attention::binding
