#include "runtime/batch.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "runtime/decoder.h"
#include "runtime/engine_state.h"
#include "runtime/fingerprint.h"
#include "runtime/kv_cache.h"
#include "runtime/session_memory.h"

namespace duet {

struct Sequence::State {
  KvCache kv;
  std::shared_ptr<const void> engine;   // which owns the card
  std::unique_ptr<gpu::Cache> on_card;  // instead of kv, where a card computes
  std::vector<Token> tokens;  // those whose keys and values are in the cache
  size_t most = 0;            // tokens ever held
};

Sequence::Sequence(std::unique_ptr<State> state) : state_(std::move(state)) {}
Sequence::Sequence(Sequence&&) noexcept = default;
Sequence& Sequence::operator=(Sequence&&) noexcept = default;
Sequence::~Sequence() = default;

std::span<const Token> Sequence::tokens() const { return state_->tokens; }
size_t Sequence::bytes() const { return state_->on_card ? state_->on_card->size_bytes() : state_->kv.touched_bytes(state_->most); }

void Sequence::truncate(size_t n) {
  if (n < state_->tokens.size()) state_->tokens.resize(n);
}

void Sequence::copy_prefix(const Sequence& from, size_t n) {
  DUET_ASSERT(n <= from.state_->tokens.size());
  if (state_->on_card) state_->on_card->copy_prefix(*from.state_->on_card, n);
  else state_->kv.copy_prefix(from.state_->kv, n);
  state_->tokens.assign(from.state_->tokens.begin(), from.state_->tokens.begin() + static_cast<ptrdiff_t>(n));
  state_->most = std::max(state_->most, n);
}

static_assert(Sequence::kBlock == kKvSegment);

size_t Sequence::n_layer() const { return state_->kv.n_layer(); }
size_t Sequence::block_bytes(size_t n) const { return state_->on_card ? state_->on_card->block_bytes(n) : state_->kv.piece_bytes(n); }

void Sequence::save(size_t layer, size_t block, size_t n, std::span<std::byte> out) const {
  DUET_ASSERT(block * kBlock + n <= state_->tokens.size() && out.size() == block_bytes(n));
  if (state_->on_card) return state_->on_card->save(layer, block, n, out);
  state_->kv.visit(layer, block, n, [&](std::span<std::byte> piece) {
    std::memcpy(out.data(), piece.data(), piece.size());
    out = out.subspan(piece.size());
  });
}

void Sequence::load(size_t layer, size_t block, size_t n, std::span<const std::byte> in) {
  DUET_ASSERT(in.size() == block_bytes(n));
  if (state_->on_card) return state_->on_card->load(layer, block, n, in);
  state_->kv.visit(layer, block, n, [&](std::span<std::byte> piece) {
    std::memcpy(piece.data(), in.data(), piece.size());
    in = in.subspan(piece.size());
  });
}

void Sequence::continue_with(std::span<const Token> tokens) {
  DUET_ASSERT(state_->tokens.size() + tokens.size() <= (state_->on_card ? state_->on_card->n_ctx() : state_->kv.n_ctx()));
  state_->tokens.insert(state_->tokens.end(), tokens.begin(), tokens.end());
  state_->most = std::max(state_->most, state_->tokens.size());
}

struct Batch::State {
  State(std::shared_ptr<const Engine::State> e, const SessionSize& s, const BatchOptions& options)
      : engine(std::move(e)),
        size(s),
        kv_type(options.kv_type),
        cancel(options.cancel),
        n_vocab(engine->model.hparams().n_vocab),
        decoder(engine->model, engine->compute, size.n_ctx, size.n_batch, engine->experts.get(),
                engine->forward_on_card({size.n_ctx, size.n_batch, options.n_sequences, options.kv_type}, false)),
        logits(std::min<size_t>(size.n_batch, kMaxLogitRows) * n_vocab) {
    runs.reserve(size.n_batch);
    if (options.routing && engine->model.hparams().n_expert > 0)
      decoder.set_probe({.hidden = {}, .routing = [routing = options.routing](int layer, std::span<const int32_t> chosen, std::span<const float>) { routing(layer, chosen); }});
  }
  void check(const Part& part) const;

