// Choosing the next token from logits.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/tokenizer.h"

namespace duet {

// Order of application: penalties, top-k, top-p, min-p, temperature, draw. temperature <= 0 is
// greedy (after penalties; the lowest id wins a tie).
struct SamplerParams {
  float temperature = 0.8f;
  int32_t top_k = 40;           // <= 0: off
  float top_p = 0.95f;          // >= 1: off
  float min_p = 0.05f;          // <= 0: off
  float repeat_penalty = 1.0f;  // divides positive / multiplies negative logits; 1: off
  float presence_penalty = 0.0f, frequency_penalty = 0.0f;
  int32_t penalty_last_n = 64;  // window of the penalties; -1: whole sequence
  uint64_t seed = 0;
};

// One sequence's sampler. Same seed, logits and history give the same tokens on every machine.
class Sampler {
 public:
  explicit Sampler(const SamplerParams& params);  // Error(usage) on NaN or out-of-range values
  // Does not accept. Error(internal) on logits that are NaN or have no finite maximum.
  Token sample(std::span<const float> logits);
  void accept(Token token);  // history for the penalties (prompt tokens too)

 private:
  struct Candidate {
    float logit;
    Token id;
    double weight;  // of the draw, relative to the best candidate's 1
  };
  std::span<const float> penalized(std::span<const float> logits);
  double scale() const { return 1.0 / static_cast<double>(params_.temperature); }
  void weigh(std::span<const float> logits, float best, double scale);
  void select_all(std::span<const float> logits, float best);
  void select_count(std::span<const float> logits, float best, size_t keep);
  void select_mass(std::span<const float> logits, float best);
  void gather(std::span<const float> logits, float best, size_t n_steps);
  void cut_by_probability(float best);
  void apply_temperature(float best);
  Token draw();

  SamplerParams params_;
  uint64_t rng_;
  std::vector<Token> history_;
  std::vector<float> penalized_;       // scratch
  std::vector<double> weights_;        // scratch: by id
  std::vector<size_t> steps_;          // scratch: candidates by distance from the best
  std::vector<double> mass_;           // scratch: their weight
  double total_ = 0;                   // weight that top-p is a share of
  std::vector<Candidate> candidates_;  // scratch: best first where an order was needed
};

}  // namespace duet
