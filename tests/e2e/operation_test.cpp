// Access log, request ids, metrics, TLS.
#include <doctest/doctest.h>

#include <csignal>
#include <fstream>
#include <sstream>

#include "base/json.h"
#include "tests/support/process.h"
#include "tests/support/server_process.h"
#include "tests/support/skip.h"
#include "tests/support/tiny_model.h"

using namespace duet::test;
using duet::Json;

namespace {

const std::string kModel = DUET_TEST_DIR "/demo-q4_k_m.gguf";

std::vector<std::string> arguments(const std::vector<std::string>& extra) {
  std::vector<std::string> out{kModel, "--template", "chatml", "--ctx", "512", "--threads", "2"};
  out.insert(out.end(), extra.begin(), extra.end());
  return out;
}

std::vector<Json> lines_of(const std::filesystem::path& path) {
  std::vector<Json> out;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) out.push_back(duet::parse_json(line, "log"));
  return out;
}

bool has_openssl() { return run_process({"/bin/sh", "-c", "command -v openssl"}).exit_code == 0; }

// A key and a certificate of its own for localhost.
void make_certificate(const TempFolder& folder, const std::string& name) {
  const std::string at = (folder / name).string();
  REQUIRE(run_process({"/usr/bin/env", "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                       "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", at + ".key", "-out", at + ".pem"}).exit_code == 0);
}

ProcessResult ask_securely(int port, const std::string& certificate, const std::string& request, const std::vector<std::string>& extra = {}) {
  std::vector<std::string> command{"/usr/bin/env", "openssl", "s_client", "-quiet", "-connect", "127.0.0.1:" + std::to_string(port), "-CAfile", certificate, "-verify_return_error", "-servername", "localhost"};
  command.insert(command.end(), extra.begin(), extra.end());
  return run_process(command, {.input = request, .timeout_s = 60});
}

}  // namespace

TEST_CASE("access log: a line of JSON for each request, with what was generated") {
  const TempFolder folder;
  const std::string log = (folder / "access.log").string();
  {
    ServerProcess server(arguments({"--access-log", log, "--api-key", "secret"}));
    const int port = server.port();
    const std::string key = "Authorization: Bearer secret\r\n";
    CHECK(status_of(http(port, "GET", "/v1/models")) == 401);
    const std::string reply = http(port, "POST", "/v1/completions", R"({"prompt":"The","max_tokens":3,"ignore_eos":true})", key);
    CHECK(status_of(reply) == 200);
    CHECK(reply.find("x-request-id: req_") != std::string::npos);
    CHECK(http(port, "POST", "/v1/completions", R"({"prompt":"The","max_tokens":4,"n":2,"ignore_eos":true,"stream":true})", key + "X-Request-Id: mine-1\r\n").find("x-request-id: mine-1\r\n") != std::string::npos);
    CHECK(http(port, "GET", "/health", "", "X-Request-Id: \"bad\" id\r\n").find("x-request-id: req_") != std::string::npos);
    {
      Socket socket(port);
      socket.send(http_request("POST", "/v1/completions", R"({"prompt":"The","max_tokens":400,"ignore_eos":true,"stream":true})", key));
      socket.receive("data: {");
    }
    server.signal(SIGTERM);
    CHECK(server.wait() == 0);
  }
  const auto lines = lines_of(log);
  REQUIRE(lines.size() == 5);
  CHECK(lines[0]["status"] == 401);
  CHECK(lines[0]["path"] == "/v1/models");
  CHECK(lines[0]["remote"] == "127.0.0.1");
  CHECK(!lines[0].contains("generated_tokens"));
  CHECK(lines[1]["method"] == "POST");
  CHECK(lines[1]["generated_tokens"] == 3);
  CHECK(lines[1]["prompt_tokens"].get<int>() >= 1);
  CHECK(lines[1]["stream"] == false);
  CHECK(lines[1]["seconds"].get<double>() > 0);
  CHECK(lines[2]["id"] == "mine-1");
  CHECK(lines[2]["stream"] == true);
  CHECK(lines[2]["choices"] == 2);
  CHECK(lines[2]["generated_tokens"] == 8);
  CHECK(lines[2]["complete"] == true);
  CHECK(lines[3]["path"] == "/health");
  CHECK(lines[4]["complete"] == false);
  for (const Json& line : lines) {
    const std::string time = line["time"].get<std::string>();
    CHECK(time.size() == 24);
    CHECK(time.ends_with("Z"));
    CHECK(to_string(line).find("secret") == std::string::npos);
  }
}

TEST_CASE("metrics: names that dashboards know, histograms of times") {
  ServerProcess server(arguments({}));
  CHECK(status_of(http(server.port(), "POST", "/v1/completions", R"({"prompt":"The","max_tokens":5,"ignore_eos":true})")) == 200);
  const std::string text = body_of(http(server.port(), "GET", "/metrics"));
  for (const char* line : {"duet_requests_total 1\n", "duet_generated_tokens_total 5\n", "duet_time_to_first_token_seconds_count 1\n", "duet_time_between_tokens_seconds_count 4\n",
                           "duet_time_to_first_token_seconds_bucket{le=\"+Inf\"} 1\n", "llamacpp:tokens_predicted_total 5\n", "llamacpp:n_decode_total ", "llamacpp:predicted_tokens_seconds ",
                           "duet_major_page_faults_total "})
    CHECK_MESSAGE(text.find(line) != std::string::npos, line);
}

TEST_CASE("serve refuses a log it cannot write and certificates that are none") {
  const TempFolder folder;
  CHECK(refusal(run_duet({"serve", kModel, "--access-log", "/nowhere/log"}), 3, "/nowhere/log: cannot be written") == "");
  CHECK(refusal(run_duet({"serve", kModel, "--tls-cert", "x.pem"}), 2, "--tls-key") == "");
  CHECK(refusal(run_duet({"serve", kModel, "--cache-size", "1GiB"}), 2, "--cache-dir") == "");
  CHECK(refusal(run_duet({"serve", kModel, "--tls-cert", "/nowhere.pem", "--tls-key", "/nowhere.key"}), 3, "/nowhere.pem: cannot open") == "");
  write_text(folder / "no.pem", "hello\n");
  CHECK(refusal(run_duet({"serve", kModel, "--tls-cert", (folder / "no.pem").string(), "--tls-key", (folder / "no.pem").string()}), 4, "no certificate in PEM form") == "");
}

TEST_CASE("serve speaks HTTPS") {
  if (!has_openssl()) DUET_SKIP("no openssl program to make a certificate with");
  const TempFolder folder;
  make_certificate(folder, "one");
  make_certificate(folder, "other");
  const std::string certificate = (folder / "one.pem").string(), key = (folder / "one.key").string();
  CHECK(refusal(run_duet({"serve", kModel, "--tls-cert", certificate, "--tls-key", (folder / "other.key").string()}), 4, "is not the key of the certificate") == "");
  CHECK(refusal(run_duet({"serve", kModel, "--tls-cert", certificate, "--tls-key", certificate}), 4, "is no private key") == "");
  ServerProcess server(arguments({"--tls-cert", certificate, "--tls-key", key}));
  const std::string body = R"({"prompt":"The package manager","temperature":0,"max_tokens":12,"stream":true})";
  const ProcessResult stream = ask_securely(server.port(), certificate, http_request("POST", "/v1/completions", body));
  CAPTURE(stream.err);
  CHECK(status_of(stream.out) == 200);
  CHECK(body_of(stream.out).ends_with("data: [DONE]\n\n"));
  // A body that takes many records, in and out.
  const std::string text(200000, 'a');
  const ProcessResult large = ask_securely(server.port(), certificate, http_request("POST", "/tokenize", "{\"content\":\"" + text + "\",\"with_pieces\":true}"));
  CHECK(status_of(large.out) == 200);
  CHECK(duet::parse_json(body_of(large.out), "reply")["count"].get<size_t>() > 1000);
  CHECK(ask_securely(server.port(), certificate, "", {"-tls1_1"}).exit_code != 0);
  const std::string plain = http(server.port(), "GET", "/health");
  CHECK(status_of(plain) == 400);
  CHECK(plain.find("https://") != std::string::npos);
  Socket silent(server.port());  // says nothing, stalls nobody
  CHECK(status_of(ask_securely(server.port(), certificate, http_request("GET", "/health", "")).out) == 200);
  server.signal(SIGTERM);
  CHECK(server.wait() == 0);
}
