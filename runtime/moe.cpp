#include "runtime/moe.h"

#include <algorithm>
#include <cmath>

namespace duet {
namespace {

size_t expert_count(const HParams& hparams) { return std::max<size_t>(hparams.n_expert, 1); }
size_t used_count(const HParams& hparams) { return hparams.n_expert > 0 ? hparams.n_expert_used : 1; }

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
      gate_(n_batch * n_used_ * n_ff_),
      up_(n_batch * n_used_ * n_ff_),
      out_(n_batch * n_used_ * n_embd_),
      gathered_(n_expert_ > 1 ? n_batch * n_used_ : 0, n_embd_),
      hidden_(n_batch * n_used_, n_ff_),
      queue_(2 * n_expert_) {}

uint64_t Moe::bytes_needed(const HParams& hparams, size_t n_batch) {
  const uint64_t per_row = uint64_t{3} * hparams.n_ff + uint64_t{2} * hparams.n_embd;
  return sizeof(float) * n_batch * used_count(hparams) * per_row;
}

void Moe::forward(size_t layer_index, size_t n, Activations& input, float* residual) {
  const Layer& layer = model_->layers()[layer_index];
  n_ = n;
  ActFormats formats = act_bit(ActFormat::f32);
  for (const Expert& expert : layer.experts) formats |= act_bit(expert.gate) | act_bit(expert.up);
  normalize(compute_, residual, n, layer.ffn_norm, model_->hparams().rms_eps, input, formats);
  route(layer, input);
  group();
  if (gathers()) gather(layer, input);
  gate_up(layer, gathers() ? gathered_ : input);
  activate(layer);
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
      gathered_.copy_row(slot, input, static_cast<size_t>(slot_token_[slot]), act_bit(expert.gate) | act_bit(expert.up));
    }
  });
}

void Moe::gate_up(const Layer& layer, const Activations& input) {
  for (size_t e = 0; e < n_expert_; ++e) {
    const size_t first = first_slot_[e], count = first_slot_[e + 1] - first;
    if (count == 0) continue;
    const size_t input_row = gathers() ? first : 0;
    queue_.add(layer.experts[e].gate, input, input_row, count, gate_.data() + first * n_ff_, n_ff_);
    queue_.add(layer.experts[e].up, input, input_row, count, up_.data() + first * n_ff_, n_ff_);
  }
  queue_.run(compute_);
}

void Moe::activate(const Layer& layer) {
  const int n_threads = compute_.threads_for(uint64_t{n_rows()} * n_ff_ * 3 * sizeof(float));
  parallel_for(n_threads, n_rows(), n_ == 1 ? 1 : 4, [&](size_t begin, size_t end) {
    for (size_t slot = begin; slot < end; ++slot) {
      compute_.kernels->silu_mul(gate_.data() + slot * n_ff_, up_.data() + slot * n_ff_, hidden_.row(slot), n_ff_);
      hidden_.quantize(*compute_.kernels, slot, act_bit(layer.experts[static_cast<size_t>(slot_expert_[slot])].down));
    }
  });
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
