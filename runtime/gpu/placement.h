// What a card computes, decided before anything is loaded: attention, norms, routers, the output head, keys and values and
// working memory first; then whole layers of experts (of a dense model: feed-forward parts), the last layers first, until
// the budget is full. The rest stays where it was: with the CPU, in memory or streamed.
#pragma once

#include <cstdint>
#include <string>

#include "base/error.h"
#include "runtime/engine.h"
#include "runtime/gpu/device.h"
#include "runtime/memory_plan.h"
#include "runtime/model.h"

namespace duet::gpu {

// What is taken for the rate of a card when none is there to ask: that of an RTX 3090.
inline constexpr double kAssumedBytesPerS = 936e9;
inline constexpr const char* kAssumedCard = "RTX 3090";

// Chunks from so many tokens on have the experts that are the CPU's copied through the card, which is then faster than
// the CPU: 8 experts, 2 used, 32 rows for each.
inline constexpr uint32_t kTransitTokens = 128;

struct Card {
  std::string name;
  uint64_t free_bytes = 0;
  double memory_bytes_per_s = 0;
  const Device* device = nullptr;  // null: no card is there, only a size; its working memory is guessed
};
Card card_of(Device& device);

// Tokens that a card evaluates at once, at most: longer chunks are evaluated in pieces.
uint32_t largest_batch(const HParams& hparams);

// The sessions to come.
struct ChunkSizes {
  uint32_t n_ctx = 0, n_batch = 0, n_sequences = 1;
  KvType kv_type = KvType::f16;
};
ChunkSizes chunk_sizes(const HParams& hparams, const MemoryOptions& options, const GpuOptions& gpu);

struct CardPlan {
  uint64_t budget_bytes = 0;
  std::string budget_reason;  // "--vram 22.0 GiB", "free memory 23.1 GiB, 512.0 MiB left"
  uint64_t context_bytes = 0; // of the budget: what the driver takes for itself; 0 when it has been taken already
  uint64_t weight_bytes = 0, kv_bytes = 0, scratch_bytes = 0, expert_bytes = 0;
  uint64_t transit_bytes = 0;  // of two experts on their way; 0: none passes through, as where they are streamed
  ChunkSizes sizes;
  uint32_t n_layer = 0, first_layer = 0;  // experts of layers [first_layer, n_layer) are on the card
  uint64_t total_bytes() const { return context_bytes + weight_bytes + kv_bytes + scratch_bytes + transit_bytes + expert_bytes; }
};

// The budget is options.vram_bytes, or what is free less a reserve. Error(memory) naming the budget that would do when it is
// too small for the floor (no experts), or for the layers asked for; Error(usage) for more layers than there are.
CardPlan plan_card(const ModelSizes& sizes, const GpuOptions& options, const ChunkSizes& chunk, const Card& card);
// The same for the sessions of `options`. Where the experts left to the CPU stream and no batch was asked for, with the
// larger one that streaming takes: every chunk of a long prompt reads them all.
CardPlan plan_card(const ModelSizes& sizes, const GpuOptions& gpu, const MemoryOptions& options, const Card& card, int n_threads, const HostMemory& memory);
// Whether the CPU does everything where the card is refused so: nobody has asked for it or for a size.
bool may_go_without(const GpuOptions& options, const Error& refusal);

// The same plan with the experts of fewer layers.
CardPlan with_first_layer(CardPlan plan, const ModelSizes& sizes, uint32_t first_layer);
// What passing through takes: two experts of the CPU, or feed-forward parts; nothing where it has none, or chunks are short.
uint64_t transit_bytes(const ModelSizes& sizes, const CardPlan& plan);

// What the CPU still holds: embeddings, norms and routers, the experts of the layers before first_layer, and memory for those on
// their way to the card.
ModelSizes sizes_beside(ModelSizes sizes, const CardPlan& plan);
// What its memory is then planned for: keys and values are on the card.
MemoryOptions options_beside(MemoryOptions options, const CardPlan& plan);
// Both. Where the experts are streamed, none passes through the card: its transit_bytes become 0.
MemoryPlan plan_beside(const ModelSizes& sizes, const MemoryOptions& options, CardPlan& card, int n_threads, const HostMemory& memory);

// Error(unsupported) for heads, or for formats or heads, that the card does not take.
void check_heads(const HParams& hparams, KvType type, const Device& device);
void check_support(const Model& model, KvType type, const Device& device);

// On the card.
uint64_t dense_bytes_on_card(const ModelSizes& sizes);
uint64_t cache_bytes(const HParams& hparams, uint32_t n_ctx, KvType type);
uint64_t scratch_bytes(const HParams& hparams, const ChunkSizes& chunk, const Device* device);
HeadShape head_shape(const HParams& hparams, KvType type);
size_t attention_bytes(const HParams& hparams, const ChunkSizes& chunk, const Device* device);

// One line: "attention and the experts of layers 6 to 31, 21.4 GiB (...)".
std::string describe(const CardPlan& plan, const HParams& hparams);

}  // namespace duet::gpu
