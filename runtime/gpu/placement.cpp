#include "runtime/gpu/placement.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/bytes.h"
#include "base/error.h"
#include "base/units.h"
#include "runtime/gpu/scratch.h"

namespace duet::gpu {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;
// Driver and kernels, within a budget that was given for the process; of what is free, left to others.
constexpr uint64_t kContextBytes = 512 * kMiB, kReserveBytes = 512 * kMiB;
constexpr uint64_t kContextShare = 32, kReserveShare = 16;
// Pairs of a token and an expert in one product: its grid of kernels has a row for every 8 of them and one for each
// expert, and a grid has at most 65535 rows.
constexpr size_t kMostSlots = size_t{1} << 18;

uint64_t context_of(uint64_t vram_bytes) { return std::min(kContextBytes, vram_bytes / kContextShare); }

// The least budget of a process in which so much is left beside the context.
uint64_t budget_for(uint64_t n_bytes) { return n_bytes + std::min(kContextBytes, n_bytes / (kContextShare - 1) + 1); }

uint64_t in_mib(uint64_t n_bytes) { return (n_bytes + kMiB - 1) / kMiB; }

void set_budget(CardPlan& plan, const GpuOptions& options, const Card& card) {
  const uint64_t reserve = std::min(kReserveBytes, card.free_bytes / kReserveShare), usable = card.free_bytes - reserve;
  if (options.vram_bytes > 0) {
    plan.context_bytes = context_of(options.vram_bytes);
    plan.budget_bytes = options.vram_bytes;
    plan.budget_reason = concat("--vram ", format_size(options.vram_bytes));
    if (card.device == nullptr || options.vram_bytes - plan.context_bytes <= card.free_bytes) return;
    plan.context_bytes = 0;
    plan.budget_bytes = usable;
    plan.budget_reason = concat("free memory ", format_size(card.free_bytes), ", less than --vram ", format_size(options.vram_bytes));
    return;
  }
  if (card.device == nullptr) fail(ErrorKind::usage, "no card is here to ask for its memory; say how much to plan for with --vram");
  plan.budget_bytes = usable;
  plan.budget_reason = concat("free memory ", format_size(card.free_bytes), ", ", format_size(reserve), " left");
}

const char* what_is_placed(const HParams& hparams) { return hparams.n_expert > 0 ? "experts" : "feed-forward parts"; }

[[noreturn]] void refuse(const CardPlan& plan, const HParams& hparams) {
  const uint64_t needed = plan.total_bytes() - plan.context_bytes;
  const std::string layers = plan.expert_bytes > 0 ? concat(", ", what_is_placed(hparams), " of ", plan.n_layer - plan.first_layer, " layers ", format_size(plan.expert_bytes)) : "";
  fail(ErrorKind::memory, "the card's budget of ", format_size(plan.budget_bytes), " (", plan.budget_reason, ") is too small: --vram ",
       in_mib(budget_for(needed)), "MiB would do (weights ", format_size(plan.weight_bytes), ", keys and values of ", plan.sizes.n_ctx, " positions ",
       format_size(plan.kv_bytes), ", working memory of a batch of ", plan.sizes.n_batch, " ", format_size(plan.scratch_bytes), layers,
       "); give it more, use a smaller context or batch, or --gpu off");
}

bool fits(const CardPlan& plan) { return plan.total_bytes() <= plan.budget_bytes; }

void place_layers(CardPlan& plan, const ModelSizes& sizes, const GpuOptions& options) {
  if (options.mode == GpuOptions::Mode::attention) return;
  if (options.mode == GpuOptions::Mode::layers) {
    if (options.n_layers > plan.n_layer) fail(ErrorKind::usage, "--gpu ", options.n_layers, ": the model has ", plan.n_layer, " layers");
    plan = with_first_layer(plan, sizes, plan.n_layer - options.n_layers);
    if (!fits(plan)) plan.transit_bytes = 0;
    if (!fits(plan)) refuse(plan, sizes.hparams);
    return;
  }
  while (plan.first_layer > 0) {
    CardPlan more = with_first_layer(plan, sizes, plan.first_layer - 1);
    if (!fits(more)) return;
    plan = std::move(more);
  }
}

// A guess for a card that is not there: partial results of many pieces of the keys, a few hundred in all.
size_t guessed_attention_bytes(const HParams& h, size_t n_batch) {
  constexpr size_t kPieces = 512;
  return sizeof(float) * h.n_head * (h.head_dim + 2) * std::max(n_batch, kPieces);
}

}  // namespace

