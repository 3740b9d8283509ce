// How the commands that run a model open it.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "base/host.h"
#include "runtime/engine.h"
#include "runtime/gpu/module.h"
#include "runtime/gpu/placement.h"
#include "runtime/memory_plan.h"

namespace CLI {
class App;
}

namespace duet::cli {

// How a command opens a model. Filled by add_model_options.
struct ModelOptions {
  std::string path;
  uint32_t n_ctx = 0;  // 0: the command's default
  int n_threads = 0;   // 0: HostCores::usable()
  uint32_t n_batch = 0;  // 0: the memory plan's
  KvType kv_type = KvType::f16;
  std::string isa;  // "": best usable
  PinMode pin = PinMode::automatic;
  NumaMode numa = NumaMode::automatic;
  ReadBackend backend = ReadBackend::automatic;
  Lookahead lookahead = StreamOptions{}.lookahead;
  std::vector<std::string> loras;
  GpuOptions gpu{.mode = GpuOptions::Mode::automatic};
  MemoryOptions memory;  // of --ram; the sizes of the session are copied into it by open_engine
};

// --ram; --gpu and --vram.
void add_memory_option(CLI::App& command, MemoryOptions& memory);
void add_gpu_options(CLI::App& command, GpuOptions& gpu);
// Declares MODEL, --ram, --gpu, --vram, --ctx, --threads, --pin, --numa, --batch, --kv-type and --isa. options.kv_type and the text
// `ctx_default` are the command's defaults as help shows them.
void add_model_options(CLI::App& command, ModelOptions& options, const char* ctx_default);
// The GGUF file that MODEL stands for: a path, or the name of a model that is on this machine (hub/store.h). Error(io)
// with the next step when it is a folder, or neither.
std::filesystem::path model_file(const std::string& model);
// options.memory with the sizes of the session.
MemoryOptions memory_options_of(const ModelOptions& options);
// Of the file, with its adapters; nothing is loaded. Error: as of Engine::open.
ModelSizes sizes_of(const ModelOptions& options, const NoticeFn& notice);
// None, and no reason, with --gpu off and with adapters, which are the CPU's. Error(unsupported) when a card was asked for with those.
gpu::FoundDevice find_card(const ModelOptions& options);
// How memory would be divided by open_engine. Error: as of plan_card and plan_memory.
struct Division {
  std::optional<gpu::CardPlan> card;
  MemoryPlan memory;     // of what a card leaves to the CPU
  std::string card_refusal;  // why the card that is there would not be used
};
Division divide(const ModelSizes& sizes, const ModelOptions& options, const std::optional<gpu::Card>& card, int n_threads, const HostMemory& memory);
Engine open_engine(const ModelOptions& options);
// A session of the options' sizes; n_ctx 0 takes `default_ctx` (0: the library's default).
Session open_session(const Engine& engine, const ModelOptions& options, uint32_t default_ctx = 0, RoutingFn routing = {});
// On standard error, what a card computes and what streams, where there is something to say.
void print_plans(const Engine& engine);
// --trace-experts FILE (runtime/expert_trace.h).
void add_trace_option(CLI::App& command, std::string& path);

}  // namespace duet::cli
