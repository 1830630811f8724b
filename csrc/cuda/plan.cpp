#include "cuda/plan.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "cuda/bounded.h"
#include "cuda/registry.h"

namespace sink_attention::cuda {
namespace {

std::string version(int arch) {
  return std::to_string(arch / 10) + "." + std::to_string(arch % 10);
}

// Whether code for `built` ("8.0", "9.0a+PTX") runs on a device: machine code on later minor
// versions of its major one, PTX on every later one. "9.0a" is for 9.0 alone, "10.0f" for 10.x.
bool runs_on(const std::string& built, int arch) {
  char* rest = nullptr;
  const int major = static_cast<int>(std::strtol(built.c_str(), &rest, 10));
  const int minor = *rest == '.' ? static_cast<int>(std::strtol(rest + 1, &rest, 10)) : 0;
  const int number = 10 * major + minor;
  if (*rest == 'a') return arch == number;
  const bool same_major = arch / 10 == major && arch >= number;
  if (*rest == 'f') return same_major;
  return same_major || (built.find("+PTX") != std::string::npos && arch >= number);
}

// Tables for one architecture alone are compiled for it wherever the list has it in some form, all
// others for the whole list (setup.py, archs_of).
template <class Params>
bool is_built(const KernelTable<Params>& table, const char* archs, int device_arch) {
  if (archs == nullptr) return true;
  const std::string list = archs;
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find(';', begin), list.size());
    const std::string built = list.substr(begin, end - begin);
    if (table.is_for_one_arch()) {
      if (built.rfind(version(table.least_arch), 0) == 0) return true;
    } else if (runs_on(built, device_arch)) {
      return true;
    }
    begin = end + 1;
  }
  return false;
}

template <class Params>
const KernelRow<Params>* smallest_that_fits(const KernelTable<Params>& table,
                                            const CallShape& shape) {
  const KernelRow<Params>* best = nullptr;
  for (const KernelRow<Params>& row : table.rows) {
    const Bucket& bucket = row.bucket;
    if (shape.head_dim > bucket.head_dim || shape.head_dim_v > bucket.head_dim_v) continue;
    if (best == nullptr ||
        bucket.head_dim + bucket.head_dim_v < best->bucket.head_dim + best->bucket.head_dim_v) {
      best = &row;
    }
  }
  return best;
}

template <class Params>
bool is_for_one_arch(const Tables<Params>& tables, const char* family) {
  for (const KernelTable<Params>* table : tables) {
    if (std::strcmp(table->family, family) == 0) return table->is_for_one_arch();
  }
  return false;
}

template <class Params>
const char* why_not_here(const KernelTable<Params>& table, const Tables<Params>& all,
                         const Device& device) {
  if (device.forced != nullptr && std::strcmp(table.family, device.forced) != 0 &&
      (table.is_for_one_arch() || is_for_one_arch(all, device.forced))) {
    return "another family is forced";
  }
  if (device.arch < table.least_arch || device.arch > table.greatest_arch) return table.wrong_arch;
  if (!is_built(table, device.build_archs, device.arch)) {
    return "this library was built without them: TORCH_CUDA_ARCH_LIST had other architectures";
  }
  return nullptr;
}

// The first table that takes the call, and its smallest bucket that fits.
template <class Params>
Plan<Params> choose(const Tables<Params>& tables, const CallShape& shape, const Device& device) {
  Plan<Params> plan{};
  plan.shape = shape;
  plan.num_sms = device.num_sms;
  const char** next_reason = plan.why_not;
  for (const KernelTable<Params>* table : tables) {
    const char*& why_not = *next_reason++;
    why_not = why_not_here(*table, tables, device);
    if (why_not == nullptr) why_not = table->why_not(shape);
    if (why_not != nullptr) continue;
    plan.row = smallest_that_fits(*table, shape);
    if (plan.row == nullptr) {
      why_not = "head_dim or head_dim_v is larger than in any of them";
      continue;
    }
    plan.table = table;
    const Resources resources = table->resources(shape, plan.row->bucket, device);
    plan.num_splits = resources.num_splits;
    plan.workspace_bytes = resources.workspace_bytes;
    break;
  }
  return plan;
}

// The reason of the last table of a family: of its most general kernels.
template <class Params>
const char* reason_of(const Tables<Params>& tables, const Plan<Params>& plan, const char* family) {
  const char* reason = "";
  const char* const* next_reason = plan.why_not;
  for (const KernelTable<Params>* table : tables) {
    if (std::strcmp(table->family, family) == 0) reason = *next_reason;
    ++next_reason;
  }
  return reason;
}

// Each table's kernel that the call would have run, and why it does not.
template <class Params>
std::string reasons(const Tables<Params>& tables, const Plan<Params>& plan) {
  std::string text;
  const char* const* next_reason = plan.why_not;
  for (const KernelTable<Params>* table : tables) {
    const KernelRow<Params>* row = smallest_that_fits(*table, plan.shape);
    const std::string name =
        row != nullptr ? name_of(*table, *row) : std::string(table->family) + "::" + table->op;
    text += (text.empty() ? "" : "; ") + name + ": " + *next_reason++;
  }
  return text;
}

template <class Params>
Plan<Params> planned(const Tables<Params>& tables, const CallShape& given, const Device& device,
                     const char* op, bool is_optional = false) {
  const CallShape shape = bounded(given);
  const Plan<Params> plan = choose(tables, shape, device);
  if (plan.row != nullptr) return plan;
  if (device.forced != nullptr && is_for_one_arch(tables, device.forced)) {
    throw std::runtime_error(
        std::string("SINK_ATTENTION_CUDA_KERNELS or set_cuda_kernels forces the ") + device.forced +
        " kernels, but they do not take this " + op + ": " +
        reason_of(tables, plan, device.forced));
  }
  if (is_optional) return plan;
  throw std::runtime_error(
      std::string("sink_attention_ext: no CUDA kernel takes this ") + op +
      " on compute capability " + version(device.arch) +
      (device.build_archs == nullptr ? "" : std::string(", built for ") + device.build_archs) +
      ": " + reasons(tables, plan));
}

}  // namespace

template <class Params>
std::string Plan<Params>::kernel_name() const {
  return row == nullptr ? "" : name_of(*table, *row);
}
template std::string FlashFwdPlan::kernel_name() const;
template std::string FlashFwdFp8Plan::kernel_name() const;
template std::string FlashBwdPlan::kernel_name() const;

FlashFwdPlan plan_flash_fwd(const CallShape& shape, const Device& device) {
  return planned(flash_fwd_tables(), shape, device, "forward");
}

FlashFwdFp8Plan plan_flash_fwd_fp8(const CallShape& shape, const Device& device) {
  return planned(flash_fwd_fp8_tables(), shape, device, "float8 forward", true);
}

FlashBwdPlan plan_flash_bwd(const CallShape& shape, const Device& device) {
  return planned(flash_bwd_tables(), shape, device, "backward");
}

}  // namespace sink_attention::cuda
