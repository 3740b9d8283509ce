// The sequences of a batch: those being generated and, as long as memory lasts, finished ones, whose
// beginnings later requests share.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "runtime/batch.h"

namespace duet::server {

class SequencePool {
 public:
  struct Entry {
    Sequence sequence;
    bool busy = true;
    uint64_t last_used = 0;
  };

  // Finished sequences are dropped, the least recently used first, when all together take more than
  // max_bytes.
  SequencePool(const Batch& batch, size_t max_bytes) : batch_(&batch), max_bytes_(max_bytes) {}

  // A sequence that holds the longest beginning of the prompt that any has, less than all of it; `reuse`
  // false: empty. A finished one is taken when little of it is lost, else its beginning is copied.
  Entry& acquire(std::span<const Token> prompt, bool reuse);
  void release(Entry& entry);  // its tokens stay for others
  void trim();                 // sequences have grown
  size_t bytes() const;
  size_t size() const { return entries_.size(); }

 private:
  Entry& fresh(const Entry* keep);
  Entry* oldest_idle(const Entry* keep) const;

  static constexpr size_t kMaxEntries = 256;
  static constexpr size_t kMinCopy = 16;  // tokens below which copying saves nothing

  const Batch* batch_;
  size_t max_bytes_;
  uint64_t clock_ = 0;
  std::vector<std::unique_ptr<Entry>> entries_;
};

}  // namespace duet::server
