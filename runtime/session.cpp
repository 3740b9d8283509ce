#include <algorithm>
#include <vector>

#include "runtime/decoder.h"
#include "runtime/engine_state.h"
#include "runtime/kv_cache.h"
#include "runtime/session_memory.h"

namespace duet {

struct Session::State {
  State(std::shared_ptr<const Engine::State> e, size_t n_context, size_t n_batch, const SessionOptions& options)
      : engine(std::move(e)),
        n_vocab(engine->model.hparams().n_vocab),
        n_ctx(n_context),
        cancel(options.cancel),
        products(options.products),
        decoder(engine->model, compute(), n_ctx, n_batch, engine->experts.get(),
                engine->forward_on_card({static_cast<uint32_t>(n_ctx), static_cast<uint32_t>(n_batch), 1, options.kv_type}, static_cast<bool>(products))),
        kv(engine->model.hparams(), decoder.on_card() ? 0 : n_ctx, options.kv_type),
        on_card(decoder.on_card() ? std::make_unique<gpu::Cache>(*engine->card, static_cast<uint32_t>(n_ctx), options.kv_type) : nullptr),
        logits(n_vocab),
        logit_rows(std::min(n_batch, kLogitRows) * n_vocab) {
    tokens.reserve(n_ctx);
    const HParams& hparams = engine->model.hparams();
    if (hparams.n_expert == 0) return;
    expert_uses.resize(size_t{hparams.n_layer} * hparams.n_expert);
    decoder.set_probe({.hidden = {}, .routing = [this, n = hparams.n_expert, routing = options.routing](int layer, std::span<const int32_t> chosen, std::span<const float>) {
      for (const int32_t expert : chosen) ++expert_uses[static_cast<size_t>(layer) * n + static_cast<size_t>(expert)];
      if (routing) routing(layer, chosen);
    }});
  }

  Compute compute() const {
    Compute out = engine->compute;
    out.observer = products ? &products : nullptr;
    return out;
  }
  void check(size_t n_kept, std::span<const Token> added) const;
  void evaluate(std::span<const Token> added, const Progress& progress, const LogitsSink& sink, size_t skip);
  void deliver(size_t first_row, size_t n_rows, const LogitsSink& sink);

  std::shared_ptr<const Engine::State> engine;
  size_t n_vocab, n_ctx;
  const std::atomic<bool>* cancel;
  const ProductObserver products;
  Decoder decoder;
  KvCache kv;
  std::unique_ptr<gpu::Cache> on_card;  // instead of kv, where a card computes
  std::vector<Token> tokens;       // those whose keys and values are in the cache
  AlignedArray<float> logits;      // [n_vocab] of the last token, when logits_valid
  AlignedArray<float> logit_rows;  // [kLogitRows, n_vocab]
  bool logits_valid = false;
  std::vector<uint64_t> expert_uses;  // [n_layer, n_expert]
};

void Session::State::check(size_t n_kept, std::span<const Token> added) const {
  for (size_t i = 0; i < added.size(); ++i)
    if (added[i] < 0 || static_cast<size_t>(added[i]) >= n_vocab)
      fail(ErrorKind::usage, "token id ", added[i], " at position ", n_kept + i, " is outside the vocabulary of ", n_vocab);
  if (added.size() > n_ctx - n_kept)
    fail(ErrorKind::usage, n_kept + added.size(), " tokens exceed the context of ", n_ctx,
         " positions; shorten the text or ask for a larger context");
}

// Batch by batch; `tokens` grows only with complete batches, so that an exception leaves a
// sequence that can be continued.
void Session::State::evaluate(std::span<const Token> added, const Progress& progress, const LogitsSink& sink, size_t skip) {
  check(tokens.size(), added);
  if (added.empty()) return;
  logits_valid = false;
  for (size_t done = 0; done < added.size();) {
    const auto batch = added.subspan(done, std::min(decoder.n_batch(), added.size() - done));
    const bool last = done + batch.size() == added.size();
    const size_t unwanted = std::clamp<size_t>(skip, done, done + batch.size()) - done;
    const bool delivers_last = sink && unwanted < batch.size();
    const size_t n_outputs = delivers_last ? batch.size() - unwanted : last ? 1 : 0;
    decoder.with_team([&] {
      const TokenRun run{batch, tokens.size(), &kv, on_card.get(), n_outputs};
      decoder.forward({&run, 1}, cancel, std::min(decoder.n_batch(), added.size() - done - batch.size()));
      if (last && !delivers_last) decoder.logits(batch.size() - 1, 1, logits.data());
    });
    if (engine->experts) engine->experts->check_unchanged();
    tokens.insert(tokens.end(), batch.begin(), batch.end());
    done += batch.size();
    logits_valid = last && !delivers_last;
    engine->after_chunk(batch.size());
    if (delivers_last) deliver(unwanted, batch.size() - unwanted, sink);
    logits_valid = last;
    if (progress) progress(done, added.size());
  }
}

// Rows [first_row, first_row + n_rows) of the batch that ends the sequence; `logits` becomes the last.
void Session::State::deliver(size_t first_row, size_t n_rows, const LogitsSink& sink) {
  const size_t batch_start = tokens.size() - first_row - n_rows;
  for (size_t row = first_row; row < first_row + n_rows;) {
    const size_t n = std::min(std::min(decoder.n_batch(), kLogitRows), first_row + n_rows - row);
    decoder.logits(row, n, logit_rows.data());
    if (row + n == first_row + n_rows) std::copy_n(logit_rows.data() + (n - 1) * n_vocab, n_vocab, logits.data());
    sink(batch_start + row, n, {logit_rows.data(), n * n_vocab});
    row += n;
  }
}

Session Engine::new_session(const SessionOptions& options) const {
  const SessionSize size = session_size(*this, options.n_ctx, options.n_batch, 1, options.kv_type, state_->notice);
  return Session(std::make_unique<Session::State>(state_, size.n_ctx, size.n_batch, options));
}

Session::Session(std::unique_ptr<State> state) : state_(std::move(state)) {}
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

std::span<const Token> Session::tokens() const { return state_->tokens; }
uint32_t Session::n_ctx() const { return static_cast<uint32_t>(state_->n_ctx); }
size_t Session::kv_bytes() const { return state_->on_card ? state_->on_card->size_bytes() : state_->kv.size_bytes(); }

void Session::sync(std::span<const Token> prompt, const Progress& progress) {
  if (prompt.empty()) fail(ErrorKind::usage, "the prompt is empty: nothing to evaluate");
  state_->check(0, prompt);
  const auto& have = state_->tokens;
  const size_t limit = std::min(have.size(), prompt.size() - 1);  // the last one is always evaluated
  size_t same = 0;
  while (same < limit && have[same] == prompt[same]) ++same;
  truncate(same);
  state_->evaluate(prompt.subspan(same), progress, {}, 0);
}

void Session::append(std::span<const Token> tokens, const Progress& progress) {
  state_->evaluate(tokens, progress, {}, 0);
}

void Session::append_all_logits(std::span<const Token> tokens, const LogitsSink& sink, size_t skip) {
  state_->evaluate(tokens, {}, sink, skip);
}

void Session::truncate(size_t n) {
  if (n >= state_->tokens.size()) return;
  state_->tokens.resize(n);
  state_->logits_valid = false;
}

std::span<const float> Session::logits() const {
  if (!state_->logits_valid) fail(ErrorKind::usage, "no logits: no token has been evaluated since the sequence began or was cut");
  return {state_->logits.data(), state_->n_vocab};
}

std::span<const uint64_t> Session::expert_uses() const { return state_->expert_uses; }

}  // namespace duet
