#include "runtime/kv_cache.h"

#include <cstring>

#include "base/bytes.h"

namespace duet {
namespace {

size_t elem_bytes(KvType type) { return type == KvType::f16 ? sizeof(uint16_t) : sizeof(float); }

}  // namespace

uint64_t KvCache::bytes_needed(const HParams& hparams, size_t n_ctx, KvType type) {
  uint64_t n = 2 * elem_bytes(type);
  for (const uint64_t factor : {uint64_t{hparams.n_layer}, uint64_t{n_ctx}, uint64_t{hparams.n_head_kv}, uint64_t{hparams.head_dim}})
    if (!checked_mul(n, factor, n)) fail(ErrorKind::memory, "a context of ", n_ctx, " positions does not fit any memory");
  return n;
}

KvCache::KvCache(const HParams& hparams, size_t n_ctx, KvType type)
    : n_ctx_(n_ctx),
      head_dim_(hparams.head_dim),
      width_(size_t{hparams.n_head_kv} * hparams.head_dim),
      elem_bytes_(elem_bytes(type)),
      keys_(bytes_needed(hparams, n_ctx, type) / 2),
      values_(bytes_needed(hparams, n_ctx, type) / 2) {}

void KvCache::store(const KernelTable& kernels, size_t layer, size_t pos, const float* k, const float* v) {
  const size_t offset = (layer * n_ctx_ + pos) * width_ * elem_bytes_;
  if (elem_bytes_ == sizeof(float)) {
    std::memcpy(keys_.data() + offset, k, width_ * sizeof(float));
    std::memcpy(values_.data() + offset, v, width_ * sizeof(float));
    return;
  }
  kernels.f32_to_f16(k, reinterpret_cast<uint16_t*>(keys_.data() + offset), width_);
  kernels.f32_to_f16(v, reinterpret_cast<uint16_t*>(values_.data() + offset), width_);
}

KvView KvCache::view(const AlignedArray<std::byte>& data, size_t layer, size_t head, size_t pos) const {
  const size_t stride = width_ * elem_bytes_;
  return {data.data() + (layer * n_ctx_ + pos) * stride + head * head_dim_ * elem_bytes_, stride,
          elem_bytes_ == sizeof(uint16_t)};
}

}  // namespace duet
