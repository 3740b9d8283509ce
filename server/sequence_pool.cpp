#include "server/sequence_pool.h"

#include <algorithm>

namespace duet::server {
namespace {

size_t common_prefix(std::span<const Token> a, std::span<const Token> b) {
  return static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
}

}  // namespace

SequencePool::Entry& SequencePool::acquire(std::span<const Token> prompt, bool reuse) {
  const auto wanted = prompt.first(prompt.size() - 1);  // the last is always evaluated
  Entry& entry = from_memory(wanted, reuse);
  entry.to_store = false;
  if (reuse && store_ != nullptr) store_->extend(entry.sequence, wanted);
  entry.busy = true;  // last: what throws before leaves a finished sequence
  return entry;
}

SequencePool::Entry& SequencePool::from_memory(std::span<const Token> wanted, bool reuse) {
  Entry* best = nullptr;
  size_t common = 0;
  for (const auto& entry : entries_) {
    const size_t n = reuse ? common_prefix(wanted, entry->sequence.tokens()) : 0;
    if (n > common || (n > 0 && n == common && !entry->busy)) {
      common = n;
      best = entry.get();
    }
  }
  if (best != nullptr && !best->busy && 2 * common >= best->sequence.tokens().size()) {
    best->sequence.truncate(common);
    return *best;
  }
  Entry& entry = fresh(best);
  entry.sequence.truncate(&entry == best ? common : 0);
  if (best != nullptr && &entry != best && common >= kMinCopy) entry.sequence.copy_prefix(best->sequence, common);
  return entry;
}

// Memory of the oldest finished sequence where one more might not fit: rather another than `keep`, as long as there is
// room for both now (on a card, whose sequences take all of their memory at once, there is none).
SequencePool::Entry& SequencePool::fresh(const Entry* keep) {
  Entry* old = oldest_idle(keep);
  const bool is_full = bytes() >= max_bytes_ || entries_.size() >= kMaxEntries;
  if (old == nullptr && is_full) old = oldest_idle(nullptr);
  if (old != nullptr && (is_full || bytes() + batch_->sequence_bytes() > max_bytes_)) {
    store_rest(*old);
    return *old;
  }
  entries_.push_back(std::make_unique<Entry>(Entry{batch_->new_sequence()}));
  return *entries_.back();
}

void SequencePool::release(Entry& entry, bool keep) {
  entry.busy = false;
  entry.last_used = ++clock_;
  entry.to_store = keep && store_ != nullptr;
  entry.n_stored = 0;
  trim();
}

bool SequencePool::store_next() {
  Entry* last = nullptr;
  for (const auto& entry : entries_)
    if (!entry->busy && entry->to_store && (last == nullptr || entry->last_used > last->last_used)) last = entry.get();
  if (last != nullptr) store_block(*last);
  return last != nullptr;
}

void SequencePool::store_block(Entry& entry) {
  entry.to_store = store_->store(entry.sequence, entry.n_stored);
  ++entry.n_stored;
}

void SequencePool::store_rest(Entry& entry) {
  while (entry.to_store) store_block(entry);
}

void SequencePool::trim() {
  while (bytes() > max_bytes_ || entries_.size() > kMaxEntries) {
    Entry* old = oldest_idle(nullptr);
    if (old == nullptr) return;
    store_rest(*old);
    std::erase_if(entries_, [&](const auto& entry) { return entry.get() == old; });
  }
}

size_t SequencePool::bytes() const {
  size_t sum = 0;
  for (const auto& entry : entries_) sum += entry->sequence.bytes();
  return sum;
}

SequencePool::Entry* SequencePool::oldest_idle(const Entry* keep) const {
  Entry* old = nullptr;
  for (const auto& entry : entries_)
    if (!entry->busy && entry.get() != keep && (old == nullptr || entry->last_used < old->last_used)) old = entry.get();
  return old;
}

}  // namespace duet::server
