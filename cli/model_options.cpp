#include "cli/model_options.h"

#include <CLI/CLI.hpp>

#include "base/error.h"
#include "base/units.h"
#include "cli/console.h"
#include "cli/options.h"

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

}  // namespace

void add_memory_option(CLI::App& command, MemoryOptions& memory) {
  command
      .add_option_function<std::string>(
          "--ram", [&memory](const std::string& text) { memory.ram = parse_ram(text, memory.ram_bytes); },
          "Memory of the whole process: a size; auto: what the machine leaves; all: no limit")
      ->type_name("SIZE|auto|all")
      ->default_str("auto");
}

void add_model_options(CLI::App& command, ModelOptions& options, const char* ctx_default) {
  command.add_option("MODEL", options.path, "GGUF file")->required();
  add_memory_option(command, options.memory);
  command
      .add_option("-c,--ctx", options.n_ctx,
                  std::string("Context size in tokens [default: ") + ctx_default + "]")
      ->check(CLI::Range(1u, 1u << 24).description(""))
      ->type_name("N");
  add_threads_option(command, options.n_threads);
  add_placement_options(command, options.pin, options.numa);
  command.add_option("-b,--batch", options.n_batch, "Tokens evaluated at once in prefill")
      ->check(CLI::Range(1u, 1u << 16).description(""))
      ->type_name("N")
      ->capture_default_str();
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

void require_model_file(const std::filesystem::path& path) {
  if (std::filesystem::is_directory(path))
    fail(ErrorKind::io, path.string(),
         ": is a folder, not a GGUF file; make one with: duet convert ", path.string(),
         " -q Q4_K_M -o model.gguf");
}

Engine open_engine(const ModelOptions& options) {
  require_model_file(options.path);
  MemoryOptions memory = options.memory;
  memory.n_ctx = options.n_ctx;
  memory.n_batch = options.n_batch;
  memory.kv_type = options.kv_type;
  return Engine::open(options.path,
                      {.n_threads = options.n_threads,
                       .isa = options.isa,
                       .notice = notices(),
                       .pin = options.pin,
                       .numa = options.numa,
                       .memory = memory});
}

Session open_session(const Engine& engine, const ModelOptions& options, uint32_t default_ctx) {
  return engine.new_session({.n_ctx = options.n_ctx != 0 ? options.n_ctx : default_ctx,
                             .n_batch = options.n_batch,
                             .kv_type = options.kv_type,
                             .cancel = &interrupted()});
}

}  // namespace duet::cli
