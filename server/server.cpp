#include "server/server.h"

#include <algorithm>
#include <atomic>
#include <cctype>
#include <condition_variable>
#include <filesystem>
#include <mutex>

#include "base/json.h"
#include "base/rapl.h"
#include "server/api_error.h"
#include "server/embeddings.h"
#include "server/llama.h"
#include "server/ollama.h"
#include "server/openai.h"
#include "server/page.h"
#include "server/text.h"

namespace duet::server {
namespace {

std::string new_request_id() { return "req_" + random_text("0123456789abcdef", 32); }

// A client's own id, so that logs of several servers can be joined, where it is one.
std::string request_id(const HttpRequest& request) {
  const std::string given = request.header("x-request-id");
  const bool sane = std::all_of(given.begin(), given.end(), [](unsigned char c) { return std::isalnum(c) || c == '-' || c == '_' || c == '.'; });
  return !given.empty() && given.size() <= 64 && sane ? given : new_request_id();
}

// Tells the log when the stream has ended, however it did.
class LoggedStream : public ReplyStream {
 public:
  LoggedStream(std::unique_ptr<ReplyStream> stream, std::function<void(const ReplyUsage&)> log) : stream_(std::move(stream)), log_(std::move(log)) {}
  ~LoggedStream() override { log_(stream_->usage()); }
  void run(const Write& write) override { stream_->run(write); }

 private:
  std::unique_ptr<ReplyStream> stream_;
  std::function<void(const ReplyUsage&)> log_;
};

ServedModel served_model(const Engine& engine, const ServerOptions& options, uint32_t n_ctx) {
  const std::filesystem::path path(options.file_name);
  return {.engine = engine, .tokenizer = engine.tokenizer(), .chat = options.chat, .id = path.stem().string(), .aliases = options.aliases,
          .n_ctx = n_ctx, .created = now_seconds(), .file_name = path.filename().string(), .version = options.version, .vocabulary = grammar::TokenTrie(engine.tokenizer())};
}

HttpReply json_reply(const Json& json) { return {.body = dump(json)}; }
HttpReply text_reply(std::string text) { return {.content_type = "text/plain; charset=utf-8", .body = std::move(text)}; }

int status_of(const Error& e) {
  switch (e.kind()) {
    case ErrorKind::usage:
    case ErrorKind::format:
      return 400;
    case ErrorKind::unsupported:
      return 501;
    case ErrorKind::memory:
    case ErrorKind::cancelled:
      return 503;
    default:
      return 500;
  }
}

// "/v1/models/" and "/v1/models" are one.
std::string normal_path(std::string path) {
  while (path.size() > 1 && path.ends_with('/')) path.pop_back();
  return path;
}

}  // namespace

struct Server::State {
  State(const Engine& e, ServerOptions o)
      : options(std::move(o)),
        engine(e),
        scheduler(engine, options.scheduler, metrics),
        model(served_model(engine, options, scheduler.n_ctx())) {
    add_routes();
  }

  using Route = std::function<HttpReply(const HttpRequest&)>;
  struct Entry {
    std::string method, path;
    Route route;
  };

  void add_routes();
  void add_openai_routes();
  void add_embedding_routes();
  void add_ollama_routes();
  void add_llama_routes();
  void get(const char* path, std::function<HttpReply()> make) { routes.push_back({"GET", path, [make](const HttpRequest&) { return make(); }}); }
  void post(const char* path, Route route) { routes.push_back({"POST", path, std::move(route)}); }
  HttpReply respond(const HttpRequest& request);
  HttpReply dispatch(const HttpRequest& request);
  HttpReply error_reply(const HttpRequest& request, int status, const std::string& message, const std::string& param) const;
  HttpReply openai_reply(openai::Parsed parsed, const HttpRequest& request);
  HttpReply ollama_reply(ollama::Parsed parsed, const HttpRequest& request);
  HttpReply generate(TextRequest wanted, std::unique_ptr<Renderer> renderer, const HttpRequest& request) {
    return answer(scheduler, std::move(wanted), std::move(renderer), request, options.answer);
  }

  std::optional<double> joules() {  // where they can be read
    const std::lock_guard lock(energy_mutex);
    return energy.available() ? std::optional(energy.joules()) : std::nullopt;
  }

