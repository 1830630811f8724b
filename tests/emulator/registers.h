// How many registers the warps of a block have (setmaxnreg).
#pragma once

#include <string>
#include <vector>

#include "emulator/clocks.h"
#include "emulator/step.h"

namespace emulator {

struct Block;
struct Thread;

struct Registers {
  struct Warp {
    int count;       // of each thread
    int wanted = 0;  // waits for so many
    bool changed = false;
    Step step{};  // where
  };
  std::vector<Warp> warps;
  int all = 0;  // what the block was launched with; what is over of the file is nobody's

  void start(int num_warps);
  int in_use() const;
  std::string describe_waiting() const;  // for the report of a deadlock
};

// From all lanes of a warp. A warp that takes waits until there are so many.
void warpgroup_reg_dealloc(int count, const Step& step);
void warpgroup_reg_alloc(int count, const Step& step);
// Faults if some warps of a warpgroup changed their registers and others did not.
void check_end_of_registers(const Block& block);

}  // namespace emulator
