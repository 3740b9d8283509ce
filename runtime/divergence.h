// How far a model's predictions are from those of another: Kullback-Leibler divergence, perplexity
// ratio, agreement. The figures of llama.cpp's perplexity tool with --kl-divergence.
//
//   KLD of a position = sum over tokens of p (log p - log q), p the reference's, q the model's
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/logits_reference.h"
#include "runtime/perplexity.h"

namespace duet {

struct Estimate {
  double value = 0, error = 0;  // one standard error
};

struct DivergenceResult {
  size_t n_tokens = 0, n_chunks = 0;
  uint32_t n_ctx = 0;
  Estimate perplexity, reference_perplexity;
  Estimate log_ratio, ratio;  // of the perplexities, model over reference
  Estimate kld;               // mean
  double kld_median = 0, kld_90 = 0, kld_95 = 0, kld_99 = 0, kld_999 = 0, kld_max = 0;
  Estimate same_top;          // share of positions with the same most probable token
  Estimate rms_difference;    // of the next token's probability, root of the mean square
  Estimate mean_difference;   // model less reference
  std::vector<float> token_kld;  // [n_tokens]
};

// Position by position. Statistics with fewer than 2 positions have no errors.
class DivergenceMeter {
 public:
  // logits [n_rows, n_vocab]; targets, reference: of the same rows. Error(format) when logits are not finite.
  void add(std::span<const float> logits, std::span<const Token> targets, const ReferenceRows& reference, int n_threads);
  DivergenceResult result() const;  // without n_chunks, n_ctx

 private:
  std::vector<float> kld_, nll_, reference_nll_;
  size_t n_same_ = 0;
};

// Evaluates the reference's tokens with the model. options: n_ctx and max_chunks are the reference's.
// Error(format) when the vocabulary is of another size.
DivergenceResult divergence(const Engine& engine, LogitsReferenceReader& reference, PerplexityOptions options);

// Perplexity of a text, its predictions written to `path` as a reference that names `model`.
PerplexityResult save_reference(const Engine& engine, std::string_view text, const std::string& model,
                                const std::filesystem::path& path, PerplexityOptions options);

}  // namespace duet
