// Replays recorded routing (--trace-experts of duet run and duet bench) through policies of keeping
// experts (runtime/expert_replay.h).
//
//   bench_cache_sim TRACE
//
// First the engine's policy with the slots that the trace was recorded with: hits and misses must be
// those that the engine counted, and the bytes it read those of the misses, the padding around them
// and the guesses that were wrong; exit code 1 when they are not. Then, for each number of slots per
// layer, the hit rate and MB read per token of the engine's policy, LRU, LFU and Belady's optimum:
// once for the tokens that went through the model alone (decode), once for the others (prompts).
#include <algorithm>
#include <cstdio>

#include "base/error.h"
#include "runtime/expert_replay.h"

namespace duet {
namespace {

constexpr const char* kNames[] = {"engine", "LRU", "LFU", "Belady"};

struct Part {
  const char* name;
  bool decode;
  size_t n_chunks = 0, n_tokens = 0;
};

bool is_decode(const ExpertTrace& trace, size_t chunk) { return trace.n_tokens(trace.chunks[chunk]) == 1; }

Part part_of(const ExpertTrace& trace, const char* name, bool decode) {
  Part part{.name = name, .decode = decode};
  for (size_t i = 0; i < trace.chunks.size(); ++i) {
    if (is_decode(trace, i) != decode) continue;
    ++part.n_chunks;
    part.n_tokens += trace.n_tokens(trace.chunks[i]);
  }
  return part;
}

ReplayCounts sum(const ExpertTrace& trace, const Part& part, const std::vector<ReplayCounts>& counts) {
  ReplayCounts out;
  for (size_t i = 0; i < counts.size(); ++i)
    if (is_decode(trace, i) == part.decode) out += counts[i];
  return out;
}

void print(const Part& part, const ReplayCounts& c) {
  const double n_used = static_cast<double>(std::max<uint64_t>(c.hits + c.misses, 1));
  std::printf("  %5.1f %% %7.2f", 100.0 * static_cast<double>(c.hits) / n_used,
              static_cast<double>(c.bytes) / 1e6 / static_cast<double>(part.n_tokens));
}

// False: the engine counted something else.
bool print_recorded(const ExpertTrace& trace) {
  ReplayCounts all;
  for (const ReplayCounts& counts : replay_engine(trace, trace.header.slots)) all += counts;
  const auto [least, most] = std::minmax_element(trace.header.slots.begin(), trace.header.slots.end());
  const auto n_shrunk = std::count_if(trace.chunks.begin(), trace.chunks.end(), [](const auto& chunk) { return !chunk.slots.empty(); });
  std::printf("%zu layers of %u experts, %u to %u held; replayed as recorded: %llu hits, %llu misses, %llu bytes of misses\n",
              trace.header.slots.size(), trace.header.n_expert, *least, *most, static_cast<unsigned long long>(all.hits),
              static_cast<unsigned long long>(all.misses), static_cast<unsigned long long>(all.bytes));
  if (n_shrunk > 0) std::printf("memory became short %td times: fewer were held from there on\n", n_shrunk);
  if (!trace.engine) {
    std::printf("the engine held all weights and counted nothing\n");
    return true;
  }
  const bool same = trace.engine->hits == all.hits && trace.engine->misses == all.misses;
  std::printf("the engine counted %llu hits, %llu misses: %s\n", static_cast<unsigned long long>(trace.engine->hits),
              static_cast<unsigned long long>(trace.engine->misses), same ? "equal" : "NOT EQUAL");
  const uint64_t padding = trace.engine->padding_bytes, wasted = trace.engine->wasted_bytes;
  const bool same_bytes = trace.engine->disk_bytes == all.bytes + padding + wasted;
  std::printf("the engine read %llu bytes, %llu of them padding, %llu for wrong guesses: %s\n", static_cast<unsigned long long>(trace.engine->disk_bytes),
              static_cast<unsigned long long>(padding), static_cast<unsigned long long>(wasted), same_bytes ? "equal" : "NOT EQUAL");
  return same && same_bytes;
}

// As if memory had never become short: each row is for so many slots from beginning to end.
void print_tables(ExpertTrace trace, const std::vector<Part>& parts) {
  for (ExpertTrace::Chunk& chunk : trace.chunks) chunk.slots.clear();
  std::vector<std::vector<std::vector<ReplayCounts>>> results;  // [slots - 1][policy][chunk]
  for (uint32_t n = 1; n <= trace.header.n_expert; ++n) {
    const Slots slots(trace.header.slots.size(), n);
    results.push_back({replay_engine(trace, slots), replay_lru(trace, slots), replay_lfu(trace, slots), replay_belady(trace, slots)});
  }
  for (const Part& part : parts) {
    if (part.n_chunks == 0) continue;
    std::printf("\n%s: %zu tokens in %zu chunks; hit rate and MB per token\nslots", part.name, part.n_tokens, part.n_chunks);
    for (const char* name : kNames) std::printf("  %15s", name);
    for (size_t n = 0; n < results.size(); ++n) {
      std::printf("\n%5zu", n + 1);
      for (const auto& counts : results[n]) print(part, sum(trace, part, counts));
    }
    std::printf("\n");
  }
}

bool run(const char* path) {
  const ExpertTrace trace = read_expert_trace(path);
  const bool same = print_recorded(trace);
  print_tables(trace, {part_of(trace, "decode", true), part_of(trace, "prompts", false)});
  return same;
}

}  // namespace
}  // namespace duet

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: bench_cache_sim TRACE\n");
    return 2;
  }
  try {
    return duet::run(argv[1]) ? 0 : 1;
  } catch (const duet::Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
}
