#include "emulator/step.h"

#include <cstring>
#include <sstream>

namespace emulator {
namespace {

constexpr size_t kSlots = 4096;  // a power of 2
constexpr size_t kProbes = 64;
Step steps[kSlots];

}  // namespace

bool same_text(const Step& a, const Step& b) {
  return a.site.line == b.site.line && strcmp(a.name, b.name) == 0 &&
         strcmp(a.site.file, b.site.file) == 0;
}

std::string describe(const Step& step) {
  std::ostringstream text;
  const char* slash = strrchr(step.site.file, '/');
  text << step.name << " at " << (slash ? slash + 1 : step.site.file) << ":" << step.site.line;
  return text.str();
}

std::string difference(int thread, const Step& step, int other_thread, const Step& other_step) {
  return "thread " + std::to_string(thread) + " is at " + describe(step) + ", thread " +
         std::to_string(other_thread) + " at " + describe(other_step);
}

// Steps are compared by address. The same text at two addresses gets two ids, which does no harm.
uint16_t number_of(const Step& step) {
  const size_t hash = reinterpret_cast<uintptr_t>(step.site.file) +
                      reinterpret_cast<uintptr_t>(step.name) * 7 +
                      static_cast<size_t>(step.site.line) * 37;
  for (size_t i = 0; i < kProbes; ++i) {
    const size_t slot = (hash + i) % kSlots;
    if (slot == kUnknownStep) continue;
    if (steps[slot].name == nullptr) steps[slot] = step;
    if (identical(steps[slot], step)) return static_cast<uint16_t>(slot);
  }
  return kUnknownStep;
}

std::string describe(uint16_t step_id) {
  return step_id == kUnknownStep ? "an unknown step" : describe(steps[step_id]);
}

}  // namespace emulator
