#include "cli/model_options.h"

#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdio>

#include "base/error.h"
#include "base/units.h"
#include "cli/console.h"
#include "cli/options.h"
#include "hub/store.h"
#include "runtime/model.h"

namespace duet::cli {
namespace {

constexpr std::pair<KvType, const char*> kKvTypes[] = {
    {KvType::f16, "f16"}, {KvType::f32, "f32"}, {KvType::q8_0, "q8_0"}};

// "auto", "all" or a size, which must not be nothing.
MemoryOptions::Ram parse_ram(const std::string& text, uint64_t& n_bytes) {
  if (text == "auto") return MemoryOptions::Ram::automatic;
  if (text == "all") return MemoryOptions::Ram::all;
  try {
    n_bytes = parse_size(text);
  } catch (const Error& e) {
    throw CLI::ValidationError("--ram", concat(e.what(), "; auto: what the machine leaves; all: no limit"));
  }
  if (n_bytes == 0) throw CLI::ValidationError("--ram", "must be more than 0");
  return MemoryOptions::Ram::bytes;
}

// "auto", "off", "attention" or a number of layers.
void parse_gpu(const std::string& text, GpuOptions& gpu) {
  using Mode = GpuOptions::Mode;
  constexpr std::pair<const char*, Mode> kModes[] = {{"auto", Mode::automatic}, {"off", Mode::off}, {"attention", Mode::attention}};
  for (const auto& [name, mode] : kModes) {
    if (text != name) continue;
    gpu.mode = mode;
    return;
  }
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, gpu.n_layers);
  if (error != std::errc() || rest != end) throw CLI::ValidationError("--gpu", concat("'", text, "' is none of auto, off, attention and a number of layers"));
  gpu.mode = Mode::layers;
}

}  // namespace

constexpr std::pair<ReadBackend, const char*> kBackends[] = {{ReadBackend::automatic, "auto"},
                                                             {ReadBackend::io_uring, "io_uring"},
                                                             {ReadBackend::pread, "pread"},
                                                             {ReadBackend::buffered, "buffered"}};

void add_stream_options(CLI::App& command, ModelOptions& options) {
  command
      .add_option("--slots", options.memory.slots,
                  "Stream experts with so many of each layer kept in memory, whatever --ram allows (for experiments)")
      ->check(whole_number(0, 1024))
      ->type_name("N");
  const auto set = [&options](const std::string& name) {
    for (const auto& [backend, backend_name] : kBackends)
      if (name == backend_name) options.backend = backend;
  };
  std::vector<std::string> names;
  for (const auto& backend : kBackends) names.emplace_back(backend.second);
  command.add_option_function<std::string>("--io", set, "How streamed experts are read")
      ->check(CLI::IsMember(names))
      ->type_name("KIND")
      ->default_str("auto");
  command
      .add_option_function<std::string>(
          "--lookahead", [&options](const std::string& name) { options.lookahead = name == "on" ? Lookahead::on : name == "off" ? Lookahead::off : Lookahead::automatic; },
          "Read the experts that the next layers will probably choose while nothing else is read; auto: as far ahead as it pays")
      ->check(CLI::IsMember({"on", "off", "auto"}))
      ->type_name("on|off|auto")
      ->default_str("auto");
}

void add_memory_option(CLI::App& command, MemoryOptions& memory) {
  command
      .add_option_function<std::string>(
          "--ram", [&memory](const std::string& text) { memory.ram = parse_ram(text, memory.ram_bytes); },
          "Memory of the whole process: a size; auto: what the machine leaves; all: no limit")
      ->type_name("SIZE|auto|all")
      ->default_str("auto");
}

void add_gpu_options(CLI::App& command, GpuOptions& gpu) {
  command
      .add_option_function<std::string>(
          "--gpu", [&gpu](const std::string& text) { parse_gpu(text, gpu); },
          "What a graphics card computes. auto: what fits, where there is one; attention: all but the experts; N: and the experts of the last N layers")
      ->type_name("auto|off|attention|N")
      ->default_str("auto");
  command
      .add_option_function<std::string>(
          "--vram",
          [&gpu](const std::string& text) {
            gpu.vram_bytes = parse_size(text);
            if (gpu.vram_bytes == 0) throw CLI::ValidationError("--vram", "must be more than 0; --gpu off uses no card");
          },
          "Memory of the card that may be used [default: what is free, less a reserve]")
      ->type_name("SIZE");
}

