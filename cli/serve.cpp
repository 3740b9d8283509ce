// duet serve: the HTTP server.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "base/error.h"
#include "base/host.h"
#include "base/json.h"
#include "base/units.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/model_options.h"
#include "cli/options.h"
#include "runtime/memory_plan.h"
#include "server/server.h"

namespace duet::cli {
namespace {

struct ServeOptions {
  ModelOptions model;
  server::AccessOptions access;
  int port = 8080;
  bool unsafe_no_key = false, access_log = false;
  uint32_t n_parallel = 0;
  size_t max_queue = 256, max_connections = 512;
  double timeout_s = 0, grace_s = 10;
  std::string chat_template;
  std::vector<std::string> aliases;
};

constexpr uint32_t kMostParallel = 32;

// As many contexts as a third of the memory holds that is left beside the weights.
uint32_t default_parallel(const ModelOptions& options) {
  const GgufFile file = GgufFile::open(options.path);
  const HParams hparams = read_hparams(file, [](const std::string&) {});
  MemoryOptions one = memory_options_of(options);
  one.ram = MemoryOptions::Ram::all;
  const HostMemory memory = read_host_memory();
  const MemoryPlan plan = plan_memory(model_sizes(file, hparams), one, 1, memory);
  uint64_t available = memory.available_bytes;
  if (options.memory.ram == MemoryOptions::Ram::bytes) available = options.memory.ram_bytes;
  if (memory.cgroup_limit_bytes) available = std::min(available, *memory.cgroup_limit_bytes);
  const uint64_t left = available > plan.total_bytes ? available - plan.total_bytes : available / 8;
  return static_cast<uint32_t>(std::clamp<uint64_t>(left / 3 / std::max<uint64_t>(plan.kv_bytes, 1), 1, kMostParallel));
}

std::optional<ChatTemplate> chat_template_of(const ServeOptions& options, const Engine& engine) {
  if (options.chat_template == "none") return std::nullopt;
  if (!options.chat_template.empty()) return ChatTemplate::named(options.chat_template);
  return engine.chat_template();
}

void check_exposure(const ServeOptions& options) {
  for (const std::string& key : options.access.keys)
    if (key.empty()) fail(ErrorKind::usage, "--api-key is empty, which everyone could bring; give a key, or --no-api-key to allow everyone");
  if (server::is_loopback(options.access.host) || !options.access.keys.empty() || options.unsafe_no_key) return;
  fail(ErrorKind::usage, "--host ", options.access.host, " lets others on the network use this server: give --api-key KEY, or --no-api-key to allow everyone");
}

void log_access(const server::ServerOptions::Access& access) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  const Json line{{"id", access.id}, {"method", access.method}, {"path", access.path}, {"remote", access.remote}, {"status", access.status}, {"seconds", access.seconds}};
  std::fprintf(stderr, "%s\n", to_line(line).c_str());
}

void print_addresses(const ServeOptions& options, const Engine& engine, int port, uint32_t n_ctx, uint32_t n_parallel) {
  const ModelInfo& info = engine.info();
  const std::string host = options.access.host.find(':') != std::string::npos ? "[" + options.access.host + "]" : options.access.host;
  std::fprintf(stderr, "[%s | %s | %s | %s, %d thread%s | %u at once, ctx %u each]\n", info.hparams.name.c_str(), info.types.c_str(),
               format_size(info.file_bytes).c_str(), info.isa.c_str(), info.n_threads, info.n_threads == 1 ? "" : "s", n_parallel, n_ctx);
  if (engine.plan().streamed) std::fprintf(stderr, "[%s]\n", describe(engine.plan(), info.hparams).c_str());
  print(concat("listening on http://", host, ":", port, "\n"));
  print(concat("  OpenAI clients:  OPENAI_BASE_URL=http://", host, ":", port, "/v1\n"));
  print(concat("  Ollama clients:  OLLAMA_HOST=http://", host, ":", port, "\n"));
  flush_stdout();
}

// Until SIGINT or SIGTERM.
void serve(server::Server& server, double grace_s) {
  std::exception_ptr error;
  std::atomic<bool> ended{false};
  std::thread thread([&] {
    try {
      server.run();
    } catch (...) {
      error = std::current_exception();
    }
    ended = true;
  });
  while (!interrupted() && !ended) std::this_thread::sleep_for(std::chrono::milliseconds(50));
  server.stop(std::chrono::milliseconds(static_cast<int64_t>(grace_s * 1e3)));
  thread.join();
  if (error) std::rethrow_exception(error);
}

void run_serve(ServeOptions options) {
  check_exposure(options);
  options.model.path = model_file(options.model.path).string();
  if (options.n_parallel == 0) options.n_parallel = default_parallel(options.model);
  options.model.memory.n_sequences = options.n_parallel;
  const Engine engine = open_engine(options.model);
  server::ServerOptions server_options;
  server_options.access = options.access;
  server_options.port = options.port;
  server_options.http.max_connections = options.max_connections;
  server_options.scheduler = {.n_parallel = options.n_parallel, .max_queue = options.max_queue, .n_ctx = options.model.n_ctx, .n_batch = options.model.n_batch, .kv_type = options.model.kv_type};
  server_options.answer.timeout = std::chrono::milliseconds(static_cast<int64_t>(options.timeout_s * 1e3));
  server_options.file_name = options.model.path;
  server_options.aliases = options.aliases;
  server_options.chat = chat_template_of(options, engine);
  server_options.version = DUET_VERSION;
  if (options.access_log) server_options.log = log_access;
  server::Server server(engine, std::move(server_options));
  const int port = server.bind();
  print_addresses(options, engine, port, server.n_ctx(), options.n_parallel);
  serve(server, options.grace_s);
}

void add_network_options(CLI::App& command, ServeOptions& o) {
  command.add_option("--host", o.access.host, "Address to listen on; other than loopback needs --api-key or --no-api-key")->capture_default_str()->type_name("ADDRESS");
  command.add_option("-p,--port", o.port, "Port; 0: any free one")->check(CLI::Range(0, 65535).description(""))->capture_default_str()->type_name("N");
  command.add_option("--api-key", o.access.keys, "Key that requests must bring; may be repeated")->type_name("KEY");
  command.add_flag("--no-api-key", o.unsafe_no_key, "Let everyone who reaches --host use the server");
  command.add_option("--allow-host", o.access.allowed_hosts, "Host name that requests may be made to; may be repeated; *: any")->type_name("NAME");
  command.add_option("--cors", o.access.cors_origins, "Origin whose pages may ask (https://example.org); may be repeated; *: any")->type_name("ORIGIN");
}

}  // namespace

