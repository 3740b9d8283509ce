#include "runtime/gpu/forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "runtime/attention.h"

namespace duet::gpu {
namespace {

constexpr size_t kBlock = 256;  // positions

std::byte* take_bytes(std::byte*& at, size_t n_bytes) {
  std::byte* const out = at;
  at += aligned(n_bytes);
  return out;
}

bool reads(const Matrices& w, ActFormat format) { return w.n > 0 && format_of(w.dtype).act == format; }
bool reads(const ExpertMatrices& w, ActFormat format) { return w.reads(format); }

// Of `all`, the forms in which these weights read rows.
template <class... Weights>
ActRows wanted(const ActRows& all, const Weights&... weights) {
  return {(reads(weights, ActFormat::act32) || ...) ? all.act32 : nullptr, (reads(weights, ActFormat::act256) || ...) ? all.act256 : nullptr};
}

const std::byte* rows_for(DType dtype, const float* x, const ActRows& acts) {
  switch (format_of(dtype).act) {
    case ActFormat::act32: return acts.act32;
    case ActFormat::act256: return acts.act256;
    case ActFormat::f32: break;
  }
  return reinterpret_cast<const std::byte*>(x);
}

size_t host_bytes(const HParams& h, size_t n_batch) {
  return aligned(n_batch * h.n_embd * sizeof(float)) + aligned(n_batch * h.n_rot * sizeof(float)) + aligned(h.n_layer * n_batch * sizeof(KvRun));
}

}  // namespace

// ---- keys and values ---------------------------------------------------------------------------

Cache::Cache(Offload& card, uint32_t n_ctx, KvType type)
    : card_(&card),
      n_layer_(card.model().hparams().n_layer),
      n_ctx_(n_ctx),
      n_positions_((size_t{n_ctx} + kBlock - 1) / kBlock * kBlock) {
  const HParams& h = card.model().hparams();
  const size_t n_bytes = cache_bytes(h, n_ctx, type), n_values = size_t{h.n_head_kv} * h.head_dim;
  row_bytes_ = n_values * (type == KvType::f32 ? 4 : type == KvType::f16 ? 2 : 1);
  scale_bytes_ = type == KvType::q8_0 ? n_values / 32 * sizeof(uint16_t) : 0;
  memory_ = card.allocate(n_bytes, "keys and values");
}

KvLayer Cache::layer(size_t i) const {
  std::byte* const keys = memory_.data() + i * 2 * n_positions_ * (row_bytes_ + scale_bytes_);
  std::byte* const values = keys + n_positions_ * row_bytes_;
  if (scale_bytes_ == 0) return {.keys = keys, .values = values, .key_scales = nullptr, .value_scales = nullptr};
  std::byte* const scales = values + n_positions_ * row_bytes_;
  return {.keys = keys, .values = values, .key_scales = scales, .value_scales = scales + n_positions_ * scale_bytes_};
}

std::vector<Cache::Part> Cache::parts(size_t i) const {
  const KvLayer at = layer(i);
  std::vector<Part> out{{at.keys, row_bytes_}, {at.values, row_bytes_}};
  if (scale_bytes_ > 0) out.insert(out.end(), {{at.key_scales, scale_bytes_}, {at.value_scales, scale_bytes_}});
  return out;
}

void Cache::copy_prefix(const Cache& from, size_t n) {
  DUET_ASSERT(from.memory_.size() == memory_.size() && n <= n_ctx_);
  if (n == 0) return;
  const std::lock_guard lock(card_->mutex());
  for (size_t layer = 0; layer < n_layer_; ++layer) {
    const std::vector<Part> to = parts(layer), old = from.parts(layer);
    for (size_t i = 0; i < to.size(); ++i) card_->device().copy(to[i].data, old[i].data, n * to[i].position_bytes);
  }
  card_->check();
}

size_t Cache::block_bytes(size_t n) const { return 2 * n * (row_bytes_ + scale_bytes_); }

void Cache::save(size_t layer, size_t block, size_t n, std::span<std::byte> out) const {
  DUET_ASSERT(layer < n_layer_ && block * kBlock + n <= n_positions_ && out.size() == block_bytes(n));
  const std::lock_guard lock(card_->mutex());
  for (const Part& part : parts(layer)) {
    card_->device().download(out.data(), part.data + block * kBlock * part.position_bytes, n * part.position_bytes);
    out = out.subspan(n * part.position_bytes);
  }
  card_->check();
}

void Cache::load(size_t layer, size_t block, size_t n, std::span<const std::byte> in) {
  DUET_ASSERT(layer < n_layer_ && block * kBlock + n <= n_positions_ && in.size() == block_bytes(n));
  const std::lock_guard lock(card_->mutex());
  for (const Part& part : parts(layer)) {
    card_->device().upload(part.data + block * kBlock * part.position_bytes, in.data(), n * part.position_bytes);
    in = in.subspan(n * part.position_bytes);
  }
  card_->check();
}

// ---- the pass ----------------------------------------------------------------------------------

Forward::Forward(Offload& card, const ChunkSizes& sizes)
    : card_(&card),
      device_(&card.device()),
      h_(&card.model().hparams()),
      sizes_(sizes),
      shape_(head_shape(*h_, sizes.kv_type)),
      attention_bytes_(attention_bytes(*h_, sizes, device_)),
      speeds_(rotation_speeds(*h_, card.model().rope_factors())),
      memory_(card.allocate(scratch_bytes(*h_, sizes, device_), "working memory")),
      host_(*device_, host_bytes(*h_, sizes.n_batch)) {
  std::byte* at = memory_.data();
  s_.lay_out(*h_, sizes.n_batch, attention_bytes_, [&](auto*& pointer, size_t n) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(take_bytes(at, n * sizeof(*pointer)));
  });
  at = host_.data();
  rows_ = reinterpret_cast<float*>(take_bytes(at, sizes.n_batch * h_->n_embd * sizeof(float)));
  cos_sin_ = reinterpret_cast<float*>(take_bytes(at, sizes.n_batch * h_->n_rot * sizeof(float)));
  runs_ = reinterpret_cast<KvRun*>(at);
  std::vector<int32_t> every(sizes.n_batch * used_count(*h_));
  std::iota(every.begin(), every.end(), 0);
  const std::lock_guard lock(card.mutex());
  device_->upload(s_.every, every.data(), every.size() * sizeof(int32_t));
  card.check();
}

