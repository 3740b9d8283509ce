// Byte-pair merging of a row of symbols: the highest priority first, the leftmost among equals.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace duet {

// A stretch [begin, begin + n_bytes) of the text; n_bytes 0 once merged into its left neighbour.
struct Symbol {
  uint32_t begin = 0, n_bytes = 0;
  int32_t prev = -1, next = -1;
  int32_t id = -1;      // token, -1: none
  bool frozen = false;  // never merged
};

struct MergeCandidate {
  double priority;
  int32_t left, right;
  uint32_t n_bytes;
  int32_t id;
  bool operator<(const MergeCandidate& other) const {  // for a max-heap
    return priority != other.priority ? priority < other.priority : left > other.left;
  }
};

// `find(left, right, candidate)` says whether two neighbouring symbols merge, filling priority and
// id. O(n log n). `heap` is scratch space, kept by the caller between calls.
template <class Find>
void merge_symbols(std::vector<Symbol>& symbols, std::vector<MergeCandidate>& heap, Find&& find) {
  const auto at = [&](int32_t i) -> Symbol& { return symbols[static_cast<size_t>(i)]; };
  const auto propose = [&](int32_t left, int32_t right) {
    if (left < 0 || right < 0 || at(left).frozen || at(right).frozen) return false;
    MergeCandidate candidate{0, left, right, at(left).n_bytes + at(right).n_bytes, -1};
    if (!find(at(left), at(right), candidate)) return false;
    heap.push_back(candidate);
    return true;
  };
  heap.clear();
  for (size_t i = 0; i + 1 < symbols.size(); ++i)
    propose(static_cast<int32_t>(i), static_cast<int32_t>(i + 1));
  std::make_heap(heap.begin(), heap.end());
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end());
    const MergeCandidate top = heap.back();
    heap.pop_back();
    Symbol &left = at(top.left), &right = at(top.right);
    // Outdated when either side has merged since.
    if (left.n_bytes == 0 || right.n_bytes == 0 || left.n_bytes + right.n_bytes != top.n_bytes)
      continue;
    left.n_bytes = top.n_bytes;
    left.id = top.id;
    left.next = right.next;
    if (right.next >= 0) at(right.next).prev = top.left;
    right.n_bytes = 0;
    if (propose(left.prev, top.left)) std::push_heap(heap.begin(), heap.end());
    if (propose(top.left, left.next)) std::push_heap(heap.begin(), heap.end());
  }
}

}  // namespace duet
