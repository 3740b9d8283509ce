// duet serve on the demo model, over real sockets.
#include <doctest/doctest.h>

#include <chrono>
#include <csignal>
#include <fstream>
#include <thread>

#include "base/error.h"
#include "base/json.h"
#include "tests/support/process.h"
#include "tests/support/server_process.h"

using namespace duet::test;
using duet::Json;

namespace {

const std::string kModel = DUET_TEST_DIR "/demo-q4_k_m.gguf";

std::vector<std::string> arguments(std::vector<std::string> extra = {}) {
  std::vector<std::string> out{kModel, "--template", "chatml", "--ctx", "512", "--threads", "2"};
  out.insert(out.end(), extra.begin(), extra.end());
  return out;
}

std::string prompt_body(int i, bool stream, int n) {
  return duet::concat(R"({"prompt":"Client )", i, R"( asks for the package manager","temperature":0,"ignore_eos":true,"max_tokens":)", n, stream ? R"(,"stream":true})" : "}");
}

std::string streamed_text(const std::string& body) {
  std::string text;
  for (size_t at = 0, end; at < body.size(); at = end + 2) {
    end = body.find("\n\n", at);
    if (end == std::string::npos) break;
    const std::string line = body.substr(at, end - at);
    if (line.starts_with("data: {")) text += duet::parse_json(line.substr(6), "event")["choices"][0]["text"].get<std::string>();
  }
  return text;
}

size_t running(int port) {
  size_t n = 0;
  for (const Json& slot : duet::parse_json(body_of(http(port, "GET", "/slots")), "slots")) n += slot["is_processing"].get<bool>();
  return n;
}

bool becomes_idle(int port) {
  for (int i = 0; i < 100; ++i) {
    if (running(port) == 0) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  return false;
}

}  // namespace

TEST_CASE("serve: sixteen streams at once are those of each alone") {
  ServerProcess server(arguments());
  constexpr int kClients = 16;
  std::vector<std::string> texts(kClients);
  std::vector<std::thread> clients;
  for (int i = 0; i < kClients; ++i)
    clients.emplace_back([&, i] { texts[static_cast<size_t>(i)] = streamed_text(body_of(http(server.port(), "POST", "/v1/completions", prompt_body(i, true, 40)))); });
  for (std::thread& client : clients) client.join();
  for (int i = 0; i < kClients; ++i) {
    const std::string reply = http(server.port(), "POST", "/v1/completions", prompt_body(i, false, 40));
    REQUIRE(status_of(reply) == 200);
    CHECK(duet::parse_json(body_of(reply), "reply")["choices"][0]["text"] == texts[static_cast<size_t>(i)]);
  }
  server.signal(SIGTERM);
  CHECK(server.wait() == 0);
}

TEST_CASE("serve: the text is that of duet run") {
  ServerProcess server(arguments());
  for (const char* text : {"The package manager", "<s>The</s>package manager"}) {  // the second: 2 control tokens
    const std::string prompt = text;
    const Json run = duet::parse_json(run_duet({"run", kModel, "-p", prompt, "-n", "16", "--temp", "0", "--raw", "--json"}).out, "run");
    const Json reply = duet::parse_json(body_of(http(server.port(), "POST", "/v1/completions", R"({"max_tokens":16,"temperature":0,"prompt":")" + prompt + "\"}")), "reply");
    CHECK(reply["choices"][0]["text"] == run["text"]);
    CHECK(reply["usage"]["prompt_tokens"] == run["prompt_tokens"]);
    CHECK(run["prompt_tokens"].get<int>() < 8);
  }
}