void Forward::begin(std::span<const CardRun> runs) {
  n_ = max_keys_ = 0;
  n_runs_ = runs.size();
  for (size_t i = 0; i < runs.size(); ++i) {
    const CardRun& run = runs[i];
    DUET_ASSERT(run.n > 0 && n_ + run.n <= sizes_.n_batch && run.first + run.n <= run.cache->n_ctx());
    for (size_t layer = 0; layer < h_->n_layer; ++layer)
      runs_[layer * n_runs_ + i] = {run.cache->layer(layer), static_cast<uint32_t>(n_), static_cast<uint32_t>(run.n), static_cast<uint32_t>(run.first)};
    for (size_t t = 0; t < run.n; ++t) rotation_at(speeds_, run.first + t, cos_sin_ + (n_ + t) * h_->n_rot);
    n_ += run.n;
    max_keys_ = std::max(max_keys_, run.first + run.n);
  }
  if (h_->sliding_window > 0) max_keys_ = std::min<size_t>(max_keys_, h_->sliding_window);
  if (device_->attention_scratch_bytes(shape_, n_, max_keys_) > attention_bytes_)
    fail(ErrorKind::internal, device_->info().name, ": attention of ", n_, " rows over ", max_keys_, " keys needs more than was set aside");
  device_->upload(s_.residual, rows_, n_ * h_->n_embd * sizeof(float));
  device_->upload(s_.cos_sin, cos_sin_, n_ * h_->n_rot * sizeof(float));
  device_->upload(s_.runs, runs_, h_->n_layer * n_runs_ * sizeof(KvRun));
}

