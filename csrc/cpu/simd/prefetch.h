// Rows of keys on their way from memory into L2, ahead of the kernels that read them.
#pragma once

#include "attention/paged_kv.h"
#include "cpu/simd/vec.h"

namespace sink_attention::cpu::SA_ISA {

// The rows of several heads of a range of keys, a whole token after the other: the order in which a
// cache [page][slot][head][dim] lies, whatever the order in which it is read. Kernels call fetch()
// once a step for as many bytes as the step reads, so that memory has always something to do, and
// never too much.
class RowPrefetcher {
 public:
  // Rows of the heads that lie head_bytes apart, from the one in `rows` on.
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
  // After the last run the last one is fetched again, which costs no memory access.
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
  attention::Range keys_;  // those that are left
  int64_t head_bytes_;
  int64_t heads_;      // runs of a key
  int64_t run_bytes_;  // what lies together: all heads of a key, or a row
  int64_t head_ = 0;
  const char* run_ = rows_.base;
  const char* run_end_;
  const char* line_;  // the next one to fetch
};

}  // namespace sink_attention::cpu::SA_ISA
