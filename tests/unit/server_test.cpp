// The server without sockets: requests in, replies out, on a tiny model.
#include <doctest/doctest.h>

#include "base/error.h"
#include "base/json.h"
#include "server/server.h"
#include "tests/support/tiny_model.h"

using namespace duet;
using namespace duet::server;

namespace {

struct Fixture {
  Fixture() : engine(open()), server(engine, options()) {}

  static Engine open() {
    const std::filesystem::path path = std::filesystem::path(DUET_TEST_DIR) / "server_tiny.gguf";
    test::write_tiny_model(path, {.type = DType::Q8_0});
    Engine engine = Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}});
    std::filesystem::remove(path);
    return engine;
  }
  static ServerOptions options() {
    ServerOptions options;
    options.scheduler = {.n_parallel = 4, .n_ctx = 256};
    options.file_name = "models/tiny.gguf";
    options.chat = ChatTemplate::named("chatml");
    return options;
  }

  HttpReply ask(const std::string& method, const std::string& path, const std::string& body = {}) {
    return server.handle({.method = method, .path = path, .body = body, .remote = "127.0.0.1", .headers = {{"Host", "localhost:8080"}}, .client_gone = [] { return false; }});
  }
  HttpReply post(const std::string& path, const std::string& body) { return ask("POST", path, body); }
  Json ok(const std::string& path, const std::string& body) {
    const HttpReply reply = post(path, body);
    CAPTURE(reply.body);
    REQUIRE(reply.status == 200);
    return parse_json(reply.body, "reply");
  }
  std::string streamed(const std::string& path, const std::string& body) {
    const HttpReply reply = post(path, body);
    REQUIRE(reply.status == 200);
    REQUIRE(reply.stream);
    std::string out;
    reply.stream->run([&](std::string_view text) {
      out += text;
      return true;
    });
    return out;
  }
  // "status param: message", for the error cases.
  std::string refusal(const std::string& path, const std::string& body) {
    const HttpReply reply = post(path, body);
    const Json json = parse_json(reply.body, "reply");
    if (json["error"].is_string()) return concat(reply.status, " ", json["error"].get<std::string>());
    const Json& param = json["error"]["param"];
    return concat(reply.status, " ", param.is_null() ? "-" : param.get<std::string>(), ": ", json["error"]["message"].get<std::string>());
  }

  Engine engine;
  Server server;
};

std::vector<Json> events(const std::string& stream) {
  std::vector<Json> out;
  for (size_t at = 0; at < stream.size();) {
    const size_t end = stream.find("\n\n", at);
    REQUIRE(end != std::string::npos);
    const std::string line = stream.substr(at, end - at);
    REQUIRE(line.starts_with("data: "));
    if (line != "data: [DONE]") out.push_back(parse_json(line.substr(6), "event"));
    at = end + 2;
  }
  return out;
}

bool begins(const std::string& text, const std::string& start) { return text.starts_with(start); }

constexpr const char* kHello = R"("messages":[{"role":"user","content":"hello"}],"temperature":0)";

}  // namespace

TEST_CASE("chat completions: whole and streamed are the same text") {
  Fixture f;
  const Json whole = f.ok("/v1/chat/completions", concat("{", kHello, R"(,"max_tokens":12,"ignore_eos":true})"));
  CHECK(whole["object"] == "chat.completion");
  CHECK(whole["model"] == "tiny");
  CHECK(begins(whole["id"], "chatcmpl-"));
  CHECK(whole["choices"][0]["message"]["role"] == "assistant");
  CHECK(whole["choices"][0]["finish_reason"] == "length");
  CHECK(whole["usage"]["completion_tokens"] == 12);
  const std::string stream = f.streamed("/v1/chat/completions", concat("{", kHello, R"(,"max_tokens":12,"ignore_eos":true,"stream":true,"stream_options":{"include_usage":true}})"));
  CHECK(stream.ends_with("data: [DONE]\n\n"));
  const auto chunks = events(stream);
  CHECK(chunks.front()["choices"][0]["delta"]["role"] == "assistant");
  std::string text;
  for (const Json& chunk : chunks) {
    CHECK(chunk["object"] == "chat.completion.chunk");
    CHECK(chunk["id"] == chunks[0]["id"]);
    if (!chunk["choices"].empty() && chunk["choices"][0]["delta"].contains("content")) text += chunk["choices"][0]["delta"]["content"].get<std::string>();
  }
  CHECK(text == whole["choices"][0]["message"]["content"]);
  CHECK(chunks.back()["choices"].empty());
  CHECK(chunks.back()["usage"]["total_tokens"] == whole["usage"]["total_tokens"]);
  CHECK(chunks[chunks.size() - 2]["choices"][0]["finish_reason"] == "length");
}

