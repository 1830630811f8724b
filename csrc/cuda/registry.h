// The kernel table: every attention kernel of the library, a row each.
//
// A row is one head-dim bucket of one op and family. Rows of an op and family share a KernelTable,
// which says on what hardware they run, which calls they take and what memory they need. Each
// family's tables are in <family>/table.cpp; registry.cpp lists them in the order in which a plan
// asks them. csrc/README.md walks through adding a row, an option and a family.
#pragma once

#include <cstdint>

#include "cuda/plan.h"

namespace sink_attention::cuda {

constexpr int kAnyArch = 9999;

// What a launch is given. It starts the row's kernel, and those that go before and after it.
template <class Params>
struct Call {
  const Params& params;  // with the plan's bounded counts
  const Plan<Params>& plan;
  void* workspace;  // plan.workspace_bytes of device memory, aligned to 256 bytes
  Stream stream;
};
using FlashFwdCall = Call<attention::FlashFwdParams>;
using FlashFwdFp8Call = Call<attention::FlashFwdFp8Params>;
using FlashBwdCall = Call<attention::FlashBwdParams>;

struct Bucket {
  int head_dim;    // the largest that the kernel takes; smaller ones are padded in shared memory
  int head_dim_v;  // likewise
  int tile_rows;   // PackGQA rows of a tile
  int tile_keys;   // keys of a block
};

// Declares launch functions that another file instantiates (instantiations/). Weak: a library
// without that file, as one that is not built for 9.0, has null in their place.
#define SA_LAUNCH __attribute__((weak)) void

template <class Params>
struct KernelRow {
  Bucket bucket;
  void (*launch)(const Call<Params>& call);
};

// In any order: of those that a call fits in, the smallest bucket runs.
template <class Params>
struct Rows {
  const KernelRow<Params>* first;
  int count;

  template <int kCount>
  constexpr Rows(const KernelRow<Params> (&rows)[kCount]) : first(rows), count(kCount) {}
  const KernelRow<Params>* begin() const { return first; }
  const KernelRow<Params>* end() const { return first + count; }
};

struct Resources {
  int num_splits;
  int64_t workspace_bytes;
};

template <class Params>
struct KernelTable {
  const char* family;  // "sm90"
  const char* op;      // in the kernels' names: "flash_fwd", "decode", ...
  int least_arch;      // 10 * major + minor of compute capabilities
  int greatest_arch;
  const char* wrong_arch;  // the reason where the device's is another
  // Why the kernels do not take a call; null if they do. Looks at nothing but the shape.
  const char* (*why_not)(const CallShape& shape);
  // Throws std::runtime_error where one launch cannot take the call.
  Resources (*resources)(const CallShape& shape, const Bucket& bucket, const Device& device);
  Rows<Params> rows;

  bool is_for_one_arch() const { return least_arch == greatest_arch; }
};

// The tables of an op, the first that takes a call before the others.
template <class Params>
struct Tables {
  const KernelTable<Params>* const* begin_;
  const KernelTable<Params>* const* end_;
  const KernelTable<Params>* const* begin() const { return begin_; }
  const KernelTable<Params>* const* end() const { return end_; }
};
Tables<attention::FlashFwdParams> flash_fwd_tables();
Tables<attention::FlashFwdFp8Params> flash_fwd_fp8_tables();
Tables<attention::FlashBwdParams> flash_bwd_tables();

// The families' tables.
namespace sm90 {
extern const KernelTable<attention::FlashFwdParams> kDecodeTable, kFlashFwdTable;
extern const KernelTable<attention::FlashFwdFp8Params> kFlashFwdFp8Table;
extern const KernelTable<attention::FlashBwdParams> kFlashBwdTable;
}  // namespace sm90
namespace sm80 {
extern const KernelTable<attention::FlashFwdParams> kDecodeTable, kFlashFwdTable;
extern const KernelTable<attention::FlashBwdParams> kFlashBwdTable;
}  // namespace sm80
namespace simt {
extern const KernelTable<attention::FlashFwdParams> kFlashFwdFloat32Table, kFlashFwdFloat64Table;
extern const KernelTable<attention::FlashBwdParams> kFlashBwdFloat32Table, kFlashBwdFloat64Table;
}  // namespace simt

template <class Params>
std::string name_of(const KernelTable<Params>& table, const KernelRow<Params>& row) {
  const int dim = row.bucket.head_dim, dim_v = row.bucket.head_dim_v;
  return std::string(table.family) + "::" + table.op + "_hdim" + std::to_string(dim) +
         (dim_v == dim ? "" : "_" + std::to_string(dim_v));
}

}  // namespace sink_attention::cuda
