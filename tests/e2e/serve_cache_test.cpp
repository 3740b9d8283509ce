// duet serve --cache-dir: what has been evaluated of a prompt outlives the server.
#include <doctest/doctest.h>

#include <sys/stat.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <thread>

#include "base/error.h"
#include "base/json.h"
#include "tests/support/process.h"
#include "tests/support/server_process.h"

using namespace duet::test;
using duet::Json;

namespace {

namespace fs = std::filesystem;

const std::string kModel = DUET_TEST_DIR "/demo-q4_k_m.gguf";

struct Folder {
  explicit Folder(const char* name) : path(fs::path(DUET_TEST_DIR) / name) { fs::remove_all(path); }
  ~Folder() { fs::remove_all(path); }
  std::vector<fs::path> files() const {
    std::vector<fs::path> out;
    if (fs::exists(path))
      for (const auto& entry : fs::directory_iterator(path)) out.push_back(entry.path());
    return out;
  }
  fs::path path;
};

std::vector<std::string> arguments(const std::vector<std::string>& extra) {
  std::vector<std::string> out{kModel, "--template", "chatml", "--ctx", "1024", "--threads", "2"};
  out.insert(out.end(), extra.begin(), extra.end());
  return out;
}

std::string prompt(size_t n_words) {
  std::string out = "A list of what the package manager checks:";
  for (size_t i = 0; i < n_words; ++i) out += duet::concat(" item ", i);
  return out;
}

struct Answer {
  std::string text;
  size_t n_cached = 0, n_prompt = 0;
};

Answer ask(int port, const std::string& text) {
  const Json body{{"prompt", text}, {"temperature", 0}, {"ignore_eos", true}, {"max_tokens", 24}};
  const std::string reply = http(port, "POST", "/v1/completions", body.dump());
  REQUIRE(status_of(reply) == 200);
  const Json json = duet::parse_json(body_of(reply), "reply");
  return {json["choices"][0]["text"].get<std::string>(), json["usage"]["prompt_tokens_details"]["cached_tokens"].get<size_t>(), json["usage"]["prompt_tokens"].get<size_t>()};
}

void stop(ServerProcess& server) {
  server.signal(SIGTERM);
  CHECK(server.wait() == 0);
}

}  // namespace

TEST_CASE("serve: with --cache-dir a prompt's beginning outlives the server, and the text is the same") {
  Folder folder("serve-cache");
  const std::string first = prompt(60), second = first + " and at last";
  Answer plain_first, plain_second;
  {
    ServerProcess server(arguments({}));
    plain_first = ask(server.port(), first);
    plain_second = ask(server.port(), second);
    stop(server);
  }
  for (const std::string kv_type : {"f16", "q8_0"}) {
    CAPTURE(kv_type);
    const std::vector<std::string> options{"--cache-dir", folder.path.string(), "--kv-type", kv_type};
    Answer before;
    {
      ServerProcess server(arguments(options));
      before = ask(server.port(), first);
      CHECK(before.n_cached == 0);
      stop(server);
    }
    ServerProcess server(arguments(options));
    const Answer again = ask(server.port(), first), longer = ask(server.port(), second);
    CHECK(again.n_cached == again.n_prompt - 1);
    CHECK(again.text == before.text);
    CHECK(longer.n_cached >= before.n_prompt - 1);
    if (kv_type == "f16") {
      CHECK(again.text == plain_first.text);
      CHECK(longer.text == plain_second.text);
    }
    stop(server);
  }
  CHECK(!folder.files().empty());
}

TEST_CASE("serve: --cache-dir keeps what was evaluated when the server is killed") {
  Folder folder("serve-cache-kill");
  const std::vector<std::string> options{"--cache-dir", folder.path.string()};
  const std::string text = prompt(60);
  Answer before;
  {
    ServerProcess server(arguments(options));
    before = ask(server.port(), text);
    for (int i = 0; i < 100 && folder.files().size() < (before.n_prompt + 24) / 256 + 1; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(50));
    server.signal(SIGKILL);
    server.wait();
  }
  ServerProcess server(arguments(options));
  const Answer again = ask(server.port(), text);
  CHECK(again.n_cached == again.n_prompt - 1);
  CHECK(again.text == before.text);
}

TEST_CASE("serve: files of --cache-dir that are damaged cost time, not answers") {
  Folder folder("serve-cache-damage");
  const std::vector<std::string> options{"--cache-dir", folder.path.string()};
  const std::string text = prompt(60);
  Answer before;
  {
    ServerProcess server(arguments(options));
    before = ask(server.port(), text);
    stop(server);
  }
  for (const fs::path& file : folder.files()) {
    std::fstream out(file, std::ios::in | std::ios::out | std::ios::binary);
    out.seekp(static_cast<std::streamoff>(fs::file_size(file) / 2));
    out.write("\xff\xff\xff\xff\xff\xff\xff\xff", 8);
  }
  ServerProcess server(arguments(options));
  const Answer again = ask(server.port(), text);
  CHECK(again.n_cached == 0);
  CHECK(again.text == before.text);
  stop(server);
}

TEST_CASE("serve: a --cache-dir that others may write to is refused") {
  Folder folder("serve-cache-open");
  fs::create_directories(folder.path);
  fs::permissions(folder.path, fs::perms::all);
  std::vector<std::string> command = arguments({"--cache-dir", folder.path.string(), "--port", "0"});
  command.insert(command.begin(), "serve");
  CHECK(refusal(run_duet(command), 3, "others may write") == "");
}
