// The server without sockets: requests in, replies out, on a tiny model.
#include <doctest/doctest.h>
#include <unistd.h>

#include <future>
#include <set>
#include <thread>

#include "base/error.h"
#include "base/json.h"
#include "server/server.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/server_process.h"
#include "tests/support/tiny_model.h"

using namespace duet;
using namespace duet::server;

namespace {

struct Fixture {
  explicit Fixture(uint32_t n_ctx = 256) : engine(open()), server(engine, options(n_ctx)) {}

  static Engine open() {
    const std::filesystem::path path = std::filesystem::path(DUET_TEST_DIR) / concat("server_tiny_", ::getpid(), ".gguf");  // cases run at the same time
    test::write_tiny_model(path, {.type = DType::Q8_0});
    Engine engine = Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}});
    std::filesystem::remove(path);
    return engine;
  }
  static ServerOptions options(uint32_t n_ctx) {
    ServerOptions options;
    options.scheduler = {.n_parallel = 4, .n_ctx = n_ctx};
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

// Who scores texts (lm-eval) takes the prompt's part to be all but the last entry.
TEST_CASE("completions: echo with log probabilities ends with the token that was generated, also where that ends the text") {
  Fixture f;
  const std::string ends = R"("prompt":"the hat","temperature":0,"logit_bias":{"2":1000})";
  const std::string scored = R"(,"echo":true,"logprobs":1)";
  const Json one = f.ok("/v1/completions", concat("{", ends, scored, R"(,"max_tokens":1})"));
  const Json& logprobs = one["choices"][0]["logprobs"];
  const size_t n_prompt = one["usage"]["prompt_tokens"];
  CHECK(one["choices"][0]["text"] == "the hat");
  CHECK(one["choices"][0]["finish_reason"] == "stop");
  CHECK(logprobs["token_logprobs"].size() == n_prompt + 1);
  CHECK(logprobs["tokens"].back() == "</s>");
  CHECK(logprobs["text_offset"].back() == 7);
  CHECK(logprobs["token_logprobs"].back().get<double>() < 0);
  // A token before the last: told once.
  const std::string letter = R"(,"max_tokens":5,"grammar":"root ::= \"a\" \"bcdefgh\"?")";
  const Json two = f.ok("/v1/completions", concat("{", ends, letter, scored, "}"));
  CHECK(two["choices"][0]["text"] == "the hata");
  CHECK(two["choices"][0]["logprobs"]["tokens"].size() == n_prompt + 2);
  std::string streamed;
  for (const Json& event : events(f.streamed("/v1/completions", concat("{", ends, letter, scored, R"(,"stream":true})")))) streamed += event["choices"][0]["text"].get<std::string>();
  CHECK(streamed == "the hata");
  CHECK(f.ok("/v1/completions", concat("{", ends, letter, "}"))["choices"][0]["text"] == "a");
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
  CHECK(begins(refused(R"(,"mirostat":2)"), "400 mirostat:"));
  CHECK(begins(refused(R"(,"typical_p":0.5)"), "400 typical_p:"));
  CHECK(begins(refused(R"(,"stop_token_ids":[5])"), "400 stop_token_ids:"));
  CHECK(begins(refused(R"(,"bad_words":"x")"), "400 bad_words:"));
  CHECK(begins(refused(R"(,"grammar":"root ::= \"a\"","grammar_lazy":true)"), "400 grammar_lazy:"));
  CHECK(begins(refused(R"(,"grammar_triggers":[{"type":0,"value":"a"}])"), "400 grammar_triggers:"));
  CHECK(begins(refused(R"(,"samplers":["temperature","top_p"])"), "400 samplers:"));
  CHECK(begins(refused(R"(,"samplers":"tk")"), "400 samplers:"));
  CHECK(begins(refused(R"(,"samplers":["infill"])"), "400 samplers:"));
  CHECK(begins(refused(R"(,"structured_outputs":{"regex":"a+"})"), "400 structured_outputs.regex:"));
  CHECK(begins(refused(R"(,"structured_outputs":{"structural_tag":"{}"})"), "400 structured_outputs.structural_tag:"));
  CHECK(begins(refused(R"(,"structured_outputs":{"json":{"not":{}}})"), "400 structured_outputs.json:"));
  CHECK(begins(refused(R"(,"structured_outputs":{"json":{},"choice":["a"]})"), "400 structured_outputs.choice:"));
  CHECK(begins(refused(R"(,"structured_outputs":{"grammar":"root ::= \"a\""},"guided_choice":["b"])"), "400 structured_outputs.grammar:"));
  CHECK(begins(refused(R"(,"guided_json":"{")"), "400 guided_json:"));
  for (const char* field : {R"("chat_template":"{{ messages }}")", R"("continue_final_message":true)", R"("add_generation_prompt":false)"}) {
    const std::string name(field + 1, std::string_view(field).find(':') - 2);
    for (const char* path : {"/v1/chat/completions", "/apply-template", "/tokenize"}) CHECK(begins(f.refusal(path, concat("{", kHello, ",", field, "}")), concat("400 ", name, ":")));
  }
  CHECK(begins(refused(R"(,"logit_bias":{"x":1})"), "400 logit_bias:"));
  CHECK(begins(refused(R"(,"logit_bias":{"99999":1})"), "400 logit_bias:"));
  CHECK(begins(refused(R"(,"max_tokens":-5)"), "400 max_tokens:"));
  CHECK(begins(refused(R"(,"grammar":"root ::= x")"), "400 grammar: grammar: line 1:"));
  CHECK(begins(refused(R"(,"response_format":{"type":"xml"})"), "400 response_format:"));
  CHECK(begins(refused(R"(,"response_format":{"type":"json_schema","json_schema":{"schema":{"not":{}}}})"), "400 response_format.json_schema.schema:"));
  CHECK(begins(refused(R"(,"json_schema":{},"grammar":"root ::= \"a\"")"), "400 grammar:"));
  CHECK(begins(refused(R"(,"stream_options":{})"), "400 stream_options:"));
  CHECK(begins(refused(R"(,"model":"gpt-4")"), "404 model:"));
  CHECK(f.refusal("/v1/completions", R"({"prompt":[1,99999]})").find("outside this model's vocabulary") != std::string::npos);
  CHECK(begins(f.refusal("/v1/completions", "{}"), "400 prompt:"));
  CHECK(begins(f.refusal("/v1/completions", "{"), "400 -: request body: not valid JSON"));
  CHECK(begins(f.refusal("/v1/completions", std::string(100, '[')), "400 -: request body: JSON nested deeper"));
  CHECK(begins(f.refusal("/v1/completions", "{\"prompt\":\"\xff\"}"), "400 -: request body: not valid JSON"));
  CHECK(begins(f.refusal("/v1/chat/completions", R"({"messages":[]})"), "400 messages:"));
  CHECK(begins(f.refusal("/v1/chat/completions", R"({"messages":[{"role":"user","content":"x"}],"tools":[{"type":"function"}]})"), "400 tools[0]:"));
  CHECK(f.refusal("/v1/completions", concat(R"({"prompt":")", std::string(4000, 'x'), "\"}")).find("the context has 256 positions") != std::string::npos);
  CHECK(begins(f.refusal("/nowhere", "{}"), "404 -:"));
  CHECK(f.ask("GET", "/v1/completions").status == 405);
}

TEST_CASE("values that change nothing are taken") {
  Fixture f;
  const std::string neutral = R"("mirostat":0,"typical_p":1.0,"tfs_z":1,"min_tokens":0,"length_penalty":1.0,"xtc_probability":0,"dry_multiplier":0.0,"top_n_sigma":-1,"guided_regex":"","stop_token_ids":[],)"
                              R"("samplers":["penalties","dry","top_n_sigma","top_k","typ_p","top_p","min_p","xtc","temperature"],"grammar_lazy":false,"grammar_triggers":[],"structured_outputs":{"regex":null})";
  CHECK(f.post("/v1/completions", R"({"prompt":"a","max_tokens":1,"suffix":"",)" + neutral + "}").status == 200);
  CHECK(f.post("/completion", R"({"prompt":"a","n_predict":1,)" + neutral + "}").status == 200);
  CHECK(f.post("/api/generate", R"({"model":"tiny","prompt":"a","stream":false,"options":{"num_predict":1,)" + neutral + "}}").status == 200);
  CHECK(f.post("/v1/chat/completions", concat("{", kHello, R"(,"max_tokens":1,"chat_template":null,"continue_final_message":false,"add_generation_prompt":true,"chat_template_kwargs":{}})")).status == 200);
}

TEST_CASE("llama-server's list of samplers: what is not in it does nothing; its number for a random seed") {
  Fixture f;
  const auto settings = [&](const std::string& more) { return f.ok("/completion", concat(R"({"prompt":"a","n_predict":1,"temperature":0.5,"top_k":7,"top_p":0.25,"min_p":0.125)", more, "}"))["generation_settings"]; };
  const Json some = settings(R"(,"samplers":["top_k","temperature"])");
  CHECK(some["top_k"] == 7);
  CHECK(some["top_p"] == 1);
  CHECK(some["min_p"] == 0);
  CHECK(some["temperature"] == 0.5);
  const Json letters = settings(R"(,"samplers":"edpm")");
  CHECK(letters["top_k"] == 0);
  CHECK(letters["top_p"] == 0.25);
  CHECK(letters["temperature"] == 1);
  CHECK(settings(R"(,"seed":4294967295)")["seed"] != 4294967295);
  CHECK(settings(R"(,"seed":4294967294)")["seed"] == 4294967294);
}

TEST_CASE("names of control tokens in a whole prompt are those tokens, unless that is not wanted") {
  Fixture f;
  const Json rendered = f.ok("/apply-template", R"({"messages":[{"role":"user","content":"the hat"}]})");
  const auto n_prompt = [&](const std::string& path, const std::string& extra) {
    const Json reply = f.ok(path, concat(R"({"model":"tiny","prompt":)", rendered["prompt"].dump(), extra, "}"));
    return reply.contains("usage") ? reply["usage"]["prompt_tokens"] : reply.contains("count") ? reply["count"] : reply.contains("timings") ? reply["tokens_evaluated"] : reply["prompt_eval_count"];
  };
  const size_t n = rendered["tokens"].size();
  CHECK(n_prompt("/v1/completions", R"(,"max_tokens":1)") == n);
  CHECK(n_prompt("/completion", R"(,"n_predict":1)") == n);
  CHECK(n_prompt("/tokenize", "") == n);
  CHECK(n_prompt("/api/generate", R"(,"raw":true,"stream":false,"options":{"num_predict":1})") == n);
  const auto count = [&](const char* extra) { return f.ok("/tokenize", concat(R"({"prompt":"<s>the</s>")", extra, "}"))["count"].get<size_t>(); };
  CHECK(count("") == f.ok("/tokenize", R"({"prompt":"the"})")["count"].get<size_t>() + 1);  // one BOS
  CHECK(count(R"(,"parse_special":false)") > count(""));
  CHECK(f.ok("/v1/completions", R"({"prompt":"<s>the</s>","max_tokens":1})")["usage"]["prompt_tokens"] == count(""));
  CHECK(f.ok("/v1/completions", R"({"prompt":"<s>the</s>","max_tokens":1,"parse_special":false})")["usage"]["prompt_tokens"] > count(""));
  // In a message they are what the user wrote.
  const Json plain = f.ok("/apply-template", R"({"messages":[{"role":"user","content":"</s>"}]})");
  CHECK(std::count(plain["tokens"].begin(), plain["tokens"].end(), Json(f.engine.tokenizer().eos().value())) == 0);
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
  CHECK(begins(f.refusal("/api/generate", R"({"model":"tiny","prompt":"x","format":"xml"})"), "400 'format'"));
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
  for (const char* path : {"/v1/embeddings", "/api/embed"}) CHECK(f.refusal(path, R"({"input":"a","model":"tiny","dimensions":8})").find("'dimensions' is fixed") != std::string::npos);
  const std::string longer(4000, 'x');
  CHECK(f.refusal("/api/embed", R"({"model":"tiny","input":")" + longer + "\"}").find("the context has 256 positions") != std::string::npos);
  CHECK(f.ok("/api/embed", R"({"model":"tiny","truncate":true,"input":")" + longer + "\"}")["prompt_eval_count"] == 256);
  Json many{{"input", Json::array()}};
  for (int i = 0; i < 2048; ++i) many["input"].push_back(Json::array({i % 250 + 3}));
  CHECK(f.ok("/v1/embeddings", many.dump())["data"].size() == 2048);  // more than may wait in the queue
}

TEST_CASE("what does not fit in memory or cannot be seen is refused") {
  Fixture f(2048);
  Json prompts = Json::array();
  for (int i = 0; i < 16; ++i) prompts.push_back(std::vector<int>(1000, 5));
  const Json body{{"prompt", prompts}, {"echo", true}, {"logprobs", 100}, {"max_tokens", 0}};
  CHECK(begins(f.refusal("/v1/completions", body.dump()), "400 logprobs:"));
  CHECK(f.refusal("/api/chat", R"({"model":"tiny","messages":[{"role":"user","content":"what is this?","images":["aGk="]}]})").find("messages[0].images") != std::string::npos);
  CHECK(f.refusal("/detokenize", R"({"tokens":["a"]})").find("integers only") != std::string::npos);
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
  CHECK(status(local, {{"Host", "LocalHost:8080"}, {"Origin", "http://LOCALHOST:3000"}}) == 200);
  CHECK(status(local, {{"Host", "evil.example:8080"}}) == 403);
  CHECK(status(local, {{"Host", "192.168.1.5"}}) == 403);
  CHECK(status(local, {{"Host", "localhost"}, {"Origin", "https://evil.example"}}) == 403);
  CHECK(status(local, {{"Host", "localhost"}, {"Origin", "null"}}) == 403);
  CHECK(status(local, {{"Host", "localhost:8080"}, {"Origin", "http://localhost:3000"}}) == 200);
  const AccessOptions open{.host = "0.0.0.0", .keys = {}, .allowed_hosts = {"box.lan"}, .cors_origins = {}};
  CHECK(status(open, {{"Host", "192.168.1.5:8080"}}) == 200);
  CHECK(status(open, {{"Host", "Box.LAN"}}) == 200);
  CHECK(status(open, {{"Host", "evil.example"}}) == 403);
  const AccessOptions keyed{.host = "0.0.0.0", .keys = {"secret", "other"}, .allowed_hosts = {}, .cors_origins = {}};
  CHECK(status(keyed, {{"Host", "any.example"}}) == 401);
  CHECK(status(keyed, {{"Authorization", "Bearer secret"}}) == 200);
  CHECK(status(keyed, {{"authorization", "Bearer other"}}) == 200);
  CHECK(status(keyed, {{"x-api-key", "secret"}}) == 200);
  CHECK(status(keyed, {{"Authorization", "Bearer secre"}}) == 401);
  CHECK(status(keyed, {{"Authorization", "Bearer secretsecret"}}) == 401);
}

TEST_CASE("bodies of all requests together are bounded, and held until their answers") {
  HttpLimits limits;
  limits.max_bodies_bytes = 1000;
  std::promise<void> entered, release;
  HttpServer server(limits, [](const HttpRequest&) { return true; }, [&](const HttpRequest& request) -> HttpReply {
    if (request.path == "/wait") {
      entered.set_value();
      release.get_future().wait();
    }
    return {.body = request.body};
  });
  const int port = server.bind("127.0.0.1", 0);
  std::thread thread([&] { server.run(); });
  const std::string body(600, 'x'), chunked = "POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n258\r\n" + body + "\r\n0\r\n\r\n";
  const auto statuses = [&] {  // one after the other
    const int plain = test::status_of(test::http(port, "POST", "/", body));
    test::Socket socket(port);
    socket.send(chunked);
    const int of_chunks = test::status_of(socket.receive("\r\n\r\n"));
    socket.send("GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    socket.receive();  // until it is closed: what it held is free
    return std::pair(plain, of_chunks);
  };
  CHECK(statuses() == std::pair(200, 200));
  test::Socket waiting(port);
  waiting.send(test::http_request("POST", "/wait", body));
  entered.get_future().wait();
  CHECK(statuses() == std::pair(503, 400));
  release.set_value();
  CHECK(test::status_of(waiting.receive(body)) == 200);
  waiting.receive();  // until it is closed: what it held is free
  CHECK(statuses() == std::pair(200, 200));
  server.stop();
  thread.join();
}

// ---- texts of a form, tool calls ---------------------------------------------------------------

namespace {

const std::string kSchema = R"({"type":"object","properties":{"n":{"type":"integer","minimum":10,"maximum":99},"w":{"enum":["x","yes"]}},"required":["n","w"],"additionalProperties":false})";

bool fits_schema(const std::string& text) {
  const Json json = parse_json(text, "text");
  return json.size() == 2 && json["n"].get<int>() >= 10 && json["n"].get<int>() <= 99 && (json["w"] == "x" || json["w"] == "yes");
}

const std::string kTools = R"("tools":[{"type":"function","function":{"name":"get_weather","description":"The weather","parameters":)" + kSchema +
                           R"(}},{"type":"function","function":{"name":"add","parameters":{"type":"object","properties":{"a":{"type":"boolean"}},"required":["a"]}}}])";

// One call: names its tool, arguments that fit.
bool is_call(const Json& call) {
  const std::string name = call["function"]["name"], arguments = call["function"]["arguments"];
  if (name == "add") return parse_json(arguments, "arguments")["a"].is_boolean();
  return name == "get_weather" && fits_schema(arguments);
}

}  // namespace

TEST_CASE("response_format: a schema is kept to, whole, streamed, drawn or greedy") {
  Fixture f;
  const std::string format = R"(,"max_tokens":200,"response_format":{"type":"json_schema","json_schema":{"name":"x","strict":true,"schema":)" + kSchema + "}}";
  const Json whole = f.ok("/v1/chat/completions", concat("{", kHello, format, "}"));
  CHECK(whole["choices"][0]["finish_reason"] == "stop");
  const std::string text = whole["choices"][0]["message"]["content"];
  CHECK(fits_schema(text));
  std::string streamed;
  for (const Json& chunk : events(f.streamed("/v1/chat/completions", concat("{", kHello, format, R"(,"stream":true})"))))
    if (chunk["choices"][0]["delta"].contains("content")) streamed += chunk["choices"][0]["delta"]["content"].get<std::string>();
  CHECK(streamed == text);
  const Json drawn = f.ok("/v1/chat/completions", concat(R"({"messages":[{"role":"user","content":"x"}],"temperature":2,"top_k":0,"top_p":1,"min_p":0,"seed":3,"n":6,"logprobs":true)", format, "}"));
  std::set<std::string> texts;
  for (const Json& choice : drawn["choices"]) {
    CHECK(fits_schema(choice["message"]["content"]));
    CHECK(!choice["logprobs"]["content"].empty());
    texts.insert(choice["message"]["content"].get<std::string>());
  }
  CHECK(texts.size() > 1);
}

TEST_CASE("grammars and schemas in every protocol") {
  Fixture f;
  CHECK(f.ok("/v1/completions", R"({"prompt":"x","max_tokens":50,"grammar":"root ::= \"yes\" | \"no\"","temperature":0})")["choices"][0]["text"].get<std::string>().size() <= 3);
  CHECK(f.ok("/v1/completions", R"({"prompt":"x","max_tokens":50,"guided_choice":["left","right"]})")["choices"][0]["text"].get<std::string>().size() >= 4);
  CHECK(f.ok("/v1/completions", R"({"prompt":"x","max_tokens":50,"structured_outputs":{"choice":["left","right"]}})")["choices"][0]["text"].get<std::string>().size() >= 4);
  CHECK(f.ok("/v1/completions", R"({"prompt":"x","max_tokens":50,"structured_outputs":{"grammar":"root ::=\n  [0-9]{5}"}})")["choices"][0]["text"].get<std::string>().size() == 5);
  CHECK(fits_schema(f.ok("/v1/completions", R"({"prompt":"x","max_tokens":100,"structured_outputs":{"json":)" + kSchema + "}}")["choices"][0]["text"]));
  CHECK(fits_schema(f.ok("/v1/completions", R"({"prompt":"x","max_tokens":100,"guided_json":)" + Json(kSchema).dump() + "}")["choices"][0]["text"]));
  CHECK(fits_schema(f.ok("/completion", R"({"prompt":"x","n_predict":100,"json_schema":)" + kSchema + "}")["content"]));
  CHECK(f.ok("/completion", R"({"prompt":"x","n_predict":100,"grammar":"root ::= [0-9]{5}"})")["content"].get<std::string>().size() == 5);
  CHECK(fits_schema(f.ok("/api/generate", R"({"model":"tiny","prompt":"x","stream":false,"format":)" + kSchema + "}")["response"]));
  CHECK(fits_schema(f.ok("/api/chat", R"({"model":"tiny","messages":[{"role":"user","content":"x"}],"stream":false,"format":)" + kSchema + "}")["message"]["content"]));
  // ignore_eos asks for more than the grammar has: it ends there all the same.
  CHECK(f.ok("/completion", R"({"prompt":"x","n_predict":100,"ignore_eos":true,"grammar":"root ::= [ab]{7}"})")["content"].get<std::string>().size() == 7);
  const Json ended = f.ok("/completion", R"({"prompt":"x","n_predict":3,"grammar":"root ::= [ab]{70}"})");
  CHECK(ended["stop_type"] == "limit");
}

TEST_CASE("a grammar that cannot be followed fails alone") {
  Fixture f;
  std::string choices = "[";
  for (int i = 0; i < 256; ++i) choices += concat(i == 0 ? "" : ",", "[", i + 3, ",false]");
  // All bytes are forbidden, and no other piece fits.
  const HttpReply reply = f.post("/completion", R"({"prompt":"x","n_predict":5,"grammar":"root ::= [0-9]{5}","logit_bias":)" + choices + "]}");
  CHECK(reply.status == 400);
  CHECK(f.ok("/completion", R"({"prompt":"x","n_predict":5})")["stop"] == true);
}

TEST_CASE("tools: calls that must be made have the form of OpenAI's, whole and streamed") {
  Fixture f(2048);
  const std::string body = concat("{", kHello, R"(,"max_tokens":500,"parallel_tool_calls":false,)", kTools);
  const Json whole = f.ok("/v1/chat/completions", body + R"(,"tool_choice":"required"})");
  const Json& choice = whole["choices"][0];
  CHECK(choice["finish_reason"] == "tool_calls");
  CHECK(choice["message"]["content"].is_null());
  REQUIRE(choice["message"]["tool_calls"].size() == 1);
  const Json& call = choice["message"]["tool_calls"][0];
  CHECK(call["type"] == "function");
  CHECK(call["id"].get<std::string>().size() == 9);
  CHECK(is_call(call));
  Json streamed{{"function", {{"name", ""}, {"arguments", ""}}}};
  const auto chunks = events(f.streamed("/v1/chat/completions", body + R"(,"tool_choice":"required","stream":true})"));
  for (const Json& chunk : chunks) {
    const Json& delta = chunk["choices"][0]["delta"];
    if (!delta.contains("tool_calls")) continue;
    const Json& piece = delta["tool_calls"][0];
    CHECK(piece["index"] == 0);
    CHECK(piece.contains("id") == piece["function"].contains("name"));
    if (piece["function"].contains("name")) streamed["function"]["name"] = piece["function"]["name"];
    streamed["function"]["arguments"] = streamed["function"]["arguments"].get<std::string>() + piece["function"]["arguments"].get<std::string>();
  }
  CHECK(streamed["function"]["name"] == call["function"]["name"]);
  CHECK(streamed["function"]["arguments"] == call["function"]["arguments"]);
  CHECK(chunks.back()["choices"][0]["finish_reason"] == "tool_calls");
}

TEST_CASE("tools: a named one, several calls, none") {
  Fixture f(2048);
  const std::string body = concat("{", kHello, R"(,"max_tokens":500,)", kTools);
  const Json named = f.ok("/v1/chat/completions", body + R"(,"tool_choice":{"type":"function","function":{"name":"add"}},"n":3})");
  for (const Json& choice : named["choices"])
    for (const Json& call : choice["message"]["tool_calls"]) {
      if (choice["finish_reason"] != "tool_calls") continue;  // cut off
      CHECK(call["function"]["name"] == "add");
      CHECK(is_call(call));
    }
  const Json none = f.ok("/v1/chat/completions", body + R"(,"tool_choice":"none"})");
  CHECK(none["choices"][0]["message"]["content"].is_string());
  CHECK(f.ok("/v1/chat/completions", body + "}")["choices"][0]["message"].contains("content"));
  CHECK(begins(f.refusal("/v1/chat/completions", body + R"(,"tool_choice":{"type":"function","function":{"name":"sub"}}})"), "400 tool_choice:"));
  CHECK(begins(f.refusal("/v1/chat/completions", concat("{", kHello, R"(,"tool_choice":"required"})")), "400 tool_choice:"));
  // Arguments of no schema, and of one that cannot be kept to: any object; those beside it are kept to.
  for (const char* parameters : {"{}", R"({"type":"object","minProperties":2})"}) {
    const std::string free = concat(R"({"type":"function","function":{"name":"f","parameters":)", parameters, "}}");
    const std::string tools = kTools.substr(0, kTools.size() - 1) + "," + free + "]";
    for (const char* which : {R"({"type":"function","function":{"name":"f"}})", R"("required")"}) {
      const Json choice = f.ok("/v1/chat/completions", concat("{", kHello, R"(,"max_tokens":500,"parallel_tool_calls":false,)", tools, R"(,"tool_choice":)", which, "}"))["choices"][0];
      const Json& call = choice["message"]["tool_calls"][0];
      if (choice["finish_reason"] != "tool_calls") continue;  // cut off
      if (call["function"]["name"] != "f") CHECK(is_call(call));
      else CHECK(parse_json(call["function"]["arguments"].get<std::string>(), "arguments").is_object());
    }
  }
  // A schema that does not say that it is one of objects: arguments are an object all the same.
  const std::string untyped = R"(,"max_tokens":400,"parallel_tool_calls":false,"tools":[{"type":"function","function":{"name":"f","parameters":{"title":"F"}}}],"logit_bias":[["{",-100],["}",-100],["n",50],["5",50]])";
  const Json untyped_call = f.ok("/v1/chat/completions", concat("{", kHello, untyped, R"(,"tool_choice":"required"})"))["choices"][0]["message"]["tool_calls"][0];
  CHECK(begins(untyped_call["function"]["arguments"].get<std::string>(), "{"));
  const std::string strict = R"(,"tools":[{"type":"function","function":{"name":"f","strict":true,"parameters":{"type":"object","minProperties":2}}}]})";
  const HttpReply refused = f.post("/v1/chat/completions", concat("{", kHello, R"(,"tool_choice":"required")", strict));
  CHECK(refused.status == 400);
  CHECK(refused.body.find("minProperties") != std::string::npos);
}

TEST_CASE("tools: where the model is told in words, an answer that is calls is one") {
  Fixture f(2048);
  // The form asked for is that of a call, so the model has no choice but the boolean.
  const std::string form = R"({"type":"array","minItems":1,"maxItems":1,"items":{"type":"object","properties":{"name":{"const":"add"},"arguments":{"type":"object","properties":{"a":{"type":"boolean"}},"required":["a"]}},"required":["name","arguments"]}})";
  const std::string start = R"({"model":"tiny","messages":[{"role":"user","content":"x"}],)" + kTools + R"(,"format":)" + form;
  const Json whole = f.ok("/api/chat", start + R"(,"stream":false,"options":{"temperature":0}})");
  REQUIRE(whole["message"].contains("tool_calls"));
  CHECK(whole["message"]["content"] == "");
  const Json& function = whole["message"]["tool_calls"][0]["function"];
  if (function["name"] == "add") CHECK(function["arguments"]["a"].is_boolean());
  Json last;
  Json streamed;
  const std::string lines = f.streamed("/api/chat", start + R"(,"options":{"temperature":0}})");
  for (size_t at = 0, end; at < lines.size(); at = end + 1) {
    end = lines.find('\n', at);
    last = parse_json(lines.substr(at, end - at), "line");
    if (last["message"].contains("tool_calls")) streamed = last["message"]["tool_calls"];
  }
  CHECK(last["done"] == true);
  REQUIRE(streamed.size() == whole["message"]["tool_calls"].size());
  CHECK(streamed[0]["function"] == function);
  const Json openai = f.ok("/v1/chat/completions", concat("{", kHello, ",", kTools, R"(,"response_format":{"type":"json_schema","json_schema":{"schema":)", form, "}}}"));
  CHECK(openai["choices"][0]["finish_reason"] == "tool_calls");
}

TEST_CASE("tools: mistral-v3 opens calls by its token, which the grammar follows") {
  constexpr uint32_t kVocabulary = 330;
  test::TinyVocabulary vocabulary = test::tiny_vocabulary(kVocabulary);
  size_t at = kVocabulary - 7;
  for (const char* name : {"[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"}) {
    vocabulary.tokens[at] = name;
    vocabulary.types[at++] = 3;
  }
  test::GgufBuilder builder = test::tiny_model({.n_vocab = kVocabulary, .type = DType::Q8_0});
  std::erase_if(builder.keys, [](const auto& key) { return key.name == "tokenizer.ggml.tokens" || key.name == "tokenizer.ggml.token_type"; });
  builder.texts("tokenizer.ggml.tokens", vocabulary.tokens).ints("tokenizer.ggml.token_type", vocabulary.types);
  const std::filesystem::path path = std::filesystem::path(DUET_TEST_DIR) / "server_tiny_v3.gguf";
  test::write_bytes(path, builder.build());
  const Engine engine = Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}});
  ServerOptions options = Fixture::options(2048);
  options.chat = ChatTemplate::named("mistral-v3");
  Server server(engine, options);
  const auto ask = [&](const std::string& more) {
    const HttpReply reply = server.handle({.method = "POST", .path = "/v1/chat/completions", .body = concat("{", kHello, R"(,"max_tokens":500,"parallel_tool_calls":false,)", kTools, more, "}"),
                                           .remote = "127.0.0.1", .headers = {{"Host", "localhost:8080"}}, .client_gone = [] { return false; }});
    CAPTURE(reply.body);
    REQUIRE(reply.status == 200);
    return parse_json(reply.body, "reply")["choices"][0];
  };
  // The model itself has no reason to call; a bias gives it one, and the token comes once only.
  const Json called = ask(concat(R"(,"logit_bias":{")", kVocabulary - 1, R"(":1000})"));
  CHECK(called["finish_reason"] == "tool_calls");
  REQUIRE(called["message"]["tool_calls"].size() == 1);
  CHECK(is_call(called["message"]["tool_calls"][0]));
  const Json required = ask(R"(,"tool_choice":"required")");
  CHECK(required["finish_reason"] == "tool_calls");
  CHECK(is_call(required["message"]["tool_calls"][0]));
  // Beside a form of words: calls may stand instead of it.
  const std::string form = R"(,"response_format":{"type":"json_schema","json_schema":{"schema":)" + kSchema + "}}";
  CHECK(fits_schema(ask(form + concat(R"(,"logit_bias":{")", kVocabulary - 1, R"(":-1000})"))["message"]["content"]));
  CHECK(is_call(ask(form + concat(R"(,"logit_bias":{")", kVocabulary - 1, R"(":1000})"))["message"]["tool_calls"][0]));
  // The token's name, spelt by other tokens, is what is said.
  const std::string words = R"([TOOL_CALLS] [{"name": "add", "arguments": {"a": true}}])";
  const Json said = ask(concat(R"(,"logit_bias":{")", kVocabulary - 1, R"(":-1000},"guided_choice":)", Json::array({words}).dump()));
  CHECK(said["message"]["content"] == words);
  CHECK_FALSE(said["message"].contains("tool_calls"));
  std::filesystem::remove(path);
}

TEST_CASE("tools: calls and results of earlier turns are told to any template") {
  Fixture f(2048);
  const std::string messages = R"({"messages":[{"role":"user","content":"add"},{"role":"assistant","content":null,"tool_calls":[{"id":"abcdefghi","type":"function","function":{"name":"add","arguments":"{\"a\": true}"}}]},{"role":"tool","tool_call_id":"abcdefghi","content":"7"}],)" + kTools + "}";
  const std::string prompt = f.ok("/apply-template", messages)["prompt"];
  CHECK(prompt.find("You can call these tools:") != std::string::npos);
  CHECK(prompt.find(R"([{"name": "add", "arguments": {"a": true}}])") != std::string::npos);
  CHECK(prompt.find("Result of add:\n7") != std::string::npos);
  const Json reply = f.ok("/api/chat", R"({"model":"tiny","stream":false,"options":{"num_predict":5},"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"","tool_calls":[{"function":{"name":"add","arguments":{"a":true}}}]},{"role":"tool","tool_name":"add","content":"7"}],)" + kTools + "}");
  CHECK(reply["message"]["role"] == "assistant");
}
