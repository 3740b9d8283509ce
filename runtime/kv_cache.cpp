#include "runtime/kv_cache.h"

#include <sys/mman.h>

#include <cstring>

#include "base/bytes.h"
#include "quant/f16.h"

namespace duet {
namespace {

constexpr size_t kMaxHeadDim = 1024;  // formats/schema.cpp refuses larger ones

DType dtype_of(KvType type) {
  if (type == KvType::f32) return DType::F32;
  return type == KvType::f16 ? DType::F16 : DType::Q8_0;
}

// The first position of a layer takes a whole huge page: not for contexts of a few of them.
constexpr size_t kHugePage = size_t{2} << 20, kHugeFromLayerBytes = 4 * kHugePage;

void prefer_huge_pages(std::byte* data, size_t n_bytes) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage, end = (address + n_bytes) / kHugePage * kHugePage;
  if (begin < end) static_cast<void>(::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));  // a hint
}

size_t segments(size_t n_ctx) { return n_ctx / kKvSegment + (n_ctx % kKvSegment != 0); }

// One element of 16 keys after the other: `lane` is the key's place among them.
template <class T>
void scatter(const T* from, size_t n, std::byte* to, size_t lane) {
  for (size_t i = 0; i < n; ++i) std::memcpy(to + (i * kKvBlock + lane) * sizeof(T), from + i, sizeof(T));
}

}  // namespace

KvCache::Sizes KvCache::sizes(const HParams& hparams, KvType type) {
  const size_t dim = hparams.head_dim, padded = (dim + 15) / 16 * 16;
  if (type == KvType::f32) return {4 * kKvBlock * dim, 4 * padded};
  if (type == KvType::f16) return {2 * kKvBlock * dim, 2 * padded};
  if (dim % 32 != 0)
    fail(ErrorKind::unsupported, "keys and values in q8_0 need a head size that is a multiple of 32, this model's is ", dim,
         "; use f16");
  return {kKvBlock * sizeof(BlockQ8_0) * (dim / 32), sizeof(BlockQ8_0) * (dim / 32)};
}

uint64_t KvCache::bytes_needed(const HParams& hparams, size_t n_ctx, KvType type) {
  const Sizes bytes = sizes(hparams, type);
  uint64_t n = bytes.key_block / kKvBlock + bytes.value_row;
  for (const uint64_t factor : {uint64_t{hparams.n_layer}, uint64_t{segments(n_ctx)}, uint64_t{kKvSegment}, uint64_t{hparams.n_head_kv}})
    if (!checked_mul(n, factor, n)) fail(ErrorKind::memory, "a context of ", n_ctx, " positions does not fit any memory");
  return n;
}

KvCache::KvCache(const HParams& hparams, size_t n_ctx, KvType type)
    : n_layer_(hparams.n_layer),
      n_ctx_(n_ctx),
      n_segments_(segments(n_ctx)),
      head_dim_(hparams.head_dim),
      n_head_kv_(hparams.n_head_kv),
      type_(dtype_of(type)),
      sizes_(sizes(hparams, type)),
      data_(bytes_needed(hparams, n_ctx, type)) {
  const size_t layer_bytes = n_segments_ * n_head_kv_ * unit_bytes();
  if (layer_bytes >= kHugeFromLayerBytes) prefer_huge_pages(data_.data(), data_.size_bytes());
}

KvView KvCache::view(size_t layer, size_t head) const {
  const std::byte* unit = data_.data() + (layer * n_segments_ * n_head_kv_ + head) * unit_bytes();
  return {.keys = unit,
          .values = unit + key_bytes(),
          .segment_bytes = n_head_kv_ * unit_bytes(),
          .key_block_bytes = sizes_.key_block,
          .value_row_bytes = sizes_.value_row,
          .type = type_};
}

// Whole segments: what lies behind the n-th position is never read before it is written.
void KvCache::copy_prefix(const KvCache& from, size_t n) {
  DUET_ASSERT(from.data_.size_bytes() == data_.size_bytes() && from.type_ == type_ && n <= n_ctx_);
  const size_t segment_bytes = n_head_kv_ * unit_bytes();
  for (size_t layer = 0; layer < n_layer_; ++layer) {
    const size_t at = layer * n_segments_ * segment_bytes;
    std::memcpy(data_.data() + at, from.data_.data() + at, segments(n) * segment_bytes);
  }
}

