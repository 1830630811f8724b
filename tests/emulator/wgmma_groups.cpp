#include "emulator/wgmma_groups.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "emulator/machine.h"
#include "emulator/poison.h"

namespace emulator {
namespace {

const ProductOperands& of(void* const* lanes, int lane) {
  return *static_cast<const ProductOperands*>(lanes[lane]);
}
int threads_begin() { return current().thread_idx / kWarpgroupThreads * kWarpgroupThreads; }
std::string thread_name(int lane) { return "thread " + std::to_string(threads_begin() + lane); }

// PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16", accumulator D:
//   row = groupID          for d_i where i / 2 % 2 == 0, else groupID + 8
//   col = i / 4 * 8 + threadID_in_group * 2 + i % 2
// of a warp; warp w holds rows 16 w ... 16 w + 15. Visits each pair of a lane's accumulators
// together with the same two elements of the sums.
template <class Sum, class Visit>
void for_each_pair(float* const* lanes, Sum* sums, int n, Visit visit) {
  for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4;
    float* values = lanes[thread];
    Sum* sum = sums + row * n + thread % 4 * 2;
    for (int col = 0; col < n; col += 8, values += 4, sum += 8) {
      visit(values, sum);
      visit(values + 2, sum + 8 * n);
    }
  }
}

}  // namespace

bool PackLog::has(uint32_t value) const {
  const uint32_t* end = values + std::min(count, uint32_t{kSize});
  return std::find(values, end, value) != end;
}

void WarpgroupProducts::clear() {
  accumulations_.clear();
  products_.clear();
  groups_.clear();
  open_ = 0;
  was_fenced_ = false;
  unfenced_.clear();
}

const Step* WarpgroupProducts::under_way() const {
  return products_.empty() ? nullptr : &products_.front().step;
}

bool WarpgroupProducts::is_uncommitted(uint16_t step) const {
  return std::any_of(products_.end() - open_, products_.end(),
                     [&](const Product& product) { return number_of(product.step) == step; });
}

void WarpgroupProducts::fence() {
  was_fenced_ = true;
  unfenced_.clear();
  logs_.resize(kWarpgroupThreads);
  Thread* lanes = &current() - current().thread_idx % kWarpgroupThreads;
  for (int lane = 0; lane < kWarpgroupThreads; ++lane) {
    logs_[lane].count = 0;
    lanes[lane].packs = &logs_[lane];
  }
}

void WarpgroupProducts::check_lanes_agree(void* const* lanes) const {
  const ProductOperands& first = of(lanes, 0);
  for (int lane = 1; lane < kWarpgroupThreads; ++lane) {
    const ProductOperands& other = of(lanes, lane);
    const char* what = nullptr;
    if (other.b_descriptor != first.b_descriptor) what = "another descriptor of B";
    if (other.a_descriptor != first.a_descriptor) what = "another descriptor of A";
    if (other.accumulate != first.accumulate) what = "another `accumulate`";
    if (other.n != first.n || other.type != first.type || other.a_mn_major != first.a_mn_major ||
        other.b_mn_major != first.b_mn_major || (other.a == nullptr) != (first.a == nullptr)) {
      what = "another instruction";
    }
    if (what == nullptr) continue;
    fault(*current().step,
          thread_name(lane) + " comes with " + what + " than " + thread_name(0) + " does");
  }
}

void WarpgroupProducts::check_accumulators_fenced(const ProductOperands& first) const {
  const Step& step = *current().step;
  if (!was_fenced_) fault(step, "no warpgroup_arrive comes before the warpgroup's first product");
  for (const Range& range : unfenced_) {
    if (first.acc >= range.end || first.acc + first.n / 2 <= range.begin) continue;
    fault(step,
          "no warpgroup_arrive has come since a wait gave these accumulators back, those of " +
              describe(range.step));
  }
}

// Faults if every thread has packed its whole operand A since the fence. A single equal value may
// have been packed for another purpose.
void WarpgroupProducts::check_operand_fenced(void* const* lanes) const {
  for (int lane = 0; lane < kWarpgroupThreads; ++lane) {
    for (int i = 0; i < 4; ++i) {
      if (!logs_[lane].has(of(lanes, lane).a[i])) return;
    }
  }
  fault(*current().step,
        "no warpgroup_arrive has come since operand A was packed into its registers");
}

