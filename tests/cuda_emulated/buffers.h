// Names the memory of params to the emulator: all that a kernel may access.
#pragma once

#include <string>
#include <vector>

#include "array.h"
#include "emulator/global_memory.h"
#include "scenario.h"

namespace sink_attention::tests {

inline emulator::Buffer buffer(const Array& array, bool writable, std::string name) {
  const char* begin = static_cast<const char*>(array.data());
  return {begin, begin + array.count() * attention::bytes_of(array.dtype()), writable,
          std::move(name)};
}
template <class T>
emulator::Buffer buffer(const std::vector<T>& values, bool writable, std::string name) {
  const char* begin = reinterpret_cast<const char*>(values.data());
  return {begin, begin + values.size() * sizeof(T), writable, std::move(name)};
}
inline emulator::Buffer readable(const Array& array, std::string name) {
  return buffer(array, false, std::move(name));
}
inline emulator::Buffer writable(const Array& array, std::string name) {
  return buffer(array, true, std::move(name));
}

// The buffers that a forward reads, and, with `results`, those that it writes.
inline std::vector<emulator::Buffer> buffers_of(const Scenario& s, bool writes_results) {
  return {readable(s.q, "q"),
          readable(s.k, "k"),
          readable(s.v, "v"),
          readable(s.s_aux, "s_aux"),
          buffer(s.out, writes_results, "out"),
          buffer(s.lse, writes_results, "lse"),
          buffer(s.cu_seqlens_q, false, "cu_seqlens_q"),
          buffer(s.cu_seqlens_k, false, "cu_seqlens_k"),
          buffer(s.seqused_k, false, "seqused_k"),
          buffer(s.block_table, false, "block_table"),
          buffer(s.k_scale, false, "k_scale"),
          buffer(s.v_scale, false, "v_scale")};
}

// q and out without gaps between heads: rows that can be aligned to 16 bytes.
inline void close_gaps(Scenario& s) {
  attention::FlashFwdParams& p = s.params;
  const auto close = [&](int64_t dim, int64_t& batch, int64_t& row, int64_t& head) {
    head = dim;
    row = p.num_heads_q * dim;
    batch = p.cu_seqlens_q == nullptr ? p.seqlen_q * row : 0;
  };
  close(p.head_dim, p.q_stride_batch, p.q_stride_row, p.q_stride_head);
  close(p.head_dim_v, p.out_stride_batch, p.out_stride_row, p.out_stride_head);
}

}  // namespace sink_attention::tests
