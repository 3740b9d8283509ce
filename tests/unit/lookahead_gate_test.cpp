// When looking ahead pauses.
#include "runtime/lookahead_gate.h"

#include <doctest/doctest.h>

using duet::LookaheadGate;

namespace {

void pass(LookaheadGate& gate, uint64_t gained, uint64_t lost) {
  gate.gained(gained);
  gate.lost(lost);
  gate.passed();
}

}  // namespace

TEST_CASE("lookahead gate: open while what was gained is as much as what was lost") {
  LookaheadGate gate;
  for (uint32_t i = 0; i < 10 * LookaheadGate::kWindow; ++i) {
    CHECK(gate.open());
    pass(gate, i % 2 == 0 ? 200 : 0, 100);
  }
}

TEST_CASE("lookahead gate: pauses after a window of more loss than gain, then tries again") {
  LookaheadGate gate;
  for (int round = 0; round < 3; ++round) {
    for (uint32_t i = 0; i < LookaheadGate::kWindow; ++i) {
      CHECK(gate.open());
      pass(gate, 99, 100);
    }
    for (uint32_t i = 0; i < LookaheadGate::kPause; ++i) {
      CHECK_FALSE(gate.open());
      gate.passed();
    }
  }
  for (uint32_t i = 0; i < 2 * LookaheadGate::kWindow; ++i) pass(gate, 1, 0);
  CHECK(gate.open());
}

TEST_CASE("lookahead gate: no guesses, no pause") {
  LookaheadGate gate;
  for (uint32_t i = 0; i < 2 * LookaheadGate::kWindow; ++i) gate.passed();
  CHECK(gate.open());
}