void add_serve(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("serve", "Serve a model over HTTP: OpenAI, Ollama and llama-server clients");
  auto options = std::make_shared<ServeOptions>();
  ServeOptions& o = *options;
  add_model_options(command, o.model, "model's, at most 4096");
  add_network_options(command, o);
  command.add_option("--parallel", o.n_parallel, "Sequences generated at once, each with its own context [default: what memory allows, at most 32]")
      ->check(CLI::Range(1u, 256u).description(""))->type_name("N");
  command.add_option("--queue", o.max_queue, "Requests that may wait; more get status 503")->check(CLI::Range(0u, 100000u).description(""))->capture_default_str()->type_name("N");
  command.add_option("--max-connections", o.max_connections, "Connections open at once")->check(CLI::Range(1u, 4096u).description(""))->capture_default_str()->type_name("N");
  command.add_option("--timeout", o.timeout_s, "Seconds that a request may take; 0: any time")->check(CLI::Range(0.0, 1e6).description(""))->capture_default_str()->type_name("S");
  command.add_option("--grace", o.grace_s, "Seconds that streams may go on after SIGTERM")->check(CLI::Range(0.0, 3600.0).description(""))->capture_default_str()->type_name("S");
  command.add_option("--template", o.chat_template, "Chat template by name; none: no chat [default: the model's]")->type_name("NAME");
  command.add_option("--alias", o.aliases, "Another name that requests may give the model; may be repeated; *: any")->type_name("NAME");
  command.add_flag("--access-log", o.access_log, "Write a JSON line to stderr for each request");
  add_environment(command);
  command.callback([options] { run_serve(*options); });
}

}  // namespace duet::cli