void Forward::multiply(const Matrices& w, const float* x, const ActRows& acts, size_t n, float* y, bool add) {
  device_->multiply({.w = w, .grouping = {nullptr, nullptr}, .x = rows_for(w.dtype, x, acts), .n = n, .y = y, .y_stride = w.rows, .add = add});
}

// token: the row of x that each slot reads; null: its own.
void Forward::multiply(const ExpertMatrices& w, const float* x, const ActRows& acts, const int32_t* token, float* y) {
  const size_t n_expert = w.formats.size();
  if (n_expert == 1) return multiply(w.matrices(0, 1), x, acts, n_, y, false);
  if (w.alike) {
    const Matrices all = w.matrices(0, n_expert);
    return device_->multiply({.w = all, .grouping = {s_.first, token}, .x = rows_for(all.dtype, x, acts), .n = n_slots(), .y = y, .y_stride = w.rows, .add = false});
  }
  for (size_t e = 0; e < n_expert; ++e) {
    const auto first = static_cast<size_t>(first_[e]), n = static_cast<size_t>(first_[e + 1]) - first;
    if (n == 0) continue;
    const Matrices one = w.matrices(e, 1);
    device_->multiply({.w = one, .grouping = {nullptr, (token != nullptr ? token : s_.every) + first}, .x = rows_for(one.dtype, x, acts), .n = n,
                       .y = y + first * w.rows, .y_stride = w.rows, .add = false});
  }
}

// residual += attention(rms_norm(residual))
void Forward::attend(size_t index) {
  const LayerOnCard& layer = card_->layers()[index];
  const KvRun* const runs = s_.runs + index * n_runs_;
  const ActRows input = wanted(s_.input, layer.q, layer.k, layer.v), heads = wanted(s_.heads, layer.output);
  device_->normalize(s_.residual, layer.attn_norm, h_->rms_eps, n_, h_->n_embd, s_.normed, input);
  multiply(layer.q, s_.normed, input, n_, s_.q, false);
  multiply(layer.k, s_.normed, input, n_, s_.k, false);
  multiply(layer.v, s_.normed, input, n_, s_.v, false);
  device_->rotate_and_store(shape_, runs, n_runs_, n_, s_.cos_sin, s_.q, s_.k, s_.v);
  device_->attend(shape_, runs, n_runs_, n_, max_keys_, 1.0f / std::sqrt(static_cast<float>(h_->head_dim)), s_.q, s_.attention, s_.mixed);
  if (heads.act32 != nullptr || heads.act256 != nullptr) device_->quantize(s_.mixed, n_, size_t{h_->n_head} * h_->head_dim, heads);
  multiply(layer.output, s_.mixed, heads, n_, s_.residual, true);
}

void Forward::choose(size_t index) {
  const size_t n_expert = h_->n_expert, n_used = h_->n_expert_used;
  multiply(card_->layers()[index].router, s_.normed, {}, n_, s_.router, false);
  device_->choose_experts(s_.router, n_, n_expert, n_used, chosen(index), weights(index));
  device_->group(chosen(index), n_, n_expert, n_used, s_.slot_of, s_.token_of, s_.first);
}

// residual += experts(rms_norm(residual)); a dense layer is one expert that every token uses with weight 1.
void Forward::run_experts(size_t index) {
  const LayerOnCard& layer = card_->layers()[index];
  const bool has_router = layer.router.n > 0, is_dense = h_->n_expert == 0;
  const ActRows input = wanted(s_.input, layer.gate, layer.up), hidden = wanted(s_.hidden, layer.down);
  device_->normalize(s_.residual, layer.ffn_norm, h_->rms_eps, n_, h_->n_embd, s_.normed, input);
  if (has_router) choose(index);
  if (!layer.gate.alike || !layer.up.alike || !layer.down.alike) {
    first_.resize(expert_count(*h_) + 1);
    device_->download(first_.data(), s_.first, first_.size() * sizeof(int32_t));
    card_->check();
  }
  multiply(layer.gate, s_.normed, input, s_.token_of, s_.gate);
  multiply(layer.up, s_.normed, input, s_.token_of, s_.up);
  device_->silu_mul(s_.gate, s_.up, n_slots(), h_->n_ff, s_.gate, hidden);
  if (is_dense) return multiply(layer.down.matrices(0, 1), s_.gate, hidden, n_, s_.residual, true);
  multiply(layer.down, s_.gate, hidden, nullptr, s_.out);
  device_->combine(s_.out, s_.slot_of, weights(index), n_, h_->n_expert_used, h_->n_embd, s_.residual);
}

