#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdlib>

int main(int argc, char** argv) {
  ::setenv("XDG_CONFIG_HOME", DUET_TEST_DIR "/none", 1);  // not the settings of whoever runs the tests
  return doctest::Context(argc, argv).run();
}
