// How the memory of the process is divided, decided before anything is loaded: all weights mapped
// from the file ("resident"), or dense weights in memory of our own and as many experts per layer
// as fit ("streamed").
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/host.h"
#include "runtime/engine.h"

namespace duet {

// a - b, or nothing.
inline uint64_t less(uint64_t a, uint64_t b) { return a > b ? a - b : 0; }

// Sizes of a model, from a file or from known dimensions.
struct ModelSizes {
  HParams hparams;
  uint64_t file_bytes = 0;
  uint64_t dense_bytes = 0;                // all that is not a routed expert
  std::vector<uint64_t> expert_bytes;      // [n_layer] one slot: the largest expert of the layer with its read padding; empty: dense model
  std::vector<uint64_t> expert_file_bytes; // [n_layer] all experts of the layer, as in the file
  std::vector<uint64_t> ffn_bytes;         // [n_layer] the same, and of a dense model gate, up and down
  uint64_t embd_bytes = 0;                 // of dense_bytes: the table of embeddings
  uint64_t router_bytes = 0;               // of dense_bytes: the routers
  uint64_t bytes_per_token = 0;            // weights that one token reads
  uint64_t int8_macs = 0, f32_macs = 0;    // multiply-adds of one token in the layers, by kind of its activations
};

// What one of an expert's three matrices takes in a slot: whole pages, and one more for where it begins
// in its first one.
inline uint64_t slot_part_bytes(uint64_t n_bytes) {
  return (n_bytes + kReadAlignment - 1) / kReadAlignment * kReadAlignment + kReadAlignment;
}

// Of a file, in either layout of experts. Error(format) when a tensor is missing.
ModelSizes model_sizes(const GgufFile& file, const HParams& hparams);
// Of a file that is yet to be made: each tensor in the format that `format_of` says, metadata and
// tokenizer left out.
ModelSizes model_sizes(const HParams& hparams, const std::function<const Format&(const TensorSpec&)>& format_of);

struct MemoryPlan {
  bool streamed = false;
  uint64_t budget_bytes = 0;   // the whole process, page cache it is charged for included; 0: no limit
  std::string budget_reason;   // "available memory 9.3 GiB, 1.0 GiB left to the system", "cgroup limit 16.0 GiB", "--ram 8.0 GiB"
  uint64_t reserve_bytes = 0;  // that the machine was to keep available; 0: the budget was asked for
  // program: code, tokenizer, logits, page tables. io: staging slots and what reads have under way.
  uint64_t program_bytes = 0, dense_bytes = 0, kv_bytes = 0, scratch_bytes = 0, io_bytes = 0, expert_bytes = 0;
  uint64_t total_bytes = 0;    // sum of the above
  uint32_t n_ctx = 0, n_batch = 0;
  uint32_t n_staging = 0;                // slots shared by all layers for experts that pass through
  std::vector<uint32_t> slots;           // [n_layer]; empty when resident
  double resident_share = 1.0;           // of the expert bytes
};

// Positions of a session when so many were asked for, 0: the model's, at most 4096. Tokens evaluated at once by default.
uint32_t planned_context(const HParams& hparams, uint32_t asked);
inline constexpr uint32_t kResidentBatch = 512;

// The budget:
//   bytes      as given, for the whole process; not above the machine's memory or the cgroup's limit
//   automatic  what is available now (MemAvailable) less a reserve of max(1 GiB, 1/16 of the machine), which
//              MemoryWatch restores when others need more; not above a cgroup limit, which is the process's
//              own but for a little that the kernel charges to it, less what is in use there and no page cache
//   all        none
//
// Resident when everything fits into the budget; automatic: into 9/10 of the machine or cgroup and
// into what is available, because a mapping that nearly fits is slower than slots. A dense model has
// nothing to stream: resident or refused.
//
// Streamed: dense weights, keys and values, scratch and staging first; what is left is slots, as
// many in each layer, the rest of them one more in layers spread evenly. Each
// further slot of a layer hits less often than the one before (replayed: 19, 34, 47, 59 %), so that
// even is best.
//
// Error(memory) (exit 5) naming the smallest budget that would do when even the floor (no slots, two
// for staging) does not fit.
MemoryPlan plan_memory(const ModelSizes& sizes, const MemoryOptions& options, int n_threads, const HostMemory& memory);

// The budget of a process that runs already, in a cgroup that now has this limit: less what the kernel
// charges to it and what others use there.
uint64_t budget_in_cgroup(uint64_t limit, uint64_t used_by_others);
// What is left of a streamed plan in a smaller budget: no layer has more slots than before, all else
// stays. Where even no slots are too much, there are none and total_bytes exceeds the budget.
MemoryPlan shrunk_plan(MemoryPlan plan, const ModelSizes& sizes, uint64_t budget_bytes);
// One slot less in every layer that has any.
MemoryPlan with_one_slot_less(MemoryPlan plan, const ModelSizes& sizes);

// "4", or "4 to 5": the least and the most slots of a layer.
std::string slots_text(const std::vector<uint32_t>& slots);
// One line: "streamed in 8.0 GiB (--ram 8.0 GiB): dense weights 1.1 GiB, ...".
std::string describe(const MemoryPlan& plan, const HParams& hparams);

}  // namespace duet