WarpgroupProducts::Accumulation& WarpgroupProducts::accumulation_for(void* const* lanes) {
  const Step& step = *current().step;
  const ProductOperands& first = of(lanes, 0);
  const int size = first.n / 2;
  for (const auto& other : accumulations_) {
    if (first.acc >= other->lanes[0] + other->n / 2 || first.acc + size <= other->lanes[0]) {
      continue;
    }
    if (first.acc != other->lanes[0] || first.n != other->n || first.type != other->type) {
      fault(step, "its accumulators are partly those of " + describe(other->first) +
                      ", a product of another shape that is under way");
    }
    if (!first.accumulate) std::fill(other->sums.begin(), other->sums.end(), 0.0f);
    return *other;
  }
  check_accumulators_fenced(first);
  accumulations_.push_back(std::make_unique<Accumulation>());
  Accumulation& mine = *accumulations_.back();
  mine.type = first.type;
  mine.n = first.n;
  mine.first = step;
  mine.poison = poison_of(number_of(step));
  mine.sums.resize(kProductRows * first.n);
  for (int lane = 0; lane < kWarpgroupThreads; ++lane) mine.lanes[lane] = of(lanes, lane).acc;
  const bool accumulate = first.accumulate;
  const uint32_t poison[2] = {mine.poison, mine.poison};
  for_each_pair(mine.lanes, mine.sums.data(), mine.n, [&](float* values, float* sum) {
    if (accumulate) memcpy(sum, values, 2 * sizeof(float));
    memcpy(values, poison, sizeof(poison));
  });
  return mine;
}

void WarpgroupProducts::start(void* const* lanes) {
  static OperandValues a, b;  // one product at a time
  const Step& step = *current().step;
  const char* memory = current().block->shared.data();
  const ProductOperands& first = of(lanes, 0);
  check_lanes_agree(lanes);
  Product product{step, &accumulation_for(lanes), nullptr, {}};
  const auto unpack = [&](const char* name, uint64_t descriptor, bool mn_major, int count,
                          OperandValues& values) {
    const OperandLayout layout(descriptor, mn_major, first.type);
    if (const char* why = layout.refusal(count)) {
      fault(step, std::string("the descriptor of ") + name + " " + why);
    }
    const size_t own = product.shared.size();
    if (!append_ranges(layout, count, product.shared)) {
      fault(step, std::string("operand ") + name + " reaches beyond shared memory");
    }
    for (size_t i = own; i < product.shared.size(); ++i) {
      const auto [begin, bytes] = product.shared[i];
      begin_async_read(memory + begin, bytes, AsyncReader::kWarpgroup, step);
    }
    unpack_shared(layout, first.type, count, memory, values);
  };
  if (first.a == nullptr) {
    unpack("A", first.a_descriptor, first.a_mn_major, kProductRows, a);
  } else {
    check_operand_fenced(lanes);
    product.a = std::make_unique<RegisterOperand>();
    for (int lane = 0; lane < kWarpgroupThreads; ++lane) {
      product.a->lanes[lane] = of(lanes, lane).a;
      memcpy(product.a->values[lane], of(lanes, lane).a, sizeof(product.a->values[lane]));
    }
    unpack_registers(first.type, product.a->lanes, a);
  }
  unpack("B", first.b_descriptor, first.b_mn_major, first.n, b);
  float* sums = product.accumulation->sums.data();
  if (first.type == ElementType::kFloat8E4M3) {
    multiply_float8(a, b, first.n, sums);
  } else {
    multiply(a, b, depth_of(first.type), first.n, sums);
  }
  ++product.accumulation->products;
  products_.push_back(std::move(product));
  ++open_;
}

void WarpgroupProducts::commit() {
  groups_.push_back(open_);
  open_ = 0;
}

void WarpgroupProducts::wait(int pending) {
  while (static_cast<int>(groups_.size()) > pending) {
    for (int i = 0; i < groups_.front(); ++i) {
      finish(products_.front());
      products_.pop_front();
    }
    groups_.pop_front();
  }
}

