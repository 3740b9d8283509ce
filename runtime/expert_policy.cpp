#include "runtime/expert_policy.h"

#include <algorithm>

#include "base/error.h"

namespace duet {
namespace {

constexpr int32_t kFree = -1, kRetired = -2;

}  // namespace

ExpertPolicy::ExpertPolicy(size_t n_expert, std::vector<uint32_t> slots) : n_expert_(n_expert) {
  layers_.reserve(slots.size());
  for (const uint32_t n : slots) {
    DUET_ASSERT(n <= n_expert);
    layers_.push_back({n, std::vector<int32_t>(n_expert, kStaging), std::vector<int32_t>(n, kFree),
                       std::vector<uint64_t>(n_expert, 0)});
  }
}

// The clock then stands beyond what it showed before for the experts chosen, and only for them.
void ExpertPolicy::mark_used(Layer& layer, std::span<const int32_t> chosen, size_t n_used) {
  DUET_ASSERT(n_used > 0 && chosen.size() % n_used == 0);
  for (size_t token = 0; token < chosen.size(); token += n_used)
    for (size_t rank = n_used; rank-- > 0;) {
      const auto expert = static_cast<size_t>(chosen[token + rank]);
      DUET_ASSERT(expert < n_expert_);
      layer.used[expert] = ++clock_;
    }
}

int32_t ExpertPolicy::take_slot(Layer& layer, uint64_t before) {
  const auto free = std::find(layer.expert.begin(), layer.expert.end(), kFree);
  if (free != layer.expert.end()) return static_cast<int32_t>(free - layer.expert.begin());
  const int32_t slot = oldest(layer, before);
  if (slot != kStaging) layer.slot[static_cast<size_t>(layer.expert[static_cast<size_t>(slot)])] = kStaging;
  return slot;
}

int32_t ExpertPolicy::oldest(const Layer& layer, uint64_t before) {
  int32_t slot = kStaging;
  uint64_t least = before;
  for (size_t i = 0; i < layer.expert.size(); ++i) {
    if (layer.expert[i] < 0) continue;
    const uint64_t used = layer.used[static_cast<size_t>(layer.expert[i])];
    if (used > least) continue;
    least = used;
    slot = static_cast<int32_t>(i);
  }
  return slot;
}

void ExpertPolicy::use(size_t layer_index, std::span<const int32_t> chosen, size_t n_used, Step& step) {
  Layer& layer = layers_.at(layer_index);
  const uint64_t before = clock_;
  mark_used(layer, chosen, n_used);
  step.hits.clear();
  step.loads.clear();
  for (size_t e = 0; e < n_expert_; ++e) {
    if (layer.used[e] <= before) continue;
    const auto expert = static_cast<int32_t>(e);
    if (layer.slot[e] != kStaging)
      step.hits.push_back(expert);
    else
      step.loads.push_back({expert, kStaging});
  }
  hits_ += step.hits.size();
  misses_ += step.loads.size();
  place(layer, before, step.loads);
}

void ExpertPolicy::place(Layer& layer, uint64_t before, std::vector<Load>& loads) {
  const auto used = [&](const Load& load) { return layer.used[static_cast<size_t>(load.expert)]; };
  std::sort(loads.begin(), loads.end(), [&](const Load& a, const Load& b) { return used(a) > used(b); });
  for (Load& load : loads) {
    load.slot = take_slot(layer, before);
    if (load.slot == kStaging) break;
    layer.expert[static_cast<size_t>(load.slot)] = load.expert;
    layer.slot[static_cast<size_t>(load.expert)] = load.slot;
  }
  std::sort(loads.begin(), loads.end(), [](const Load& a, const Load& b) { return a.expert < b.expert; });
}

int32_t ExpertPolicy::slot_of(size_t layer, int32_t expert) const {
  return layers_.at(layer).slot.at(static_cast<size_t>(expert));
}

void ExpertPolicy::forget(size_t layer_index, int32_t expert) {
  Layer& layer = layers_.at(layer_index);
  int32_t& slot = layer.slot.at(static_cast<size_t>(expert));
  if (slot == kStaging) return;
  layer.expert[static_cast<size_t>(slot)] = kFree;
  slot = kStaging;
}

void ExpertPolicy::shrink(size_t layer_index, uint32_t n_slots, std::vector<int32_t>& freed) {
  Layer& layer = layers_.at(layer_index);
  const auto retire = [&](size_t slot) {
    layer.expert[slot] = kRetired;
    freed.push_back(static_cast<int32_t>(slot));
    --layer.n_slots;
  };
  for (size_t slot = layer.expert.size(); slot-- > 0 && layer.n_slots > n_slots;)
    if (layer.expert[slot] == kFree) retire(slot);
  while (layer.n_slots > n_slots) {
    const auto slot = static_cast<size_t>(oldest(layer, clock_));
    layer.slot[static_cast<size_t>(layer.expert[slot])] = kStaging;
    retire(slot);
  }
}

uint32_t ExpertPolicy::slots(size_t layer) const { return layers_.at(layer).n_slots; }

}  // namespace duet
