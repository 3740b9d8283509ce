#include "tests/support/reference_device.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base/error.h"
#include "quant/f16.h"

namespace duet::test {
namespace {

// Elements of one head at one position, as floats.
void load_head(const gpu::HeadShape& s, const std::byte* data, const std::byte* scales, size_t position, size_t head, float* out) {
  const size_t dim = s.head_dim, at = (position * s.n_head_kv + head) * dim;
  for (size_t i = 0; i < dim; ++i) {
    if (s.kv_type == DType::F32) out[i] = reinterpret_cast<const float*>(data)[at + i];
    else if (s.kv_type == DType::F16) out[i] = f16_to_f32(reinterpret_cast<const uint16_t*>(data)[at + i]);
    else out[i] = f16_to_f32(reinterpret_cast<const uint16_t*>(scales)[(at + i) / 32]) * static_cast<float>(reinterpret_cast<const int8_t*>(data)[at + i]);
  }
}

void store_head(const KernelTable& kernels, const gpu::HeadShape& s, std::byte* data, std::byte* scales, size_t position, size_t head, const float* x) {
  const size_t dim = s.head_dim, at = (position * s.n_head_kv + head) * dim;
  if (s.kv_type == DType::F32) return void(std::memcpy(reinterpret_cast<float*>(data) + at, x, dim * sizeof(float)));
  if (s.kv_type == DType::F16) return kernels.f32_to_f16(x, reinterpret_cast<uint16_t*>(data) + at, dim);
  std::vector<BlockAct32> blocks(dim / 32);
  kernels.quantize_act32(x, blocks.data(), dim);
  for (size_t b = 0; b < blocks.size(); ++b) {
    reinterpret_cast<uint16_t*>(scales)[at / 32 + b] = f32_to_f16(blocks[b].d);
    std::memcpy(data + at + 32 * b, blocks[b].qs, 32);
  }
}

}  // namespace

ReferenceDevice::ReferenceDevice(uint64_t total_bytes) : kernels_(&select_kernels("scalar")) {
  std::snprintf(info_.name, sizeof info_.name, "Reference card");
  info_.total_bytes = total_bytes;
  info_.memory_bytes_per_s = 1e12;
}

AnyCard::AnyCard() {
  if (std::getenv("DUET_GPU_MODULE") == nullptr) return;
  found_ = gpu::find_device();
  if (found_.device == nullptr) fail(ErrorKind::io, "DUET_GPU_MODULE: ", found_.reason);
}

ReferenceDevice::~ReferenceDevice() {
  for (const auto& block : blocks_) std::free(const_cast<std::byte*>(block.first));
}

void ReferenceDevice::fail_after(uint64_t n_operations, std::string message) {
  operations_left_ = n_operations;
  message_ = std::move(message);
}

bool ReferenceDevice::works() {
  if (operations_left_ > 0 && failure_.empty()) {
    --operations_left_;
    return true;
  }
  failure_ = message_;
  return false;
}

void ReferenceDevice::check_inside(const void* p, size_t n_bytes) const {
  const std::lock_guard lock(mutex_);
  const auto* const at = static_cast<const std::byte*>(p);
  auto block = blocks_.upper_bound(at);
  DUET_ASSERT(block != blocks_.begin());
  --block;
  DUET_ASSERT(at >= block->first && at + n_bytes <= block->first + block->second);
}

void* ReferenceDevice::allocate(size_t n_bytes) {
  const std::lock_guard lock(mutex_);
  if (used_bytes_ + hidden_bytes_ + n_bytes > info_.total_bytes) return nullptr;
  auto* const p = static_cast<std::byte*>(std::aligned_alloc(256, (n_bytes + 255) / 256 * 256));
  std::memset(p, 0x7f, n_bytes);  // whoever reads what nobody wrote gets large numbers
  blocks_[p] = n_bytes;
  used_bytes_ += n_bytes;
  return p;
}

void ReferenceDevice::release(void* p) {
  if (p == nullptr) return;
  const std::lock_guard lock(mutex_);
  const auto block = blocks_.find(static_cast<std::byte*>(p));
  DUET_ASSERT(block != blocks_.end());
  used_bytes_ -= block->second;
  blocks_.erase(block);
  std::free(p);
}

void* ReferenceDevice::allocate_host(size_t n_bytes) {
  if (n_refused_ > 0) return --n_refused_, nullptr;
  return std::aligned_alloc(256, (n_bytes + 255) / 256 * 256);
}
void ReferenceDevice::release_host(void* p) { std::free(p); }

void ReferenceDevice::upload(void* dst, const void* src, size_t n_bytes) {
  if (!works()) return;
  check_inside(dst, n_bytes);
  uploaded_bytes_ += n_bytes;
  std::memcpy(dst, src, n_bytes);
}

void ReferenceDevice::download(void* dst, const void* src, size_t n_bytes) {
  if (!works()) return;
  check_inside(src, n_bytes);
  std::memcpy(dst, src, n_bytes);
}

void ReferenceDevice::copy(void* dst, const void* src, size_t n_bytes) {
  if (!works()) return;
  check_inside(dst, n_bytes);
  check_inside(src, n_bytes);
  std::memcpy(dst, src, n_bytes);
}

void ReferenceDevice::upload_beside(int, void* dst, const void* src, size_t n_bytes) { upload(dst, src, n_bytes); }

const char* ReferenceDevice::synchronize() { return failure_.empty() ? nullptr : failure_.c_str(); }

void ReferenceDevice::normalize(const float* x, const float* w, float eps, size_t n, size_t cols, float* y, gpu::ActRows acts) {
  if (!works()) return;
  check_inside(x, n * cols * sizeof(float));
  std::vector<float> row(cols);
  for (size_t t = 0; t < n; ++t) {
    kernels_->rms_norm(x + t * cols, w, eps, row.data(), cols);
    if (y != nullptr) std::copy(row.begin(), row.end(), y + t * cols);
    if (acts.act32 != nullptr) kernels_->quantize_act32(row.data(), acts.act32 + t * act_row_bytes(ActFormat::act32, cols), cols);
    if (acts.act256 != nullptr) kernels_->quantize_act256(row.data(), acts.act256 + t * act_row_bytes(ActFormat::act256, cols), cols);
  }
}

void ReferenceDevice::quantize(const float* x, size_t n, size_t cols, gpu::ActRows acts) {
  if (!works()) return;
  for (size_t t = 0; t < n; ++t) {
    if (acts.act32 != nullptr) kernels_->quantize_act32(x + t * cols, acts.act32 + t * act_row_bytes(ActFormat::act32, cols), cols);
    if (acts.act256 != nullptr) kernels_->quantize_act256(x + t * cols, acts.act256 + t * act_row_bytes(ActFormat::act256, cols), cols);
  }
}

void ReferenceDevice::silu_mul(const float* gate, const float* up, size_t n, size_t cols, float* h, gpu::ActRows acts) {
  if (!works()) return;
  std::vector<float> rows(n * cols);
  kernels_->silu_mul(gate, up, rows.data(), rows.size());
  if (h != nullptr) std::copy(rows.begin(), rows.end(), h);
  for (size_t t = 0; t < n; ++t) {
    if (acts.act32 != nullptr) kernels_->quantize_act32(rows.data() + t * cols, acts.act32 + t * act_row_bytes(ActFormat::act32, cols), cols);
    if (acts.act256 != nullptr) kernels_->quantize_act256(rows.data() + t * cols, acts.act256 + t * act_row_bytes(ActFormat::act256, cols), cols);
  }
}

void ReferenceDevice::multiply(const gpu::Product& p) {
  if (!works()) return;
  const ActFormat act = format_of(p.w.dtype).act;
  const size_t stride = act == ActFormat::f32 ? p.w.cols * sizeof(float) : act_row_bytes(act, p.w.cols);
  std::vector<float> row(p.w.rows);
  for (size_t slot = 0; slot < p.n; ++slot) {
    size_t expert = 0;
    if (p.grouping.first != nullptr)
      while (static_cast<size_t>(p.grouping.first[expert + 1]) <= slot) ++expert;
    DUET_ASSERT(expert < p.w.n);
    const size_t from = p.grouping.token != nullptr ? static_cast<size_t>(p.grouping.token[slot]) : slot;
    check_inside(p.w.data[expert], p.w.rows * p.w.row_bytes);
    check_inside(p.x + from * stride, stride);
    kernels_->matmul[static_cast<size_t>(p.w.dtype)]({.w = p.w.data[expert], .w_stride = p.w.row_bytes, .n_rows = p.w.rows, .cols = p.w.cols, .x = p.x + from * stride,
                                                      .x_stride = stride, .n_tokens = 1, .y = row.data(), .y_stride = p.w.rows});
    float* const y = p.y + slot * p.y_stride;
    check_inside(y, p.w.rows * sizeof(float));
    if (p.add) kernels_->add(y, row.data(), row.size());
    else std::copy(row.begin(), row.end(), y);
  }
}

void ReferenceDevice::rotate_and_store(const gpu::HeadShape& s, const gpu::KvRun* runs, size_t n_runs, size_t n, const float* cos_sin, float* q, float* k,
                                       const float* v) {
  if (!works()) return;
  size_t n_seen = 0;
  for (size_t r = 0; r < n_runs; ++r) {
    const gpu::KvRun& run = runs[r];
    for (size_t t = run.row; t < run.row + run.n; ++t, ++n_seen) {
      const size_t position = run.first + t - run.row;
      for (size_t h = 0; h < s.n_head; ++h) kernels_->rope(q + (t * s.n_head + h) * s.head_dim, cos_sin + t * s.n_rot, s.n_rot);
      for (size_t h = 0; h < s.n_head_kv; ++h) {
        float* const key = k + (t * s.n_head_kv + h) * s.head_dim;
        kernels_->rope(key, cos_sin + t * s.n_rot, s.n_rot);
        store_head(*kernels_, s, run.kv.keys, run.kv.key_scales, position, h, key);
        store_head(*kernels_, s, run.kv.values, run.kv.value_scales, position, h, v + (t * s.n_head_kv + h) * s.head_dim);
      }
    }
  }
  DUET_ASSERT(n_seen == n);
}

void ReferenceDevice::attend(const gpu::HeadShape& s, const gpu::KvRun* runs, size_t n_runs, size_t, size_t max_keys, float scale, const float* q, void* scratch,
                             float* out) {
  if (!works()) return;
  auto* const scores = static_cast<float*>(scratch);
  check_inside(scores, max_keys * sizeof(float));
  std::vector<float> row(s.head_dim);
  for (size_t r = 0; r < n_runs; ++r)
    for (size_t t = runs[r].row; t < runs[r].row + runs[r].n; ++t)
      for (size_t h = 0; h < s.n_head; ++h) {
        const gpu::KvRun& run = runs[r];
        const size_t position = run.first + t - run.row, begin = s.window > 0 && position + 1 > s.window ? position + 1 - s.window : 0;
        const size_t n_keys = position + 1 - begin, head_kv = h / (s.n_head / s.n_head_kv);
        const float* const query = q + (t * s.n_head + h) * s.head_dim;
        DUET_ASSERT(n_keys <= max_keys);
        for (size_t i = 0; i < n_keys; ++i) {
          load_head(s, run.kv.keys, run.kv.key_scales, begin + i, head_kv, row.data());
          double sum = 0;
          for (size_t d = 0; d < s.head_dim; ++d) sum += double{query[d]} * double{row[d]};
          scores[i] = static_cast<float>(sum) * scale;
        }
        kernels_->softmax(scores, n_keys);
        float* const to = out + (t * s.n_head + h) * s.head_dim;
        std::fill_n(to, s.head_dim, 0.0f);
        for (size_t i = 0; i < n_keys; ++i) {
          load_head(s, run.kv.values, run.kv.value_scales, begin + i, head_kv, row.data());
          for (size_t d = 0; d < s.head_dim; ++d) to[d] += scores[i] * row[d];
        }
      }
}

size_t ReferenceDevice::attention_scratch_bytes(const gpu::HeadShape&, size_t, size_t max_keys) const { return max_keys * sizeof(float); }

void ReferenceDevice::choose_experts(const float* logits, size_t n, size_t n_expert, size_t n_used, int32_t* chosen, float* weights) {
  if (!works()) return;
  for (size_t t = 0; t < n; ++t) {
    std::vector<int32_t> order(n_expert);
    for (size_t e = 0; e < n_expert; ++e) order[e] = static_cast<int32_t>(e);
    const float* const row = logits + t * n_expert;
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
    for (size_t rank = 0; rank < n_used; ++rank) {
      chosen[t * n_used + rank] = order[rank];
      weights[t * n_used + rank] = row[order[rank]];
    }
    kernels_->softmax(weights + t * n_used, n_used);
  }
}

void ReferenceDevice::group(const int32_t* chosen, size_t n, size_t n_expert, size_t n_used, int32_t* slot_of, int32_t* token_of, int32_t* first) {
  if (!works()) return;
  int32_t slot = 0;
  for (size_t e = 0; e < n_expert; ++e) {
    first[e] = slot;
    for (size_t i = 0; i < n * n_used; ++i) {
      if (chosen[i] != static_cast<int32_t>(e)) continue;
      token_of[slot] = static_cast<int32_t>(i / n_used);
      slot_of[i] = slot++;
    }
  }
  first[n_expert] = slot;
}

void ReferenceDevice::combine(const float* y, const int32_t* slot_of, const float* weights, size_t n, size_t n_used, size_t cols, float* residual) {
  if (!works()) return;
  for (size_t t = 0; t < n; ++t)
    for (size_t i = t * n_used; i < (t + 1) * n_used; ++i)
      kernels_->add_scaled(residual + t * cols, y + static_cast<size_t>(slot_of[i]) * cols, weights[i], cols);
}

}  // namespace duet::test