TEST_CASE("completions: echo with log probabilities in the legacy shape") {
  Fixture f;
  const Json json = f.ok("/v1/completions", R"({"prompt":"the hat","max_tokens":2,"echo":true,"logprobs":3,"temperature":0,"ignore_eos":true})");
  const Json& choice = json["choices"][0];
  CHECK(begins(choice["text"], "the hat"));
  const Json& logprobs = choice["logprobs"];
  const size_t n = logprobs["tokens"].size();
  CHECK(n == json["usage"]["total_tokens"]);
  CHECK(logprobs["token_logprobs"].size() == n);
  CHECK(logprobs["top_logprobs"].size() == n);
  CHECK(logprobs["text_offset"].size() == n);
  CHECK(logprobs["token_logprobs"][0].is_null());
  CHECK(logprobs["text_offset"][n - 2] == 7);
  for (size_t i = 1; i < n; ++i) {
    double best = -1e30;
    for (const auto& [token, logprob] : logprobs["top_logprobs"][i].items()) best = std::max(best, logprob.get<double>());
    CHECK(logprobs["token_logprobs"][i].get<double>() <= best);
    if (i >= n - 2) CHECK(logprobs["token_logprobs"][i].get<double>() == best);  // greedy
  }
  for (const int n_new : {0, 1}) {
    const Json few = f.ok("/v1/completions", concat(R"({"prompt":"the hat","echo":true,"logprobs":1,"temperature":0,"ignore_eos":true,"max_tokens":)", n_new, "}"));
    CHECK(few["choices"][0]["logprobs"]["tokens"].size() == few["usage"]["total_tokens"]);
  }
  const auto parts = events(f.streamed("/v1/completions", R"({"prompt":"the hat","max_tokens":2,"echo":true,"logprobs":1,"temperature":0,"ignore_eos":true,"stream":true})"));
  const Json& echoed = parts[0]["choices"][0]["logprobs"]["token_logprobs"];
  for (size_t i = 1; i < echoed.size(); ++i) CHECK(!echoed[i].is_null());
}

TEST_CASE("completions: texts, ids and lists of ids; n; stop; bias") {
  Fixture f;
  const Json texts = f.ok("/v1/completions", R"({"prompt":["a","b"],"max_tokens":3,"n":2,"temperature":1,"seed":4,"ignore_eos":true})");
  REQUIRE(texts["choices"].size() == 4);
  CHECK(texts["choices"][3]["index"] == 3);
  CHECK(texts["choices"][0]["text"] != texts["choices"][1]["text"]);
  const Json again = f.ok("/v1/completions", R"({"prompt":["a","b"],"max_tokens":3,"n":2,"temperature":1,"seed":4,"ignore_eos":true})");
  CHECK(again["choices"] == texts["choices"]);
  CHECK(f.ok("/v1/completions", R"({"prompt":[1,5,6],"max_tokens":1})")["usage"]["prompt_tokens"] == 3);
  CHECK(f.ok("/v1/completions", R"({"prompt":[[1,5],[1,5,6]],"max_tokens":1})")["usage"]["prompt_tokens"] == 5);
  const Json biased = f.ok("/v1/completions", R"({"prompt":"a","max_tokens":4,"temperature":0,"logit_bias":{"68":1000}})");  // byte 'A'
  CHECK(biased["choices"][0]["text"] == "AAAA");
  const Json stopped = f.ok("/v1/completions", R"({"prompt":"a","max_tokens":9,"temperature":0,"logit_bias":{"68":1000},"stop":"AAA"})");
  CHECK(stopped["choices"][0]["text"] == "");
  CHECK(stopped["choices"][0]["finish_reason"] == "stop");
  CHECK(stopped["usage"]["completion_tokens"] == 3);
}

TEST_CASE("UTF-8 characters are never split between events") {
  Fixture f;
  // Bytes of U+20AC: E2 82 AC, one token each, then an end that leaves a character incomplete.
  const std::string stream = f.streamed("/v1/completions", R"({"prompt":"a","max_tokens":3,"temperature":0,"logit_bias":{"229":1000},"stream":true})");
  std::string text;
  for (const Json& event : events(stream)) text += event["choices"][0]["text"].get<std::string>();
  CHECK(text == "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD");  // E2 alone is no character
}

