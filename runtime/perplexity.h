// Perplexity of a text by the method of llama.cpp's tool, so that published figures compare.
//
// The whole text is encoded once with BOS (where the vocabulary wants one) and cut into chunks of
// n_ctx ids; a last incomplete one is dropped. In each chunk, evaluated on its own, the first id is
// replaced by BOS and positions n_ctx/2 .. n_ctx-2 predict their next ids.
#pragma once

#include <atomic>
#include <functional>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "runtime/engine.h"

namespace duet {

struct PerplexityResult {
  double perplexity = 0;   // exp(nll)
  double nll = 0;          // mean negative log-likelihood per token, nats
  double nll_stderr = 0;   // standard error of nll; that of the perplexity is perplexity * nll_stderr
  size_t n_tokens = 0;     // scored
  size_t n_chunks = 0;
  uint32_t n_ctx = 0;
  std::vector<float> token_nll;  // [n_tokens], in text order
};

struct PerplexityOptions {
  uint32_t n_ctx = 512;
  uint32_t n_batch = 0;  // 0: the memory plan's
  size_t max_chunks = 0;           // 0: all
  KvType kv_type = KvType::f32;
  const std::atomic<bool>* cancel = nullptr;
  // Logits of scored positions [n_rows, n_vocab], in text order, and the tokens that follow them [n_rows].
  std::function<void(std::span<const float> logits, std::span<const Token> targets)> rows = {};
  // After each chunk: the result so far (without token_nll) and how many chunks there will be.
  std::function<void(const PerplexityResult& so_far, size_t n_chunks)> progress = {};
};

// The ids of whole chunks of a text, [n_chunks, n_ctx], each beginning with BOS where the vocabulary
// wants one; max_chunks 0: all. Error(usage) when the text is shorter than one chunk.
std::vector<Token> perplexity_chunks(const Engine& engine, std::string_view text, uint32_t n_ctx, size_t max_chunks);

// Error(usage) when the text is shorter than one chunk or n_ctx is too small to score anything.
PerplexityResult perplexity(const Engine& engine, std::string_view text, const PerplexityOptions& options);

// The same from ids; `bos` replaces the first id of each chunk.
PerplexityResult perplexity(const Engine& engine, std::span<const Token> ids, std::optional<Token> bos,
                            const PerplexityOptions& options);

// -log softmax(logits)[target], in double precision.
double negative_log_likelihood(std::span<const float> logits, Token target);

}  // namespace duet
