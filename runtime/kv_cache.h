// Keys and values of the tokens of one session: [n_layer][n_ctx][n_head_kv * head_dim] each.
#pragma once

#include <cstddef>

#include "runtime/compute.h"
#include "runtime/engine.h"

namespace duet {

// All memory is reserved on construction, physical pages follow as positions are written.
class KvCache {
 public:
  KvCache(const HParams& hparams, size_t n_ctx, KvType type);

  // Writes keys and values [n_head_kv * head_dim] of one position.
  void store(const KernelTable& kernels, size_t layer, size_t pos, const float* k, const float* v);
  // Keys, values of one KV head from position `first` on.
  KvView keys(size_t layer, size_t head, size_t first) const { return view(keys_, layer, head, first); }
  KvView values(size_t layer, size_t head, size_t first) const { return view(values_, layer, head, first); }

  size_t n_ctx() const { return n_ctx_; }
  size_t size_bytes() const { return keys_.size_bytes() + values_.size_bytes(); }
  // Bytes of a cache of this size, without making one.
  static uint64_t bytes_needed(const HParams& hparams, size_t n_ctx, KvType type);

 private:
  KvView view(const AlignedArray<std::byte>& data, size_t layer, size_t head, size_t pos) const;

  size_t n_ctx_, head_dim_, width_, elem_bytes_;  // width: elements of a position
  AlignedArray<std::byte> keys_, values_;
};

}  // namespace duet
