#include "runtime/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <unordered_map>
#include <utility>

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

// e^x for x <= 0, from additions, multiplications and powers of two only: libm's exp may differ in
// the last bit between machines, and a draw with it. Relative error below 1e-15. No call and no
// branch: a whole vocabulary may pass through here for each token.
double exp_of_negative(double x) {
  constexpr double kLog2e = 1.4426950408889634, kLn2High = 0.693147180369123816490,
                   kLn2Low = 1.90821492927058770002e-10, kLeast = -700;
  constexpr double kRound = 0x1.8p52;  // added: the integer nearest to a sum stands in its low bits
  const double bounded = std::max(x, kLeast);
  const double shifted = bounded * kLog2e + kRound, n = shifted - kRound;
  const double r = (bounded - n * kLn2High) - n * kLn2Low;
  // Taylor, |r| <= 0.347, the even and the odd powers side by side.
  const double s = r * r;
  const double even = 1 + s * (1.0 / 2 + s * (1.0 / 24 + s * (1.0 / 720 + s * (1.0 / 40320 + s * (1.0 / 3628800 + s * (1.0 / 479001600))))));
  const double odd = 1 + s * (1.0 / 6 + s * (1.0 / 120 + s * (1.0 / 5040 + s * (1.0 / 362880 + s * (1.0 / 39916800 + s * (1.0 / 6227020800))))));
  const double power = std::bit_cast<double>((std::bit_cast<uint64_t>(shifted) + 1023) << 52);
  const double result = (even + r * odd) * power;
  return x < kLeast ? 0 : result;
}

// Distance from the best logit in steps of 1/64: where order matters, candidates are sorted by these
// first and inside a step afterwards.
constexpr size_t kSteps = 2048;
size_t step_of(float best, float logit) {
  return static_cast<size_t>(std::min((best - logit) * 64.0f, static_cast<float>(kSteps - 1)));
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
  const float best_logit = scores[static_cast<size_t>(best)];
  const bool all = params_.top_k <= 0 || static_cast<size_t>(params_.top_k) >= scores.size();
  if (all && params_.top_p >= 1) {
    select_all(scores, best_logit);
    return draw();
  }
  if (all)
    select_mass(scores, best_logit);
  else
    select_count(scores, best_logit, static_cast<size_t>(params_.top_k));
  cut_by_probability(best_logit);
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

// Weights of all candidates at the temperature 1 / scale.
void Sampler::weigh(std::span<const float> logits, float best, double scale) {
  weights_.resize(logits.size());
  for (size_t i = 0; i < logits.size(); ++i)
    weights_[i] = exp_of_negative((static_cast<double>(logits[i]) - static_cast<double>(best)) * scale);
}

// In order of ids: all that min-p leaves.
void Sampler::select_all(std::span<const float> logits, float best) {
  weigh(logits, best, params_.min_p > 0 ? 1.0 : scale());
  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i)
    if (params_.min_p <= 0 || weights_[i] >= static_cast<double>(params_.min_p))
      candidates_.push_back({logits[i], static_cast<Token>(i), weights_[i]});
  if (params_.min_p > 0) apply_temperature(best);
}

// The `keep` best, best first.
void Sampler::select_count(std::span<const float> logits, float best, size_t keep) {
  steps_.assign(kSteps, 0);
  for (const float logit : logits) ++steps_[step_of(best, logit)];
  size_t n_steps = 0;
  for (size_t n = 0; n < keep; ++n_steps) n += steps_[n_steps];
  weights_.assign(logits.size(), 0);
  gather(logits, best, n_steps);
  candidates_.resize(keep);
  for (Candidate& c : candidates_) c.weight = exp_of_negative(static_cast<double>(c.logit) - static_cast<double>(best));
  total_ = 0;
  for (const Candidate& c : candidates_) total_ += c.weight;
}

// Best first, at least as many as reach top_p of the weight of all.
void Sampler::select_mass(std::span<const float> logits, float best) {
  weigh(logits, best, 1);
  steps_.assign(kSteps, 0);
  mass_.assign(kSteps, 0);
  for (size_t i = 0; i < logits.size(); ++i) {
    const size_t step = step_of(best, logits[i]);
    ++steps_[step];
    mass_[step] += weights_[i];
  }
  total_ = 0;
  for (const double mass : mass_) total_ += mass;
  // A little more than wanted: the exact cut adds the weights in another order.
  const double wanted = total_ * static_cast<double>(params_.top_p) * (1 + 1e-9);
  size_t n_steps = 1;
  for (double sum = mass_[0]; sum < wanted && n_steps < kSteps; ++n_steps) sum += mass_[n_steps];
  gather(logits, best, n_steps);
}

// Fills candidates_ with those of the first n_steps steps, best first.
void Sampler::gather(std::span<const float> logits, float best, size_t n_steps) {
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  size_t n = 0;
  for (size_t step = 0; step < n_steps; ++step) n += std::exchange(steps_[step], n);
  candidates_.resize(n);
  for (size_t i = 0; i < logits.size(); ++i) {
    const size_t step = step_of(best, logits[i]);
    if (step < n_steps) candidates_[steps_[step]++] = {logits[i], static_cast<Token>(i), weights_[i]};
  }
  for (size_t step = 0, first = 0; step < n_steps; first = steps_[step++])
    std::sort(candidates_.begin() + static_cast<ptrdiff_t>(first), candidates_.begin() + static_cast<ptrdiff_t>(steps_[step]), better);
}

// Top-p and min-p, both on the probabilities at temperature 1.
void Sampler::cut_by_probability(float best) {
  if (params_.top_p < 1) {
    double sum = 0;
    size_t keep = 0;
    while (keep < candidates_.size() &&
           (keep == 0 || sum < static_cast<double>(params_.top_p) * total_))
      sum += candidates_[keep++].weight;
    candidates_.resize(keep);
  }
  if (params_.min_p > 0)
    std::erase_if(candidates_, [&](const Candidate& c) {
      return c.weight < static_cast<double>(params_.min_p);
    });
  apply_temperature(best);
}

void Sampler::apply_temperature(float best) {
  for (Candidate& c : candidates_)
    c.weight = exp_of_negative((static_cast<double>(c.logit) - static_cast<double>(best)) * scale());
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
