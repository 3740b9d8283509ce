#include "runtime/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace duet {
namespace {

// Query rows (tokens x heads of a group) that share one pass over the keys and their conversion to
// float; with a head of 128 elements they and a segment take 0.4 MiB of the L2 cache.
constexpr size_t kTileRows = 96;

// Positions of a span: what one task of a long decode step reads, 1 MiB of keys and values in half
// precision.
constexpr size_t kSpan = 2048;
static_assert(kSpan % kKvSegment == 0);

// Chunks of up to so many tokens share out spans, not only heads, among the threads.
constexpr size_t kSplitTokens = 8;

constexpr float kNone = -std::numeric_limits<float>::infinity();

size_t group_of(const HParams& hparams) { return hparams.n_head / hparams.n_head_kv; }

size_t max_tile_tokens(const HParams& hparams) { return std::max<size_t>(kTileRows / group_of(hparams), 1); }

// Of one worker: the kernel's, results so far, results of a span.
size_t scratch_floats(const HParams& hparams) {
  const size_t rows = max_tile_tokens(hparams) * group_of(hparams);
  return attention_scratch_floats(rows, hparams.head_dim) + 2 * rows * attention_row_floats(hparams.head_dim);
}

size_t partial_floats(const HParams& hparams, size_t n_ctx, size_t n_batch) {
  const size_t n_spans = (n_ctx + kSpan - 1) / kSpan, n_tokens = std::min(n_batch, kSplitTokens);
  return n_spans < 2 ? 0 : n_spans * n_tokens * hparams.n_head * attention_row_floats(hparams.head_dim);
}

// Adds a row of a later span to the row so far; both as KernelTable::attention leaves them, `dims`
// (attention_row_dims) values before the largest score and the sum of weights.
void merge_row(float* row, const float* later, size_t dims) {
  if (later[dims] == kNone) return;
  if (row[dims] == kNone) {
    std::memcpy(row, later, (dims + 2) * sizeof(float));
    return;
  }
  const float max = std::max(row[dims], later[dims]);
  const float a = std::exp2(row[dims] - max), b = std::exp2(later[dims] - max);
  for (size_t i = 0; i < dims; ++i) row[i] = row[i] * a + later[i] * b;
  row[dims] = max;
  row[dims + 1] = row[dims + 1] * a + later[dims + 1] * b;
}

}  // namespace

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

void rotation_at(const std::vector<float>& speeds, size_t position, float* cos_sin) {
  for (size_t i = 0; i < speeds.size(); ++i) {
    // In double: a float near 2^16 radians is off by up to 0.004.
    const double angle = static_cast<double>(position) * double{speeds[i]};
    cos_sin[2 * i] = static_cast<float>(std::cos(angle));
    cos_sin[2 * i + 1] = static_cast<float>(std::sin(angle));
  }
}

Attention::Attention(const HParams& hparams, const std::vector<float>& rope_factors, const Compute& compute, size_t n_ctx,
                     size_t n_batch)
    : hparams_(&hparams),
      compute_(compute),
      head_dim_(hparams.head_dim),
      n_head_(hparams.n_head),
      n_head_kv_(hparams.n_head_kv),
      n_rot_(hparams.n_rot),
      window_(hparams.sliding_window),
      group_(group_of(hparams)),
      row_floats_(attention_row_floats(head_dim_)),
      max_tile_tokens_(max_tile_tokens(hparams)),
      scratch_floats_(scratch_floats(hparams)),
      speeds_(rotation_speeds(hparams, rope_factors)),
      cos_sin_(n_batch * n_rot_),
      q_(n_batch * n_head_ * head_dim_),
      k_(n_batch * n_head_kv_ * head_dim_),
      v_(n_batch * n_head_kv_ * head_dim_),
      projected_(n_batch * hparams.n_embd),
      scratch_(static_cast<size_t>(compute.n_threads) * scratch_floats_),
      partials_(partial_floats(hparams, n_ctx, n_batch)),
      out_(n_batch, n_head_ * head_dim_) {
  runs_.reserve(n_batch);
  run_of_.reserve(n_batch);
  tiles_.reserve(n_batch);
}

uint64_t Attention::bytes_needed(const HParams& hparams, int n_threads, size_t n_ctx, size_t n_batch) {
  const uint64_t per_token = uint64_t{3} * hparams.n_head * hparams.head_dim +
                             uint64_t{2} * hparams.n_head_kv * hparams.head_dim + hparams.n_embd + hparams.n_rot;
  return sizeof(float) * (n_batch * per_token + static_cast<uint64_t>(n_threads) * scratch_floats(hparams) +
                          partial_floats(hparams, n_ctx, n_batch));
}

