// The frame of a benchmark's main(): arguments counted, errors as one line.
#pragma once

#include <cstdio>

#include "base/error.h"

namespace duet {

// Calls `run` when between `fewest` and `most` arguments were given, else prints `usage`. Returns the exit status: 0,
// 1 after an error (printed), 2 after a wrong use.
template <class Run>
int bench_main(int argc, char** argv, int fewest, int most, const char* usage, Run run) {
  if (argc - 1 < fewest || argc - 1 > most) {
    std::fprintf(stderr, "usage: %s\n", usage);
    return 2;
  }
  try {
    run(argc, argv);
  } catch (const Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
  return 0;
}

}  // namespace duet
