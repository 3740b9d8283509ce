// duet serve: the HTTP server.
#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <exception>
#include <memory>
#include <optional>
#include <thread>

#include "base/error.h"
#include "base/host.h"
#include "base/json.h"
#include "base/units.h"
#include "base/user_folders.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/model_options.h"
#include "cli/options.h"
#include "server/server.h"

namespace duet::cli {
namespace {

struct ServeOptions {
  ModelOptions model;
  server::AccessOptions access;
  int port = 8080;
  bool unsafe_no_key = false;
  server::TlsFiles tls;
  std::string access_log;  // file, "-" or ""
  uint32_t n_parallel = 0;
  size_t max_queue = 256, max_connections = 512;
  double timeout_s = 0, grace_s = 10;
  std::string chat_template, cache_dir, cache_size = "4GiB";
  std::vector<std::string> aliases;
};

constexpr uint32_t kMostParallel = 32;

// What one context takes, with all weights in memory.
MemoryPlan plan_of_one(const ModelOptions& options, const HostMemory& memory) {
  MemoryOptions one = memory_options_of(options);
  one.ram = MemoryOptions::Ram::all;
  return plan_memory(sizes_of(options, [](const std::string&) {}), one, 1, memory);
}

uint32_t contexts_in(uint64_t n_bytes, const MemoryPlan& one) {
  return static_cast<uint32_t>(std::clamp<uint64_t>(n_bytes / std::max<uint64_t>(one.kv_bytes, 1), 1, kMostParallel));
}

// As many contexts as a third of the memory holds that is left beside the weights. On a card, which has them where it is
// used, as many as a sixteenth of its memory does: most of it is for experts.
void choose_parallel(ServeOptions& options) {
  ModelOptions& model = options.model;
  const HostMemory memory = read_host_memory();
  const MemoryPlan one = plan_of_one(model, memory);
  uint64_t available = memory.available_bytes;
  if (model.memory.ram == MemoryOptions::Ram::bytes) available = model.memory.ram_bytes;
  if (memory.cgroup_limit_bytes) available = std::min(available, *memory.cgroup_limit_bytes);
  const uint64_t left = available > one.total_bytes ? available - one.total_bytes : available / 8;
  options.n_parallel = contexts_in(left / 3, one);
  gpu::Device* const card = model.gpu.device;
  if (card == nullptr) return;
  const uint64_t vram = model.gpu.vram_bytes > 0 ? std::min(model.gpu.vram_bytes, card->free_bytes()) : card->free_bytes();
  model.gpu.n_sequences = contexts_in(vram / 16, one);
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

// Lines of JSON, each written at once, so that several programs and logrotate's copytruncate may share the file.
class AccessLog {
 public:
  explicit AccessLog(const std::string& path) : fd_(path == "-" ? STDOUT_FILENO : ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0640)) {
    if (fd_ < 0) fail(ErrorKind::io, path, ": cannot be written: ", std::strerror(errno));
  }
  ~AccessLog() {
    if (fd_ != STDOUT_FILENO) ::close(fd_);
  }
  AccessLog(const AccessLog&) = delete;
  AccessLog& operator=(const AccessLog&) = delete;

  void write(const server::ServerOptions::Access& access) const {
    const std::string line = to_line(json_of(access)) + "\n";
    static_cast<void>(::write(fd_, line.data(), line.size()));  // a full disk must not stop the server
  }

 private:
  static Json json_of(const server::ServerOptions::Access& a) {
    Json line{{"time", utc_now()}, {"id", a.id}, {"remote", a.remote}, {"method", a.method}, {"path", a.path}, {"status", a.status}, {"seconds", a.seconds}};
    const server::ReplyUsage& u = a.usage;
    if (u.n_choices == 0) return line;
    line.update({{"stream", a.stream}, {"complete", u.complete}, {"choices", u.n_choices}, {"prompt_tokens", u.n_prompt}, {"cached_tokens", u.n_cached},
                 {"generated_tokens", u.n_generated}, {"queue_seconds", u.queue_s}, {"prompt_seconds", u.prompt_s}});
    return line;
  }

  static std::string utc_now() {
    struct timespec now {};
    struct tm parts {};
    ::clock_gettime(CLOCK_REALTIME, &now);
    ::gmtime_r(&now.tv_sec, &parts);
    std::array<char, 40> text{};
    const size_t n = std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%S", &parts);
    std::snprintf(text.data() + n, text.size() - n, ".%03dZ", static_cast<int>(now.tv_nsec / 1000000));
    return text.data();
  }

  int fd_;
};

void print_addresses(const ServeOptions& options, const Engine& engine, int port, uint32_t n_ctx, uint32_t n_parallel) {
  const ModelInfo& info = engine.info();
  const std::string host = options.access.host.find(':') != std::string::npos ? "[" + options.access.host + "]" : options.access.host;
  std::fprintf(stderr, "[%s | %s | %s | %s, %d thread%s | %u at once, ctx %u each]\n", one_line(info.hparams.name).c_str(), info.types.c_str(),
               format_size(info.file_bytes).c_str(), info.isa.c_str(), info.n_threads, info.n_threads == 1 ? "" : "s", n_parallel, n_ctx);
  print_plans(engine);
  const std::string url = concat(options.tls.certificate.empty() ? "http://" : "https://", host, ":", port);
  print(concat("listening on ", url, "\n"));
  print(concat("  a browser:       ", url, "/\n"));
  print(concat("  OpenAI clients:  OPENAI_BASE_URL=", url, "/v1\n"));
  print(concat("  Ollama clients:  OLLAMA_HOST=", url, "\n"));
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

// What is wrong with them, before the model is loaded.
void check_files(const ServeOptions& options) {
  if (options.tls.certificate.empty() != options.tls.key.empty()) fail(ErrorKind::usage, "--tls-cert and --tls-key are given together or not at all");
  if (!options.tls.certificate.empty()) server::TlsContext{options.tls};
}

void run_serve(ServeOptions options) {
  check_exposure(options);
  check_files(options);
  std::optional<AccessLog> log;
  if (!options.access_log.empty()) log.emplace(options.access_log);
  const uint64_t cache_bytes = parse_size(options.cache_size);
  options.model.path = model_file(options.model.path).string();
  const gpu::FoundDevice card = options.n_parallel == 0 ? find_card(options.model) : gpu::FoundDevice{};
  options.model.gpu.device = card.device.get();
  if (options.n_parallel == 0) choose_parallel(options);
  options.model.memory.n_sequences = options.n_parallel;
  const Engine engine = open_engine(options.model);
  if (const gpu::CardPlan* const plan = engine.card_plan()) options.n_parallel = plan->sizes.n_sequences;
  server::ServerOptions server_options;
  server_options.access = options.access;
  server_options.port = options.port;
  server_options.http.max_connections = options.max_connections;
  server_options.scheduler = {.n_parallel = options.n_parallel, .max_queue = options.max_queue, .n_ctx = options.model.n_ctx, .n_batch = options.model.n_batch, .kv_type = options.model.kv_type};
  server_options.scheduler.store = {.folder = expand_home(options.cache_dir), .max_bytes = cache_bytes, .version = DUET_VERSION, .notice = notices()};
  server_options.answer.timeout = std::chrono::milliseconds(static_cast<int64_t>(options.timeout_s * 1e3));
  server_options.file_name = options.model.path;
  server_options.aliases = options.aliases;
  server_options.chat = chat_template_of(options, engine);
  server_options.version = DUET_VERSION;
  server_options.tls = options.tls;
  if (log) server_options.log = [&log](const server::ServerOptions::Access& access) { log->write(access); };
  server::Server server(engine, std::move(server_options));
  const int port = server.bind();
  print_addresses(options, engine, port, server.n_ctx(), options.n_parallel);
  serve(server, options.grace_s);
}

void add_network_options(CLI::App& command, ServeOptions& o) {
  command.add_option("--host", o.access.host, "Address to listen on; other than loopback needs --api-key or --no-api-key")->capture_default_str()->type_name("ADDRESS");
  command.add_option("-p,--port", o.port, "Port; 0: any free one")->check(whole_number(0, 65535))->capture_default_str()->type_name("N");
  command.add_option("--api-key", o.access.keys, "Key that requests must bring; may be repeated")->type_name("KEY");
  command.add_option("--tls-cert", o.tls.certificate, "Speak HTTPS with this certificate and those that lead to its root (PEM)")->type_name("FILE");
  command.add_option("--tls-key", o.tls.key, "The certificate's private key, without a passphrase (PEM)")->type_name("FILE");
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
      ->check(whole_number(1, 256))->type_name("N");
  command.add_option("--queue", o.max_queue, "Requests that may wait; more get status 503")->check(whole_number(0, 100000))->capture_default_str()->type_name("N");
  command.add_option("--max-connections", o.max_connections, "Connections open at once")->check(whole_number(1, 4096))->capture_default_str()->type_name("N");
  command.add_option("--timeout", o.timeout_s, "Seconds that a request may take; 0: any time")->check(CLI::Range(0.0, 1e6).description(""))->capture_default_str()->type_name("S");
  command.add_option("--grace", o.grace_s, "Seconds that streams may go on after SIGTERM")->check(CLI::Range(0.0, 3600.0).description(""))->capture_default_str()->type_name("S");
  command.add_option("--template", o.chat_template, "Chat template by name; none: no chat [default: the model's]")->type_name("NAME");
  command.add_option("--alias", o.aliases, "Another name that requests may give the model; may be repeated; *: any")->type_name("NAME");
  command.add_option("--cache-dir", o.cache_dir, "Folder where what has been evaluated of prompts is kept for later and for the next start; it holds users' text")->type_name("DIR");
  command.add_option("--cache-size", o.cache_size, "Size that it may grow to")->capture_default_str()->type_name("SIZE")->needs("--cache-dir");
  command.add_option("--access-log", o.access_log, "Append a JSON line for each request to a file; -: to standard output")->type_name("FILE");
  add_environment(command);
  command.callback([options] { run_serve(*options); });
}

}  // namespace duet::cli
