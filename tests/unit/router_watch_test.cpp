// Which experts the last tokens chose: recorded only while somebody looks.
#include <doctest/doctest.h>

#include "server/router_watch.h"

using duet::HParams;
using duet::server::RouterWatch;

namespace {

HParams two_layers() {
  HParams hparams;
  hparams.n_layer = 2;
  hparams.n_expert = 4;
  hparams.n_expert_used = 2;
  return hparams;
}

}  // namespace

TEST_CASE("router watch: nothing is recorded before somebody looks") {
  RouterWatch watch(two_layers());
  const std::vector<int32_t> token{1, 3};
  watch.chosen(0, token);
  CHECK(!watch.watched());
  const auto picture = watch.look();
  CHECK(picture.uses == std::vector<uint8_t>(8));
  CHECK(watch.watched());
  watch.chosen(0, token);
  CHECK(watch.look().uses == std::vector<uint8_t>{0, 1, 0, 1, 0, 0, 0, 0});
}

TEST_CASE("router watch: uses of the window, the last token, what had to be read for it") {
  RouterWatch watch(two_layers());
  watch.look();
  std::vector<int32_t> prompt;  // 40 tokens of 0 and 1, of which the last 32 count
  for (int i = 0; i < 40; ++i) prompt.insert(prompt.end(), {0, 1});
  watch.chosen(0, prompt);
  watch.chosen(1, prompt);
  watch.evaluated(40, {true, true, false, false, true, true, false, false});
  const std::vector<int32_t> first{2, 0}, second{1, 0};
  watch.chosen(0, first);
  watch.chosen(1, second);
  watch.evaluated(1, {true, false, true, false, true, true, false, false});
  const auto picture = watch.look();
  CHECK(picture.n_tokens == 41);
  CHECK(picture.uses == std::vector<uint8_t>{32, 31, 1, 0, 32, 32, 0, 0});
  CHECK(picture.last == std::vector<bool>{true, false, true, false, true, true, false, false});
  CHECK(picture.read == std::vector<bool>{false, false, true, false, false, false, false, false});
  CHECK(picture.resident == std::vector<bool>{true, false, true, false, true, true, false, false});
}

TEST_CASE("router watch: a dense model has no router") {
  HParams dense;
  dense.n_layer = 3;
  RouterWatch watch(dense);
  CHECK(watch.look().uses.empty());
}
