// How the memory of the process is divided, decided before anything is loaded: all weights mapped
// from the file ("resident"), or dense weights in memory of our own and as many experts per layer
// as fit ("streamed").
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/host.h"
#include "runtime/engine.h"

namespace duet {

// Sizes of a model, from a file or from known dimensions.
struct ModelSizes {
  HParams hparams;
  uint64_t file_bytes = 0;
  uint64_t dense_bytes = 0;                // all that is not a routed expert
  std::vector<uint64_t> expert_bytes;      // [n_layer] one slot: the largest expert of the layer with its read padding; empty: dense model
  std::vector<uint64_t> expert_file_bytes; // [n_layer] all experts of the layer, as in the file
  uint64_t bytes_per_token = 0;            // weights that one token reads
};

struct MemoryPlan {
  bool streamed = false;
  uint64_t budget_bytes = 0;   // the whole process, page cache it is charged for included; 0: no limit
  std::string budget_reason;   // "available memory", "cgroup limit 16.0 GiB", "--ram 8GiB"
  uint64_t program_bytes = 0, dense_bytes = 0, kv_bytes = 0, scratch_bytes = 0, io_bytes = 0, expert_bytes = 0;
  uint64_t total_bytes = 0;    // sum of the above
  uint32_t n_ctx = 0, n_batch = 0;
  uint32_t n_staging = 0;                // slots shared by all layers for experts that pass through
  std::vector<uint32_t> slots;           // [n_layer]; empty when resident
  double resident_share = 1.0;           // of the expert bytes
};

// Error(memory) (exit 5) naming the smallest budget that would do when even the floor does not fit.
MemoryPlan plan_memory(const ModelSizes& sizes, const MemoryOptions& options, int n_threads, const HostMemory& memory);

}  // namespace duet
