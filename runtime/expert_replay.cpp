#include "runtime/expert_replay.h"

#include <algorithm>
#include <functional>
#include <limits>

#include "base/error.h"
#include "runtime/expert_policy.h"

namespace duet {
namespace {

// How much each expert of a layer deserves to stay, after a chunk.
using Values = std::vector<double>;
using Update = std::function<void(size_t chunk, std::span<const int32_t> chosen, Values& values)>;

// Those that belong to the best `n` by value stay; the lower number among equals.
void keep_best(size_t n, const Values& values, std::vector<bool>& held) {
  std::vector<size_t> ranked;
  for (size_t e = 0; e < held.size(); ++e)
    if (held[e]) ranked.push_back(e);
  std::stable_sort(ranked.begin(), ranked.end(), [&](size_t a, size_t b) { return values[a] > values[b]; });
  for (size_t i = n; i < ranked.size(); ++i) held[ranked[i]] = false;
}

ReplayCounts use(std::span<const int32_t> chosen, uint64_t expert_bytes, std::vector<bool>& held) {
  std::vector<bool> needed(held.size());
  for (const int32_t e : chosen) needed[static_cast<size_t>(e)] = true;
  ReplayCounts counts;
  for (size_t e = 0; e < held.size(); ++e) {
    if (!needed[e]) continue;
    ++(held[e] ? counts.hits : counts.misses);
    held[e] = true;
  }
  counts.bytes = counts.misses * expert_bytes;
  return counts;
}

void replay_layer(const ExpertTrace& trace, size_t layer, uint32_t slots, std::vector<bool> held, const Update& update,
                  std::vector<ReplayCounts>& counts) {
  Values values(trace.header.n_expert, -std::numeric_limits<double>::infinity());
  for (size_t i = 0; i < trace.chunks.size(); ++i) {
    if (!trace.chunks[i].slots.empty() && trace.chunks[i].slots[layer] < slots) {
      slots = trace.chunks[i].slots[layer];
      keep_best(slots, values, held);
    }
    if (layer >= trace.chunks[i].layers.size()) continue;  // it was broken off before
    const auto& chosen = trace.chunks[i].layers[layer];
    counts[i] += use(chosen, trace.header.expert_bytes[layer], held);
    update(i, chosen, values);
    keep_best(slots, values, held);
  }
}

std::vector<bool> held_in(const ExpertTrace& trace, const HeldExperts& held, size_t layer) {
  std::vector<bool> out(trace.header.n_expert);
  if (held.empty()) return out;
  for (const int32_t e : held[layer]) out[static_cast<size_t>(e)] = true;
  return out;
}

// make_update(layer): a fresh Update for that layer.
template <class MakeUpdate>
std::vector<ReplayCounts> replay(const ExpertTrace& trace, const Slots& slots, const HeldExperts& held, const MakeUpdate& make_update) {
  DUET_ASSERT(slots.size() == trace.header.expert_bytes.size() && (held.empty() || held.size() == slots.size()));
  std::vector<ReplayCounts> counts(trace.chunks.size());
  for (size_t layer = 0; layer < slots.size(); ++layer)
    replay_layer(trace, layer, slots[layer], held_in(trace, held, layer), make_update(layer), counts);
  return counts;
}

// next[chunk][expert]: minus the number of the chunk that needs the expert next after this one.
std::vector<Values> next_uses(const ExpertTrace& trace, size_t layer) {
  std::vector<Values> next(trace.chunks.size());
  Values now(trace.header.n_expert, -std::numeric_limits<double>::infinity());
  for (size_t i = trace.chunks.size(); i-- > 0;) {
    next[i] = now;
    if (layer >= trace.chunks[i].layers.size()) continue;
    for (const int32_t e : trace.chunks[i].layers[layer]) now[static_cast<size_t>(e)] = -static_cast<double>(i);
  }
  return next;
}

}  // namespace

ReplayCounts& ReplayCounts::operator+=(const ReplayCounts& other) {
  hits += other.hits;
  misses += other.misses;
  bytes += other.bytes;
  return *this;
}

std::vector<ReplayCounts> replay_engine(const ExpertTrace& trace, const Slots& slots) {
  ExpertPolicy policy(trace.header.n_expert, slots);
  ExpertPolicy::Step step;
  std::vector<ReplayCounts> counts(trace.chunks.size());
  std::vector<int32_t> freed;
  for (size_t i = 0; i < trace.chunks.size(); ++i) {
    for (size_t layer = 0; layer < trace.chunks[i].slots.size(); ++layer) policy.shrink(layer, trace.chunks[i].slots[layer], freed);
    for (size_t layer = 0; layer < trace.chunks[i].layers.size(); ++layer) {
      policy.use(layer, trace.chunks[i].layers[layer], trace.header.n_used, step);
      counts[i] += {step.hits.size(), step.loads.size(), step.loads.size() * trace.header.expert_bytes[layer]};
    }
  }
  return counts;
}

std::vector<ReplayCounts> replay_lru(const ExpertTrace& trace, const Slots& slots) {
  return replay(trace, slots, {}, [&](size_t) {
    return [clock = 0.0, n_used = trace.header.n_used](size_t, std::span<const int32_t> chosen, Values& last) mutable {
      for (size_t token = 0; token < chosen.size(); token += n_used)
        for (size_t rank = n_used; rank-- > 0;) last[static_cast<size_t>(chosen[token + rank])] = ++clock;
    };
  });
}

std::vector<ReplayCounts> replay_lfu(const ExpertTrace& trace, const Slots& slots) {
  return replay(trace, slots, {}, [](size_t) {
    return [](size_t, std::span<const int32_t> chosen, Values& count) {
      for (const int32_t e : chosen) {
        double& n = count[static_cast<size_t>(e)];
        n = std::max(n, 0.0) + 1;
      }
    };
  });
}

std::vector<ReplayCounts> replay_belady(const ExpertTrace& trace, const Slots& slots, const HeldExperts& held) {
  return replay(trace, slots, held, [&](size_t layer) {
    return [next = next_uses(trace, layer)](size_t i, std::span<const int32_t>, Values& soonness) { soonness = next[i]; };
  });
}

}  // namespace duet
