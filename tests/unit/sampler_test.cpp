#include "runtime/sampler.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <string>

#include "base/error.h"

namespace duet {
namespace {

SamplerParams plain() {
  SamplerParams params;
  params.temperature = 1;
  params.top_k = 0;
  params.top_p = 1;
  params.min_p = 0;
  return params;
}

std::map<Token, int> draw_many(const SamplerParams& params, const std::vector<float>& logits,
                               int n) {
  Sampler sampler(params);
  std::map<Token, int> counts;
  for (int i = 0; i < n; ++i) ++counts[sampler.sample(logits)];
  return counts;
}

TEST_CASE("sampler: greedy takes the lowest id of a tie") {
  SamplerParams params;
  params.temperature = 0;
  Sampler sampler(params);
  CHECK(sampler.sample(std::vector<float>{1, 3, 2, 3}) == 1);
  CHECK(sampler.sample(std::vector<float>{-5, -5}) == 0);
}

TEST_CASE("sampler: draws follow the softmax at the temperature") {
  const std::vector<float> logits = {0.0f, 1.0f, 2.0f, -1.0f};
  constexpr int kDraws = 40000;
  for (const float temperature : {0.5f, 1.0f, 2.0f}) {
    SamplerParams params = plain();
    params.temperature = temperature;
    double total = 0;
    for (const float l : logits) total += std::exp(static_cast<double>(l / temperature));
    const auto counts = draw_many(params, logits, kDraws);
    for (size_t i = 0; i < logits.size(); ++i) {
      const double p = std::exp(static_cast<double>(logits[i] / temperature)) / total;
      const auto found = counts.find(static_cast<Token>(i));
      const double seen = found == counts.end() ? 0 : found->second;
      CHECK(std::abs(seen / kDraws - p) < 5 * std::sqrt(p * (1 - p) / kDraws) + 1e-4);
    }
  }
}

TEST_CASE("sampler: top-k keeps the k best, lower ids first in a tie") {
  SamplerParams params = plain();
  params.top_k = 2;
  const auto counts = draw_many(params, {1.0f, 2.0f, 1.0f, 0.5f, 1.0f}, 2000);
  CHECK(counts.size() == 2);
  CHECK(counts.contains(1));
  CHECK(counts.contains(0));
}

TEST_CASE("sampler: a large top-k vocabulary is selected like a sorted one") {
  std::vector<float> logits(32768);
  uint64_t state = 7;
  for (float& l : logits) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    l = static_cast<float>(state >> 40) / 16777216.0f * 4;
  }
  SamplerParams small = plain();
  small.top_k = 40;
  SamplerParams whole = small;  // the same set by the other path: all sorted, then cut by min-p
  std::vector<float> sorted = logits;
  std::sort(sorted.rbegin(), sorted.rend());
  whole.top_k = 0;
  whole.min_p = std::exp(sorted[39] - sorted[0]) * 0.999999f;
  REQUIRE(sorted[40] < sorted[39]);
  const auto a = draw_many(small, logits, 4000), b = draw_many(whole, logits, 4000);
  for (const auto& [id, n] : a) CHECK(logits[static_cast<size_t>(id)] >= sorted[39]);
  for (const auto& [id, n] : b) CHECK(logits[static_cast<size_t>(id)] >= sorted[40]);
  CHECK(a.size() >= 38);
}

TEST_CASE("sampler: top-p keeps the smallest set reaching p, at least one") {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.15f),
                                     std::log(0.05f)};
  SamplerParams params = plain();
  params.top_p = 0.75f;
  CHECK(draw_many(params, logits, 3000).size() == 2);
  params.top_p = 0.9f;
  CHECK(draw_many(params, logits, 3000).size() == 3);
  params.top_p = 0;
  const auto one = draw_many(params, logits, 100);
  CHECK(one.size() == 1);
  CHECK(one.contains(0));
}

TEST_CASE("sampler: min-p cuts relative to the best, before the temperature") {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.15f),
                                     std::log(0.05f)};
  SamplerParams params = plain();
  params.min_p = 0.29f;
  params.temperature = 5;
  CHECK(draw_many(params, logits, 3000).size() == 3);
  params.min_p = 1;
  CHECK(draw_many(params, logits, 100).size() == 1);
}

