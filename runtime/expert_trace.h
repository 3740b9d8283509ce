// Which experts were chosen, recorded as JSON lines, to be replayed through other policies and sizes
// of cache (runtime/expert_replay.h, bench/cache_sim.cpp).
//
//   {"n_expert": 8, "n_used": 2, "expert_bytes": [per layer], "slots": [per layer]}
//   {"layers": [[experts of each token, best first], ...]}    one line per chunk of tokens that went
//   ...                                                        through the model together
//   {"slots": [per layer]}                                     from the next chunk on, when memory became short
//   {"hits": 123, "misses": 45, "disk_bytes": 6789,             what the engine counted, when it streamed
//    "padding_bytes": 10, "wasted_bytes": 11}                  (StreamStats)
//
// A chunk that was broken off has the layers that it passed: the engine has counted those too. The last layer has only the
// tokens whose logits were wanted, and is left out where there were none.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <vector>

#include "base/mapped_file.h"
#include "runtime/engine.h"

namespace duet {

struct ExpertTraceHeader {
  uint32_t n_expert = 0, n_used = 0;
  std::vector<uint64_t> expert_bytes;  // [n_layer] one expert in the file
  std::vector<uint32_t> slots;         // [n_layer] of the engine that wrote it; n_expert when resident
};

struct ExpertTrace {
  struct Chunk {
    std::vector<std::vector<int32_t>> layers;  // [1..n_layer][n_tokens * n_used], of the last layer fewer
    std::vector<uint32_t> slots = {};          // [n_layer] when they became fewer before this chunk; else empty
  };
  struct Counters {
    uint64_t hits = 0, misses = 0;
    uint64_t disk_bytes = 0, padding_bytes = 0, wasted_bytes = 0;
  };
  ExpertTraceHeader header;
  std::vector<Chunk> chunks;
  std::optional<Counters> engine;  // absent: resident

  size_t n_tokens(const Chunk& chunk) const { return chunk.layers.front().size() / header.n_used; }
};

// Error(usage) when the model has no experts.
ExpertTraceHeader trace_header(const Engine& engine);

// The file appears with commit(); without it nothing is left behind.
class ExpertTraceWriter {
 public:
  ExpertTraceWriter(const std::filesystem::path& path, ExpertTraceHeader header);  // Error(io)
  // Layer after layer of a chunk, as SessionOptions::routing delivers them. Error(io).
  void add(int layer, std::span<const int32_t> experts);
  // Slots as they are now; fewer than before are noted. Between chunks. Error(io).
  void set_slots(const std::vector<uint32_t>& slots);
  // stats: of the engine, all of whose work since it was opened must be in the trace. Error(io).
  void commit(const std::optional<StreamStats>& stats);

 private:
  void write_chunk();

  ExpertTraceHeader header_;
  OutputFile file_;
  std::vector<std::vector<int32_t>> layers_;  // of the chunk at hand
};

// SessionOptions::routing of a session that does all of the engine's work. Both must outlive it.
RoutingFn trace_routing(ExpertTraceWriter& writer, const Engine& engine);

// Error: io, format (what does not fit the header, with its line).
ExpertTrace read_expert_trace(const std::filesystem::path& path);

}  // namespace duet
