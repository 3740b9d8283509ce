#include <doctest/doctest.h>

#include "server/stop_matcher.h"

using duet::server::StopMatcher;

namespace {

// What is shown after each piece, joined by '|'; a '!' marks the end by a stop string.
std::string shown(std::vector<std::string> stops, const std::vector<std::string>& pieces) {
  StopMatcher matcher(std::move(stops));
  std::string out;
  for (const std::string& piece : pieces) {
    out += matcher.push(piece) + "|";
    if (!matcher.matched().empty()) return out + "!" + matcher.matched();
  }
  return out + matcher.finish();
}

}  // namespace

TEST_CASE("stop strings end the text, wherever tokens are cut") {
  CHECK(shown({}, {"ab", "c"}) == "ab|c|");
  CHECK(shown({"STOP"}, {"one STOP two"}) == "one |!STOP");
  CHECK(shown({"STOP"}, {"one S", "TO", "P two"}) == "one |||!STOP");
  CHECK(shown({"STOP"}, {"one S", "TO", "X"}) == "one ||STOX|");
  CHECK(shown({"STOP"}, {"one ST"}) == "one |ST");
  CHECK(shown({"\n\n"}, {"a\n", "b\n", "\nc"}) == "a|\nb||!\n\n");
}

TEST_CASE("of several stop strings the one that begins first counts") {
  CHECK(shown({"cd", "bcd"}, {"abcde"}) == "a|!bcd");
  CHECK(shown({"ab", "abc"}, {"xabc"}) == "x|!abc");
  CHECK(shown({"aab"}, {"aa", "ab"}) == "|a|!aab");
}
