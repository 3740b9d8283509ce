#include "server/logprobs.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace duet::server {

TokenRecord logprob_record(std::span<const float> logits, Token id, size_t n_top) {
  const double max = double{*std::max_element(logits.begin(), logits.end())};
  double sum = 0;
  for (const float logit : logits) sum += std::exp(double{logit} - max);
  const double log_sum = max + std::log(sum);
  const auto logprob = [&](Token token) { return static_cast<float>(double{logits[static_cast<size_t>(token)]} - log_sum); };
  TokenRecord record{id, logprob(id), {}};
  std::vector<Token> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  n_top = std::min(n_top, ids.size());
  const auto better = [&](Token a, Token b) {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x != y ? x > y : a < b;
  };
  std::partial_sort(ids.begin(), ids.begin() + static_cast<ptrdiff_t>(n_top), ids.end(), better);
  for (size_t i = 0; i < n_top; ++i) record.top.emplace_back(ids[i], logprob(ids[i]));
  return record;
}

}  // namespace duet::server