void Attention::begin(std::span<const KvRun> runs) {
  runs_.clear();
  run_of_.clear();
  n_ = 0;
  n_bytes_ = 0;
  for (const KvRun& run : runs) {
    runs_.push_back({run, n_});
    n_ += run.n;
    n_bytes_ += uint64_t{run.n} * (run.first + run.n) * n_head_ * head_dim_ * sizeof(float);
  }
  for (const Run& run : runs_) run_of_.insert(run_of_.end(), run.n, &run);
  for (size_t t = 0; t < n_; ++t) rotation_at(speeds_, run_of_[t]->position(t), cos_sin_.data() + t * n_rot_);
  make_tiles();
}

// A few tasks per thread, where that does not make every tile small. Later queries see more keys:
// handing out the longest tasks first evens the load.
void Attention::make_tiles() {
  const auto n_threads = static_cast<size_t>(compute_.threads_for(n_bytes_));
  const size_t tile_tokens = std::clamp<size_t>(n_ * n_head_kv_ / (4 * n_threads), 1, max_tile_tokens_);
  tiles_.clear();
  for (const Run& run : runs_)
    for (size_t t = run.row; t < run.row + run.n; t += tile_tokens)
      tiles_.push_back({&run, 0, t, std::min(run.row + run.n, t + tile_tokens)});
  const auto cost = [](const Tile& tile) { return (tile.t_end - tile.t_begin) * tile.run->position(tile.t_end); };
  std::sort(tiles_.begin(), tiles_.end(), [&](const Tile& a, const Tile& b) { return cost(a) > cost(b); });
}

void Attention::forward(const Layer& layer, size_t kv_layer, Activations& input, float* residual) {
  attend(layer, kv_layer, input, residual);
  add_output(layer, residual);
}

void Attention::store_keys(const Layer& layer, size_t kv_layer, Activations& input, const float* residual) {
  project(layer, kv_layer, input, residual, {.queries = false, .keys = true});
}

void Attention::forward_queries(const Layer& layer, size_t kv_layer, Activations& input, float* residual) {
  project(layer, kv_layer, input, residual, {.queries = true, .keys = false});
  mix_values(layer, kv_layer);
  add_output(layer, residual);
}

void Attention::attend(const Layer& layer, size_t kv_layer, Activations& input, const float* residual) {
  project(layer, kv_layer, input, residual, {.queries = true, .keys = true});
  mix_values(layer, kv_layer);
}

void Attention::add_output(const Layer& layer, float* residual) {
  const size_t n_embd = hparams_->n_embd;
  queue_.add(layer.attn_output, out_, 0, n_, projected_.data(), n_embd);
  queue_.run(compute_);
  parallel_for(compute_.n_threads, n_, 32, [&](size_t begin, size_t end) {
    compute_.kernels->add(residual + begin * n_embd, projected_.data() + begin * n_embd, (end - begin) * n_embd);
  });
}

// Queries, keys and values of the rows, rotated, and keys and values in the cache.
void Attention::project(const Layer& layer, size_t kv_layer, Activations& input, const float* residual, Parts parts) {
  const size_t q_width = n_head_ * head_dim_, kv_width = n_head_kv_ * head_dim_;
  const ActFormats of_q = parts.queries ? act_bit(layer.attn_q) : 0, of_kv = parts.keys ? act_bit(layer.attn_k) | act_bit(layer.attn_v) : 0;
  normalize(compute_, residual, n_, layer.attn_norm, hparams_->rms_eps, input, of_q | of_kv);
  const auto multiply = [&](TensorKind kind, const Weight& w, float* y, size_t width) {
    if (compute_.observer != nullptr) observe(compute_, kind, static_cast<int>(kv_layer), input.row(0), n_, hparams_->n_embd);
    queue_.add(w, input, 0, n_, y, width);
  };
  if (parts.queries) multiply(TensorKind::attn_q, layer.attn_q, q_.data(), q_width);
  if (parts.keys) multiply(TensorKind::attn_k, layer.attn_k, k_.data(), kv_width);
  if (parts.keys) multiply(TensorKind::attn_v, layer.attn_v, v_.data(), kv_width);
  queue_.run(compute_);
  parallel_for(compute_.n_threads, n_, kKvBlock, [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) {
      if (parts.queries) rotate(q_.data() + t * q_width, n_head_, t);
      if (!parts.keys) continue;
      rotate(k_.data() + t * kv_width, n_head_kv_, t);
      run_of_[t]->kv->store(*compute_.kernels, kv_layer, run_of_[t]->position(t), k_.data() + t * kv_width, v_.data() + t * kv_width);
    }
  });
}

void Attention::rotate(float* rows, size_t n_heads, size_t t) const {
  for (size_t h = 0; h < n_heads; ++h) compute_.kernels->rope(rows + h * head_dim_, cos_sin_.data() + t * n_rot_, n_rot_);
}