// The same with experts that come from the host's memory, one after the other.
void Forward::run_in_transit(size_t index, int n_threads) {
  const Layer& layer = card_->model().layers()[index];
  Transit& transit = *card_->transit();
  device_->normalize(s_.residual, card_->layers()[index].ffn_norm, h_->rms_eps, n_, h_->n_embd, s_.normed, s_.input);
  first_.assign({0, static_cast<int32_t>(n_)});
  if (h_->n_expert > 0) {
    choose(index);
    first_.resize(h_->n_expert + 1);
    device_->download(first_.data(), s_.first, first_.size() * sizeof(int32_t));
    card_->check();
  }
  for (size_t e = 0; e < layer.experts.size(); ++e) {
    const auto first = static_cast<size_t>(first_[e]), n = static_cast<size_t>(first_[e + 1]) - first;
    if (n == 0) continue;
    if (!device_->slot_read(transit.next)) card_->check();
    size_t part = 0;
    for (const Weight* w : {&layer.experts[e].gate, &layer.experts[e].up, &layer.experts[e].down}) {
      std::byte* const to = transit.host(transit.next, part);
      const size_t n_bytes = w->rows * w->row_bytes;
      parallel_for(n_threads, n_bytes, size_t{256} << 10, [&](size_t begin, size_t end) { std::memcpy(to + begin, w->data + begin, end - begin); });
      device_->upload_beside(transit.next, transit.card(transit.next, part), to, n_bytes);
      ++part;
    }
    multiply_in_transit(layer.experts[e], first, n);
    transit.next = 1 - transit.next;
  }
  if (h_->n_expert > 0) device_->combine(s_.out, s_.slot_of, weights(index), n_, h_->n_expert_used, h_->n_embd, s_.residual);
}

// Slots [first, first + n); of a dense layer all rows, straight to the residual.
void Forward::multiply_in_transit(const Expert& expert, size_t first, size_t n) {
  const Transit& transit = *card_->transit();
  const auto product = [&](const Weight& w, size_t part, const float* x, const ActRows& acts, const int32_t* token, float* y, bool add) {
    const Matrices one{.dtype = w.format->dtype, .data = transit.pointers + 3 * static_cast<size_t>(transit.next) + part, .n = 1, .rows = w.rows, .cols = w.cols, .row_bytes = w.row_bytes};
    device_->multiply({.w = one, .grouping = {nullptr, token}, .x = rows_for(one.dtype, x, acts), .n = n, .y = y, .y_stride = w.rows, .add = add});
  };
  const bool is_dense = h_->n_expert == 0;
  const int32_t* const token = is_dense ? nullptr : s_.token_of + first;
  device_->await_slot(transit.next);
  product(expert.gate, 0, s_.normed, s_.input, token, s_.gate, false);
  product(expert.up, 1, s_.normed, s_.input, token, s_.up, false);
  device_->silu_mul(s_.gate, s_.up, n, h_->n_ff, s_.gate, s_.hidden);
  product(expert.down, 2, s_.gate, s_.hidden, nullptr, is_dense ? s_.residual : s_.out + first * h_->n_embd, is_dense);
  device_->release_slot(transit.next);
}

