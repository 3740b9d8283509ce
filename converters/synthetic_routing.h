// Synthetic models whose consecutive tokens share experts as often as those of Mixtral do (Table 5 of
// the Mixtral paper, arXiv 2401.04088), although the tokens themselves are random and independent.
//
// What two neighbours can have in common is their context. The residual stream is divided:
//
//   columns    constant | context | token          (1/16, 1/4, the rest)
//   embedding  the same | 0       | random         of every token
//
// Queries and keys read the constant columns alone, with the same weights: all are one vector turned
// by its position, and a score depends on the distance only. It is largest for the token itself and
// falls over the next few, because the fast rotations then disagree; large scores make the softmax
// drop the rest of the context. Values read the token columns, attention writes the context columns,
// experts the token columns. So the context columns hold a sum over the last few tokens, which drifts
// from token to token, without a mean that would favour some experts; the router, stored as floats,
// takes its share of context and token in any proportion:
//
//   correlation of a logit with the next token's = context share * correlation of the sums
//
// The correlation wanted rises from the first layer to the middle one and falls to the last. A
// correlation of 0.25 makes two tokens share one of two experts of eight in 62 % of cases (0: 46 %).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "formats/schema.h"

namespace duet {

class ContextRouting {
 public:
  // Error(usage) when rows of blocks of block_elems cannot be divided so.
  ContextRouting(const HParams& hparams, size_t block_elems);

  // Whether element (row, column) of a matrix may differ from zero.
  bool is_kept(TensorKind kind, uint64_t row, uint64_t column) const;
  // The constant columns of embeddings, queries and keys: rows with the same number here are equal.
  bool has_shared_columns(TensorKind kind) const;
  uint64_t shared_row(TensorKind kind, uint64_t row) const;
  uint64_t n_constant() const { return n_constant_; }

  float query_deviation() const;  // of the elements of attn_q and attn_k
  // Magnitude of the elements of a layer's router in this column.
  float router_weight(int layer, uint64_t column) const;

 private:
  struct Sums {
    double variance, correlation;  // of the weighted sums over past tokens, lag one
  };
  Sums sums() const;

  HParams hparams_;
  uint64_t n_constant_, n_context_;
  double mean_square_;  // of the residual stream
  std::vector<float> token_weight_, context_weight_;  // [n_layer]
};

}  // namespace duet