void add_model_options(CLI::App& command, ModelOptions& options, const char* ctx_default) {
  command.add_option("MODEL", options.path, "GGUF file, or the name of a model that is here (duet list)")->required();
  add_lora_option(command, options.loras, "Apply this PEFT adapter");
  add_memory_option(command, options.memory);
  add_gpu_options(command, options.gpu);
  add_stream_options(command, options);
  command
      .add_option("-c,--ctx", options.n_ctx,
                  std::string("Context size in tokens [default: ") + ctx_default + "]")
      ->check(whole_number(1, 1u << 24))
      ->type_name("N");
  add_threads_option(command, options.n_threads);
  add_placement_options(command, options.pin, options.numa);
  command.add_option("-b,--batch", options.n_batch,
                     "Tokens evaluated at once in prefill [default: 512, more where experts are streamed]")
      ->check(whole_number(1, 1u << 16))
      ->type_name("N");
  const auto set_kv_type = [&options](const std::string& name) {
    for (const auto& [type, type_name] : kKvTypes)
      if (name == type_name) options.kv_type = type;
  };
  std::vector<std::string> names;
  std::string default_name;
  for (const auto& [type, name] : kKvTypes) {
    names.emplace_back(name);
    if (type == options.kv_type) default_name = name;
  }
  command
      .add_option_function<std::string>("--kv-type", set_kv_type, "Type of cached keys and values")
      ->check(CLI::IsMember(names))
      ->type_name("TYPE")
      ->default_str(default_name);
  command.add_option("--isa", options.isa,
                     "Force an instruction set: scalar, avx2, avx512, neon [default: best usable]");
}

std::filesystem::path model_file(const std::string& model) {
  std::error_code ec;
  if (std::filesystem::is_directory(model, ec))
    fail(ErrorKind::io, model, ": is a folder, not a GGUF file; make one with: duet convert ", model, " -q Q4_K_M -o model.gguf");
  if (std::filesystem::exists(model, ec) || model.starts_with('/') || model.starts_with('.')) return model;
  if (const auto found = hub::find_model(hub::local_models(hub::folders_of_environment()), model)) return found->path;
  fail(ErrorKind::io, model, ": no such file, and no model of that name is here; duet list shows those that are, duet pull gets others");
}

MemoryOptions memory_options_of(const ModelOptions& options) {
  MemoryOptions memory = options.memory;
  memory.n_ctx = options.n_ctx;
  memory.n_batch = options.n_batch;
  memory.kv_type = options.kv_type;
  return memory;
}

namespace {

std::vector<LoraChoice> loras_of(const ModelOptions& options) {
  std::vector<LoraChoice> loras;
  for (const std::string& lora : options.loras) loras.push_back(parse_lora(lora));
  return loras;
}

}  // namespace

ModelSizes sizes_of(const ModelOptions& options, const NoticeFn& notice) {
  const GgufFile file = GgufFile::open(model_file(options.path));
  const HParams hparams = read_hparams(file, notice);
  Model model = Model::bind(file, hparams);
  for (const LoraChoice& lora : loras_of(options)) model.apply(lora);
  ModelSizes sizes = model_sizes(file, hparams);
  sizes.dense_bytes += model.lora_bytes();
  return sizes;
}

gpu::FoundDevice find_card(const ModelOptions& options) {
  if (options.gpu.mode == GpuOptions::Mode::off) return {};
  if (options.loras.empty()) return gpu::find_device();
  if (options.gpu.mode != GpuOptions::Mode::automatic) fail(ErrorKind::unsupported, "adapters are applied on the CPU only; use --gpu off with them");
  return {};
}

Division divide(const ModelSizes& sizes, const ModelOptions& options, const std::optional<gpu::Card>& card, int n_threads, const HostMemory& memory) {
  const MemoryOptions all = memory_options_of(options);
  Division out;
  try {
    if (card && card->device != nullptr) gpu::check_heads(sizes.hparams, all.kv_type, *card->device);
    if (card) out.card = gpu::plan_card(sizes, options.gpu, all, *card, n_threads, memory);
  } catch (const Error& e) {
    if (!gpu::may_go_without(options.gpu, e)) throw;
    out.card_refusal = e.what();
  }
  if (!out.card) {
    out.memory = plan_memory(sizes, all, n_threads, memory);
    return out;
  }
  out.memory = gpu::plan_beside(sizes, all, *out.card, n_threads, memory);
  return out;
}

Engine open_engine(const ModelOptions& options) {
  return Engine::open(model_file(options.path),
                      {.n_threads = options.n_threads,
                       .isa = options.isa,
                       .notice = notices(),
                       .pin = options.pin,
                       .numa = options.numa,
                       .memory = memory_options_of(options),
                       .stream = {.backend = options.backend, .lookahead = options.lookahead},
                       .loras = loras_of(options),
                       .gpu = options.gpu});
}

Session open_session(const Engine& engine, const ModelOptions& options, uint32_t default_ctx, RoutingFn routing) {
  return engine.new_session({.n_ctx = options.n_ctx != 0 ? options.n_ctx : default_ctx,
                             .n_batch = options.n_batch,
                             .kv_type = options.kv_type,
                             .cancel = &interrupted(),
                             .routing = std::move(routing)});
}

void print_plans(const Engine& engine) {
  const HParams& hparams = engine.info().hparams;
  if (const gpu::CardPlan* card = engine.card_plan()) std::fprintf(stderr, "[%s: %s]\n", engine.info().gpu.c_str(), describe(*card, hparams).c_str());
  if (engine.plan().streamed) std::fprintf(stderr, "[%s]\n", describe(engine.plan(), hparams).c_str());
}

void add_trace_option(CLI::App& command, std::string& path) {
  command.add_option("--trace-experts", path, "Write which experts were chosen, to replay (JSON lines)")->type_name("FILE");
}

}  // namespace duet::cli
