// A thread's step: an instruction, and the line of the kernel that calls it.
#pragma once

#include <cstdint>
#include <string>

namespace emulator {

struct Site {
  const char* file;
  int line;
};
// As the default of a function's last argument: the site of the call.
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {file, line};
}

struct Step {
  const char* name;
  Site site;
};

// Compares addresses; the same text may be at two addresses.
inline bool identical(const Step& a, const Step& b) {
  return a.name == b.name && a.site.file == b.site.file && a.site.line == b.site.line;
}
bool same_text(const Step& a, const Step& b);
inline bool same(const Step& a, const Step& b) { return identical(a, b) || same_text(a, b); }
std::string describe(const Step& step);  // "sync_threads at kernel.cuh:40"
// "thread 3 is at any at a.cuh:1, thread 4 at shfl at b.cuh:2"
std::string difference(int thread, const Step& step, int other_thread, const Step& other_step);

// A 16-bit id of a step, which shared memory keeps for each of its units. After some 4000 steps ids
// run out, and later steps share kUnknownStep.
constexpr uint16_t kUnknownStep = 0;
uint16_t number_of(const Step& step);
std::string describe(uint16_t step_id);

}  // namespace emulator