void KvCache::visit(size_t layer, size_t segment, size_t n, const Piece& piece) const {
  DUET_ASSERT(layer < n_layer_ && segment < n_segments_ && n <= kKvSegment);
  const size_t n_blocks = (n + kKvBlock - 1) / kKvBlock;
  for (size_t head = 0; head < n_head_kv_; ++head) {
    std::byte* keys = data_.data() + ((layer * n_segments_ + segment) * n_head_kv_ + head) * unit_bytes();
    std::byte* values = keys + key_bytes();
    piece({keys, n_blocks * sizes_.key_block});
    if (type_ != DType::Q8_0) {
      piece({values, n * sizes_.value_row});
      continue;
    }
    const size_t n_groups = head_dim_ / 32, n_pairs = (n + 1) / 2;
    for (size_t g = 0; g < n_groups; ++g) piece({values + g * kKvSegment * sizeof(uint16_t), n * sizeof(uint16_t)});
    values += n_groups * kKvSegment * sizeof(uint16_t);
    for (size_t g = 0; g < n_groups; ++g) piece({values + g * kKvSegment * 32, n_pairs * 64});
  }
}

size_t KvCache::piece_bytes(size_t n) const {
  size_t sum = 0;
  visit(0, 0, n, [&](std::span<std::byte> piece) { sum += piece.size(); });
  return sum;
}

size_t KvCache::touched_bytes(size_t n) const { return n_layer_ * segments(n) * n_head_kv_ * unit_bytes(); }

void KvCache::store(const KernelTable& kernels, size_t layer, size_t pos, const float* k, const float* v) {
  DUET_ASSERT(head_dim_ <= kMaxHeadDim);
  const size_t segment = pos / kKvSegment, in_segment = pos % kKvSegment;
  for (size_t head = 0; head < n_head_kv_; ++head) {
    std::byte* unit = data_.data() + ((layer * n_segments_ + segment) * n_head_kv_ + head) * unit_bytes();
    store_key(kernels, unit + in_segment / kKvBlock * sizes_.key_block, pos % kKvBlock, k + head * head_dim_);
    if (type_ == DType::Q8_0)
      store_value_q8(kernels, unit + key_bytes(), in_segment, v + head * head_dim_);
    else
      store_value(kernels, unit + key_bytes() + in_segment * sizes_.value_row, v + head * head_dim_);
  }
}

void KvCache::store_key(const KernelTable& kernels, std::byte* block, size_t lane, const float* k) const {
  if (type_ == DType::F32) return scatter(k, head_dim_, block, lane);
  if (type_ == DType::F16) {
    uint16_t halves[kMaxHeadDim];
    kernels.f32_to_f16(k, halves, head_dim_);
    return scatter(halves, head_dim_, block, lane);
  }
  BlockAct32 quantized[kMaxHeadDim / 32];
  kernels.quantize_act32(k, quantized, head_dim_);
  for (size_t g = 0; g < head_dim_ / 32; ++g, block += kKvBlock * sizeof(BlockQ8_0)) {
    const uint16_t d = f32_to_f16(quantized[g].d);
    scatter(&d, 1, block, lane);
    std::byte* pairs = block + kKvBlock * sizeof d;
    for (size_t i = 0; i < 32; i += 2) std::memcpy(pairs + i * kKvBlock + 2 * lane, quantized[g].qs + i, 2);
  }
}

void KvCache::store_value_q8(const KernelTable& kernels, std::byte* values, size_t in_segment, const float* v) const {
  BlockAct32 quantized[kMaxHeadDim / 32];
  kernels.quantize_act32(v, quantized, head_dim_);
  const size_t n_groups = head_dim_ / 32;
  for (size_t g = 0; g < n_groups; ++g) {
    const uint16_t d = f32_to_f16(quantized[g].d);
    std::memcpy(values + (g * kKvSegment + in_segment) * sizeof d, &d, sizeof d);
    std::byte* pair = values + n_groups * kKvSegment * sizeof d + (g * kKvSegment + in_segment / 2 * 2) * 32;
    for (size_t i = 0; i < 32; ++i) std::memcpy(pair + 2 * i + in_segment % 2, quantized[g].qs + i, 1);
  }
}

void KvCache::store_value(const KernelTable& kernels, std::byte* row, const float* v) const {
  const size_t n_bytes = head_dim_ * (type_ == DType::F32 ? sizeof(float) : sizeof(uint16_t));
  if (type_ == DType::F32)
    std::memcpy(row, v, n_bytes);
  else
    kernels.f32_to_f16(v, reinterpret_cast<uint16_t*>(row), head_dim_);
  std::memset(row + n_bytes, 0, sizes_.value_row - n_bytes);
}

}  // namespace duet
