#include "runtime/decoder.h"

#include <algorithm>
#include <numeric>

namespace duet {

Decoder::Decoder(const Model& model, const Compute& compute, size_t n_ctx, size_t n_batch, ExpertSource* source, std::unique_ptr<gpu::Forward> card)
    : model_(&model),
      panels_(static_cast<size_t>(compute.n_threads) * kPanelFloats),
      compute_{compute.kernels, compute.n_threads, panels_.data(), compute.placement, compute.observer},
      source_(source),
      n_batch_(n_batch),
      n_embd_(model.hparams().n_embd),
      residual_(n_batch * n_embd_),
      input_(n_batch, n_embd_),
      attention_(model.hparams(), model.rope_factors(), compute_, n_ctx, n_batch),
      moe_(model, compute_, n_batch, source),
      card_(std::move(card)) {
  tokens_.reserve(n_batch);
  outputs_.reserve(n_batch);
  runs_.reserve(n_batch);
  output_runs_.reserve(n_batch);
}

uint64_t Decoder::bytes_needed(const HParams& hparams, int n_threads, size_t n_ctx, size_t n_batch) {
  return sizeof(float) * (n_batch * 2 * hparams.n_embd + static_cast<uint64_t>(n_threads) * kPanelFloats) + Attention::bytes_needed(hparams, n_threads, n_ctx, n_batch) +
         Moe::bytes_needed(hparams, n_batch);
}

void Decoder::embed(float* rows) {
  const Weight& table = model_->token_embd();
  const auto decode = compute_.kernels->decode_row[static_cast<size_t>(table.format->dtype)];
  parallel_for(compute_.n_threads, n_, 64, [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t)
      decode(table.data + static_cast<size_t>(tokens_[t]) * table.row_bytes, rows + t * n_embd_, n_embd_);
  });
}

void Decoder::forward(std::span<const Token> tokens, size_t first, KvCache& kv, const std::atomic<bool>* cancel, size_t n_next) {
  const TokenRun run{tokens, first, &kv};
  forward({&run, 1}, cancel, n_next);
}

void Decoder::forward(std::span<const TokenRun> runs, const std::atomic<bool>* cancel, size_t n_next) {
  tokens_.clear();
  runs_.clear();
  card_runs_.clear();
  for (const TokenRun& run : runs) {
    DUET_ASSERT(!run.tokens.empty() && tokens_.size() + run.tokens.size() <= n_batch_);
    tokens_.insert(tokens_.end(), run.tokens.begin(), run.tokens.end());
    if (card_ != nullptr) {
      card_runs_.push_back({run.on_card, run.first, run.tokens.size()});
      continue;
    }
    DUET_ASSERT(run.first + run.tokens.size() <= run.kv->n_ctx());
    runs_.push_back({run.kv, run.first, run.tokens.size()});
  }
  n_ = tokens_.size();
  DUET_ASSERT(n_ > 0);
  choose_outputs(runs);
  compute_.team([&] { card_ != nullptr ? evaluate_on_card(cancel, n_next) : evaluate(cancel, n_next); });
}

// All where somebody watches: observers count rows, and a card leaves none out.
void Decoder::choose_outputs(std::span<const TokenRun> runs) {
  const bool all = card_ != nullptr || compute_.observer != nullptr || probe_.hidden;
  outputs_.clear();
  output_runs_.clear();
  size_t end = 0;
  for (const TokenRun& run : runs) {
    end += run.tokens.size();
    const size_t n_outputs = all ? run.tokens.size() : std::min(run.n_outputs, run.tokens.size());
    for (size_t row = end - n_outputs; row < end; ++row) outputs_.push_back(row);
    if (n_outputs > 0) output_runs_.push_back({run.kv, run.first + run.tokens.size() - n_outputs, n_outputs});
  }
}

void Decoder::keep_outputs() {
  for (size_t i = 0; i < outputs_.size(); ++i)
    if (outputs_[i] != i) std::copy_n(residual_.data() + outputs_[i] * n_embd_, n_embd_, residual_.data() + i * n_embd_);
}

size_t Decoder::place_of(size_t row) const {
  const auto found = std::lower_bound(outputs_.begin(), outputs_.end(), row);
  DUET_ASSERT(found != outputs_.end() && *found == row);
  return static_cast<size_t>(found - outputs_.begin());
}

