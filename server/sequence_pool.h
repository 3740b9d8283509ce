// The sequences of a batch: those being generated and, as long as memory lasts, finished ones, whose
// beginnings later requests share, those in a PrefixStore after their memory has gone to others.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "runtime/batch.h"
#include "server/prefix_store.h"

namespace duet::server {

class SequencePool {
 public:
  struct Entry {
    Sequence sequence;
    bool busy = false;
    uint64_t last_used = 0;
    bool to_store = false;  // not all blocks, from n_stored on, are in the store
    size_t n_stored = 0;
  };

  // Finished sequences are dropped, the least recently used first, when all together take more than
  // max_bytes. `store` may be null.
  SequencePool(const Batch& batch, size_t max_bytes, PrefixStore* store) : batch_(&batch), max_bytes_(max_bytes), store_(store) {}

  // A sequence that holds the longest beginning of the prompt that any, or the store, has, less than all of
  // it; `reuse` false: empty. A finished one is taken when little of it is lost, else its beginning is copied.
  Entry& acquire(std::span<const Token> prompt, bool reuse);
  void release(Entry& entry, bool keep);  // its tokens stay for others; keep: after their memory has gone, too
  void trim();                 // sequences have grown
  size_t bytes() const;
  size_t size() const { return entries_.size(); }

  // The store gets what finished sequences have: a block of the one finished last. False: there is none.
  bool store_next();
  void store_all() {
    while (store_next()) {
    }
  }

 private:
  Entry& from_memory(std::span<const Token> wanted, bool reuse);
  Entry& fresh(const Entry* keep);
  void store_block(Entry& entry);
  void store_rest(Entry& entry);
  Entry* oldest_idle(const Entry* keep) const;

  static constexpr size_t kMaxEntries = 256;
  static constexpr size_t kMinCopy = 16;  // tokens below which copying saves nothing

  const Batch* batch_;
  size_t max_bytes_;
  PrefixStore* store_;
  uint64_t clock_ = 0;
  std::vector<std::unique_ptr<Entry>> entries_;
};

}  // namespace duet::server
