// Logits of a token sequence, and their comparison to the bit.
#pragma once

#include <span>
#include <vector>

#include "runtime/engine.h"

namespace duet::test {

// n ids that are spread over the vocabulary, the same in every run.
std::vector<Token> some_tokens(size_t n, uint32_t n_vocab);

EngineOptions with_threads(int n_threads, const std::vector<LoraChoice>& loras = {});

// Of every token appended, [n_tokens, n_vocab].
std::vector<float> all_logits(Session& session, std::span<const Token> tokens);

bool same_bits(const std::vector<float>& a, const std::vector<float>& b);

}  // namespace duet::test
