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
// Hidden rows kept at once: what the scratch of a batch needs does not grow with n_ff beyond that.
constexpr size_t kWaveRows = 1024;

// Tokens for which the next layer's choice is guessed.
size_t guess_rows(size_t n_batch, const ExpertSource* source) { return source != nullptr ? std::min(n_batch, kAllExpertsTokens - 1) : 0; }

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

Moe::Moe(const Model& model, const Compute& compute, size_t n_batch, ExpertSource* source)
    : model_(&model),
      compute_(compute),
      source_(source),
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
      hidden_(std::min(n_batch * n_used_, kWaveRows), n_ff_, formats_of(model, hidden_formats)),
      next_input_(guess_rows(n_batch, source), n_embd_, act_bit(ActFormat::f32)),
      next_chosen_(guess_rows(n_batch, source) * n_used_),
      next_weights_(next_chosen_.size()),
      likely_(n_expert_),
      slot_weight_(compute.observer != nullptr ? n_batch * n_used_ : 0),
      observed_(compute.observer != nullptr ? std::max(n_batch * n_embd_, std::min(n_batch * n_used_, kWaveRows) * n_ff_) : 0),
      queue_(n_expert_ + kWaveRows / kTokenBlock) {
  wave_.reserve(n_expert_ + kWaveRows / kTokenBlock);
  blocks_.reserve(n_expert_ + kWaveRows / kMinTokenBlock);
}

// Inputs and hidden rows may be floats (for float weights).
uint64_t Moe::bytes_needed(const HParams& hparams, size_t n_batch) {
  const uint64_t n_rows = n_batch * used_count(hparams), n_guess = std::min(n_batch, kAllExpertsTokens - 1);
  return sizeof(float) * (n_guess * hparams.n_embd + n_rows * 2 * hparams.n_embd + std::min<uint64_t>(n_rows, kWaveRows) * hparams.n_ff);
}

void Moe::forward(size_t layer_index, size_t n, Activations& input, float* residual) {
  const Layer& layer = model_->layers()[layer_index];
  n_ = n;
  layer_index_ = layer_index;
  wave_.clear();  // an error may have left some
  wave_rows_ = 0;
  ActFormats formats = act_bit(ActFormat::f32);
  for (const Expert& expert : layer.experts) formats |= input_formats(expert);
  normalize(compute_, residual, n, layer.ffn_norm, model_->hparams().rms_eps, input, formats);
  route(compute_, model_->hparams(), layer, input.row(0), n_, logits_.data(), chosen_.data(), weights_.data());
  group();
  if (gathers()) gather(layer, input);
  if (compute_.observer != nullptr) observe_inputs(input);
  choose_block_size();
  const Activations& rows = gathers() ? gathered_ : input;
  if (source_ == nullptr) run_resident(layer, rows);
  else run_streamed(layer_index, rows, residual);
  combine(residual);
}

void route(const Compute& compute, const HParams& hparams, const Layer& layer, const float* x, size_t n, float* logits,
           int32_t* chosen, float* weights) {
  if (layer.router.empty()) {
    std::fill_n(chosen, n, 0);
    std::fill_n(weights, n, 1.0f);
    return;
  }
  const size_t n_expert = hparams.n_expert, n_used = hparams.n_expert_used, cols = hparams.n_embd, stride = cols * sizeof(float);
  const auto matmul = compute.kernels->matmul[static_cast<size_t>(DType::F32)];
  parallel_for(compute.n_threads, n, 16, [&](size_t begin, size_t end) {
    matmul({.w = reinterpret_cast<const std::byte*>(layer.router.data()), .w_stride = stride, .n_rows = n_expert,
            .cols = cols, .x = reinterpret_cast<const std::byte*>(x + begin * cols), .x_stride = stride,
            .n_tokens = end - begin, .y = logits + begin * n_expert, .y_stride = n_expert});
    for (size_t t = begin; t < end; ++t)
      choose_experts(logits + t * n_expert, n_expert, n_used, chosen + t * n_used, weights + t * n_used);
  });
}

