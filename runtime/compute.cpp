#include "runtime/compute.h"

#include <algorithm>
#include <cstring>

#include "runtime/kernels/onednn_gemm.h"

namespace duet {
namespace {

// Weight bytes of one piece of a product: small enough that a piece stays in the L2 cache while
// all tokens pass, large enough that handing pieces out costs nothing.
constexpr size_t kChunkBytes = size_t{128} << 10;
// Kernels work on tiles of rows; pieces are whole multiples.
constexpr size_t kRowTile = 16;

// Float weights with many tokens go to a library product, which wants larger pieces: as many rows
// as a panel of converted weights holds, up to the point where more no longer helps.
bool is_gemm(const Weight& w, size_t n_tokens) {
  return w.format->act == ActFormat::f32 && n_tokens >= kGemmMinTokens;
}

size_t chunk_rows(const Weight& w, size_t n_tokens) {
  if (is_gemm(w, n_tokens)) return std::clamp<size_t>(kPanelFloats / w.cols, 1, 256);
  const size_t rows = kChunkBytes / std::max<size_t>(w.row_bytes, 1) / kRowTile * kRowTile;
  return std::max(rows, kRowTile);
}

// Bytes of a quantized row; 0 where the width has no such form (then no weight needs it).
size_t act_stride(ActFormat format, size_t cols, size_t block) {
  return cols % block == 0 ? act_row_bytes(format, cols) : 0;
}

}  // namespace

Activations::Activations(size_t max_rows, size_t cols)
    : cols_(cols),
      act32_stride_(act_stride(ActFormat::act32, cols, 32)),
      act256_stride_(act_stride(ActFormat::act256, cols, 256)),
      floats_(max_rows * cols),
      act32_(max_rows * act32_stride_),
      act256_(max_rows * act256_stride_) {}

void Activations::quantize(const KernelTable& kernels, size_t i, ActFormats formats) {
  if (formats & act_bit(ActFormat::act32)) kernels.quantize_act32(row(i), act32_.data() + i * act32_stride_, cols_);
  if (formats & act_bit(ActFormat::act256)) kernels.quantize_act256(row(i), act256_.data() + i * act256_stride_, cols_);
}

void Activations::copy_row(size_t i, const Activations& other, size_t from, ActFormats formats) {
  for (const ActFormat format : {ActFormat::f32, ActFormat::act32, ActFormat::act256})
    if (formats & act_bit(format))
      std::memcpy(const_cast<std::byte*>(data(format, i)), other.data(format, from), stride(format));
}

const std::byte* Activations::data(ActFormat format, size_t i) const {
  switch (format) {
    case ActFormat::act32: return act32_.data() + i * act32_stride_;
    case ActFormat::act256: return act256_.data() + i * act256_stride_;
    case ActFormat::f32: break;
  }
  return reinterpret_cast<const std::byte*>(floats_.data() + i * cols_);
}

size_t Activations::stride(ActFormat format) const {
  switch (format) {
    case ActFormat::act32: return act32_stride_;
    case ActFormat::act256: return act256_stride_;
    case ActFormat::f32: break;
  }
  return cols_ * sizeof(float);
}

void normalize(const Compute& compute, const float* x, size_t n, const std::vector<float>& weight, float eps,
               Activations& acts, ActFormats formats) {
  parallel_for(compute.n_threads, n, 8, [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) {
      compute.kernels->rms_norm(x + t * acts.cols(), weight.data(), eps, acts.row(t), acts.cols());
      acts.quantize(*compute.kernels, t, formats);
    }
  });
}

void MatmulQueue::add(const Weight& w, const Activations& x, size_t first_row, size_t n_tokens, float* y,
                      size_t y_stride) {
  const ActFormat act = w.format->act;
  const MatmulArgs args{.w = w.data, .w_stride = w.row_bytes, .n_rows = w.rows, .cols = w.cols,
                        .x = x.data(act, first_row), .x_stride = x.stride(act), .n_tokens = n_tokens,
                        .y = y, .y_stride = y_stride};
  const size_t rows = chunk_rows(w, n_tokens);
  jobs_.push_back({&w, args, rows, n_chunks_});
  n_chunks_ += (w.rows + rows - 1) / rows;
  n_bytes_ += uint64_t{w.rows} * w.row_bytes * n_tokens;
}

void MatmulQueue::run(const Compute& compute) {
  parallel_tasks(compute.threads_for(n_bytes_), n_chunks_,
                 [&](size_t worker, size_t chunk) { run_chunk(compute, worker, chunk); });
  jobs_.clear();
  n_chunks_ = 0;
  n_bytes_ = 0;
}

void MatmulQueue::run_chunk(const Compute& compute, size_t worker, size_t chunk) const {
  size_t i = jobs_.size() - 1;  // a handful of jobs: the last one that begins at or before the chunk
  while (jobs_[i].first_chunk > chunk) --i;
  const Job& job = jobs_[i];
  const size_t first = (chunk - job.first_chunk) * job.rows_per_chunk;
  MatmulArgs args = job.args;
  args.w += first * args.w_stride;
  args.y += first;
  args.n_rows = std::min(job.rows_per_chunk, args.n_rows - first);
  const DType dtype = job.w->format->dtype;
  const bool done = is_gemm(*job.w, args.n_tokens) &&
                    try_gemm(*compute.kernels, dtype, args, 1, {compute.panel(worker), kPanelFloats});
  if (!done) compute.kernels->matmul[static_cast<size_t>(dtype)](args);
}

}  // namespace duet
