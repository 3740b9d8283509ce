// The web page as the server serves it. What it does in a browser: tests/page/page_test.py.
#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>
#include <regex>

#include "base/json.h"
#include "tests/support/process.h"
#include "tests/support/server_process.h"
#include "tests/support/tiny_model.h"

using namespace duet::test;
using duet::Json;

namespace {

const std::string kModel = DUET_TEST_DIR "/demo-q4_k_m.gguf";
const std::string kHtml = "Accept: text/html,application/xhtml+xml\r\n";

std::vector<std::string> arguments(std::vector<std::string> extra = {}) {
  std::vector<std::string> out{kModel, "--template", "chatml", "--ctx", "512", "--threads", "2"};
  out.insert(out.end(), extra.begin(), extra.end());
  return out;
}

bool has(const std::string& text, const std::string& words) { return text.find(words) != std::string::npos; }

Json json_of(int port, const std::string& path) { return duet::parse_json(body_of(http(port, "GET", path)), "reply"); }

}  // namespace

TEST_CASE("page: browsers get it at /, Ollama's clients what they expect") {
  ServerProcess server(arguments());
  const int port = server.port();
  const std::string page = http(port, "GET", "/", "", kHtml);
  CHECK(status_of(page) == 200);
  CHECK(has(page, "Content-Type: text/html; charset=utf-8\r\n"));
  CHECK(has(page, "Content-Security-Policy: default-src 'none'; script-src 'self';"));
  CHECK(has(page, "frame-ancestors 'none'\r\n"));
  CHECK(has(page, "X-Content-Type-Options: nosniff\r\n"));
  CHECK(has(page, "Vary: Accept\r\n"));
  CHECK(body_of(page).starts_with("<!doctype html>"));
  for (const char* accept : {"", "Accept: */*\r\n", "Accept: application/json\r\n"}) CHECK(body_of(http(port, "GET", "/", "", accept)) == "Ollama is running");
  CHECK(status_of(http(port, "HEAD", "/")) == 200);
}

TEST_CASE("page: all that it loads comes from here, and is there") {
  ServerProcess server(arguments());
  const int port = server.port();
  std::vector<std::string> paths{"/"};
  const std::regex kLoads("(?:src|href|from)[= ]?[\"'](?:\\./)?([\\w./:-]+)[\"']");
  for (size_t i = 0; i < paths.size(); ++i) {
    CAPTURE(paths[i]);
    const std::string reply = http(port, "GET", paths[i], "", kHtml), text = body_of(reply);
    CHECK(status_of(reply) == 200);
    CHECK(has(reply, "Content-Security-Policy: "));
    CHECK(!has(text, "innerHTML"));
    CHECK(!has(text, "insertAdjacentHTML"));
    CHECK(!has(text, "document.write"));
    CHECK(!has(text, "@import"));
    CHECK(!has(text, "url("));
    for (std::sregex_iterator found(text.begin(), text.end(), kLoads), end; found != end; ++found) {
      std::string path = (*found)[1].str();
      CAPTURE(path);
      CHECK(!has(path, "//"));
      if (!path.starts_with("page/")) path = "page/" + path;
      if (std::find(paths.begin(), paths.end(), "/" + path) == paths.end()) paths.push_back("/" + path);
    }
  }
  CHECK(paths.size() >= 9);
  CHECK(has(http(port, "GET", "/page/app.js"), "Content-Type: text/javascript; charset=utf-8\r\n"));
  CHECK(has(http(port, "GET", "/page/style.css"), "Content-Type: text/css; charset=utf-8\r\n"));
  CHECK(has(http(port, "GET", "/page/icon.svg"), "Content-Type: image/svg+xml\r\n"));
  CHECK(status_of(http(port, "GET", "/page/nothing.js")) == 404);
  CHECK(status_of(http(port, "GET", "/page/../server.cpp")) == 404);
}

TEST_CASE("page: what is embedded are the files of the source, and browsers need not load them again") {
  ServerProcess server(arguments());
  for (const auto& entry : std::filesystem::directory_iterator(DUET_SOURCE_DIR "/server/page")) {
    const std::string name = entry.path().filename().string(), path = name == "index.html" ? "/" : "/page/" + name;
    CAPTURE(path);
    const std::string reply = http(server.port(), "GET", path, "", kHtml);
    std::ifstream file(entry.path());
    CHECK(body_of(reply) == std::string(std::istreambuf_iterator<char>(file), {}));
    const size_t at = reply.find("ETag: ");
    REQUIRE(at != std::string::npos);
    const std::string etag = reply.substr(at + 6, reply.find("\r\n", at) - at - 6);
    CHECK(status_of(http(server.port(), "GET", path, "", kHtml + "If-None-Match: " + etag + "\r\n")) == 304);
  }
}

TEST_CASE("page: it needs no key, what it asks for does") {
  ServerProcess server(arguments({"--api-key", "secret"}));
  const int port = server.port();
  CHECK(status_of(http(port, "GET", "/", "", kHtml)) == 200);
  CHECK(status_of(http(port, "GET", "/page/app.js")) == 200);
  for (const char* path : {"/router", "/props", "/v1/models", "/metrics", "/page"}) CHECK(status_of(http(port, "GET", path)) == 401);
  CHECK(status_of(http(port, "POST", "/", "{}")) == 401);
  CHECK(status_of(http(port, "GET", "/router", "", "Authorization: Bearer secret\r\n")) == 200);
  const std::string evil = "GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n" + kHtml + "\r\n";
  ServerProcess open(arguments());
  Socket socket(open.port());
  socket.send(evil);
  CHECK(status_of(socket.receive()) == 403);
}

TEST_CASE("page: the picture of the router shows the last tokens, and memory where experts stream") {
  for (const bool streamed : {false, true}) {
    ServerProcess server(arguments(streamed ? std::vector<std::string>{"--slots", "3"} : std::vector<std::string>{}));
    const int port = server.port();
    const Json before = json_of(port, "/router");
    REQUIRE(before["experts"] == 8);
    CHECK(before["tokens"] == 0);
    CHECK(before["streamed"] == streamed);
    const std::string body = R"({"prompt":"The package manager","temperature":0,"ignore_eos":true,"max_tokens":20})";
    CHECK(status_of(http(port, "POST", "/v1/completions", body)) == 200);
    const Json after = json_of(port, "/router");
    CHECK(after["tokens"].get<int>() >= 20);
    for (size_t layer = 0; layer < after["layers"].get<size_t>(); ++layer) {
      int uses = 0;
      for (const Json& n : after["uses"][layer]) uses += n.get<int>();
      const int most = 2 * std::min(32, after["tokens"].get<int>());
      CHECK((layer + 1 < after["layers"].get<size_t>() ? uses == most : uses > 0 && uses < most));  // the prompt ends before the last layer's experts, but for its last token
      CHECK(after["last"][layer].size() == 2);
      if (!streamed) continue;
      CHECK(after["resident"][layer].size() == 3);
      for (const Json& expert : after["last"][layer]) CHECK(std::find(after["resident"][layer].begin(), after["resident"][layer].end(), expert) != after["resident"][layer].end());
      for (const Json& expert : after["read"][layer]) CHECK(std::find(after["last"][layer].begin(), after["last"][layer].end(), expert) != after["last"][layer].end());
    }
    const Json chat = duet::parse_json(body_of(http(port, "POST", "/v1/chat/completions", R"({"messages":[{"role":"user","content":"Hello"}],"max_tokens":4})")), "chat");
    CHECK(chat["timings"]["predicted_n"].get<int>() >= 1);
    CHECK(chat["timings"].contains("expert_hit_rate") == streamed);
  }
}
