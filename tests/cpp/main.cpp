// native_tests [suite...]: runs the suites named, or all.
#include <cstring>

#include "check.h"

int main(int argc, char** argv) {
  using namespace sink_attention::tests;
  int num_run = 0;
  for (const Suite& suite : suites()) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted = wanted || std::strcmp(argv[i], suite.name) == 0;
    if (!wanted) continue;
    ++num_run;
    const Counts before = counts();
    suite.run();
    std::printf("%-20s %8ld checks, %ld failed\n", suite.name, counts().checks - before.checks,
                counts().failures - before.failures);
  }
  const int expected = argc == 1 ? static_cast<int>(suites().size()) : argc - 1;
  if (num_run != expected || counts().checks == 0) {
    std::fprintf(stderr, "%d of %d suites exist, %ld checks made\n", num_run, expected,
                 counts().checks);
    return 1;
  }
  return counts().failures == 0 ? 0 : 1;
}
