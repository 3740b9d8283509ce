#include "runtime/compute.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "runtime/kernels/onednn_gemm.h"

namespace duet {
namespace {

// Weight bytes of one piece of a product. For one token: as long as a thread reads in 10 us, so that
// handing pieces out costs nothing. For many: what stays in the L2 cache while all of them pass.
constexpr size_t kDecodeChunkBytes = size_t{128} << 10, kPrefillChunkBytes = size_t{256} << 10;
// Kernels work on groups of up to 16 rows for one token, on panels of 32 rows for several.
constexpr size_t kRowGroup = 16, kRowPanel = 32;

// Float weights with many tokens go to a library product, which wants larger pieces: as many rows
// as a panel of converted weights holds, up to the point where more no longer helps.
bool is_gemm(const Weight& w, size_t n_tokens) {
  return w.format->act == ActFormat::f32 && n_tokens >= kGemmMinTokens;
}

// Pieces of one weight before another's turn: kernels fetch what follows a piece in memory.
constexpr size_t kTurn = 8;

size_t chunk_rows(const Weight& w, size_t n_tokens) {
  if (is_gemm(w, n_tokens)) return std::clamp<size_t>(kPanelFloats / w.cols, 1, 256);
  const size_t bytes = n_tokens == 1 ? kDecodeChunkBytes : kPrefillChunkBytes;
  const size_t tile = n_tokens == 1 ? kRowGroup : kRowPanel;
  return std::max(bytes / std::max<size_t>(w.row_bytes, 1) / tile * tile, tile);
}

// Bytes of a quantized row; 0 where the width has no such form (then no weight needs it).
size_t act_stride(ActFormats formats, ActFormat format, size_t cols, size_t block) {
  return (formats & act_bit(format)) && cols % block == 0 ? act_row_bytes(format, cols) : 0;
}

}  // namespace

Activations::Activations(size_t max_rows, size_t cols, ActFormats formats)
    : cols_(cols),
      act32_stride_(act_stride(formats, ActFormat::act32, cols, 32)),
      act256_stride_(act_stride(formats, ActFormat::act256, cols, 256)),
      floats_(formats & act_bit(ActFormat::f32) ? max_rows * cols : 0),
      act32_(max_rows * act32_stride_),
      act256_(max_rows * act256_stride_) {}

void Activations::quantize(const KernelTable& kernels, size_t i, ActFormats formats) {
  if (formats & act_bit(ActFormat::act32)) kernels.quantize_act32(row(i), act32_.data() + i * act32_stride_, cols_);
  if (formats & act_bit(ActFormat::act256)) kernels.quantize_act256(row(i), act256_.data() + i * act256_stride_, cols_);
}

void Activations::set_part(const KernelTable& kernels, size_t i, size_t first, const float* values, size_t n,
                           ActFormat format) {
  auto* row_data = const_cast<std::byte*>(data(format, i));
  switch (format) {
    case ActFormat::act32: return kernels.quantize_act32(values, row_data + act_row_bytes(format, first), n);
    case ActFormat::act256: return kernels.quantize_act256(values, row_data + act_row_bytes(format, first), n);
    case ActFormat::f32: std::memcpy(row_data + first * sizeof(float), values, n * sizeof(float));
  }
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

uint32_t exact_batch(const Model& model) {
  const auto may_gemm = [](const Weight& w) { return is_gemm(w, kGemmMinTokens); };
  bool any = may_gemm(model.output());
  for (const Layer& layer : model.layers()) {
    for (const Weight* w : {&layer.attn_q, &layer.attn_k, &layer.attn_v, &layer.attn_output}) any |= may_gemm(*w);
    for (const Expert& expert : layer.experts)
      for (const Weight* w : {&expert.gate, &expert.up, &expert.down}) any |= may_gemm(*w);
  }
  return any ? kGemmMinTokens - 1 : std::numeric_limits<uint32_t>::max();
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

void observe(const Compute& compute, TensorKind kind, int layer, const float* rows, size_t n_rows, size_t cols) {
  const std::string name = tensor_name(kind, layer);
  (*compute.observer)({.kind = kind, .layer = layer, .tensor = name, .expert = -1, .n_rows = n_rows, .cols = cols, .rows = rows, .router_weights = {}});
}

namespace {

// y += b (a x).
void add_low_rank(const Compute& compute, const Product& p, std::span<float> panel) {
  const LowRank& low = *p.w->low_rank;
  const auto matmul = compute.kernels->matmul[static_cast<size_t>(DType::F32)];
  const size_t rank_bytes = low.rank * sizeof(float), n_rows = std::min(p.n_rows, panel.size() / p.n_tokens);
  float* added = panel.data();
  for (size_t row = 0; row < p.n_rows; row += n_rows) {
    const size_t n = std::min(n_rows, p.n_rows - row);
    matmul({.w = reinterpret_cast<const std::byte*>(low.b.data() + (p.first_row + row) * low.rank), .w_stride = rank_bytes, .n_rows = n, .cols = low.rank,
            .x = reinterpret_cast<const std::byte*>(p.inner), .x_stride = rank_bytes, .n_tokens = p.n_tokens, .y = added, .y_stride = n});
    for (size_t t = 0; t < p.n_tokens; ++t) compute.kernels->add(p.y + t * p.y_stride + row, added + t * n, n);
  }
}

void multiply_stored(const Compute& compute, const Product& p, std::span<float> panel) {
  const Format& format = *p.w->format;
  const MatmulArgs args{.w = p.w->data + p.first_row * p.w->row_bytes, .w_stride = p.w->row_bytes,
                        .n_rows = p.n_rows, .cols = p.w->cols, .x = p.x->data(format.act, p.first_token),
                        .x_stride = p.x->stride(format.act), .n_tokens = p.n_tokens, .y = p.y, .y_stride = p.y_stride, .next = p.next};
  if (is_gemm(*p.w, p.n_tokens) && try_gemm(*compute.kernels, format.dtype, args, 1, panel)) return;
  compute.kernels->matmul[static_cast<size_t>(format.dtype)](args);
}

}  // namespace

void multiply(const Compute& compute, const Product& p, std::span<float> panel) {
  multiply_stored(compute, p, panel);
  if (p.w->low_rank != nullptr) add_low_rank(compute, p, panel);
}

void InnerProducts::clear() {
  first_.clear();
  pieces_.clear();
  n_values_ = 0;
}

void InnerProducts::add(const Product& product) {
  constexpr size_t kTokens = 32;  // of one piece
  first_.push_back(product.w->low_rank != nullptr ? n_values_ : kNone);
  if (product.w->low_rank == nullptr) return;
  const size_t rank = product.w->low_rank->rank;
  for (size_t t = 0; t < product.n_tokens; t += kTokens) {
    Piece piece{product, n_values_ + t * rank};
    piece.tokens.first_token += t;
    piece.tokens.n_tokens = std::min(kTokens, product.n_tokens - t);
    pieces_.push_back(piece);
  }
  n_values_ += product.n_tokens * rank;
}

void InnerProducts::make(const Compute& compute) {
  if (pieces_.empty()) return;
  if (values_.size() < n_values_) values_.resize(n_values_);
  const auto matmul = compute.kernels->matmul[static_cast<size_t>(DType::F32)];
  uint64_t n_bytes = 0;
  for (const Piece& piece : pieces_) n_bytes += piece.tokens.w->low_rank->a.size() * sizeof(float);
  parallel_for(compute.threads_for(n_bytes), pieces_.size(), 1, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const Product& p = pieces_[i].tokens;
      const LowRank& low = *p.w->low_rank;
      matmul({.w = reinterpret_cast<const std::byte*>(low.a.data()), .w_stride = p.w->cols * sizeof(float), .n_rows = low.rank, .cols = p.w->cols,
              .x = p.x->data(ActFormat::f32, p.first_token), .x_stride = p.x->stride(ActFormat::f32), .n_tokens = p.n_tokens,
              .y = values_.data() + pieces_[i].first, .y_stride = low.rank});
    }
  });
}

void MatmulQueue::add(const Weight& w, const Activations& x, size_t first_row, size_t n_tokens, float* y,
                      size_t y_stride) {
  for (size_t t = 0; t < n_tokens; t += kTokenBlock) {
    const size_t n = std::min(kTokenBlock, n_tokens - t), rows = chunk_rows(w, n), n_chunks = (w.rows + rows - 1) / rows;
    jobs_.push_back({{&w, 0, w.rows, &x, first_row + t, n, y + t * y_stride, y_stride}, rows, n_chunks, n_chunks_});
    n_chunks_ += n_chunks;
  }
  n_bytes_ += uint64_t{w.rows} * w.row_bytes * n_tokens;
}

// An error while running leaves an empty queue too.
struct MatmulQueue::Emptied {
  MatmulQueue* queue;
  ~Emptied() {
    queue->jobs_.clear();
    queue->inner_.clear();
    queue->n_chunks_ = 0;
    queue->n_bytes_ = 0;
  }
};

void MatmulQueue::make_inner(const Compute& compute) {
  for (const Job& job : jobs_) inner_.add(job.all);
  inner_.make(compute);
  for (size_t i = 0; i < jobs_.size(); ++i) jobs_[i].all.inner = inner_.of(i);
}

bool MatmulQueue::alike() const {
  return std::all_of(jobs_.begin(), jobs_.end(), [&](const Job& job) { return job.n_chunks == jobs_[0].n_chunks; });
}

// Products of equal shape (those of the experts) take turns, so that a thread's share is about the same
// rows of each of them, whichever experts they are.
MatmulQueue::Chunk MatmulQueue::chunk_at(size_t i, bool alike) const {
  if (alike) {
    const size_t first = i / (jobs_.size() * kTurn) * kTurn, n = std::min(kTurn, jobs_[0].n_chunks - first), rest = i - first * jobs_.size();
    return {&jobs_[rest / n], first + rest % n};
  }
  size_t job = jobs_.size() - 1;  // a handful of jobs: the last one that begins at or before the chunk
  while (jobs_[job].first_chunk > i) --job;
  return {&jobs_[job], i - jobs_[job].first_chunk};
}

void MatmulQueue::run(const Compute& compute) {
  const Emptied emptied{this};
  make_inner(compute);
  const bool take_turns = alike();
  parallel_shares(compute.threads_for(n_bytes_), n_chunks_,
                  [&](size_t worker, size_t i) {
                    const std::byte* next = i + 1 < n_chunks_ ? rows_of(chunk_at(i + 1, take_turns)) : nullptr;
                    run_chunk(compute, worker, chunk_at(i, take_turns), next);
                  });
}

void MatmulQueue::run_arriving(const Compute& compute, const std::function<void(size_t, size_t)>& ready) {
  const Emptied emptied{this};
  make_inner(compute);
  const bool take_turns = alike();
  parallel_tasks(compute.n_threads, n_chunks_, [&](size_t worker, size_t i) {
    const Chunk chunk = chunk_at(i, take_turns);
    const size_t first = chunk.index * chunk.job->rows_per_chunk;
    ready(first, std::min(first + chunk.job->rows_per_chunk, chunk.job->all.n_rows));
    run_chunk(compute, worker, chunk, nullptr);
  });
}

const std::byte* MatmulQueue::rows_of(const Chunk& chunk) {
  const Weight& w = *chunk.job->all.w;
  return w.data + chunk.index * chunk.job->rows_per_chunk * w.row_bytes;
}

void MatmulQueue::run_chunk(const Compute& compute, size_t worker, const Chunk& chunk, const std::byte* next) const {
  const Job& job = *chunk.job;
  Product part = job.all;
  part.first_row = chunk.index * job.rows_per_chunk;
  part.n_rows = std::min(job.rows_per_chunk, part.n_rows - part.first_row);
  part.y += part.first_row;
  part.next = next;
  multiply(compute, part, {compute.panel(worker), kPanelFloats});
}

}  // namespace duet