TEST_CASE("what a request may not ask is named in a 400") {
  Fixture f;
  const auto refused = [&](const std::string& extra) { return f.refusal("/v1/completions", concat(R"({"prompt":"a")", extra, "}")); };
  CHECK(begins(refused(R"(,"temperature":"hot")"), "400 temperature:"));
  CHECK(begins(refused(R"(,"n":0)"), "400 n:"));
  CHECK(begins(refused(R"(,"best_of":3)"), "400 best_of:"));
  CHECK(begins(refused(R"(,"suffix":"x")"), "400 suffix:"));
  CHECK(begins(refused(R"(,"logit_bias":{"x":1})"), "400 logit_bias:"));
  CHECK(begins(refused(R"(,"logit_bias":{"99999":1})"), "400 logit_bias:"));
  CHECK(begins(refused(R"(,"max_tokens":-5)"), "400 max_tokens:"));
  CHECK(begins(refused(R"(,"grammar":"root ::= x")"), "400 grammar:"));
  CHECK(begins(refused(R"(,"response_format":{"type":"json_object"})"), "400 response_format:"));
  CHECK(begins(refused(R"(,"stream_options":{})"), "400 stream_options:"));
  CHECK(begins(refused(R"(,"model":"gpt-4")"), "404 model:"));
  CHECK(f.refusal("/v1/completions", R"({"prompt":[1,99999]})").find("outside this model's vocabulary") != std::string::npos);
  CHECK(begins(f.refusal("/v1/completions", "{}"), "400 prompt:"));
  CHECK(begins(f.refusal("/v1/completions", "{"), "400 -: request body: not valid JSON"));
  CHECK(begins(f.refusal("/v1/completions", std::string(100, '[')), "400 -: request body: JSON nested deeper"));
  CHECK(begins(f.refusal("/v1/completions", "{\"prompt\":\"\xff\"}"), "400 -: request body: not valid JSON"));
  CHECK(begins(f.refusal("/v1/chat/completions", R"({"messages":[]})"), "400 messages:"));
  CHECK(begins(f.refusal("/v1/chat/completions", R"({"messages":[{"role":"user","content":"x"}],"tools":[{"type":"function"}]})"), "400 tools:"));
  CHECK(f.refusal("/v1/completions", concat(R"({"prompt":")", std::string(4000, 'x'), "\"}")).find("the context has 256 positions") != std::string::npos);
  CHECK(begins(f.refusal("/nowhere", "{}"), "404 -:"));
  CHECK(f.ask("GET", "/v1/completions").status == 405);
}

TEST_CASE("models, tokenizer routes, health, slots and metrics") {
  Fixture f;
  const auto get = [&](const char* path) { return parse_json(f.ask("GET", path).body, path); };
  CHECK(get("/v1/models")["data"][0]["id"] == "tiny");
  CHECK(get("/v1/models/tiny")["object"] == "model");
  CHECK(f.ask("GET", "/v1/models/other").status == 404);
  CHECK(get("/health")["status"] == "ok");
  CHECK(get("/slots").size() == 4);
  CHECK(get("/props")["total_slots"] == 4);
  CHECK(get("/tokenizer_info")["eos_token"] == "</s>");
  const Json tokens = f.ok("/tokenize", R"({"content":"the hat"})");
  CHECK(f.ok("/detokenize", concat(R"({"tokens":)", tokens["tokens"].dump(), "}"))["content"] == "the hat");
  f.ok("/v1/completions", R"({"prompt":"a","max_tokens":4,"ignore_eos":true})");
  const std::string metrics = f.ask("GET", "/metrics").body;
  CHECK(metrics.find("duet_generated_tokens_total 4\n") != std::string::npos);
  CHECK(metrics.find("duet_time_to_first_token_seconds_count 1\n") != std::string::npos);
}

TEST_CASE("Ollama's routes: lines, options, loading") {
  Fixture f;
  const std::string stream = f.streamed("/api/chat", R"({"model":"tiny:latest","messages":[{"role":"user","content":"hello"}],"options":{"temperature":0,"num_predict":6}})");
  std::vector<Json> lines;
  for (size_t at = 0, end; at < stream.size(); at = end + 1) {
    end = stream.find('\n', at);
    lines.push_back(parse_json(stream.substr(at, end - at), "line"));
  }
  CHECK(lines.back()["done"] == true);
  CHECK(lines.back()["eval_count"].get<int>() <= 6);
  CHECK(lines.back()["total_duration"].get<int64_t>() > 0);
  std::string text;
  for (const Json& line : lines) text += line["message"]["content"].get<std::string>();
  const Json whole = f.ok("/api/chat", R"({"model":"tiny","stream":false,"messages":[{"role":"user","content":"hello"}],"options":{"temperature":0,"num_predict":6}})");
  CHECK(whole["message"]["content"] == text);
  CHECK(f.ok("/api/generate", R"({"model":"tiny","prompt":""})")["done_reason"] == "load");
  CHECK(f.ok("/api/generate", R"({"model":"tiny","prompt":"the","raw":true,"stream":false,"options":{"num_predict":2}})").contains("response"));
  CHECK(begins(f.refusal("/api/chat", R"({"model":"llama3","messages":[]})"), "404 model"));
  CHECK(begins(f.refusal("/api/generate", R"({"model":"tiny","prompt":"x","options":{"num_ctx":100000}})"), "400 'options.num_ctx' is 100000"));
  CHECK(begins(f.refusal("/api/generate", R"({"model":"tiny","prompt":"x","format":"json"})"), "400 'format'"));
  CHECK(begins(f.refusal("/api/pull", R"({"model":"x"})"), "501"));
  CHECK(f.ok("/api/show", R"({"model":"tiny"})")["model_info"].is_object());
}