// Softmax over all followed by renormalising the chosen equals the softmax over the chosen.
void choose_experts(const float* logits, size_t n_expert, size_t n_used, int32_t* chosen, float* weights) {
  for (size_t rank = 0; rank < n_used; ++rank) {
    int32_t best = -1;
    for (int32_t e = 0; e < static_cast<int32_t>(n_expert); ++e) {
      if (std::find(chosen, chosen + rank, e) != chosen + rank) continue;
      if (best < 0 || logits[e] > logits[best]) best = e;
    }
    chosen[rank] = best;
  }
  float sum = 0.0f;
  for (size_t rank = 0; rank < n_used; ++rank)
    sum += weights[rank] = std::exp(logits[chosen[rank]] - logits[chosen[0]]);
  for (size_t rank = 0; rank < n_used; ++rank) weights[rank] /= sum;
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

// Tokens of one task: few passes over an expert's weights, yet tasks for all threads when most tokens
// choose the same. Decided for the whole layer, so that results do not depend on what is in memory.
void Moe::choose_block_size() {
  const size_t row_blocks = div_up(n_ff_, kHiddenRows);
  for (block_size_ = kTokenBlock; block_size_ > kMinTokenBlock; block_size_ /= 2) {
    size_t n_blocks = 0;
    for (size_t e = 0; e < n_expert_; ++e) n_blocks += div_up(first_slot_[e + 1] - first_slot_[e], block_size_);
    if (n_blocks * row_blocks >= kMinTasks) return;
  }
}

void Moe::run_resident(const Layer& layer, const Activations& input) {
  for (size_t e = 0; e < n_expert_; ++e) add_to_waves(static_cast<int32_t>(e), layer.experts[e], input, false);
  run_wave(input, false);
}

// Those in memory first, while the others are being read.
void Moe::run_streamed(size_t layer_index, const Activations& input, const float* residual) {
  source_->begin(layer_index, chosen(), n_used_);
  guess_ahead(layer_index, source_->guess_reach(), residual);
  for (const int32_t e : source_->hits()) add_to_waves(e, source_->need(e), input, false);
  run_wave(input, false);
  for (const ExpertPolicy::Load& load : source_->loads()) {
    add_to_waves(load.expert, source_->need(load.expert), input, true);
    run_wave(input, true);
    source_->done(load.expert);
  }
  source_->end();
}

// The next layers' routers asked before the layers up to them have added their parts: what a layer adds is small
// beside the residual, so mostly they say the same. First the expert that most weight falls to.
void Moe::guess_ahead(size_t layer_index, size_t reach, const float* residual) {
  if (reach == 0) return;
  guesses_.clear();
  for (size_t l = layer_index + 1; l <= layer_index + reach; ++l) {
    const Layer& layer = model_->layers()[l];
    normalize(compute_, residual, n_, layer.ffn_norm, model_->hparams().rms_eps, next_input_, act_bit(ActFormat::f32));
    route(compute_, model_->hparams(), layer, next_input_.row(0), n_, logits_.data(), next_chosen_.data(), next_weights_.data());
    std::fill(likely_.begin(), likely_.end(), 0.0f);
    for (size_t i = 0; i < n_rows(); ++i) likely_[static_cast<size_t>(next_chosen_[i])] += next_weights_[i];
    const auto first = static_cast<ptrdiff_t>(guesses_.size());
    for (size_t e = 0; e < n_expert_; ++e)
      if (likely_[e] > 0) guesses_.push_back({l, static_cast<int32_t>(e)});
    std::stable_sort(guesses_.begin() + first, guesses_.end(), [&](const auto& a, const auto& b) {
      return likely_[static_cast<size_t>(a.expert)] > likely_[static_cast<size_t>(b.expert)];
    });
  }
  source_->guess(guesses_);
}

// Collects the rows of an expert; full waves run.
void Moe::add_to_waves(int32_t index, const Expert& expert, const Activations& input, bool arriving) {
  const auto e = static_cast<size_t>(index);
  for (size_t slot = first_slot_[e]; slot < first_slot_[e + 1]; slot += kTokenBlock) {
    const size_t n = std::min(kTokenBlock, first_slot_[e + 1] - slot);
    if (wave_rows_ + n > kWaveRows) run_wave(input, arriving);
    wave_.push_back({&expert, index, slot, n, wave_rows_});
    wave_rows_ += n;
  }
}

void Moe::run_wave(const Activations& input, bool arriving) {
  if (wave_.empty()) return;
  make_hidden(input, arriving);
  if (compute_.observer != nullptr) observe_hidden();
  down(arriving);
  wave_.clear();
  wave_rows_ = 0;
}

// hidden = silu(gate x) * (up x) for the (token, expert) pairs of the wave. Tasks that follow each
// other take the same rows of different experts, so that a thread's share of rows is that of every
// expert. Arriving rows are taken in their order by whoever is free.
void Moe::make_hidden(const Activations& input, bool arriving) {
  blocks_.clear();
  for (const Segment& segment : wave_)
    for (size_t at = 0; at < segment.n; at += block_size_)
      blocks_.push_back({segment.expert, segment.index, segment.first_slot + at, std::min(block_size_, segment.n - at), segment.hidden_row + at});
  const size_t n_blocks = blocks_.size(), n_tasks = n_blocks * div_up(n_ff_, kHiddenRows);
  const auto run = [&](size_t worker, size_t task) {
    make_hidden_block(input, worker, task % n_blocks, task / n_blocks * kHiddenRows);
  };
  make_inner(input);
  const Weight& gate = wave_[0].expert->gate;
  if (!arriving) return parallel_shares(compute_.threads_for(2 * uint64_t{wave_rows_} * gate.rows * gate.row_bytes), n_tasks, run);
  parallel_tasks(compute_.n_threads, n_tasks, [&](size_t worker, size_t task) {
    const size_t first_row = task / n_blocks * kHiddenRows, end_row = std::min(first_row + kHiddenRows, n_ff_);
    source_->wait(wave_[0].index, ExpertPart::gate, first_row, end_row);
    source_->wait(wave_[0].index, ExpertPart::up, first_row, end_row);
    run(worker, task);
  });
}

// Of all rows of a weight.
Product Moe::hidden_product(const Weight& weight, const Activations& input, const Segment& block, float* y) const {
  return {&weight, 0, weight.rows, &input, n_ == 1 ? 0 : block.first_slot, block.n, y, kHiddenRows};
}

void Moe::make_inner(const Activations& input) {
  inner_.clear();
  for (const Segment& block : blocks_)
    for (const Weight* weight : {&block.expert->gate, &block.expert->up}) inner_.add(hidden_product(*weight, input, block, nullptr));
  inner_.make(compute_);
}

// Columns [first_row, first_row + 256) of the hidden rows of a block of tokens, straight to the
// form in which the down projection reads them: the products never leave the worker's cache.
void Moe::make_hidden_block(const Activations& input, size_t worker, size_t block_index, size_t first_row) {
  const Segment& block = blocks_[block_index];
  const Expert& expert = *block.expert;
  const size_t n_rows = std::min(kHiddenRows, n_ff_ - first_row), n_floats = block.n * kHiddenRows;
  float* gate = compute_.panel(worker);  // [block.n, kHiddenRows], as up
  float* up = gate + n_floats;
  const std::span<float> rest{up + n_floats, kPanelFloats - 2 * n_floats};
  for (const bool is_up : {false, true}) {
    Product product = hidden_product(is_up ? expert.up : expert.gate, input, block, is_up ? up : gate);
    product.first_row = first_row;
    product.n_rows = n_rows;
    product.inner = inner_.of(2 * block_index + is_up);
    product.next = is_up ? gate_rows_after(block_index, first_row) : expert.up.data + first_row * expert.up.row_bytes;
    multiply(compute_, product, rest);
  }
  for (size_t t = 0; t < block.n; ++t) {
    float* values = gate + t * kHiddenRows;
    compute_.kernels->silu_mul(values, up + t * kHiddenRows, values, n_rows);
    if (compute_.observer != nullptr) std::copy_n(values, n_rows, observed_.data() + (block.hidden_row + t) * n_ff_ + first_row);
    hidden_.set_part(*compute_.kernels, block.hidden_row + t, first_row, values, n_rows, expert.down.format->act);
    if (expert.down.low_rank != nullptr) hidden_.set_part(*compute_.kernels, block.hidden_row + t, first_row, values, n_rows, ActFormat::f32);
  }
}

// Of the task that follows.
const std::byte* Moe::gate_rows_after(size_t block_index, size_t first_row) const {
  const bool last = block_index + 1 == blocks_.size();
  const Weight& gate = blocks_[last ? 0 : block_index + 1].expert->gate;
  if (last) first_row += kHiddenRows;
  return first_row < n_ff_ ? gate.data + first_row * gate.row_bytes : nullptr;
}

void Moe::down(bool arriving) {
  for (const Segment& segment : wave_)
    queue_.add(segment.expert->down, hidden_, segment.hidden_row, segment.n, out_.data() + segment.first_slot * n_embd_, n_embd_);
  if (!arriving) return queue_.run(compute_);
  queue_.run_arriving(compute_, [&](size_t first_row, size_t end_row) {
    source_->wait(wave_[0].index, ExpertPart::down, first_row, end_row);
  });
}

// In the order of router rank, so that a sum does not depend on how tokens were batched.
void Moe::combine(float* residual) const {
  parallel_for(compute_.n_threads, n_, 16, [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t)
      for (size_t i = t * n_used_; i < (t + 1) * n_used_; ++i)
        compute_.kernels->add_scaled(residual + t * n_embd_, out_.data() + slot_[i] * n_embd_, weights_[i], n_embd_);
  });
}

