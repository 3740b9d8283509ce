#include "runtime/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "runtime/kernels/onednn_gemm.h"

namespace duet {
namespace {

// Query rows (tokens x heads of a group) that share one pass over the keys. Reading and converting
// keys is paid once per pass (products of 32, 64, 128 rows: 39, 45, 49 GMAC/s on Zen 4); scores of
// a 32k context stay at 8 MiB per thread.
constexpr size_t kTileRows = 64;

// Keys or values converted to float at once: with a head of 128 elements 256 KiB.
constexpr size_t kPanelKeys = 512;

constexpr size_t kGemmMinRows = 16;

struct FloatRows {
  const float* data;
  size_t stride;  // floats from row to row
};

// n keys or values from position `first` as floats: in place, or converted into `panel`.
FloatRows float_rows(const KernelTable& kernels, KvView view, size_t first, size_t n, size_t head_dim, float* panel) {
  const std::byte* base = view.base + first * view.stride;
  if (!view.f16) return {reinterpret_cast<const float*>(base), view.stride / sizeof(float)};
  for (size_t j = 0; j < n; ++j)
    kernels.f16_to_f32(reinterpret_cast<const uint16_t*>(base + j * view.stride), panel + j * head_dim, head_dim);
  return {panel, head_dim};
}

size_t tile_tokens(const HParams& hparams) {
  return std::max<size_t>(kTileRows / (hparams.n_head / hparams.n_head_kv), 1);
}

// Of one worker: gathered queries, mixed values, scores.
size_t scratch_floats(const HParams& hparams, size_t n_ctx) {
  const size_t rows = tile_tokens(hparams) * (hparams.n_head / hparams.n_head_kv);
  return (rows * (2 * hparams.head_dim + n_ctx) + 15) / 16 * 16;
}

// Radians per position of each pair, in single precision steps as the reference takes them.
std::vector<float> rotation_speeds(const HParams& hparams, const std::vector<float>& factors) {
  std::vector<float> speeds(hparams.n_rot / 2);
  for (size_t i = 0; i < speeds.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(hparams.n_rot);
    float speed = 1.0f / std::pow(hparams.rope_freq_base, exponent);
    if (!factors.empty()) speed /= factors[i];
    speeds[i] = speed * hparams.rope_scale;
  }
  return speeds;
}

}  // namespace

Attention::Attention(const Model& model, const Compute& compute, size_t n_ctx, size_t n_batch)
    : model_(&model),
      compute_(compute),
      n_ctx_(n_ctx),
      head_dim_(model.hparams().head_dim),
      n_head_(model.hparams().n_head),
      n_head_kv_(model.hparams().n_head_kv),
      n_rot_(model.hparams().n_rot),
      window_(model.hparams().sliding_window),
      tile_tokens_(tile_tokens(model.hparams())),
      scratch_floats_(scratch_floats(model.hparams(), n_ctx)),
      speeds_(rotation_speeds(model.hparams(), model.rope_factors())),
      cos_sin_(n_batch * n_rot_),
      q_(n_batch * n_head_ * head_dim_),
      k_(n_batch * n_head_kv_ * head_dim_),
      v_(n_batch * n_head_kv_ * head_dim_),
      projected_(n_batch * model.hparams().n_embd),
      scratch_(static_cast<size_t>(compute.n_threads) * scratch_floats_),
      out_(n_batch, n_head_ * head_dim_) {}

uint64_t Attention::bytes_needed(const HParams& hparams, int n_threads, size_t n_ctx, size_t n_batch) {
  const uint64_t per_token = uint64_t{3} * hparams.n_head * hparams.head_dim +
                             uint64_t{2} * hparams.n_head_kv * hparams.head_dim + hparams.n_embd + hparams.n_rot;
  return sizeof(float) * (n_batch * per_token + static_cast<uint64_t>(n_threads) * scratch_floats(hparams, n_ctx));
}

void Attention::begin(size_t first, size_t n) {
  first_ = first;
  n_ = n;
  for (size_t t = 0; t < n; ++t) {
    float* cs = cos_sin_.data() + t * n_rot_;
    for (size_t i = 0; i < speeds_.size(); ++i) {
      const float angle = static_cast<float>(first + t) * speeds_[i];
      cs[2 * i] = static_cast<float>(std::cos(double{angle}));
      cs[2 * i + 1] = static_cast<float>(std::sin(double{angle}));
    }
  }
}

void Attention::forward(size_t layer_index, KvCache& kv, Activations& input, float* residual) {
  const Layer& layer = model_->layers()[layer_index];
  const size_t n_embd = model_->hparams().n_embd;
  normalize(compute_, residual, n_, layer.attn_norm, model_->hparams().rms_eps, input,
            act_bit(layer.attn_q) | act_bit(layer.attn_k) | act_bit(layer.attn_v));
  queue_.add(layer.attn_q, input, 0, n_, q_.data(), n_head_ * head_dim_);
  queue_.add(layer.attn_k, input, 0, n_, k_.data(), n_head_kv_ * head_dim_);
  queue_.add(layer.attn_v, input, 0, n_, v_.data(), n_head_kv_ * head_dim_);
  queue_.run(compute_);
  rotate_and_store(layer_index, kv);
  attend(layer_index, kv);
  queue_.add(layer.attn_output, out_, 0, n_, projected_.data(), n_embd);
  queue_.run(compute_);
  parallel_for(compute_.n_threads, n_, 32, [&](size_t begin, size_t end) {
    compute_.kernels->add(residual + begin * n_embd, projected_.data() + begin * n_embd, (end - begin) * n_embd);
  });
}

void Attention::rotate_and_store(size_t layer_index, KvCache& kv) {
  const KernelTable& kernels = *compute_.kernels;
  parallel_for(compute_.n_threads, n_, 8, [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) {
      const float* cs = cos_sin_.data() + t * n_rot_;
      float* q = q_.data() + t * n_head_ * head_dim_;
      float* k = k_.data() + t * n_head_kv_ * head_dim_;
      for (size_t h = 0; h < n_head_; ++h) kernels.rope(q + h * head_dim_, cs, n_rot_);
      for (size_t h = 0; h < n_head_kv_; ++h) kernels.rope(k + h * head_dim_, cs, n_rot_);
      kv.store(kernels, layer_index, first_ + t, k, v_.data() + t * n_head_kv_ * head_dim_);
    }
  });
}

