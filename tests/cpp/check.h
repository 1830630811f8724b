// A small test framework for the native tests: named suites, and checks that report the line and
// the case.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

namespace sink_attention::tests {

struct Suite {
  const char* name;
  void (*run)();
};

inline std::vector<Suite>& suites() {
  static std::vector<Suite> registered;
  return registered;
}

struct Registration {
  Registration(const char* name, void (*run)()) { suites().push_back({name, run}); }
};

struct Counts {
  long checks = 0;
  long failures = 0;
};

inline Counts& counts() {
  static Counts counted;
  return counted;
}

// Counts a check; a failed one prints the parts of its message and stops the run after too many.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  ++counts().checks;
  if (ok) return;
  std::ostringstream message;
  ((message << parts), ...);
  std::fprintf(stderr, "FAILED %s\n", message.str().c_str());
  constexpr long kTooMany = 20;
  if (++counts().failures == kTooMany) {
    std::fprintf(stderr, "%ld failures: stopping\n", kTooMany);
    std::exit(1);
  }
}

}  // namespace sink_attention::tests

// Defines and registers the suite that `native_tests name` runs.
#define SA_SUITE(name)                                                              \
  static void run_##name();                                                         \
  static const sink_attention::tests::Registration name##_suite(#name, run_##name); \
  static void run_##name()