  const ServerOptions options;
  const Engine& engine;
  Metrics metrics;
  std::mutex energy_mutex;
  EnergyMeter energy;
  Scheduler scheduler;
  ServedModel model;
  std::vector<Entry> routes;
  std::unique_ptr<HttpServer> http;
  std::mutex mutex;
  std::condition_variable ended_changed;
  bool ended = false;
};

void Server::State::add_routes() {
  get("/health", [] { return json_reply({{"status", "ok"}}); });
  get("/v1/health", [] { return json_reply({{"status", "ok"}}); });
  for (const PageFile& file : page_files())
    routes.push_back({"GET", std::string(file.path), [&file](const HttpRequest& r) {
      if (file.path != "/") return page_reply(file, r);
      HttpReply reply = wants_page(r) ? page_reply(file, r) : text_reply("Ollama is running");  // what Ollama's clients look for
      reply.headers.emplace_back("Vary", "Accept");
      return reply;
    }});
  get("/router", [this] { return json_reply(router_json(scheduler, engine.info().hparams)); });
  add_openai_routes();
  add_embedding_routes();
  add_ollama_routes();
  add_llama_routes();
}

void Server::State::add_embedding_routes() {
  const auto add = [this](const char* path, embeddings::Parsed (*parse)(const Json&, const ServedModel&)) {
    post(path, [this, parse](const HttpRequest& r) {
      embeddings::Parsed parsed = parse(parse_body(r.body), model);
      return generate(std::move(parsed.request), embeddings::make_renderer(parsed.shape, model), r);
    });
  };
  add("/v1/embeddings", embeddings::parse_openai);
  add("/embeddings", embeddings::parse_openai);
  add("/api/embed", embeddings::parse_ollama);
  add("/api/embeddings", embeddings::parse_ollama_single);
}

void Server::State::add_openai_routes() {
  const auto chat = [this](const HttpRequest& r) { return openai_reply(openai::parse_chat(parse_body(r.body), model), r); };
  const auto completion = [this](const HttpRequest& r) { return openai_reply(openai::parse_completion(parse_body(r.body), model), r); };
  for (const char* path : {"/v1/chat/completions", "/chat/completions"}) post(path, chat);
  for (const char* path : {"/v1/completions", "/completions"}) post(path, completion);
  for (const char* path : {"/v1/models", "/models"}) get(path, [this] { return json_reply(openai::model_list(model)); });
}

void Server::State::add_ollama_routes() {
  get("/api/version", [] { return json_reply({{"version", ollama::kVersion}}); });
  get("/api/tags", [this] { return json_reply(ollama::tags(model)); });
  get("/api/ps", [this] { return json_reply(ollama::running(model)); });
  post("/api/show", [this](const HttpRequest& r) { return json_reply(ollama::show(parse_body(r.body), model)); });
  post("/api/chat", [this](const HttpRequest& r) { return ollama_reply(ollama::parse_chat(parse_body(r.body), model), r); });
  post("/api/generate", [this](const HttpRequest& r) { return ollama_reply(ollama::parse_generate(parse_body(r.body), model), r); });
  for (const char* path : {"/api/pull", "/api/create", "/api/copy", "/api/push"})
    post(path, [](const HttpRequest& r) -> HttpReply { throw ApiError(501, concat(r.path, " is not supported: this server serves the model it was started with")); });
  routes.push_back({"DELETE", "/api/delete", [](const HttpRequest&) -> HttpReply { throw ApiError(501, "/api/delete is not supported: this server deletes nothing"); }});
}

void Server::State::add_llama_routes() {
  post("/completion", [this](const HttpRequest& r) {
    TextRequest request = llama::parse_completion(parse_body(r.body), model);
    auto renderer = llama::make_renderer(request, model);
    return generate(std::move(request), std::move(renderer), r);
  });
  post("/tokenize", [this](const HttpRequest& r) { return json_reply(llama::tokenize(parse_body(r.body), model)); });
  post("/detokenize", [this](const HttpRequest& r) { return json_reply(llama::detokenize(parse_body(r.body), model)); });
  post("/apply-template", [this](const HttpRequest& r) { return json_reply(llama::apply_template(parse_body(r.body), model)); });
  get("/tokenizer_info", [this] { return json_reply(llama::tokenizer_info(model)); });
  get("/props", [this] { return json_reply(llama::props(model, scheduler)); });
  get("/slots", [this] { return json_reply(llama::slots(model, scheduler)); });
  get("/metrics", [this]() -> HttpReply {
    return {.content_type = "text/plain; version=0.0.4; charset=utf-8", .body = llama::metrics_text(metrics, scheduler, joules())};
  });
}

HttpReply Server::State::openai_reply(openai::Parsed parsed, const HttpRequest& request) {
  auto renderer = openai::make_renderer(parsed, model);
  return generate(std::move(parsed.request), std::move(renderer), request);
}

HttpReply Server::State::ollama_reply(ollama::Parsed parsed, const HttpRequest& request) {
  if (!parsed.request) return json_reply(parsed.reply);
  auto renderer = ollama::make_renderer(parsed, model);
  return generate(std::move(*parsed.request), std::move(renderer), request);
}

HttpReply Server::State::error_reply(const HttpRequest& request, int status, const std::string& message, const std::string& param) const {
  HttpReply reply{.status = status};
  reply.body = request.path.starts_with("/api/") ? ollama::error_body(message) : openai::error_body(status, message, param);
  if (status == 503) reply.headers.emplace_back("Retry-After", "2");
  if (status == 401) reply.headers.emplace_back("WWW-Authenticate", "Bearer");
  return reply;
}

HttpReply Server::State::dispatch(const HttpRequest& request) {
  const std::string path = normal_path(request.path), method = request.method == "HEAD" ? "GET" : request.method;
  if (method == "OPTIONS") return {.status = 204, .content_type = "text/plain"};
  bool known = false;
  for (const Entry& entry : routes) {
    if (entry.path != path) continue;
    known = true;
    if (entry.method == method) return entry.route(request);
  }
  if (known) throw ApiError(405, concat(request.method, " is not what ", path, " takes"));
  for (const char* prefix : {"/v1/models/", "/models/"})
    if (method == "GET" && path.starts_with(prefix)) {
      model.check_name(path.substr(std::string_view(prefix).size()));
      return json_reply(openai::model_object(model));
    }
  throw ApiError(404, concat("there is no ", quote(path), " here"));
}

HttpReply Server::State::respond(const HttpRequest& request) {
  try {
    if (const auto denied = denial(options.access, request)) return error_reply(request, denied->status, denied->message, {});
    return dispatch(request);
  } catch (const ApiError& e) {
    return error_reply(request, e.status, e.what(), e.param);
  } catch (const Error& e) {
    return error_reply(request, status_of(e), e.what(), {});
  } catch (const std::bad_alloc&) {
    return error_reply(request, 503, "out of memory", {});
  } catch (const std::exception& e) {
    return error_reply(request, 500, e.what(), {});
  }
}

Server::Server(const Engine& engine, ServerOptions options) : state_(std::make_unique<State>(engine, std::move(options))) {}
Server::~Server() = default;

HttpReply Server::handle(const HttpRequest& request) {
  const auto start = std::chrono::steady_clock::now();
  const std::string id = request_id(request);
  HttpReply reply = state_->respond(request);
  reply.headers.emplace_back("x-request-id", id);
  for (auto& header : cors_headers(state_->options.access, request)) reply.headers.push_back(std::move(header));
  const auto& log = state_->options.log;
  if (!log || (request.path == "/router" && reply.status == 200)) return reply;  // which a page asks for all the time
  ServerOptions::Access access{.id = id, .method = request.method, .path = request.path, .remote = request.remote, .status = reply.status, .stream = reply.stream != nullptr};
  auto tell = [&log, access, start](const ReplyUsage& usage) mutable {
    access.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    access.usage = usage;
    log(access);
  };
  if (reply.stream) reply.stream = std::make_unique<LoggedStream>(std::move(reply.stream), tell);
  else tell(reply.usage);
  return reply;
}

uint32_t Server::n_ctx() const { return state_->scheduler.n_ctx(); }

int Server::bind() {
  const auto admitted = [this](const HttpRequest& request) { return !denial(state_->options.access, request).has_value(); };
  state_->http = std::make_unique<HttpServer>(state_->options.http, admitted, [this](const HttpRequest& request) { return handle(request); }, state_->options.tls);
  return state_->http->bind(state_->options.access.host, state_->options.port);
}

void Server::run() {
  std::exception_ptr error;
  try {
    state_->http->run();
  } catch (...) {
    error = std::current_exception();
  }
  {
    const std::lock_guard lock(state_->mutex);
    state_->ended = true;
    state_->ended_changed.notify_all();
  }
  if (error) std::rethrow_exception(error);
}

void Server::stop(std::chrono::milliseconds grace) {
  const auto deadline = std::chrono::steady_clock::now() + grace;
  std::unique_lock lock(state_->mutex);
  while (!state_->ended) {
    state_->http->stop();
    state_->ended_changed.wait_for(lock, std::chrono::milliseconds(50), [&] { return state_->ended; });
    if (std::chrono::steady_clock::now() >= deadline) state_->scheduler.stop();
  }
}

}  // namespace duet::server