uint32_t largest_batch(const HParams& hparams) { return static_cast<uint32_t>(std::max<size_t>(kMostSlots / used_count(hparams), 1)); }

ChunkSizes chunk_sizes(const HParams& hparams, const MemoryOptions& options, const GpuOptions& gpu) {
  const uint32_t n_ctx = planned_context(hparams, options.n_ctx), n_batch = options.n_batch > 0 ? options.n_batch : kResidentBatch;
  return {n_ctx, std::min({n_batch, n_ctx, largest_batch(hparams)}), gpu.n_sequences > 0 ? gpu.n_sequences : options.n_sequences, options.kv_type};
}

Card card_of(Device& device) {
  const DeviceInfo& info = device.info();
  return {info.name, device.free_bytes(), info.memory_bytes_per_s, &device};
}

HeadShape head_shape(const HParams& h, KvType type) {
  const DType stored = type == KvType::f32 ? DType::F32 : type == KvType::f16 ? DType::F16 : DType::Q8_0;
  return {.n_head = h.n_head, .n_head_kv = h.n_head_kv, .head_dim = h.head_dim, .n_rot = h.n_rot, .window = h.sliding_window, .kv_type = stored};
}

size_t attention_bytes(const HParams& hparams, const ChunkSizes& chunk, const Device* device) {
  if (device == nullptr) return guessed_attention_bytes(hparams, chunk.n_batch);
  return device->attention_scratch_bytes(head_shape(hparams, chunk.kv_type), chunk.n_batch, chunk.n_ctx);
}

uint64_t scratch_bytes(const HParams& hparams, const ChunkSizes& chunk, const Device* device) {
  uint64_t sum = 0;
  Scratch scratch{};
  scratch.lay_out(hparams, chunk.n_batch, attention_bytes(hparams, chunk, device),
                  [&](auto*& pointer, size_t n) { sum += aligned(n * sizeof(*pointer)); });
  return sum;
}

// Keys and values alike; whole segments, as on the CPU.
uint64_t cache_bytes(const HParams& h, uint32_t n_ctx, KvType type) {
  if (type == KvType::q8_0 && h.head_dim % 32 != 0)
    fail(ErrorKind::unsupported, "keys and values in q8_0 need a head size that is a multiple of 32, this model's is ", h.head_dim, "; use f16");
  const uint64_t head = type == KvType::q8_0 ? h.head_dim + h.head_dim / 32 * 2 : h.head_dim * (type == KvType::f32 ? 4 : 2);
  uint64_t n = 2 * head * h.n_head_kv * h.n_layer;
  if (!checked_mul(n, (uint64_t{n_ctx} + 255) / 256 * 256, n)) fail(ErrorKind::memory, "a context of ", n_ctx, " positions does not fit any memory");
  return n;
}

// Norms and routers are kept as floats, and every matrix has a pointer and begins at a round address.
uint64_t dense_bytes_on_card(const ModelSizes& sizes) {
  const HParams& h = sizes.hparams;
  const uint64_t each = kAlignment + sizeof(void*), matrices = h.n_layer * (3 * expert_count(h) + 8) + 2;
  const uint64_t floats = 2 * uint64_t{h.n_layer} + 1 + uint64_t{h.n_layer} * h.n_expert;
  uint64_t n = less(sizes.dense_bytes, sizes.router_bytes) + matrices * each + floats * h.n_embd * sizeof(float);
  if (!h.tied_output) n = less(n, sizes.embd_bytes);
  if (h.n_expert == 0)
    for (const uint64_t layer : sizes.ffn_bytes) n = less(n, layer);
  return n;
}

