// When looking ahead pauses.
#include "runtime/lookahead_gate.h"

#include <doctest/doctest.h>

using duet::LookaheadGate;

TEST_CASE("lookahead gate: open while what was used is as much as what was wasted") {
  LookaheadGate gate;
  for (uint32_t i = 0; i < 10 * LookaheadGate::kWindow; ++i) {
    CHECK(gate.open());
    gate.passed(i % 2 == 0 ? 200 : 0, 100);
  }
}

TEST_CASE("lookahead gate: pauses after a window of more waste than use, then tries again") {
  LookaheadGate gate;
  for (int round = 0; round < 3; ++round) {
    for (uint32_t i = 0; i < LookaheadGate::kWindow; ++i) {
      CHECK(gate.open());
      gate.passed(99, 100);
    }
    for (uint32_t i = 0; i < LookaheadGate::kPause; ++i) {
      CHECK_FALSE(gate.open());
      gate.passed(0, 0);
    }
  }
  for (uint32_t i = 0; i < 2 * LookaheadGate::kWindow; ++i) gate.passed(1, 0);
  CHECK(gate.open());
}

TEST_CASE("lookahead gate: no guesses, no pause") {
  LookaheadGate gate;
  for (uint32_t i = 0; i < 2 * LookaheadGate::kWindow; ++i) gate.passed(0, 0);
  CHECK(gate.open());
}