TEST_CASE("serve: texts of a form are those of duet run, and tools are called") {
  ServerProcess server(arguments());
  const std::string schema = R"({"type":"object","properties":{"name":{"type":"string","maxLength":8},"age":{"type":"integer","minimum":1,"maximum":99}},"required":["name","age"]})";
  const std::string path = DUET_TEST_DIR "/serve_schema.json";
  std::ofstream(path) << schema;
  const std::vector<std::string> run{"run", kModel, "-p", "A person:", "-n", "100", "--temp", "0", "--raw", "--json", "--json-schema", path};
  const Json alone = duet::parse_json(run_duet(run).out, "run");
  const Json person = duet::parse_json(alone["text"].get<std::string>(), "text");
  CHECK(person["age"].get<int>() <= 99);
  CHECK(alone["stop"] == "eos");
  std::vector<std::string> speculating = run;
  speculating.insert(speculating.end(), {"--speculate", "4"});
  CHECK(duet::parse_json(run_duet(speculating).out, "run")["text"] == alone["text"]);
  const Json reply = duet::parse_json(body_of(http(server.port(), "POST", "/completion", R"({"prompt":"A person:","n_predict":100,"temperature":0,"json_schema":)" + schema + "}")), "reply");
  CHECK(reply["content"] == alone["text"]);
  const std::string tools = R"({"messages":[{"role":"user","content":"x"}],"tool_choice":"required","parallel_tool_calls":false,"max_tokens":200,"tools":[{"type":"function","function":{"name":"save","parameters":)" + schema + "}}]}";
  const Json called = duet::parse_json(body_of(http(server.port(), "POST", "/v1/chat/completions", tools)), "reply");
  CHECK(called["choices"][0]["finish_reason"] == "tool_calls");
  const Json& function = called["choices"][0]["message"]["tool_calls"][0]["function"];
  CHECK(function["name"] == "save");
  CHECK(duet::parse_json(function["arguments"].get<std::string>(), "arguments")["age"].is_number_integer());
}

TEST_CASE("run: a grammar that is damaged is refused before the model is opened") {
  const std::string path = DUET_TEST_DIR "/serve_bad.gbnf";
  std::ofstream(path) << "root ::= \"a\"\nx ::= [z-a]\n";
  CHECK(refusal(run_duet({"run", "no-such-model.gguf", "-p", "x", "--grammar", path}), 4, "grammar: line 2") == "");
}