CardPlan with_first_layer(CardPlan plan, const ModelSizes& sizes, uint32_t first_layer) {
  plan.first_layer = first_layer;
  plan.expert_bytes = 0;
  const uint64_t padding = 3 * expert_count(sizes.hparams) * kAlignment;
  for (size_t layer = first_layer; layer < sizes.ffn_bytes.size(); ++layer) plan.expert_bytes += sizes.ffn_bytes[layer] + padding;
  if (first_layer == 0) plan.transit_bytes = 0;
  return plan;
}

uint64_t transit_bytes(const ModelSizes& sizes, const CardPlan& plan) {
  if (plan.sizes.n_batch < kTransitTokens) return 0;
  uint64_t largest = 0;
  for (size_t layer = 0; layer < plan.first_layer; ++layer)
    largest = std::max(largest, sizes.expert_bytes.empty() ? sizes.ffn_bytes[layer] + 3 * kAlignment : sizes.expert_bytes[layer]);
  return 2 * largest;
}

CardPlan plan_card(const ModelSizes& sizes, const GpuOptions& options, const ChunkSizes& chunk, const Card& card) {
  CardPlan plan;
  plan.sizes = chunk;
  plan.n_layer = plan.first_layer = sizes.hparams.n_layer;
  set_budget(plan, options, card);
  plan.weight_bytes = dense_bytes_on_card(sizes);
  if (!checked_mul(cache_bytes(sizes.hparams, chunk.n_ctx, chunk.kv_type), uint64_t{chunk.n_sequences}, plan.kv_bytes))
    fail(ErrorKind::memory, chunk.n_sequences, " contexts of ", chunk.n_ctx, " positions do not fit any memory");
  plan.scratch_bytes = scratch_bytes(sizes.hparams, chunk, card.device);
  if (!fits(plan)) refuse(plan, sizes.hparams);
  plan.transit_bytes = transit_bytes(sizes, plan);
  if (!fits(plan)) plan.transit_bytes = 0;
  place_layers(plan, sizes, options);
  return plan;
}

namespace {

// What streaming chooses by itself for the layers that are left to the CPU; of the card's budget, too, working memory
// may be a tenth. That of the plan where nothing streams.
uint32_t streamed_batch(const ModelSizes& sizes, const MemoryOptions& options, CardPlan plan, const Card& card, int n_threads, const HostMemory& memory) {
  constexpr uint32_t kStep = 256;
  if (!plan_beside(sizes, options, plan, n_threads, memory).streamed) return plan.sizes.n_batch;
  MemoryOptions open = options_beside(options, plan);
  open.n_batch = 0;
  ChunkSizes chunk = plan.sizes;
  chunk.n_batch = std::min(plan_memory(sizes_beside(sizes, plan), open, n_threads, memory).n_batch, largest_batch(sizes.hparams));
  while (chunk.n_batch > plan.sizes.n_batch && scratch_bytes(sizes.hparams, chunk, card.device) > plan.budget_bytes / 10)
    chunk.n_batch = std::max(plan.sizes.n_batch, static_cast<uint32_t>(less(chunk.n_batch, kStep)));
  return chunk.n_batch;
}

}  // namespace

CardPlan plan_card(const ModelSizes& sizes, const GpuOptions& gpu, const MemoryOptions& options, const Card& card, int n_threads, const HostMemory& memory) {
  ChunkSizes chunk = chunk_sizes(sizes.hparams, options, gpu);
  CardPlan plan = plan_card(sizes, gpu, chunk, card);
  if (options.n_batch > 0) return plan;
  try {
    chunk.n_batch = streamed_batch(sizes, options, plan, card, n_threads, memory);
    if (chunk.n_batch <= plan.sizes.n_batch) return plan;
    CardPlan larger = plan_card(sizes, gpu, chunk, card), beside = larger;
    plan_beside(sizes, options, beside, n_threads, memory);
    return larger;
  } catch (const Error& e) {  // layers that were asked for leave no room, or the host's memory does not do
    if (e.kind() != ErrorKind::memory) throw;
    return plan;
  }
}

