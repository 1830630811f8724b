// Prefetch of keys' or values' rows into L2, ahead of the kernels that read them.
#pragma once

#include "attention/paged_kv.h"
#include "cpu/simd/vec.h"

namespace sink_attention::cpu::SA_ISA {

// Prefetches the rows of several heads of a range of keys, token by token: the memory order of a
// cache [page][slot][head][dim], whatever order the kernel reads in. A kernel calls fetch() in each
// step, for as many bytes as the step reads, so that requests to memory are spread evenly.
class RowPrefetcher {
 public:
  // `rows` is the first head's; the others follow, head_bytes apart.
  RowPrefetcher(const attention::KeyRows& rows, int64_t head_bytes, int64_t heads,
                attention::Range keys)
      : rows_(rows),
        keys_(rows.readable.within(keys)),
        head_bytes_(head_bytes),
        heads_(heads),
        run_bytes_(rows.dim * attention::bytes_of(rows.dtype)) {
    if (run_bytes_ == head_bytes) {
      run_bytes_ *= heads;
      heads_ = 1;
    }
    next_run();
  }

  SA_INLINE void fetch(int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line_ + i, 0, 2);
    line_ += bytes;
    if (line_ >= run_end_) next_run();
  }

 private:
  // After the last run, the last run is fetched again: it is in the cache, so this costs no
  // bandwidth.
  __attribute__((noinline)) void next_run() {
    while (keys_.begin < keys_.end && !rows_.is_readable(keys_.begin)) ++keys_.begin;
    if (keys_.begin < keys_.end) {
      run_ = static_cast<const char*>(rows_.row(keys_.begin)) + head_ * head_bytes_;
      if (++head_ == heads_) {
        head_ = 0;
        ++keys_.begin;
      }
    }
    line_ = run_;
    run_end_ = run_ + run_bytes_;
  }

  const attention::KeyRows& rows_;
  attention::Range keys_;  // keys that are not yet fetched
  int64_t head_bytes_;
  int64_t heads_;      // runs per key
  int64_t run_bytes_;  // a run is contiguous: all heads of a key, or one row
  int64_t head_ = 0;
  const char* run_ = rows_.base;
  const char* run_end_;
  const char* line_;  // the next cache line to fetch
};

}  // namespace sink_attention::cpu::SA_ISA
