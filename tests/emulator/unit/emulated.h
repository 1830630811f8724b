// Shared by the emulator's own tests: the emulated primitives, launches of a lambda, expected
// faults.
#pragma once

#include <functional>
#include <initializer_list>
#include <string>

#include "check.h"
#include "emulator/device_array.h"
#include "emulator/machine.h"
#include "primitives/atomic.h"
#include "primitives/bulk.h"
#include "primitives/convert.h"
#include "primitives/cp_async.h"
#include "primitives/cta.h"
#include "primitives/fast_math.h"
#include "primitives/launch.h"
#include "primitives/ldmatrix.h"
#include "primitives/mbarrier.h"
#include "primitives/memory.h"
#include "primitives/mma.h"
#include "primitives/simt.h"
#include "primitives/tma.h"
#include "primitives/warp.h"
#include "primitives/warpgroup.h"

namespace sink_attention::tests {

using namespace primitives;  // NOLINT: every test calls the emulated primitives
using emulator::DeviceArray;
using emulator::Grid;
using emulator::VisibleBuffers;

// A site with a name that a test can look for in a message.
constexpr emulator::Site at(const char* place) { return {place, 1}; }

// One block of num_threads threads.
inline void run_block(int num_threads, int shared_bytes, const std::function<void(char*)>& body) {
  emulator::run_grid({1, 1, 1}, num_threads, shared_bytes, body);
}
inline void run_warp(const std::function<void(char*)>& body) { run_block(32, 4096, body); }

// The message of the fault that `launch` ends in; empty without one.
inline std::string fault_of(const std::function<void()>& launch) {
  try {
    launch();
  } catch (const emulator::Fault& fault) {
    return fault.what();
  }
  return "";
}

// Checks that `launch` ends in a fault whose message has all `parts`, with every seed: an injected
// fault must not be found by luck.
inline void expect_fault(const char* name, std::initializer_list<const char*> parts,
                         const std::function<void()>& launch) {
  const uint64_t before = emulator::settings().seed;
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    emulator::settings().seed = seed;
    const std::string message = fault_of(launch);
    if (seed == 1) std::printf("  %s: %s\n", name, message.c_str());
    for (const char* part : parts) {
      check(message.find(part) != std::string::npos, name, ", seed ", seed, ": expected \"", part,
            "\", got \"", message, "\"");
    }
  }
  emulator::settings().seed = before;
}

inline void expect_no_fault(const char* name, const std::function<void()>& launch) {
  const uint64_t before = emulator::settings().seed;
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    emulator::settings().seed = seed;
    const std::string message = fault_of(launch);
    check(message.empty(), name, ", seed ", seed, ": ", message);
  }
  emulator::settings().seed = before;
}

}  // namespace sink_attention::tests
