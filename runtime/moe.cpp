#include "runtime/moe.h"

#include <algorithm>
#include <cmath>

namespace duet {
namespace {

size_t expert_count(const HParams& hparams) { return std::max<size_t>(hparams.n_expert, 1); }
size_t used_count(const HParams& hparams) { return hparams.n_expert > 0 ? hparams.n_expert_used : 1; }

// Rows of gate and up that one task makes: a block of the widest activation format.
constexpr size_t kHiddenRows = 256;
// Tasks wanted, where there are tokens to split: enough for 128 threads. A fixed number, so that
// pieces do not depend on the number of threads.
constexpr size_t kMinTasks = 256;
constexpr size_t kMinTokenBlock = 64;

size_t div_up(size_t n, size_t by) { return (n + by - 1) / by; }

// Formats in which the weights that `of` names are multiplied, in any layer.
template <class Of>
ActFormats formats_of(const Model& model, const Of& of) {
  ActFormats formats = 0;
  for (const Layer& layer : model.layers())
    for (const Expert& expert : layer.experts) formats |= of(expert);
  return formats;
}

ActFormats input_formats(const Expert& expert) { return act_bit(expert.gate) | act_bit(expert.up); }
ActFormats hidden_formats(const Expert& expert) { return act_bit(expert.down); }

}  // namespace

Moe::Moe(const Model& model, const Compute& compute, size_t n_batch)
    : model_(&model),
      compute_(compute),
      n_expert_(expert_count(model.hparams())),
      n_used_(used_count(model.hparams())),
      n_embd_(model.hparams().n_embd),
      n_ff_(model.hparams().n_ff),
      chosen_(n_batch * n_used_),
      weights_(n_batch * n_used_),
      slot_(n_batch * n_used_),
      first_slot_(n_expert_ + 1),
      slot_expert_(n_batch * n_used_),
      slot_token_(n_batch * n_used_),
      cursor_(n_expert_),
      logits_(n_batch * n_expert_),
      out_(n_batch * n_used_ * n_embd_),
      gathered_(n_expert_ > 1 ? n_batch * n_used_ : 0, n_embd_, formats_of(model, input_formats)),
      hidden_(n_batch * n_used_, n_ff_, formats_of(model, hidden_formats)),
      queue_(n_expert_ + n_batch * n_used_ / kTokenBlock) {
  blocks_.reserve(n_expert_ + n_batch * n_used_ / kMinTokenBlock);
}

uint64_t Moe::bytes_needed(const HParams& hparams, size_t n_batch) {
  const uint64_t per_row = hparams.n_ff + uint64_t{2} * hparams.n_embd;
  return sizeof(float) * n_batch * used_count(hparams) * per_row;
}

void Moe::forward(size_t layer_index, size_t n, Activations& input, float* residual) {
  const Layer& layer = model_->layers()[layer_index];
  n_ = n;
  ActFormats formats = act_bit(ActFormat::f32);
  for (const Expert& expert : layer.experts) formats |= input_formats(expert);
  normalize(compute_, residual, n, layer.ffn_norm, model_->hparams().rms_eps, input, formats);
  route(layer, input);
  group();
  if (gathers()) gather(layer, input);
  make_hidden(layer, gathers() ? gathered_ : input);
  down(layer);
  combine(residual);
}

// Router logits in float from float activations, whatever the format of the experts.
void Moe::route(const Layer& layer, Activations& input) {
  if (layer.router.empty()) {
    std::fill_n(chosen_.begin(), n_, 0);
    std::fill_n(weights_.begin(), n_, 1.0f);
    return;
  }
  const auto matmul = compute_.kernels->matmul[static_cast<size_t>(DType::F32)];
  parallel_for(compute_.n_threads, n_, 16, [&](size_t begin, size_t end) {
    float* logits = logits_.data() + begin * n_expert_;
    const size_t stride = n_embd_ * sizeof(float);
    matmul({.w = reinterpret_cast<const std::byte*>(layer.router.data()), .w_stride = stride, .n_rows = n_expert_,
            .cols = n_embd_, .x = input.data(ActFormat::f32, begin), .x_stride = stride, .n_tokens = end - begin,
            .y = logits, .y_stride = n_expert_});
    for (size_t t = begin; t < end; ++t, logits += n_expert_)
      choose(logits, chosen_.data() + t * n_used_, weights_.data() + t * n_used_);
  });
}

// The n_used largest logits, lowest index first among equals. Softmax over all followed by
// renormalising the chosen equals the softmax over the chosen.
void Moe::choose(const float* logits, int32_t* chosen, float* weights) const {
  for (size_t rank = 0; rank < n_used_; ++rank) {
    int32_t best = -1;
    for (int32_t e = 0; e < static_cast<int32_t>(n_expert_); ++e) {
      if (std::find(chosen, chosen + rank, e) != chosen + rank) continue;
      if (best < 0 || logits[e] > logits[best]) best = e;
    }
    chosen[rank] = best;
  }
  float sum = 0.0f;
  for (size_t rank = 0; rank < n_used_; ++rank)
    sum += weights[rank] = std::exp(logits[chosen[rank]] - logits[chosen[0]]);
  for (size_t rank = 0; rank < n_used_; ++rank) weights[rank] /= sum;
}

// Gives every (token, rank) a row so that the rows of an expert are consecutive.
void Moe::group() {
  std::fill(first_slot_.begin(), first_slot_.end(), 0);
  for (size_t i = 0; i < n_rows(); ++i) ++first_slot_[static_cast<size_t>(chosen_[i]) + 1];
  for (size_t e = 0; e < n_expert_; ++e) first_slot_[e + 1] += first_slot_[e];
  std::copy_n(first_slot_.begin(), n_expert_, cursor_.begin());
  for (size_t i = 0; i < n_rows(); ++i) {
    const size_t slot = slot_[i] = cursor_[static_cast<size_t>(chosen_[i])]++;
    slot_expert_[slot] = chosen_[i];
    slot_token_[slot] = static_cast<int32_t>(i / n_used_);
  }
}

void Moe::gather(const Layer& layer, const Activations& input) {
  parallel_for(compute_.n_threads, n_rows(), 32, [&](size_t begin, size_t end) {
    for (size_t slot = begin; slot < end; ++slot) {
      const Expert& expert = layer.experts[static_cast<size_t>(slot_expert_[slot])];
      gathered_.copy_row(slot, input, static_cast<size_t>(slot_token_[slot]), input_formats(expert));
    }
  });
}

// Blocks of tokens of one expert: few passes over its weights, yet tasks for all threads when most
// tokens choose the same.
void Moe::split_tokens() {
  const size_t row_blocks = div_up(n_ff_, kHiddenRows);
  for (size_t size = kTokenBlock;; size /= 2) {
    blocks_.clear();
    for (size_t e = 0; e < n_expert_; ++e)
      for (size_t slot = first_slot_[e]; slot < first_slot_[e + 1]; slot += size)
        blocks_.push_back({e, slot, std::min(size, first_slot_[e + 1] - slot)});
    if (size <= kMinTokenBlock || blocks_.size() * row_blocks >= kMinTasks) return;
  }
}

// hidden = silu(gate x) * (up x) for all (token, expert) pairs. Tasks that follow each other take
// the same rows of different experts, so that a thread's share of rows is that of every expert.
void Moe::make_hidden(const Layer& layer, const Activations& input) {
  split_tokens();
  const Weight& gate = layer.experts[0].gate;
  const int n_threads = compute_.threads_for(2 * uint64_t{n_rows()} * gate.rows * gate.row_bytes);
  parallel_shares(n_threads, blocks_.size() * div_up(n_ff_, kHiddenRows), [&](size_t worker, size_t task) {
    make_hidden_block(layer, input, worker, blocks_[task % blocks_.size()], task / blocks_.size() * kHiddenRows);
  });
}

// Columns [first_row, first_row + 256) of the hidden rows of a block of tokens, straight to the
// form in which the down projection reads them: the products never leave the worker's cache.
void Moe::make_hidden_block(const Layer& layer, const Activations& input, size_t worker, const TokenBlock& block, size_t first_row) {
  const Expert& expert = layer.experts[block.expert];
  const size_t n_rows = std::min(kHiddenRows, n_ff_ - first_row), n_floats = block.n * kHiddenRows;
  float* gate = compute_.panel(worker);  // [block.n, kHiddenRows], as up
  float* up = gate + n_floats;
  const std::span<float> rest{up + n_floats, kPanelFloats - 2 * n_floats};
  Product product{&expert.gate, first_row, n_rows, &input, n_ == 1 ? 0 : block.first_slot, block.n, gate, kHiddenRows};
  multiply(compute_, product, rest);
  product.w = &expert.up;
  product.y = up;
  multiply(compute_, product, rest);
  for (size_t t = 0; t < block.n; ++t) {
    float* values = gate + t * kHiddenRows;
    compute_.kernels->silu_mul(values, up + t * kHiddenRows, values, n_rows);
    hidden_.set_part(*compute_.kernels, block.first_slot + t, first_row, values, n_rows, expert.down.format->act);
  }
}

void Moe::down(const Layer& layer) {
  for (size_t e = 0; e < n_expert_; ++e) {
    const size_t first = first_slot_[e], count = first_slot_[e + 1] - first;
    if (count > 0) queue_.add(layer.experts[e].down, hidden_, first, count, out_.data() + first * n_embd_, n_embd_);
  }
  queue_.run(compute_);
}

// In the order of router rank, so that a sum does not depend on how tokens were batched.
void Moe::combine(float* residual) const {
  parallel_for(compute_.n_threads, n_, 16, [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t)
      for (size_t i = t * n_used_; i < (t + 1) * n_used_; ++i)
        compute_.kernels->add_scaled(residual + t * n_embd_, out_.data() + slot_[i] * n_embd_, weights_[i], n_embd_);
  });
}

}  // namespace duet