void Attention::mix_values(const Layer& layer, size_t kv_layer) {
  const int n_threads = compute_.threads_for(n_bytes_);
  const Spans spans = spans_seen(runs_[0], 0, runs_[0].n);
  if (n_threads > 1 && runs_.size() == 1 && n_ <= kSplitTokens && spans.end - spans.begin > 1) {
    attend_split(kv_layer, runs_[0], spans, n_threads);
  } else {
    parallel_tasks(n_threads, tiles_.size() * n_head_kv_, [&](size_t worker, size_t task) {
      Tile tile = tiles_[task / n_head_kv_];
      tile.head_kv = task % n_head_kv_;
      attend_whole(tile.run->kv->view(kv_layer, tile.head_kv), worker, tile);
    });
  }
  const ActFormats formats = act_bit(layer.attn_output);
  parallel_for(compute_.n_threads, n_, 8, [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) out_.quantize(*compute_.kernels, t, formats);
  });
  if (compute_.observer != nullptr)
    observe(compute_, TensorKind::attn_output, static_cast<int>(kv_layer), out_.row(0), n_, n_head_ * head_dim_);
}

// All spans of a tile, one after the other.
void Attention::attend_whole(const KvView& kv, size_t worker, const Tile& tile) {
  const size_t n_rows = (tile.t_end - tile.t_begin) * group_;
  float* scratch = scratch_.data() + worker * scratch_floats_;
  float* rows = scratch + attention_scratch_floats(n_rows, head_dim_);
  float* later = rows + n_rows * row_floats_;
  const Spans spans = spans_seen(*tile.run, tile.t_begin, tile.t_end);
  for (size_t span = spans.begin; span < spans.end; ++span) {
    attend_span(kv, tile, span, scratch, span == spans.begin ? rows : later);
    for (size_t i = 0; span > spans.begin && i < n_rows; ++i)
      merge_row(rows + i * row_floats_, later + i * row_floats_, attention_row_dims(head_dim_));
  }
  for (size_t i = 0; i < n_rows; ++i)
    finish_row(rows + i * row_floats_, tile.t_begin + i / group_, tile.head_kv * group_ + i % group_);
}

// The chunk as one tile per KV head and span, for different threads; then the same merges.
void Attention::attend_split(size_t kv_layer, const Run& run, Spans spans, int n_threads) {
  const size_t n_tiles = (n_ + max_tile_tokens_ - 1) / max_tile_tokens_, n_spans = spans.end - spans.begin;
  parallel_tasks(n_threads, n_head_kv_ * n_tiles * n_spans, [&](size_t worker, size_t task) {
    const size_t span = spans.begin + task % n_spans, t = task / n_spans % n_tiles * max_tile_tokens_;
    const size_t head_kv = task / n_spans / n_tiles;
    attend_span(run.kv->view(kv_layer, head_kv), {&run, head_kv, t, std::min(n_, t + max_tile_tokens_)}, span,
                scratch_.data() + worker * scratch_floats_, partial(span - spans.begin, head_kv, t));
  });
  parallel_for(n_threads, n_ * n_head_, group_, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const size_t token = i / n_head_, head = i % n_head_, offset = head % group_ * row_floats_;
      float* row = partial(0, head / group_, token) + offset;
      for (size_t span = 1; span < n_spans; ++span)
        merge_row(row, partial(span, head / group_, token) + offset, attention_row_dims(head_dim_));
      finish_row(row, token, head);
    }
  });
}

void Attention::attend_span(const KvView& kv, const Tile& tile, size_t span, float* scratch, float* out) const {
  compute_.kernels->attention({.kv = kv,
                               .q = q_.data() + (tile.t_begin * n_head_ + tile.head_kv * group_) * head_dim_,
                               .q_stride = n_head_ * head_dim_,
                               .n_tokens = tile.t_end - tile.t_begin,
                               .group = group_,
                               .head_dim = head_dim_,
                               .first = tile.run->position(tile.t_begin),
                               .window = window_,
                               .key_begin = span * kSpan,
                               .key_end = (span + 1) * kSpan,
                               .scale = 1.0f / std::sqrt(static_cast<float>(head_dim_)),
                               .scratch = scratch,
                               .out = out});
}

void Attention::finish_row(const float* row, size_t token, size_t head) {
  const float inverse = 1.0f / row[attention_row_dims(head_dim_) + 1];
  float* out = out_.row(token) + head * head_dim_;
  for (size_t i = 0; i < head_dim_; ++i) out[i] = row[i] * inverse;
}

// Spans in which rows [t_begin, t_end) of a run see keys.
Attention::Spans Attention::spans_seen(const Run& run, size_t t_begin, size_t t_end) const {
  const size_t pos = run.position(t_begin);
  const size_t first_key = window_ > 0 && pos + 1 > window_ ? pos + 1 - window_ : 0;
  return {first_key / kSpan, run.position(t_end - 1) / kSpan + 1};
}

float* Attention::partial(size_t span, size_t head_kv, size_t token) const {
  return partials_.data() + (((span * n_head_kv_ + head_kv) * n_) + token) * group_ * row_floats_;
}

}  // namespace duet
