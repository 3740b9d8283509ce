// Which experts of each layer stay in memory when not all fit. Bookkeeping only, without bytes and
// threads, so that the engine and the replay of a recorded trace (bench/cache_sim) are one code and
// their counts equal.
//
// A layer has its own slots, one expert each, least recently used out first. What gets no slot passes
// through staging and is forgotten, so that even a single slot hits: it holds the best expert of the
// last token that missed it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace duet {

class ExpertPolicy {
 public:
  static constexpr int32_t kStaging = -1;

  // slots[layer]: experts that the layer holds, at most n_expert.
  ExpertPolicy(size_t n_expert, std::vector<uint32_t> slots);

  struct Load {
    int32_t expert;
    int32_t slot;  // of this layer, or kStaging
  };
  struct Step {
    std::vector<int32_t> hits;  // ascending
    std::vector<Load> loads;    // ascending by expert
  };
  // A chunk of tokens passes through a layer; chosen: their experts [n_tokens, n_used]. A miss gets
  // a free slot, else that of the least recently used expert which this chunk does not use, else
  // staging: a long prompt, which uses all experts, leaves the cache as it was. Where not all misses
  // get a slot, the most recent do. Afterwards an expert is as recent as the last token that chose
  // it; within a token the better rank is more recent. Allocates nothing once `step` has room.
  void use(size_t layer, std::span<const int32_t> chosen, size_t n_used, Step& step);

  // The slot that holds an expert now, or kStaging.
  int32_t slot_of(size_t layer, int32_t expert) const;
  // A load failed: the slot is empty again.
  void forget(size_t layer, int32_t expert);
  // From now on the layer has so many slots, fewer than before: free ones go first, then those of
  // the least recently used experts. Slots are not renumbered, the freed ones are never used again.
  // Appends their numbers.
  void shrink(size_t layer, uint32_t n_slots, std::vector<int32_t>& freed);

  uint32_t slots(size_t layer) const;
  uint64_t hits() const { return hits_; }
  uint64_t misses() const { return misses_; }

 private:
  struct Layer {
    uint32_t n_slots = 0;
    std::vector<int32_t> slot;     // [n_expert] slot or kStaging
    std::vector<int32_t> expert;   // [slots] expert, -1 free, -2 retired
    std::vector<uint64_t> used;    // [n_expert] time of the last use
  };
  void mark_used(Layer& layer, std::span<const int32_t> chosen, size_t n_used);
  // Gives slots to the misses of a chunk that began when the clock showed `before`.
  static void place(Layer& layer, uint64_t before, std::vector<Load>& loads);
  static int32_t take_slot(Layer& layer, uint64_t before);
  // Slot of the least recently used expert that was not used since `before`, or kStaging.
  static int32_t oldest(const Layer& layer, uint64_t before);

  size_t n_expert_;
  std::vector<Layer> layers_;
  uint64_t clock_ = 0, hits_ = 0, misses_ = 0;
};

}  // namespace duet
