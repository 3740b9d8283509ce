#include "runtime/perplexity.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/parallel.h"

namespace duet {
namespace {

// Mean, standard error and perplexity of what has been scored.
void summarize(PerplexityResult& result) {
  double sum = 0, squares = 0;
  for (const float nll : result.token_nll) {
    sum += double{nll};
    squares += double{nll} * double{nll};
  }
  const double n = static_cast<double>(result.token_nll.size());
  result.n_tokens = result.token_nll.size();
  result.nll = sum / n;
  const double variance = std::max(squares / n - result.nll * result.nll, 0.0);
  result.nll_stderr = n > 1 ? std::sqrt(variance / (n - 1)) : 0;
  result.perplexity = std::exp(result.nll);
}

void score_chunk(Session& session, std::span<const Token> chunk, int n_threads, const PerplexityOptions& options,
                 std::vector<float>& token_nll) {
  const size_t first = chunk.size() / 2, base = token_nll.size();
  token_nll.resize(base + chunk.size() - 1 - first);
  session.truncate(0);
  session.append_all_logits(
      chunk.first(chunk.size() - 1),
      [&](size_t pos, size_t n_rows, std::span<const float> logits) {
        const size_t n_vocab = logits.size() / n_rows;
        parallel_for(n_threads, n_rows, 4, [&](size_t begin, size_t end) {
          for (size_t i = begin; i < end; ++i)
            token_nll[base + pos + i - first] = static_cast<float>(
                negative_log_likelihood(logits.subspan(i * n_vocab, n_vocab), chunk[pos + i + 1]));
        });
        if (options.rows) options.rows(logits, chunk.subspan(pos + 1, n_rows));
      },
      first);
}

std::vector<Token> cut_chunks(std::span<const Token> ids, std::optional<Token> bos, uint32_t n_ctx, size_t max_chunks) {
  if (n_ctx < 4) fail(ErrorKind::usage, "perplexity: a context of ", n_ctx, " is too short; at least 4");
  const size_t fitting = ids.size() / n_ctx;
  if (fitting == 0)
    fail(ErrorKind::usage, "perplexity: the text has ", ids.size(), " tokens, one chunk needs ", n_ctx,
         "; give a longer text or a smaller context");
  const size_t n_chunks = max_chunks > 0 ? std::min(fitting, max_chunks) : fitting;
  std::vector<Token> out(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(n_chunks * n_ctx));
  for (size_t i = 0; bos && i < n_chunks; ++i) out[i * n_ctx] = *bos;
  return out;
}

}  // namespace

double negative_log_likelihood(std::span<const float> logits, Token target) {
  const double best = double{*std::max_element(logits.begin(), logits.end())};
  double sum = 0;
  for (const float x : logits) sum += std::exp(double{x} - best);
  return std::log(sum) - (double{logits[static_cast<size_t>(target)]} - best);
}

std::vector<Token> perplexity_chunks(const Engine& engine, std::string_view text, uint32_t n_ctx, size_t max_chunks) {
  const Tokenizer& tokenizer = engine.tokenizer();
  std::vector<Token> ids = tokenizer.encode(text);
  std::optional<Token> bos;
  if (tokenizer.add_bos()) bos = tokenizer.bos();
  if (bos) ids.insert(ids.begin(), *bos);
  return cut_chunks(ids, bos, n_ctx, max_chunks);
}

PerplexityResult perplexity(const Engine& engine, std::string_view text, const PerplexityOptions& options) {
  return perplexity(engine, perplexity_chunks(engine, text, options.n_ctx, options.max_chunks), std::nullopt, options);
}

PerplexityResult perplexity(const Engine& engine, std::span<const Token> ids, std::optional<Token> bos,
                            const PerplexityOptions& options) {
  const std::vector<Token> chunks = cut_chunks(ids, bos, options.n_ctx, options.max_chunks);
  const size_t n_chunks = chunks.size() / options.n_ctx;
  Session session = engine.new_session({.n_ctx = options.n_ctx, .n_batch = options.n_batch,
                                        .kv_type = options.kv_type, .cancel = options.cancel});
  PerplexityResult result;
  result.n_ctx = options.n_ctx;
  for (size_t i = 0; i < n_chunks; ++i) {
    score_chunk(session, std::span(chunks).subspan(i * options.n_ctx, options.n_ctx), engine.info().n_threads, options, result.token_nll);
    result.n_chunks = i + 1;
    summarize(result);
    if (!std::isfinite(result.nll))
      fail(ErrorKind::format, "perplexity: chunk ", i + 1, " has a token without a finite probability: a weight of the model is NaN or infinite (duet verify finds it)");
    if (options.progress) options.progress(result, n_chunks);
  }
  return result;
}

}  // namespace duet