void Attention::attend(size_t layer_index, const KvCache& kv) {
  const size_t n_tiles = (n_ + tile_tokens_ - 1) / tile_tokens_;
  // Later queries see more keys: handing out the longest tasks first evens the load.
  const uint64_t n_bytes = uint64_t{n_} * (first_ + n_) * n_head_ * head_dim_ * sizeof(float);
  parallel_tasks(compute_.threads_for(n_bytes), n_tiles * n_head_kv_, [&](size_t worker, size_t task) {
    attend_tile(layer_index, kv, worker, task % n_head_kv_, n_tiles - 1 - task / n_head_kv_);
  });
  const ActFormats formats = act_bit(model_->layers()[layer_index].attn_output);
  parallel_for(compute_.n_threads, n_, 8, [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) out_.quantize(*compute_.kernels, t, formats);
  });
}

void Attention::attend_tile(size_t layer_index, const KvCache& kv, size_t worker, size_t head_kv, size_t tile) {
  const size_t group = n_head_ / n_head_kv_, group_floats = group * head_dim_;
  const size_t t_begin = tile * tile_tokens_, t_end = std::min(n_, t_begin + tile_tokens_);
  const size_t n_rows = (t_end - t_begin) * group;
  const size_t key_begin = first_visible(first_ + t_begin), n_keys = first_ + t_end - key_begin;
  float* queries = scratch_.data() + worker * scratch_floats_;  // [n_rows, head_dim], token by token
  float* mixed = queries + n_rows * head_dim_;    // [n_rows, head_dim]
  float* scores = mixed + n_rows * head_dim_;     // [n_rows, n_keys]
  const auto heads_of = [&](float* rows, size_t t) { return rows + (t * n_head_ + head_kv * group) * head_dim_; };

  for (size_t t = t_begin; t < t_end; ++t)
    std::memcpy(queries + (t - t_begin) * group_floats, heads_of(q_.data(), t), group_floats * sizeof(float));
  score(queries, n_rows, kv.keys(layer_index, head_kv, key_begin), n_keys, scores, compute_.panel(worker));
  for (size_t row = 0; row < n_rows; ++row)
    mask_and_softmax(scores + row * n_keys, n_keys, key_begin, first_ + t_begin + row / group);
  mix(scores, n_rows, kv.values(layer_index, head_kv, key_begin), n_keys, mixed, compute_.panel(worker));
  for (size_t t = t_begin; t < t_end; ++t)
    std::memcpy(heads_of(out_.row(0), t), mixed + (t - t_begin) * group_floats, group_floats * sizeof(float));
}