// `kind` of experts; that of the dense matrix in a model without.
void Moe::tell(TensorKind kind, size_t expert, size_t first_slot, size_t n, const float* rows, size_t cols) const {
  if (model_->hparams().n_expert == 0) {
    if (kind == TensorKind::ffn_gate_exps) kind = TensorKind::ffn_gate;
    else kind = kind == TensorKind::ffn_up_exps ? TensorKind::ffn_up : TensorKind::ffn_down;
    return observe(compute_, kind, static_cast<int>(layer_index_), rows, n, cols);
  }
  const std::string name = tensor_name(kind, static_cast<int>(layer_index_));
  (*compute_.observer)({.kind = kind, .layer = static_cast<int>(layer_index_), .tensor = name, .expert = static_cast<int>(expert),
                        .n_rows = n, .cols = cols, .rows = rows, .router_weights = {slot_weight_.data() + first_slot, n}});
}

// Of the router, then of gate and up of each expert.
void Moe::observe_inputs(Activations& input) {
  if (!model_->layers()[layer_index_].router.empty())
    observe(compute_, TensorKind::ffn_gate_inp, static_cast<int>(layer_index_), input.row(0), n_, n_embd_);
  for (size_t i = 0; i < n_rows(); ++i) slot_weight_[slot_[i]] = weights_[i];
  for (size_t e = 0; e < n_expert_; ++e) {
    const size_t first = first_slot_[e], n = first_slot_[e + 1] - first;
    if (n == 0) continue;
    for (size_t i = 0; i < n; ++i) std::copy_n(input.row(static_cast<size_t>(slot_token_[first + i])), n_embd_, observed_.data() + i * n_embd_);
    for (const TensorKind kind : {TensorKind::ffn_gate_exps, TensorKind::ffn_up_exps}) tell(kind, e, first, n, observed_.data(), n_embd_);
  }
}

void Moe::observe_hidden() {
  for (const Segment& s : wave_) tell(TensorKind::ffn_down_exps, static_cast<size_t>(s.index), s.first_slot, s.n, observed_.data() + s.hidden_row * n_ff_, n_ff_);
}

}  // namespace duet