TEST_CASE("sampler: penalties act on the tokens of the window, greedy too") {
  SamplerParams params = plain();
  params.temperature = 0;
  params.repeat_penalty = 2;
  params.penalty_last_n = 2;
  Sampler sampler(params);
  const std::vector<float> logits = {4, 3, -1};
  sampler.accept(0);
  CHECK(sampler.sample(logits) == 1);
  sampler.accept(2);
  CHECK(sampler.sample(logits) == 1);
  sampler.accept(2);  // 0 has left the window
  CHECK(sampler.sample(logits) == 0);
}

TEST_CASE("sampler: repeat penalty lowers negative logits too") {
  SamplerParams params = plain();
  params.temperature = 0;
  params.repeat_penalty = 3;
  Sampler sampler(params);
  sampler.accept(0);
  CHECK(sampler.sample(std::vector<float>{-1, -2}) == 1);
}

TEST_CASE("sampler: presence counts once, frequency each time") {
  SamplerParams params = plain();
  params.temperature = 0;
  params.presence_penalty = 1;
  params.penalty_last_n = -1;
  Sampler presence(params);
  for (int i = 0; i < 3; ++i) presence.accept(0);
  CHECK(presence.sample(std::vector<float>{2, 0.5f}) == 0);
  params.presence_penalty = 0;
  params.frequency_penalty = 1;
  Sampler frequency(params);
  for (int i = 0; i < 3; ++i) frequency.accept(0);
  CHECK(frequency.sample(std::vector<float>{2, 0.5f}) == 1);
}

TEST_CASE("sampler: a seed fixes the draws, another seed changes them") {
  SamplerParams params = plain();
  const std::vector<float> logits(64, 0.0f);
  const auto sequence = [&](uint64_t seed) {
    params.seed = seed;
    Sampler sampler(params);
    std::vector<Token> ids;
    for (int i = 0; i < 32; ++i) ids.push_back(sampler.sample(logits));
    return ids;
  };
  CHECK(sequence(1) == sequence(1));
  CHECK(sequence(1) != sequence(2));
  const auto zero = sequence(0);
  // Written once: the same on every machine and in every later version.
  CHECK(std::vector<Token>(zero.begin(), zero.begin() + 8) ==
        std::vector<Token>{56, 27, 1, 62, 6, 20, 11, 49});
}

TEST_CASE("sampler: -inf is never drawn, NaN and all -inf are errors") {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const auto counts = draw_many(plain(), {0, -kInf, 0}, 500);
  CHECK(!counts.contains(1));
  Sampler sampler(plain());
  CHECK_THROWS_AS(sampler.sample(std::vector<float>{0, std::nanf("")}), Error);
  CHECK_THROWS_AS(sampler.sample(std::vector<float>{-kInf, -kInf}), Error);
  CHECK_THROWS_AS(sampler.sample(std::vector<float>{}), Error);
}

TEST_CASE("sampler: parameters out of range are usage errors") {
  const auto kind_of = [](auto change) {
    SamplerParams params;
    change(params);
    try {
      Sampler sampler(params);
    } catch (const Error& error) {
      return std::string(error.kind() == ErrorKind::usage ? "usage" : "other");
    }
    return std::string("accepted");
  };
  CHECK(kind_of([](SamplerParams& p) { p.temperature = std::nanf(""); }) == "usage");
  CHECK(kind_of([](SamplerParams& p) { p.top_p = -0.1f; }) == "usage");
  CHECK(kind_of([](SamplerParams& p) { p.top_p = std::nanf(""); }) == "usage");
  CHECK(kind_of([](SamplerParams& p) { p.min_p = 1.5f; }) == "usage");
  CHECK(kind_of([](SamplerParams& p) { p.repeat_penalty = 0; }) == "usage");
  CHECK(kind_of([](SamplerParams& p) { p.penalty_last_n = -2; }) == "usage");
  CHECK(kind_of([](SamplerParams& p) { p.temperature = -1; }) == "accepted");
}

}  // namespace
}  // namespace duet