void WarpgroupProducts::finish(const Product& product) {
  if (product.a != nullptr) {
    for (int lane = 0; lane < kWarpgroupThreads; ++lane) {
      if (std::equal(product.a->values[lane], product.a->values[lane] + 4,
                     product.a->lanes[lane])) {
        continue;
      }
      fault(*current().step, "operand A of " + describe(product.step) + " was changed in " +
                                 thread_name(lane) + "'s registers before this wait");
    }
  }
  const char* memory = current().block->shared.data();
  for (const auto [begin, bytes] : product.shared) {
    end_async_read(memory + begin, bytes, AsyncReader::kWarpgroup, product.step);
  }
  Accumulation& accumulation = *product.accumulation;
  if (--accumulation.products > 0) return;
  give_back(accumulation);
  unfenced_.push_back(
      {accumulation.lanes[0], accumulation.lanes[0] + accumulation.n / 2, accumulation.first});
  accumulations_.erase(
      std::find_if(accumulations_.begin(), accumulations_.end(),
                   [&](const auto& candidate) { return candidate.get() == &accumulation; }));
}

void WarpgroupProducts::give_back(const Accumulation& accumulation) {
  const uint32_t poison[2] = {accumulation.poison, accumulation.poison};
  const float* changed = nullptr;
  for_each_pair(accumulation.lanes, accumulation.sums.data(), accumulation.n,
                [&](float* values, const float* sum) {
                  if (memcmp(values, poison, sizeof(poison)) != 0) changed = values;
                  memcpy(values, sum, 2 * sizeof(float));
                });
  if (changed == nullptr) return;
  int lane = 0;
  while (changed < accumulation.lanes[lane] ||
         changed >= accumulation.lanes[lane] + accumulation.n / 2) {
    ++lane;
  }
  fault(*current().step, "accumulators of " + describe(accumulation.first) + " were changed in " +
                             thread_name(lane) + " before this wait");
}

WarpgroupProducts& warpgroup_products() {
  return current().block->warpgroups[current().thread_idx / kWarpgroupThreads].products;
}

void check_end_of_products() {
  if (const Step* product = warpgroup_products().under_way()) {
    fault(*product, "the thread ended before it waited for this product");
  }
}

// A separate function, so that a lane that only arrives keeps nothing on its stack.
[[gnu::noinline]] static void execute_for_warpgroup(Thread* lanes,
                                                    void (*execute)(void* const* lanes)) {
  void* all[kWarpgroupThreads];
  for (int lane = 0; lane < kWarpgroupThreads; ++lane) all[lane] = lanes[lane].operands;
  execute(all);
  for (int lane = 0; lane < kWarpgroupThreads; ++lane) {
    if (lanes + lane != &current()) wake(lanes[lane]);
  }
}

void warpgroup_collective(const Step& step, void* operands, void (*execute)(void* const* lanes)) {
  Thread& me = current();
  Block& block = *me.block;
  Warpgroup& warpgroup = block.warpgroups[me.thread_idx / kWarpgroupThreads];
  Thread* lanes = &me - me.thread_idx % kWarpgroupThreads;
  const int size = block.num_threads() - lanes->thread_idx;
  if (size < kWarpgroupThreads) {
    fault(step, "a warpgroup is 4 warps, and only " + std::to_string(size) +
                    " threads of the block are in this one");
  }
  me.operands = operands;
  me.step = &step;
  if (warpgroup.arrived++ == 0) warpgroup.first = &me;
  const Thread& first = *warpgroup.first;
  if (!same(*first.step, step)) {
    fault(step, "lanes of a warpgroup part: " +
                    difference(first.thread_idx, *first.step, me.thread_idx, step));
  }
  if (warpgroup.arrived < kWarpgroupThreads) return wait_here(step);
  warpgroup.arrived = 0;
  execute_for_warpgroup(lanes, execute);
}

void poison_found(uint32_t bits, const Step& step) {
  const auto step_id = static_cast<uint16_t>(bits & ~kPoisonMask);
  const bool uncommitted = warpgroup_products().is_uncommitted(step_id);
  fault(step, "uses accumulators of " + describe(step_id) + ", a product that was not waited for" +
                  (uncommitted ? " (no wgmma_commit closed its group)" : ""));
}

}  // namespace emulator
