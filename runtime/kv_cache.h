// Keys and values of the tokens of one session, laid out for KernelTable::attention:
// [n_layer][segment of kKvSegment positions][n_head_kv], each the keys, then the values.
#pragma once

#include <cstddef>
#include <functional>
#include <span>

#include "runtime/compute.h"
#include "runtime/engine.h"

namespace duet {

// All memory is reserved on construction, in whole segments; physical pages follow as positions are
// written: huge ones where the system has them and a layer fills several, because reading through
// small pages is slower by a third or more.
class KvCache {
 public:
  // Error(unsupported) for q8_0 and a head size that is no multiple of 32.
  KvCache(const HParams& hparams, size_t n_ctx, KvType type);

  // Writes keys and values [n_head_kv * head_dim] of one position. Different positions may be
  // written at the same time.
  void store(const KernelTable& kernels, size_t layer, size_t pos, const float* k, const float* v);
  KvView view(size_t layer, size_t head) const;

  // Takes over the first n positions of a cache of the same size, type and model.
  void copy_prefix(const KvCache& from, size_t n);

  // The memory of positions [kKvSegment * segment, ... + n) of a layer, n <= kKvSegment, piece by piece in a
  // fixed order. A piece may hold lanes of positions behind the n-th: whatever they were.
  using Piece = std::function<void(std::span<std::byte>)>;
  void visit(size_t layer, size_t segment, size_t n, const Piece& piece) const;
  size_t piece_bytes(size_t n) const;  // of all pieces of a layer

  size_t n_ctx() const { return n_ctx_; }
  size_t n_layer() const { return n_layer_; }
  // Of physical memory once n positions have been written, about.
  size_t touched_bytes(size_t n) const;
  size_t size_bytes() const { return data_.size_bytes(); }
  // Bytes of a cache of this size, without making one. Error as the constructor.
  static uint64_t bytes_needed(const HParams& hparams, size_t n_ctx, KvType type);

 private:
  // Bytes of a block of keys and of one position's values of a head.
  struct Sizes {
    size_t key_block, value_row;
  };
  static Sizes sizes(const HParams& hparams, KvType type);
  size_t key_bytes() const { return kKvSegment / kKvBlock * sizes_.key_block; }
  size_t unit_bytes() const { return key_bytes() + kKvSegment * sizes_.value_row; }
  void store_key(const KernelTable& kernels, std::byte* block, size_t lane, const float* k) const;
  void store_value(const KernelTable& kernels, std::byte* row, const float* v) const;
  void store_value_q8(const KernelTable& kernels, std::byte* values, size_t in_segment, const float* v) const;

  size_t n_layer_, n_ctx_, n_segments_, head_dim_, n_head_kv_;
  DType type_;
  Sizes sizes_;
  AlignedArray<std::byte> data_;
};

}  // namespace duet
