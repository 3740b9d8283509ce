#include "tests/support/logits.h"

#include <cstring>

namespace duet::test {

std::vector<Token> some_tokens(size_t n, uint32_t n_vocab) {
  std::vector<Token> out(n);
  for (size_t i = 0; i < n; ++i) out[i] = static_cast<Token>((i * i * 7 + i * 13 + 1) % n_vocab);
  return out;
}

EngineOptions with_threads(int n_threads, const std::vector<LoraChoice>& loras) {
  EngineOptions options;
  options.n_threads = n_threads;
  options.loras = loras;
  return options;
}

std::vector<float> all_logits(Session& session, std::span<const Token> tokens) {
  std::vector<float> out;
  session.append_all_logits(tokens, [&](size_t, size_t, std::span<const float> logits) {
    out.insert(out.end(), logits.begin(), logits.end());
  });
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace duet::test
