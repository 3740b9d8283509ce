#include "runtime/layer_eval.h"

#include <algorithm>
#include <cstring>

#include "runtime/moe.h"

namespace duet {

HParams LayerEval::one_layer(HParams hparams) {
  hparams.n_layer = 1;
  return hparams;
}

LayerEval::LayerEval(const HParams& hparams, const std::vector<float>& rope_factors, int n_threads,
                     size_t max_rows)
    : hparams_(&hparams),
      one_layer_(one_layer(hparams)),
      panels_(static_cast<size_t>(n_threads) * kPanelFloats),
      compute_{&select_kernels(""), n_threads, panels_.data(), nullptr},
      kv_(one_layer_, max_rows, KvType::f32),
      input_(max_rows, hparams.n_embd),
      attention_(hparams, rope_factors, compute_, max_rows, max_rows) {}

void LayerEval::norm(const std::vector<float>& weight, const float* x, size_t n, float* out) const {
  const size_t n_embd = hparams_->n_embd;
  compute_.team([&] {
    parallel_for(compute_.n_threads, n, 8, [&](size_t begin, size_t end) {
      for (size_t t = begin; t < end; ++t)
        compute_.kernels->rms_norm(x + t * n_embd, weight.data(), hparams_->rms_eps,
                                   out + t * n_embd, n_embd);
    });
  });
}

void LayerEval::heads(const Layer& layer, const float* residual, size_t n, float* heads) {
  DUET_ASSERT(n > 0 && n <= kv_.n_ctx());
  compute_.team([&] {
    const KvRun run{&kv_, 0, n};
    attention_.begin({&run, 1});
    attention_.attend(layer, 0, input_, residual);
  });
  const size_t cols = size_t{hparams_->n_head} * hparams_->head_dim;
  std::memcpy(heads, attention_.head_rows(), n * cols * sizeof(float));
}

void LayerEval::route(const Layer& layer, const float* normed, size_t n, int32_t* chosen,
                      float* weights) const {
  std::vector<float> logits(n * hparams_->n_expert);
  compute_.team([&] { duet::route(compute_, *hparams_, layer, normed, n, logits.data(), chosen, weights); });
}

void LayerEval::multiply(const Weight& w, const float* x, size_t n, float* y) const {
  if (n == 0) return;
  Activations rows(n, w.cols, act_bit(ActFormat::f32) | act_bit(w));
  MatmulQueue queue(n / kTokenBlock + 1);
  compute_.team([&] {
    parallel_for(compute_.n_threads, n, 8, [&](size_t begin, size_t end) {
      for (size_t t = begin; t < end; ++t) {
        std::memcpy(rows.row(t), x + t * w.cols, w.cols * sizeof(float));
        rows.quantize(*compute_.kernels, t, act_bit(w));
      }
    });
    queue.add(w, rows, 0, n, y, w.rows);
    queue.run(compute_);
  });
}

void LayerEval::hidden(const Expert& expert, const float* x, size_t n, float* hidden) const {
  const size_t n_ff = expert.gate.rows;
  std::vector<float> up(n * n_ff);
  multiply(expert.gate, x, n, hidden);
  multiply(expert.up, x, n, up.data());
  compute_.team([&] {
    parallel_for(compute_.n_threads, n, 8, [&](size_t begin, size_t end) {
      compute_.kernels->silu_mul(hidden + begin * n_ff, up.data() + begin * n_ff,
                                 hidden + begin * n_ff, (end - begin) * n_ff);
    });
  });
}

namespace {

// [n, cols] -> [cols, padded]
void transpose(const float* x, size_t n, size_t cols, size_t padded, float* out) {
  constexpr size_t kTile = 16;
  for (size_t first = 0; first < n; first += kTile)
    for (size_t c = 0; c < cols; ++c)
      for (size_t t = first; t < std::min(first + kTile, n); ++t)
        out[c * padded + t] = x[t * cols + c];
  for (size_t c = 0; c < cols; ++c) std::fill(out + c * padded + n, out + (c + 1) * padded, 0.0f);
}

}  // namespace

void LayerEval::add_moments(const float* x, size_t nx, const float* y, size_t ny, size_t n,
                            double* sum) const {
  if (n == 0) return;
  const size_t padded = (n + 15) / 16 * 16;
  AlignedArray<float> right(ny * padded), out(nx * ny);
  transpose(y, n, ny, padded, right.data());
  Activations left(nx, padded, act_bit(ActFormat::f32));
  transpose(x, n, nx, padded, left.row(0));
  const Weight w{.format = &format_of(DType::F32),
                 .rows = ny,
                 .cols = padded,
                 .data = reinterpret_cast<const std::byte*>(right.data()),
                 .row_bytes = padded * sizeof(float)};
  MatmulQueue queue(nx / kTokenBlock + 1);
  compute_.team([&] {
    queue.add(w, left, 0, nx, out.data(), ny);  // [nx, ny]
    queue.run(compute_);
    parallel_for(compute_.n_threads, nx, 16, [&](size_t begin, size_t end) {
      for (size_t i = begin * ny; i < end * ny; ++i) sum[i] += double{out.data()[i]};
    });
  });
}

}  // namespace duet