TEST_CASE("embeddings have length 1 and are the same in all shapes") {
  Fixture f;
  const Json floats = f.ok("/v1/embeddings", R"({"input":["the hat","a"],"model":"tiny"})");
  REQUIRE(floats["data"].size() == 2);
  const auto values = floats["data"][0]["embedding"].get<std::vector<float>>();
  CHECK(values.size() == 64);
  double squares = 0;
  for (const float x : values) squares += double{x} * double{x};
  CHECK(squares == doctest::Approx(1));
  CHECK(floats["data"][1]["embedding"] != floats["data"][0]["embedding"]);
  CHECK(f.ok("/api/embed", R"({"input":"the hat","model":"tiny"})")["embeddings"][0] == floats["data"][0]["embedding"]);
  CHECK(f.ok("/api/embeddings", R"({"prompt":"the hat","model":"tiny"})")["embedding"] == floats["data"][0]["embedding"]);
  const Json base64 = f.ok("/v1/embeddings", R"({"input":"the hat","encoding_format":"base64"})");
  CHECK(base64["data"][0]["embedding"].get<std::string>().size() == (64 * 4 + 2) / 3 * 4);
  CHECK(f.refusal("/v1/embeddings", R"({"input":[5000]})").find("outside this model's vocabulary") != std::string::npos);
}

TEST_CASE("llama-server's completion") {
  Fixture f;
  const Json whole = f.ok("/completion", R"({"prompt":"the","n_predict":4,"temperature":0,"ignore_eos":true,"n_probs":2})");
  CHECK(whole["stop"] == true);
  CHECK(whole["stop_type"] == "limit");
  CHECK(whole["tokens_predicted"] == 4);
  CHECK(whole["completion_probabilities"].size() == 4);
  std::string text;
  for (const Json& event : events(f.streamed("/completion", R"({"prompt":"the","n_predict":4,"temperature":0,"ignore_eos":true,"stream":true})"))) text += event["content"].get<std::string>();
  CHECK(text == whole["content"]);
}

TEST_CASE("who may ask: keys, foreign hosts and pages") {
  const auto request = [](std::vector<std::pair<std::string, std::string>> headers) {
    return HttpRequest{.method = "POST", .path = "/v1/completions", .body = {}, .remote = {}, .headers = std::move(headers), .client_gone = {}};
  };
  const auto status = [&](const AccessOptions& options, std::vector<std::pair<std::string, std::string>> headers) {
    const auto denied = denial(options, request(std::move(headers)));
    return denied ? denied->status : 200;
  };
  const AccessOptions local;
  CHECK(status(local, {{"Host", "localhost:8080"}}) == 200);
  CHECK(status(local, {{"Host", "127.0.0.1:8080"}}) == 200);
  CHECK(status(local, {{"Host", "[::1]:8080"}}) == 200);
  CHECK(status(local, {{"Host", "evil.example:8080"}}) == 403);
  CHECK(status(local, {{"Host", "192.168.1.5"}}) == 403);
  CHECK(status(local, {{"Host", "localhost"}, {"Origin", "https://evil.example"}}) == 403);
  CHECK(status(local, {{"Host", "localhost"}, {"Origin", "null"}}) == 403);
  CHECK(status(local, {{"Host", "localhost:8080"}, {"Origin", "http://localhost:3000"}}) == 200);
  const AccessOptions open{.host = "0.0.0.0", .keys = {}, .allowed_hosts = {"box.lan"}, .cors_origins = {}};
  CHECK(status(open, {{"Host", "192.168.1.5:8080"}}) == 200);
  CHECK(status(open, {{"Host", "box.lan"}}) == 200);
  CHECK(status(open, {{"Host", "evil.example"}}) == 403);
  const AccessOptions keyed{.host = "0.0.0.0", .keys = {"secret", "other"}, .allowed_hosts = {}, .cors_origins = {}};
  CHECK(status(keyed, {{"Host", "any.example"}}) == 401);
  CHECK(status(keyed, {{"Authorization", "Bearer secret"}}) == 200);
  CHECK(status(keyed, {{"authorization", "Bearer other"}}) == 200);
  CHECK(status(keyed, {{"x-api-key", "secret"}}) == 200);
  CHECK(status(keyed, {{"Authorization", "Bearer secre"}}) == 401);
  CHECK(status(keyed, {{"Authorization", "Bearer secretsecret"}}) == 401);
}