void Forward::run_on_host(size_t index, const ForwardHooks& hooks) {
  const size_t n_bytes = n_ * h_->n_embd * sizeof(float);
  device_->download(rows_, s_.residual, n_bytes);
  card_->check();
  hooks.experts(index, rows_);
  device_->upload(s_.residual, rows_, n_bytes);
}

void Forward::tell_hidden(const ForwardHooks& hooks, int layer) {
  if (!hooks.hidden) return;
  std::vector<float> rows(n_ * h_->n_embd);
  device_->download(rows.data(), s_.residual, rows.size() * sizeof(float));
  card_->check();
  hooks.hidden(layer, rows);
}

// Waits for the card, and tells what its routers of layers [first, n_layer) chose.
void Forward::finish(const ForwardHooks& hooks, size_t first) {
  chosen_.resize(hooks.routing && h_->n_expert > 0 ? (h_->n_layer - first) * n_slots() : 0);
  if (!chosen_.empty()) device_->download(chosen_.data(), chosen(first), chosen_.size() * sizeof(int32_t));
  card_->check();
  for (size_t at = 0; at < chosen_.size(); at += n_slots()) hooks.routing(first + at / n_slots(), {chosen_.data() + at, n_slots()});
}

void Forward::forward(std::span<const CardRun> runs, const ForwardHooks& hooks) {
  const std::lock_guard lock(card_->mutex());
  // However it ends, nothing on its way may read the host's rows any more.
  struct Settled {
    Offload* card;
    ~Settled() { card->settle(); }
  } settled{card_};
  begin(runs);
  const bool transits = n_ >= kTransitTokens && card_->transit() != nullptr;
  const size_t n_on_host = transits ? 0 : card_->plan().first_layer;
  tell_hidden(hooks, -1);
  for (size_t layer = 0; layer < h_->n_layer; ++layer) {
    if (hooks.cancel != nullptr && hooks.cancel->load(std::memory_order_relaxed)) fail(ErrorKind::cancelled, "interrupted");
    attend(layer);
    if (layer < n_on_host) run_on_host(layer, hooks);
    else if (layer < card_->plan().first_layer) run_in_transit(layer, hooks.n_threads);
    else run_experts(layer);
    tell_hidden(hooks, static_cast<int>(layer));
  }
  finish(hooks, n_on_host);
}

// ---- results -----------------------------------------------------------------------------------

void Forward::pick(std::span<const size_t> rows) {
  const size_t n_embd = h_->n_embd;
  for (size_t i = 0; i < rows.size();) {
    size_t n = 1;
    while (i + n < rows.size() && rows[i + n] == rows[i] + n) ++n;
    DUET_ASSERT(rows[i] + n <= n_);
    device_->copy(s_.picked + i * n_embd, s_.residual + rows[i] * n_embd, n * n_embd * sizeof(float));
    i += n;
  }
  device_->normalize(s_.picked, card_->output_norm(), h_->rms_eps, rows.size(), n_embd, s_.normed, wanted(s_.input, card_->output()));
}

void Forward::logits(std::span<const size_t> rows, float* out) {
  const std::lock_guard lock(card_->mutex());
  for (size_t done = 0; done < rows.size(); done += kLogitRowsOnCard) {
    const auto piece = rows.subspan(done, std::min(kLogitRowsOnCard, rows.size() - done));
    pick(piece);
    multiply(card_->output(), s_.normed, s_.input, piece.size(), s_.logits, false);
    device_->download(out + done * h_->n_vocab, s_.logits, piece.size() * h_->n_vocab * sizeof(float));
  }
  card_->check();
}

void Forward::hidden(std::span<const size_t> rows, float* out) {
  const std::lock_guard lock(card_->mutex());
  for (size_t done = 0; done < rows.size(); done += kLogitRowsOnCard) {
    const auto piece = rows.subspan(done, std::min(kLogitRowsOnCard, rows.size() - done));
    pick(piece);
    device_->download(out + done * h_->n_embd, s_.normed, piece.size() * h_->n_embd * sizeof(float));
  }
  card_->check();
}

}  // namespace duet::gpu
