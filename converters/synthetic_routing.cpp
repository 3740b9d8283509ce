#include "converters/synthetic_routing.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace duet {
namespace {

constexpr double kScore = 20;       // of a token with itself
// Correlation of logits by layer; heads of unequal rotations and what experts write leave about 0.8 of it.
constexpr double kFirst = 0.08, kMiddle = 0.33, kLast = 0.14;
constexpr int kContext = 256;       // tokens; more change little

double correlation_at(int layer, uint32_t n_layer) {
  if (n_layer < 2) return kMiddle;
  const double x = 2.0 * layer / (n_layer - 1);  // 1: the middle
  return x < 1 ? kFirst + (kMiddle - kFirst) * x : kMiddle + (kLast - kMiddle) * (x - 1);
}

uint64_t round_up(uint64_t n, uint64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

ContextRouting::ContextRouting(const HParams& hparams, size_t block_elems) : hparams_(hparams) {
  const uint64_t n = hparams.n_embd;
  n_constant_ = round_up(n / 16, block_elems);
  n_context_ = round_up(n / 4, block_elems);
  if (n_constant_ + n_context_ > n / 2)
    fail(ErrorKind::usage, "routing mixtral: rows of ", n, " elements have too few blocks of ", block_elems,
         "; use a type of smaller blocks, for instance Q8_0");
  const auto n_token = static_cast<double>(n - n_constant_ - n_context_);
  mean_square_ = static_cast<double>(n - n_context_) / static_cast<double>(n);
  const Sums past = sums();
  // A layer's values have variance n_token / n / mean_square_; its attention output goes through
  // weights of 1 / sqrt(2 n_layer).
  const double step = past.variance * n_token / static_cast<double>(n) / mean_square_ / (2.0 * hparams.n_layer);
  for (uint32_t layer = 0; layer < hparams.n_layer; ++layer) {
    const double share = std::min(1.0, correlation_at(static_cast<int>(layer), hparams.n_layer) / past.correlation);
    const double context_square = step * (layer + 1) * static_cast<double>(n_context_);
    token_weight_.push_back(static_cast<float>(std::sqrt((1 - share) * mean_square_ / n_token)));
    context_weight_.push_back(static_cast<float>(std::sqrt(share * mean_square_ / context_square)));
  }
}

// Attention weights by distance, of a head in which every rotation is as strong.
ContextRouting::Sums ContextRouting::sums() const {
  std::vector<double> weights(kContext);
  double total = 0;
  for (int distance = 0; distance < kContext; ++distance) {
    double cosines = 0;
    for (uint32_t i = 0; i < hparams_.n_rot; i += 2)
      cosines += std::cos(distance * std::pow(hparams_.rope_freq_base, -static_cast<double>(i) / hparams_.n_rot));
    weights[static_cast<size_t>(distance)] = std::exp(kScore * 2 * cosines / hparams_.n_rot);
    total += weights[static_cast<size_t>(distance)];
  }
  double squares = 0, neighbours = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    squares += weights[i] * weights[i];
    if (i > 0) neighbours += weights[i] * weights[i - 1];
  }
  return {squares / (total * total), neighbours / squares};
}

bool ContextRouting::is_kept(TensorKind kind, uint64_t row, uint64_t column) const {
  const uint64_t token = n_constant_ + n_context_;
  switch (kind) {
    case TensorKind::token_embd:
      return column < n_constant_ || column >= token;
    case TensorKind::attn_q:
    case TensorKind::attn_k:
      return column < n_constant_;
    case TensorKind::attn_v:
      return column >= token;
    case TensorKind::attn_output:
      return row >= n_constant_ && row < token;
    case TensorKind::ffn_down_exps:
      return row >= token;
    case TensorKind::ffn_gate_inp:
    case TensorKind::ffn_gate_exps:
    case TensorKind::ffn_up_exps:
      return column >= n_constant_;
    default:
      return true;
  }
}

bool ContextRouting::has_shared_columns(TensorKind kind) const {
  return kind == TensorKind::token_embd || kind == TensorKind::attn_q || kind == TensorKind::attn_k;
}

uint64_t ContextRouting::shared_row(TensorKind kind, uint64_t row) const {
  if (kind == TensorKind::token_embd) return 0;
  if (kind == TensorKind::attn_k) return row;
  const uint64_t head = row / hparams_.head_dim / (hparams_.n_head / hparams_.n_head_kv);
  return head * hparams_.head_dim + row % hparams_.head_dim;
}

// A score is the sum of the squares of head_dim elements, divided by sqrt(head_dim).
float ContextRouting::query_deviation() const {
  const double square = kScore / std::sqrt(static_cast<double>(hparams_.head_dim));
  return static_cast<float>(std::sqrt(square * mean_square_ / static_cast<double>(n_constant_)));
}

float ContextRouting::router_weight(int layer, uint64_t column) const {
  if (column < n_constant_) return 0;
  return (column < n_constant_ + n_context_ ? context_weight_ : token_weight_)[static_cast<size_t>(layer)];
}

}  // namespace duet
