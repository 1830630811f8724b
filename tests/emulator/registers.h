// The number of registers of each warp of a block (setmaxnreg).
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
    int wanted = 0;  // the number that it waits for; 0: it does not wait
    bool changed = false;
    Step step{};  // of the change
  };
  std::vector<Warp> warps;
  int all = 0;  // the registers of the launch; the rest of the register file is unused

  void start(int num_warps);
  int in_use() const;
  std::string describe_waiting() const;  // for the report of a deadlock
};

// Called by all lanes of a warp. warpgroup_reg_alloc waits until enough registers are free.
void warpgroup_reg_dealloc(int count, const Step& step);
void warpgroup_reg_alloc(int count, const Step& step);
// Faults if some warps of a warpgroup changed their registers and others did not.
void check_end_of_registers(const Block& block);

}  // namespace emulator
