#include "runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "base/error.h"

namespace duet {
namespace {

// splitmix64 (Steele, Lea, Flood 2014): any seed is a good seed.
uint64_t next_random(uint64_t& state) {
  uint64_t z = state += 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return z ^ z >> 31;
}

// e^x for x <= 0, from additions, multiplications and scaling by powers of two only: libm's exp may
// differ in the last bit between machines, and a draw with it. Relative error below 1e-15.
double exp_of_negative(double x) {
  if (x < -700) return 0;
  constexpr double kLog2e = 1.4426950408889634, kLn2High = 0.693147180369123816490,
                   kLn2Low = 1.90821492927058770002e-10;
  const double n = std::floor(x * kLog2e + 0.5);
  const double r = (x - n * kLn2High) - n * kLn2Low;
  double sum = 1;
  for (int i = 13; i > 0; --i) sum = 1 + sum * r / i;  // Horner's Taylor series, |r| <= 0.347
  return std::ldexp(sum, static_cast<int>(n));
}

Token best_of(std::span<const float> logits) {
  size_t best = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i])) fail(ErrorKind::internal, "logit ", i, " is not a number");
    if (logits[i] > logits[best]) best = i;
  }
  if (logits.empty() || !std::isfinite(logits[best]))
    fail(ErrorKind::internal, "the largest logit is not finite");
  return static_cast<Token>(best);
}

void check(bool ok, const char* name, double value, const char* expected) {
  if (!ok) fail(ErrorKind::usage, name, " is ", value, "; it must be ", expected);
}

}  // namespace

Sampler::Sampler(const SamplerParams& params) : params_(params), rng_(params.seed) {
  const auto finite = [](float v) { return std::isfinite(v); };
  check(finite(params.temperature), "temperature", params.temperature, "a finite number");
  check(params.top_p >= 0 && finite(params.top_p), "top-p", params.top_p, "0 or more");
  check(params.min_p <= 1 && finite(params.min_p), "min-p", params.min_p, "at most 1");
  check(params.repeat_penalty > 0 && finite(params.repeat_penalty), "repeat penalty",
        params.repeat_penalty, "above 0");
  check(finite(params.presence_penalty), "presence penalty", params.presence_penalty,
        "a finite number");
  check(finite(params.frequency_penalty), "frequency penalty", params.frequency_penalty,
        "a finite number");
  check(params.penalty_last_n >= -1, "penalty window", params.penalty_last_n,
        "-1 (whole sequence), 0 (off) or more");
}

void Sampler::accept(Token token) {
  history_.push_back(token);
  if (params_.penalty_last_n < 0) return;
  const auto window = static_cast<size_t>(params_.penalty_last_n);
  if (history_.size() > 2 * window + 64)
    history_.erase(history_.begin(), history_.end() - static_cast<ptrdiff_t>(window));
}

Token Sampler::sample(std::span<const float> logits) {
  const std::span<const float> scores = penalized(logits);
  const Token best = best_of(scores);
  if (params_.temperature <= 0) return best;
  select(scores);
  cut_by_probability();
  return draw();
}

std::span<const float> Sampler::penalized(std::span<const float> logits) {
  const bool off = params_.repeat_penalty == 1 && params_.presence_penalty == 0 &&
                   params_.frequency_penalty == 0;
  const size_t window =
      params_.penalty_last_n < 0
          ? history_.size()
          : std::min(history_.size(), static_cast<size_t>(params_.penalty_last_n));
  if (off || window == 0) return logits;
  penalized_.assign(logits.begin(), logits.end());
  std::unordered_map<Token, int> counts;
  for (size_t i = history_.size() - window; i < history_.size(); ++i) ++counts[history_[i]];
  for (const auto& [id, count] : counts) {
    if (id < 0 || static_cast<size_t>(id) >= logits.size()) continue;
    float& logit = penalized_[static_cast<size_t>(id)];
    logit = logit > 0 ? logit / params_.repeat_penalty : logit * params_.repeat_penalty;
    logit -= static_cast<float>(count) * params_.frequency_penalty + params_.presence_penalty;
  }
  return penalized_;
}

// Fills candidates_: the top_k best, best first; all of them, in order only where top-p needs it.
void Sampler::select(std::span<const float> logits) {
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  const bool all = params_.top_k <= 0 || static_cast<size_t>(params_.top_k) >= logits.size();
  const size_t keep = all ? logits.size() : static_cast<size_t>(params_.top_k);
  candidates_.clear();
  candidates_.reserve(keep + 1);
  for (size_t i = 0; i < logits.size(); ++i) {
    const Candidate candidate{logits[i], static_cast<Token>(i), 0};
    if (all) {
      candidates_.push_back(candidate);
      continue;
    }
    // A heap with the worst of the best on top: most logits of a large vocabulary fail this test.
    if (candidates_.size() == keep && !better(candidate, candidates_.front())) continue;
    candidates_.push_back(candidate);
    std::push_heap(candidates_.begin(), candidates_.end(), better);
    if (candidates_.size() <= keep) continue;
    std::pop_heap(candidates_.begin(), candidates_.end(), better);
    candidates_.pop_back();
  }
  if (!all)
    std::sort_heap(candidates_.begin(), candidates_.end(), better);
  else if (params_.top_p < 1)
    std::sort(candidates_.begin(), candidates_.end(), better);
}

// Top-p and min-p, both on the probabilities at temperature 1.
void Sampler::cut_by_probability() {
  float best = candidates_.front().logit;
  for (const Candidate& c : candidates_) best = std::max(best, c.logit);
  double total = 0;
  for (Candidate& c : candidates_)
    total += c.weight = exp_of_negative(static_cast<double>(c.logit) - static_cast<double>(best));
  if (params_.top_p < 1) {
    double sum = 0;
    size_t keep = 0;
    while (keep < candidates_.size() &&
           (keep == 0 || sum < static_cast<double>(params_.top_p) * total))
      sum += candidates_[keep++].weight;
    candidates_.resize(keep);
  }
  if (params_.min_p > 0)
    std::erase_if(candidates_, [&](const Candidate& c) {
      return c.weight < static_cast<double>(params_.min_p);
    });
  for (Candidate& c : candidates_)
    c.weight = exp_of_negative((static_cast<double>(c.logit) - static_cast<double>(best)) /
                               static_cast<double>(params_.temperature));
}

Token Sampler::draw() {
  double total = 0;
  for (const Candidate& c : candidates_) total += c.weight;
  const double uniform = static_cast<double>(next_random(rng_) >> 11) * 0x1p-53;  // [0, 1)
  double left = uniform * total;
  for (const Candidate& c : candidates_) {
    if (left < c.weight) return c.id;
    left -= c.weight;
  }
  // Rounding may leave a last crumb: the last candidate that can be drawn takes it.
  const auto drawable = std::find_if(candidates_.rbegin(), candidates_.rend(),
                                     [](const Candidate& c) { return c.weight > 0; });
  return drawable->id;
}

}  // namespace duet
