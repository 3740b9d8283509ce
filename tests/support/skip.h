// A test that cannot run on this machine says so and counts as skipped (ctest matches "SKIP: ").
#pragma once

#include <cstdio>
#include <string>

// Ends the test case as skipped. Use before any assertion.
#define DUET_SKIP(reason)                                       \
  do {                                                          \
    std::printf("SKIP: %s\n", std::string(reason).c_str());     \
    std::fflush(stdout);                                        \
    return;                                                     \
  } while (false)