bool may_go_without(const GpuOptions& options, const Error& refusal) {
  if (options.mode != GpuOptions::Mode::automatic) return false;
  return refusal.kind() == ErrorKind::unsupported || (refusal.kind() == ErrorKind::memory && options.vram_bytes == 0);
}

void check_heads(const HParams& hparams, KvType type, const Device& device) {
  if (!device.supports(head_shape(hparams, type)))
    fail(ErrorKind::unsupported, device.info().name, ": attention heads of ", hparams.head_dim, " elements with this --kv-type are not supported; use --gpu off");
}

void check_support(const Model& model, KvType type, const Device& device) {
  check_heads(model.hparams(), type, device);
  const auto check = [&](const Weight& w) {
    if (!device.supports(w.format->dtype)) fail(ErrorKind::unsupported, device.info().name, ": weights in ", w.format->name, " are not supported; use --gpu off");
  };
  check(model.output());
  for (const Layer& layer : model.layers()) {
    for (const Weight* w : {&layer.attn_q, &layer.attn_k, &layer.attn_v, &layer.attn_output}) check(*w);
    for (const Expert& expert : layer.experts)
      for (const Weight* w : {&expert.gate, &expert.up, &expert.down}) check(*w);
  }
}

ModelSizes sizes_beside(ModelSizes sizes, const CardPlan& plan) {
  const HParams& h = sizes.hparams;
  sizes.dense_bytes = sizes.embd_bytes + plan.transit_bytes + (2 + uint64_t{h.n_expert}) * h.n_layer * h.n_embd * sizeof(float);
  if (h.n_expert == 0) {
    for (size_t layer = 0; layer < plan.first_layer; ++layer) sizes.dense_bytes += sizes.ffn_bytes[layer];
    return sizes;
  }
  sizes.expert_bytes.resize(plan.first_layer);
  sizes.expert_file_bytes.resize(plan.first_layer);
  return sizes;
}

MemoryOptions options_beside(MemoryOptions options, const CardPlan& plan) {
  options.n_sequences = 0;
  options.n_batch = plan.sizes.n_batch;
  if (plan.first_layer == 0) options.slots.reset();  // nothing is left to stream
  return options;
}

MemoryPlan plan_beside(const ModelSizes& sizes, const MemoryOptions& options, CardPlan& card, int n_threads, const HostMemory& memory) {
  const auto plan = [&] { return plan_memory(sizes_beside(sizes, card), options_beside(options, card), n_threads, memory); };
  MemoryPlan beside = plan();
  if (!beside.streamed || card.transit_bytes == 0) return beside;
  card.transit_bytes = 0;
  return plan();
}

std::string describe(const CardPlan& plan, const HParams& hparams) {
  const uint32_t n = plan.n_layer - plan.first_layer;
  std::string what = "attention and output";
  if (n == plan.n_layer) what = "all layers";
  else if (n == 1) what += concat(", ", what_is_placed(hparams), " of layer ", plan.first_layer);
  else if (n > 0) what += concat(", ", what_is_placed(hparams), " of layers ", plan.first_layer, " to ", plan.n_layer - 1);
  return concat(what, ": ", format_size(plan.total_bytes()), " (budget ", format_size(plan.budget_bytes), ", ", plan.budget_reason, "): weights ",
                format_size(plan.weight_bytes), ", keys and values ", format_size(plan.kv_bytes), " (", plan.sizes.n_ctx, " positions), working memory ",
                format_size(plan.scratch_bytes + plan.transit_bytes + plan.context_bytes), " (batch ", plan.sizes.n_batch, ")",
                n > 0 ? concat(", ", what_is_placed(hparams), " ", format_size(plan.expert_bytes), " (", n, " of ", plan.n_layer, " layers)") : "");
}

}  // namespace duet::gpu
