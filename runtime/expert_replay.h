// What policies of keeping experts would have hit and read, given the routing that was recorded.
//
// A chunk of tokens needs each of its experts once in each layer, and may pass them all through
// staging; then at most slots[layer] of those that were held or read stay. Layers do not compete.
// All begin empty unless they are told what is held. Each gives counts per chunk. Where the engine's
// slots became fewer while it ran, no more than those are held from there on.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/expert_trace.h"

namespace duet {

struct ReplayCounts {
  uint64_t hits = 0, misses = 0, bytes = 0;  // bytes: of the misses, as in the file
  ReplayCounts& operator+=(const ReplayCounts& other);
};

using Slots = std::vector<uint32_t>;                    // [n_layer]
using HeldExperts = std::vector<std::vector<int32_t>>;  // [n_layer]

// The engine's (runtime/expert_policy.h): its own counters, exactly, with the slots it had.
std::vector<ReplayCounts> replay_engine(const ExpertTrace& trace, const Slots& slots);
// Keeps the experts last used; the last token and the best rank count as the latest.
std::vector<ReplayCounts> replay_lru(const ExpertTrace& trace, const Slots& slots);
// Keeps those chosen most often since the trace began.
std::vector<ReplayCounts> replay_lfu(const ExpertTrace& trace, const Slots& slots);
// Keeps those that are needed soonest (Belady): no policy that fetches on demand reads less.
std::vector<ReplayCounts> replay_belady(const ExpertTrace& trace, const Slots& slots, const HeldExperts& held = {});

}  // namespace duet
