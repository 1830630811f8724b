#include "emulator/registers.h"

#include <algorithm>

#include "emulator/machine.h"

namespace emulator {
namespace {

constexpr int kFile = 65536;  // of a multiprocessor
constexpr int kMost = 256;
constexpr int kFewest = 24;
constexpr int kStep = 8;

Registers::Warp& my_warp() { return current().block->registers.warps[current().thread_idx / 32]; }

void change(int count, const Step& step) {
  if (count < kFewest || count > kMost || count % kStep != 0) {
    fault(step, std::to_string(count) + " registers, not a multiple of 8 from 24 to 256");
  }
  std::vector<Registers::Warp>& warps = current().block->registers.warps;
  const int warp = current().thread_idx / 32;
  Registers::Warp& mine = warps[warp];
  if (mine.changed) fault(step, "the second change of registers, after " + describe(mine.step));
  const int first = warp / kWarpgroupWarps * kWarpgroupWarps;
  if (first + kWarpgroupWarps > static_cast<int>(warps.size())) {
    fault(step, "warp " + std::to_string(warp) + " is of no whole warpgroup");
  }
  for (int i = first; i < first + kWarpgroupWarps; ++i) {
    const Registers::Warp& other = warps[i];
    if (!other.changed || same(other.step, step)) continue;
    fault(step, "the warps of a warpgroup part: warp " + std::to_string(i) + " was at " +
                    describe(other.step));
  }
  mine.changed = true;
  mine.step = step;
}

// Gives registers to the waiting warps for which enough are free.
void grant(Block& block) {
  for (size_t warp = 0; warp < block.registers.warps.size(); ++warp) {
    Registers::Warp& waits = block.registers.warps[warp];
    if (waits.wanted == 0) continue;
    if (block.registers.in_use() + (waits.wanted - waits.count) * 32 > block.registers.all)
      continue;
    waits.count = waits.wanted;
    waits.wanted = 0;
    for (int lane = 0; lane < 32; ++lane) {
      Thread& thread = block.threads[warp * 32 + lane];
      if (thread.waiting) wake(thread);
    }
  }
}

}  // namespace

void Registers::start(int num_warps) {
  const int each = std::min(kFile / (num_warps * 32) / kStep * kStep, kMost);
  warps.assign(num_warps, Warp{each});
  all = in_use();
}

int Registers::in_use() const {
  int sum = 0;
  for (const Warp& warp : warps) sum += warp.count * 32;
  return sum;
}

std::string Registers::describe_waiting() const {
  std::string text;
  for (size_t warp = 0; warp < warps.size(); ++warp) {
    if (warps[warp].wanted == 0) continue;
    text += "; warp " + std::to_string(warp) + " has " + std::to_string(warps[warp].count) +
            " registers a thread and waits for " + std::to_string(warps[warp].wanted) + ", " +
            std::to_string(in_use()) + " of " + std::to_string(all) + " are in use";
  }
  return text;
}

// All lanes of a warp call; lane 0's count is used.
static void change_registers(int count, const Step& step,
                             void (*set)(Registers::Warp&, int, const Step&)) {
  struct Call {
    int count;
    const Step* step;
    void (*set)(Registers::Warp&, int, const Step&);
  } call{count, &step, set};
  collective(step, &call, [](void* const* lanes) {
    const Call& of = *static_cast<Call*>(lanes[0]);
    change(of.count, *of.step);
    of.set(my_warp(), of.count, *of.step);
  });
  grant(*current().block);
}

void warpgroup_reg_dealloc(int count, const Step& step) {
  change_registers(count, step, [](Registers::Warp& mine, int kept, const Step& step) {
    if (kept > mine.count) {
      fault(step, "keeps " + std::to_string(kept) + " registers of " + std::to_string(mine.count));
    }
    mine.count = kept;
  });
}

void warpgroup_reg_alloc(int count, const Step& step) {
  change_registers(count, step, [](Registers::Warp& mine, int wanted, const Step& step) {
    if (wanted < mine.count) {
      fault(step,
            "takes " + std::to_string(wanted) + " registers and has " + std::to_string(mine.count));
    }
    mine.wanted = wanted;
  });
  while (my_warp().wanted != 0) wait_here(step);
}

void check_end_of_registers(const Block& block) {
  const std::vector<Registers::Warp>& warps = block.registers.warps;
  for (size_t came = 0; came < warps.size(); ++came) {
    const size_t first = came / kWarpgroupWarps * kWarpgroupWarps;
    for (size_t warp = first; warps[came].changed && warp < first + kWarpgroupWarps; ++warp) {
      if (warps[warp].changed) continue;
      fault(warps[came].step, "warp " + std::to_string(came) + " came, and warp " +
                                  std::to_string(warp) + " of its warpgroup did not");
    }
  }
}

}  // namespace emulator