  std::shared_ptr<const Engine::State> engine;
  SessionSize size;
  KvType kv_type;
  const std::atomic<bool>* cancel;
  size_t n_vocab;
  Decoder decoder;
  std::vector<TokenRun> runs;
  AlignedArray<float> logits;  // [kMaxLogitRows, n_vocab]
};

void Batch::State::check(const Part& part) const {
  for (const Token id : part.tokens)
    if (id < 0 || static_cast<size_t>(id) >= n_vocab) fail(ErrorKind::usage, "token id ", id, " is outside the vocabulary of ", n_vocab);
  const size_t n = part.sequence->tokens().size() + part.tokens.size();
  if (n > size.n_ctx) fail(ErrorKind::usage, n, " tokens exceed the context of ", size.n_ctx, " positions");
}

Batch::Batch(const Engine& engine, const BatchOptions& options)
    : state_(std::make_unique<State>(engine.state_, session_size(engine, options.n_ctx, options.n_batch, options.n_sequences, options.kv_type, engine.state_->notice), options)) {}
Batch::Batch(Batch&&) noexcept = default;
Batch::~Batch() = default;

uint32_t Batch::n_ctx() const { return state_->size.n_ctx; }
uint32_t Batch::n_batch() const { return state_->size.n_batch; }

size_t Batch::sequence_bytes() const {
  const HParams& hparams = state_->engine->model.hparams();
  return state_->decoder.on_card() ? gpu::cache_bytes(hparams, state_->size.n_ctx, state_->kv_type) : KvCache::bytes_needed(hparams, state_->size.n_ctx, state_->kv_type);
}

Sequence Batch::new_sequence() const {
  const State& s = *state_;
  const bool on_card = s.decoder.on_card();
  return Sequence(std::make_unique<Sequence::State>(
      Sequence::State{KvCache(s.engine->model.hparams(), on_card ? 0 : s.size.n_ctx, s.kv_type), on_card ? s.engine : nullptr,
                      on_card ? std::make_unique<gpu::Cache>(*s.engine->card, s.size.n_ctx, s.kv_type) : nullptr, {}, 0}));
}

std::string Batch::fingerprint() const {
  const Engine::State& engine = *state_->engine;
  return fingerprint_of(engine.model.file(), concat(engine.info.isa, " K/V type ", static_cast<int>(state_->kv_type),
                                                   state_->decoder.on_card() ? concat(" ", engine.info.gpu, " from layer ", engine.card->plan().first_layer) : ""));
}

void Batch::evaluate(std::span<const Part> parts) {
  State& s = *state_;
  s.runs.clear();
  size_t n = 0;
  for (const Part& part : parts) {
    s.check(part);
    s.runs.push_back({part.tokens, part.sequence->tokens().size(), &part.sequence->state_->kv, part.sequence->state_->on_card.get(), part.n_outputs});
    n += part.tokens.size();
  }
  s.decoder.forward(s.runs, s.cancel);
  if (s.engine->experts) s.engine->experts->check_unchanged();
  for (const Part& part : parts) {
    Sequence::State& sequence = *part.sequence->state_;
    sequence.tokens.insert(sequence.tokens.end(), part.tokens.begin(), part.tokens.end());
    sequence.most = std::max(sequence.most, sequence.tokens.size());
  }
  s.engine->after_chunk(n);
}

std::vector<float> Batch::hidden(size_t row) {
  std::vector<float> out(state_->engine->model.hparams().n_embd);
  state_->decoder.hidden({&row, 1}, out.data());
  return out;
}

std::span<const float> Batch::logits(std::span<const size_t> rows) {
  State& s = *state_;
  DUET_ASSERT(rows.size() <= kMaxLogitRows);
  s.decoder.logits(rows, s.logits.data());
  return {s.logits.data(), rows.size() * s.n_vocab};
}

}  // namespace duet