// The library product wins once converted keys serve many rows. The scalar table, the reference,
// stays free of libraries.
bool Attention::use_gemm(size_t n_rows) const {
  return n_rows >= kGemmMinRows && compute_.kernels->needs != 0 && (kPanelKeys + n_rows) * head_dim_ <= kPanelFloats;
}

// scores [n_rows, n_keys] = queries keys^T / sqrt(head_dim)
void Attention::score(const float* queries, size_t n_rows, KvView keys, size_t n_keys, float* scores, float* panel) const {
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim_));
  if (!use_gemm(n_rows)) {
    compute_.kernels->attn_scores(queries, n_rows, head_dim_, keys, n_keys, scale, scores, n_keys);
    return;
  }
  for (size_t j = 0; j < n_keys; j += kPanelKeys) {
    const size_t n = std::min(kPanelKeys, n_keys - j);
    const FloatRows rows = float_rows(*compute_.kernels, keys, j, n, head_dim_, panel);
    sgemm({.m = n_rows, .n = n, .k = head_dim_, .a = queries, .lda = head_dim_, .b = rows.data, .ldb = rows.stride,
           .b_transposed = true, .c = scores + j, .ldc = n_keys, .alpha = scale});
  }
}

// mixed [n_rows, head_dim] = scores values
void Attention::mix(const float* scores, size_t n_rows, KvView values, size_t n_keys, float* mixed, float* panel) const {
  if (!use_gemm(n_rows)) {
    compute_.kernels->attn_mix(scores, n_keys, n_rows, head_dim_, values, n_keys, mixed);
    return;
  }
  float* part = panel + kPanelKeys * head_dim_;
  for (size_t j = 0; j < n_keys; j += kPanelKeys) {
    const size_t n = std::min(kPanelKeys, n_keys - j);
    const FloatRows rows = float_rows(*compute_.kernels, values, j, n, head_dim_, panel);
    sgemm({.m = n_rows, .n = head_dim_, .k = n, .a = scores + j, .lda = n_keys, .b = rows.data, .ldb = rows.stride,
           .b_transposed = false, .c = j == 0 ? mixed : part, .ldc = head_dim_});
    if (j > 0) compute_.kernels->add(mixed, part, n_rows * head_dim_);
  }
}

// Scores of the query at `pos` against keys key_begin...; those it must not see become weight 0.
void Attention::mask_and_softmax(float* scores, size_t n_keys, size_t key_begin, size_t pos) const {
  const size_t begin = first_visible(pos) - key_begin, end = pos + 1 - key_begin;
  std::fill(scores, scores + begin, 0.0f);
  std::fill(scores + end, scores + n_keys, 0.0f);
  compute_.kernels->softmax(scores + begin, end - begin);
}

}  // namespace duet