void Decoder::evaluate(const std::atomic<bool>* cancel, size_t n_next) {
  const std::span<const float> hidden{residual_.data(), n_ * n_embd_};
  const size_t n_layer = model_->layers().size();
  const ExpertSource::Pass pass(source_, {n_, outputs_.size(), n_next});
  embed(residual_.data());
  attention_.begin(runs_);
  if (probe_.hidden) probe_.hidden(-1, hidden);
  for (size_t i = 0; i < n_layer; ++i) {
    if (cancel != nullptr && cancel->load(std::memory_order_relaxed)) fail(ErrorKind::cancelled, "interrupted");
    const bool is_last = i + 1 == n_layer;
    attend(i);
    if (is_last && outputs_.empty()) return;
    moe_.forward(i, is_last ? outputs_.size() : n_, input_, residual_.data());
    if (probe_.hidden) probe_.hidden(static_cast<int>(i), hidden);
    if (probe_.routing) probe_.routing(static_cast<int>(i), moe_.chosen(), moe_.weights());
  }
}

// After the last layer's, residual_ has the rows with outputs only.
void Decoder::attend(size_t layer_index) {
  const Layer& layer = model_->layers()[layer_index];
  const bool narrows = layer_index + 1 == model_->layers().size() && outputs_.size() < n_;
  if (!narrows) return attention_.forward(layer, layer_index, input_, residual_.data());
  attention_.store_keys(layer, layer_index, input_, residual_.data());
  if (outputs_.empty()) return;
  keep_outputs();
  attention_.begin(output_runs_);
  attention_.forward_queries(layer, layer_index, input_, residual_.data());
}

void Decoder::evaluate_on_card(const std::atomic<bool>* cancel, size_t n_next) {
  const ExpertSource::Pass pass(source_, {n_, n_, n_next});
  embed(card_->rows());
  gpu::ForwardHooks hooks{.experts = {}, .routing = {}, .hidden = probe_.hidden, .cancel = cancel, .n_threads = compute_.n_threads};
  hooks.experts = [&](size_t layer, float* residual) {
    moe_.forward(layer, n_, input_, residual);
    if (probe_.routing) probe_.routing(static_cast<int>(layer), moe_.chosen(), moe_.weights());
  };
  if (probe_.routing)
    hooks.routing = [&](size_t layer, std::span<const int32_t> chosen) { probe_.routing(static_cast<int>(layer), chosen, {}); };
  card_->forward(card_runs_, hooks);
}

void Decoder::logits(size_t row, size_t n_rows, float* out) {
  DUET_ASSERT(row + n_rows <= n_);
  if (card_ != nullptr) {
    std::vector<size_t> rows(n_rows);
    std::iota(rows.begin(), rows.end(), row);
    return card_->logits(rows, out);
  }
  const size_t place = place_of(row);
  DUET_ASSERT(place_of(row + n_rows - 1) == place + n_rows - 1);
  compute_.team([&] {
    normalize(compute_, residual_.data() + place * n_embd_, n_rows, model_->output_norm(), model_->hparams().rms_eps,
              input_, act_bit(model_->output()));
    multiply_output(n_rows, out);
  });
}

void Decoder::logits(std::span<const size_t> rows, float* out) {
  DUET_ASSERT(rows.size() <= n_batch_);
  if (card_ != nullptr) return card_->logits(rows, out);
  compute_.team([&] {
    parallel_for(compute_.n_threads, rows.size(), 8, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) {
        compute_.kernels->rms_norm(residual_.data() + place_of(rows[i]) * n_embd_, model_->output_norm().data(), model_->hparams().rms_eps,
                                   input_.row(i), n_embd_);
        input_.quantize(*compute_.kernels, i, act_bit(model_->output()));
      }
    });
    multiply_output(rows.size(), out);
  });
}

void Decoder::hidden(std::span<const size_t> rows, float* out) {
  if (card_ != nullptr) return card_->hidden(rows, out);
  for (size_t i = 0; i < rows.size(); ++i) {
    compute_.kernels->rms_norm(residual_.data() + place_of(rows[i]) * n_embd_, model_->output_norm().data(), model_->hparams().rms_eps, out + i * n_embd_, n_embd_);
  }
}

// The normalised rows of input_.
void Decoder::multiply_output(size_t n_rows, float* out) {
  const Weight& output = model_->output();
  if (compute_.observer != nullptr) observe(compute_, TensorKind::output, -1, input_.row(0), n_rows, n_embd_);
  queue_.add(output, input_, 0, n_rows, out, output.rows);
  queue_.run(compute_);
}

}  // namespace duet
