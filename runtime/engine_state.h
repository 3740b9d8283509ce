// What an Engine and its Sessions share. Internal to engine.cpp, session.cpp and batch.cpp.
#pragma once

#include <exception>
#include <optional>

#include "base/host.h"
#include "runtime/compute.h"
#include "runtime/engine.h"
#include "runtime/expert_source.h"
#include "runtime/gpu/forward.h"
#include "runtime/gpu/module.h"
#include "runtime/memory_plan.h"
#include "runtime/memory_watch.h"
#include "runtime/model.h"

namespace duet {

struct Engine::State {
  explicit State(Model m) : model(std::move(m)) {}
  // Plans the memory for what is not on the card, which the result gives the sizes of.
  ModelSizes plan_host(const ModelSizes& all, const MemoryOptions& options);
  // Plans; weights to the card; where the plan streams, dense ones to memory, experts from the file.
  void load(const ModelSizes& all, const EngineOptions& options);
  // False: the card refused them and is no longer there (go_without).
  bool upload(const GpuOptions& options);
  // Takes what the plan of a card's memory gives it; leaves `card` null where there is none and none was asked for.
  void open_card(const ModelSizes& sizes, const EngineOptions& options);
  // The caller's, or the module's; null: there is none and none was asked for.
  gpu::Device* find_device(const GpuOptions& options);
  // The CPU does everything, with a notice, where gpu::may_go_without; else throws the refusal.
  void go_without(const GpuOptions& options, const Error& refusal);
  // What evaluates chunks of these sizes; null: the CPU, as no card was opened. observed: somebody wants to see the inputs
  // of products. Error(memory), Error(unsupported).
  std::unique_ptr<gpu::Forward> forward_on_card(const gpu::ChunkSizes& chunk, bool observed) const;
  // A chunk of tokens has been evaluated: experts give way where memory has become short.
  void after_chunk(size_t n_tokens) const;

  Model model;
  Placement placement;
  HostMemory memory;  // before weights and memory for the card's transfers are part of it
  MemoryPlan plan;
  std::unique_ptr<gpu::Device> device;    // null: none, or the caller's
  std::unique_ptr<gpu::Offload> card;     // null: the CPU does everything
  std::unique_ptr<ExpertSource> experts;  // null: all in memory
  std::unique_ptr<MemoryWatch> watch;     // of experts
  Compute compute{};  // placement points to the above
  ModelInfo info;
  NoticeFn notice;
  std::optional<Tokenizer> tokenizer;
  std::optional<ChatTemplate> chat_template;
  std::exception_ptr tokenizer_error, template_error;  // thrown when asked for
};

}  // namespace duet
