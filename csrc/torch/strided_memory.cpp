#include "torch/strided_memory.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <utility>

#include "torch/checks.h"

namespace sink_attention::binding {
namespace {

int64_t modulo(int64_t value, int64_t modulus) {
  const int64_t rest = value % modulus;
  return rest < 0 ? rest + modulus : rest;
}

// The inverse of a modulo `modulus`, which has no common factor with a.
int64_t inverse(int64_t a, int64_t modulus) {
  int64_t r0 = modulus, r1 = modulo(a, modulus), x0 = 0, x1 = 1;
  while (r1 > 1) {
    const int64_t quotient = r0 / r1;
    r0 = std::exchange(r1, r0 - quotient * r1);
    x0 = std::exchange(x1, x0 - quotient * x1);
  }
  return modulo(x1, modulus);
}

// Sorts and merges terms. If the multiples of a smaller step reach the next multiple of a larger
// one, both terms together are multiples of the smaller step. So dense dimensions merge: of usual
// layouts two or three terms are left.
std::vector<Term> joined(std::vector<Term> terms) {
  std::sort(terms.begin(), terms.end(),
            [](const Term& a, const Term& b) { return a.step < b.step; });
  std::vector<Term> result;
  for (const Term& term : terms) {
    if (term.most == 0) continue;
    const auto base = std::find_if(result.rbegin(), result.rend(), [&](const Term& smaller) {
      return term.step % smaller.step == 0 && term.step / smaller.step <= smaller.most + 1;
    });
    if (base == result.rend()) {
      result.push_back(term);
    } else {
      base->most += term.step / base->step * term.most;
    }
  }
  return result;
}

// Depth-first search from the largest step. A multiple is tried only if the smaller steps can reach
// the rest, and their common divisor divides it.
class Search {
 public:
  explicit Search(std::vector<Term> terms) : terms_(std::move(terms)) {
    int64_t reach = 0, divisor = 0;
    for (const Term& term : terms_) {
      reach_.push_back(reach += term.step * term.most);
      divisor_.push_back(divisor = std::gcd(divisor, term.step));
    }
  }

  bool find(int64_t target) { return find(static_cast<int>(terms_.size()) - 1, target); }

  // Realistic layouts take tens of steps.
  static constexpr int64_t kMostSteps = 100'000;

 private:
  bool find(int last, int64_t target) {
    if (last < 0) return target == 0;
    if (target < 0 || target > reach_[last] || target % divisor_[last] != 0) return false;
    if (last == 0) return true;
    check(++num_steps_ <= kMostSteps,
          "tensors that are written must not share memory with others, which strides like these do "
          "not let tell: pass one of them .contiguous()");
    const Term& term = terms_[last];
    const int64_t rest = target - reach_[last - 1];
    const int64_t fewest = rest <= 0 ? 0 : (rest + term.step - 1) / term.step;
    const int64_t most = std::min(term.most, target / term.step);
    if (fewest > most) return false;
    // Sums of the smaller steps are multiples of their divisor.
    const int64_t period = divisor_[last - 1] / divisor_[last];
    int64_t first = fewest;
    if (period > 1) {
      const int64_t unit = divisor_[last];
      const auto wanted = static_cast<__int128>(modulo(target / unit, period)) *
                          inverse(term.step / unit, period) % period;
      first += modulo(static_cast<int64_t>(wanted) - fewest, period);
    }
    if (first > most) return false;
    if (last >= 2 && !tried_.insert({last, target}).second) return false;
    for (int64_t count = first; count <= most; count += period) {
      if (find(last - 1, target - count * term.step)) return true;
    }
    return false;
  }

  int64_t num_steps_ = 0;
  std::vector<Term> terms_;
  std::vector<int64_t> reach_;    // [i]: the largest sum of terms 0 ... i
  std::vector<int64_t> divisor_;  // [i]: the greatest common divisor of their steps
  std::set<std::pair<int, int64_t>> tried_;
};

}  // namespace

bool is_sum_of(std::vector<Term> terms, int64_t target) {
  return Search(joined(std::move(terms))).find(target);
}

// They overlap if an offset into a equals an offset into b. With b's offsets counted from its end,
// that is a sum of terms of both.
bool overlap(const StridedMemory& a, const StridedMemory& b) {
  const int64_t distance = static_cast<int64_t>(b.data - a.data);
  if (distance > a.last_byte || distance + b.last_byte < 0) return false;  // the common case
  if (a.is_empty || b.is_empty) return false;
  std::vector<Term> terms{{1, a.item_bytes - 1}, {1, b.item_bytes - 1}};
  for (const StridedMemory* memory : {&a, &b}) {
    for (int i = 0; i < memory->num_dims; ++i) {
      if (memory->dims[i].step > 0) terms.push_back(memory->dims[i]);
    }
  }
  return is_sum_of(std::move(terms), distance + b.last_byte);
}

// Two elements differ by d_i in dimension i, -most_i <= d_i <= most_i. They have one address if the
// sum of d_i * step_i is 0. Let k be the last dimension in which they differ, by d_k >= 1. With d_i
// counted from -most_i (d_k from 1), the condition is a sum of terms.
bool overlaps_itself(const StridedMemory& memory) {
  if (memory.is_empty) return false;
  std::array<Term, StridedMemory::kMaxDims> dims = memory.dims;
  std::sort(dims.begin(), dims.begin() + memory.num_dims,
            [](const Term& a, const Term& b) { return a.step < b.step; });
  int64_t reach = 0;  // of the smaller steps
  for (int k = 0; k < memory.num_dims; ++k) {
    if (dims[k].step == 0) return true;
    if (dims[k].step <= reach) {  // else one step exceeds all smaller steps together
      std::vector<Term> terms{{dims[k].step, dims[k].most - 1}};
      for (int i = 0; i < k; ++i) terms.push_back({dims[i].step, 2 * dims[i].most});
      if (is_sum_of(std::move(terms), reach - dims[k].step)) return true;
    }
    reach += dims[k].step * dims[k].most;
  }
  return false;
}

}  // namespace sink_attention::binding