TEST_CASE("serve: clients that leave stop costing, streaming or not") {
  ServerProcess server(arguments());
  for (const bool stream : {true, false}) {
    {
      Socket socket(server.port());
      socket.send(http_request("POST", "/v1/completions", prompt_body(1, stream, 400)));
      if (stream) CHECK(socket.receive("data: {").find("200 OK") != std::string::npos);
      else std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    CHECK(becomes_idle(server.port()));
  }
}

TEST_CASE("serve: half requests, slow ones and damaged ones harm nobody") {
  ServerProcess server(arguments());
  std::vector<std::unique_ptr<Socket>> silent;
  for (int i = 0; i < 40; ++i) {
    silent.push_back(std::make_unique<Socket>(server.port()));
    if (i % 2 == 0) silent.back()->send("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{");
    else silent.back()->send("GET /hea");
  }
  const int port = server.port();
  CHECK(status_of(http(port, "POST", "/v1/completions", prompt_body(1, false, 4))) == 200);
  CHECK(status_of(http(port, "POST", "/v1/completions", "{\"prompt\":")) == 400);
  CHECK(status_of(http(port, "POST", "/v1/completions", "{\"prompt\":\"\xff\xfe\"}")) == 400);
  CHECK(status_of(http(port, "POST", "/v1/completions", std::string(1000, '['))) == 400);
  CHECK(status_of(http(port, "POST", "/v1/completions", "{}", "Content-Encoding: gzip\r\n")) == 415);
  CHECK(status_of(http(port, "POST", "/v1/completions", R"({"prompt":"a","model":"gpt-9"})")) == 404);
  CHECK(status_of(http(port, "GET", "/" + std::string(4000, 'a'))) == 414);
  CHECK(status_of(http(port, "GET", "/health", "", "Origin: https://evil.example\r\n")) == 403);
  const auto raw = [&](const std::string& bytes) {
    Socket socket(port);
    socket.send(bytes);
    return socket.receive({}, 20);
  };
  CHECK(status_of(raw("GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")) == 403);
  CHECK(status_of(raw("nonsense\r\n\r\n")) != 200);
  std::string headers = "GET /health HTTP/1.1\r\nHost: localhost\r\n";
  for (int i = 0; i < 3000; ++i) headers += "X-H" + std::to_string(i) + ": " + std::string(60, 'x') + "\r\n";
  CHECK(status_of(raw(headers + "\r\n")) != 200);
  CHECK(status_of(raw("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n")) == 413);
  CHECK(status_of(raw("POST /api/show HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")) == 400);  // at once: it has no body
  // A page's request that is refused unread must not let its body pass as a second request.
  const std::string second = http_request("POST", "/v1/completions", prompt_body(1, false, 4));
  const std::string length = "Content-Length: " + std::to_string(second.size()) + "\r\n\r\n";
  for (const std::string& first : {"POST /" + std::string(9000, 'a') + " HTTP/1.1\r\n", std::string("FOO /health HTTP/1.1\r\n"), std::string("POST /health HTTP/1.1\r\n")}) {
    const std::string replies = raw(first + "Host: localhost\r\nOrigin: https://evil.example\r\n" + length + second);
    CHECK(status_of(replies) >= 400);
    CHECK(replies.find("HTTP/1.1", 1) == std::string::npos);
  }
  const std::string old = raw("POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: " + std::to_string(prompt_body(1, true, 4).size()) + "\r\n\r\n" + prompt_body(1, true, 4));
  CHECK(old.find("[DONE]") != std::string::npos);
  CHECK(old.find("chunked") == std::string::npos);
  CHECK(status_of(http(port, "GET", "/health")) == 200);
}

TEST_CASE("serve: keys, and 503 with Retry-After when the queue is full") {
  ServerProcess server(arguments({"--api-key", "secret", "--parallel", "1", "--queue", "0"}));
  const int port = server.port();
  const std::string key = "Authorization: Bearer secret\r\n";
  CHECK(status_of(http(port, "GET", "/v1/models")) == 401);
  CHECK(status_of(http(port, "GET", "/v1/models", "", "Authorization: Bearer wrong\r\n")) == 401);
  CHECK(status_of(http(port, "GET", "/v1/models", "", key)) == 200);
  CHECK(status_of(http(port, "GET", "/health")) == 200);
  Socket busy(port);
  busy.send(http_request("POST", "/v1/completions", prompt_body(1, true, 400), key));
  busy.receive("data: {");
  const std::string refused = http(port, "POST", "/v1/completions", prompt_body(2, false, 4), key);
  CHECK(status_of(refused) == 503);
  CHECK(refused.find("Retry-After: ") != std::string::npos);
}

TEST_CASE("serve: without a key no body is read") {
  ServerProcess server(arguments({"--api-key", "secret"}));
  Socket socket(server.port());
  socket.send("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30000000\r\n\r\n");  // and nothing of it
  const std::string reply = socket.receive({}, 20);
  CHECK(status_of(reply) == 401);
  CHECK(reply.find("Connection: close") != std::string::npos);
}

TEST_CASE("serve: one request of many sequences does not hold up another") {
  ServerProcess server(arguments({"--parallel", "2", "--queue", "2"}));
  Socket many(server.port());
  many.send(http_request("POST", "/v1/completions", R"({"prompt":"x","temperature":0,"ignore_eos":true,"max_tokens":200,"n":40,"stream":true})"));
  many.receive("data: {");
  CHECK(status_of(http(server.port(), "POST", "/v1/completions", prompt_body(1, false, 4))) == 200);
  CHECK(running(server.port()) == 2);  // of the many
}

TEST_CASE("serve: SIGTERM under load ends streams cleanly") {
  ServerProcess server(arguments({"--grace", "0"}));
  Socket client(server.port());
  client.send(http_request("POST", "/v1/completions", prompt_body(1, true, 450)));
  client.receive("data: {");
  server.signal(SIGTERM);
  const std::string rest = client.receive();
  CHECK((rest.find("\"error\"") != std::string::npos || rest.find("[DONE]") != std::string::npos));
  CHECK(server.wait() == 0);
}

TEST_CASE("serve refuses what is unsafe or impossible") {
  CHECK(refusal(run_duet({"serve", kModel, "--host", "0.0.0.0"}), 2, "--api-key") == "");
  CHECK(refusal(run_duet({"serve", kModel, "--host", "0.0.0.0", "--api-key", ""}), 2, "--api-key is empty") == "");
  CHECK(refusal(run_duet({"serve", kModel, "--host", "192.0.2.1", "--api-key", "k", "--port", "0"}), 3, "cannot listen on 192.0.2.1") == "");
  CHECK(refusal(run_duet({"serve", "/nowhere.gguf"}), 3, "nowhere.gguf") == "");
  const ServerProcess server(arguments());
  CHECK(refusal(run_duet({"serve", kModel, "--template", "chatml", "--port", std::to_string(server.port())}), 3, "cannot listen") == "");
}
