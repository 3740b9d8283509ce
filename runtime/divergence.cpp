#include "runtime/divergence.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "base/parallel.h"

namespace duet {
namespace {

// Mean and standard error of f(i), i in [0, n).
template <class F>
Estimate mean_of(size_t n, const F& f) {
  if (n == 0) return {};
  double sum = 0, squares = 0;
  for (size_t i = 0; i < n; ++i) sum += f(i);
  const double mean = sum / static_cast<double>(n);
  for (size_t i = 0; i < n; ++i) squares += (f(i) - mean) * (f(i) - mean);
  return {mean, n > 1 ? std::sqrt(squares / static_cast<double>(n) / static_cast<double>(n - 1)) : 0};
}

Estimate exponential(const Estimate& e) { return {std::exp(e.value), std::exp(e.value) * e.error}; }

// Between the two values around it.
double quantile(const std::vector<float>& sorted, double share) {
  const double at = share * static_cast<double>(sorted.size() - 1);
  const auto i = static_cast<size_t>(at);
  const double rest = at - static_cast<double>(i);
  return (1 - rest) * double{sorted[i]} + rest * double{sorted[std::min(i + 1, sorted.size() - 1)]};
}

struct Row {
  double nll, kld;
  bool same_top;
};

Row compare(std::span<const float> logits, Token target, const float* p, uint32_t top) {
  const auto best = std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float x : logits) sum += std::exp(double{x} - double{*best});
  const double offset = double{*best} + std::log(sum);
  double kld = 0;
  for (size_t i = 0; i < logits.size(); ++i)
    if (p[i] > 0) kld += double{p[i]} * (std::log(double{p[i]}) - (double{logits[i]} - offset));
  return {offset - double{logits[static_cast<size_t>(target)]}, kld, static_cast<uint32_t>(best - logits.begin()) == top};
}

}  // namespace

void DivergenceMeter::add(std::span<const float> logits, std::span<const Token> targets, const ReferenceRows& reference, int n_threads) {
  const size_t n = targets.size(), n_vocab = logits.size() / n;
  std::vector<Row> rows(n);
  parallel_for(n_threads, n, 1, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i)
      rows[i] = compare(logits.subspan(i * n_vocab, n_vocab), targets[i], reference.probs.data() + i * n_vocab, reference.top[i]);
  });
  for (size_t i = 0; i < n; ++i) {
    if (!std::isfinite(rows[i].nll)) fail(ErrorKind::format, "the model's logits are not finite: the model or the file is damaged");
    kld_.push_back(static_cast<float>(rows[i].kld));
    nll_.push_back(static_cast<float>(rows[i].nll));
    reference_nll_.push_back(reference.nll[i]);
    n_same_ += rows[i].same_top;
  }
}

DivergenceResult DivergenceMeter::result() const {
  DivergenceResult out;
  const size_t n = out.n_tokens = kld_.size();
  if (n == 0) return out;
  out.perplexity = exponential(mean_of(n, [&](size_t i) { return double{nll_[i]}; }));
  out.reference_perplexity = exponential(mean_of(n, [&](size_t i) { return double{reference_nll_[i]}; }));
  out.log_ratio = mean_of(n, [&](size_t i) { return double{nll_[i]} - double{reference_nll_[i]}; });
  out.ratio = exponential(out.log_ratio);
  out.kld = mean_of(n, [&](size_t i) { return double{kld_[i]}; });
  const double same = static_cast<double>(n_same_) / static_cast<double>(n);
  out.same_top = {same, n > 1 ? std::sqrt(same * (1 - same) / static_cast<double>(n - 1)) : 0};
  const auto difference = [&](size_t i) { return std::exp(-double{nll_[i]}) - std::exp(-double{reference_nll_[i]}); };
  out.mean_difference = mean_of(n, difference);
  const Estimate square = mean_of(n, [&](size_t i) { return difference(i) * difference(i); });
  out.rms_difference.value = std::sqrt(square.value);
  out.rms_difference.error = square.value > 0 ? square.error / (2 * out.rms_difference.value) : 0;
  out.token_kld = kld_;
  std::vector<float> sorted = kld_;
  std::sort(sorted.begin(), sorted.end());
  out.kld_median = quantile(sorted, 0.5);
  out.kld_90 = quantile(sorted, 0.9);
  out.kld_95 = quantile(sorted, 0.95);
  out.kld_99 = quantile(sorted, 0.99);
  out.kld_999 = quantile(sorted, 0.999);
  out.kld_max = double{sorted.back()};
  return out;
}

DivergenceResult divergence(const Engine& engine, LogitsReferenceReader& reference, PerplexityOptions options) {
  const LogitsReferenceHeader& header = reference.header();
  if (header.n_vocab != engine.info().hparams.n_vocab)
    fail(ErrorKind::format, reference.source(), ": made with a vocabulary of ", header.n_vocab, ", the model has ",
         engine.info().hparams.n_vocab, "; the two cannot be compared");
  DivergenceMeter meter;
  ReferenceRows rows;
  const int n_threads = engine.info().n_threads;
  options.n_ctx = header.n_ctx;
  options.max_chunks = 0;
  options.rows = [&](std::span<const float> logits, std::span<const Token> targets) {
    reference.read(targets.size(), n_threads, rows);
    meter.add(logits, targets, rows, n_threads);
  };
  const PerplexityResult scored = perplexity(engine, header.tokens, std::nullopt, options);
  DivergenceResult out = meter.result();
  out.n_chunks = scored.n_chunks;
  out.n_ctx = scored.n_ctx;
  return out;
}

PerplexityResult save_reference(const Engine& engine, std::string_view text, const std::string& model,
                                const std::filesystem::path& path, PerplexityOptions options) {
  std::vector<Token> ids = perplexity_chunks(engine, text, options.n_ctx, options.max_chunks);
  const auto n_chunks = static_cast<uint32_t>(ids.size() / options.n_ctx);
  const LogitsReferenceHeader header{model, engine.info().hparams.n_vocab, options.n_ctx, n_chunks, std::move(ids)};
  LogitsReferenceWriter writer(path, header);
  options.rows = [&](std::span<const float> logits, std::span<const Token> targets) { writer.add(logits, targets, engine.info().n_threads); };
  const PerplexityResult result = perplexity(engine, header.tokens, std::nullopt, options);
  writer.finish();
  return result;
}

}  // namespace duet
