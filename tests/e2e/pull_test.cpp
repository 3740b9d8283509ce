// duet pull, list and rm against a hub of our own, and the names of models in other commands.
#include <doctest/doctest.h>

#include <csignal>
#include <filesystem>

#include "base/json.h"
#include "base/mapped_file.h"
#include "base/sha256.h"
#include "tests/support/http_server.h"
#include "tests/support/process.h"
#include "tests/support/tiny_model.h"

using namespace duet::test;
using duet::Json;

namespace {

namespace fs = std::filesystem;

const std::string& demo() {
  static const std::string bytes = duet::read_file(DUET_TEST_DIR "/demo-q4_k_m.gguf", 64 << 20);
  return bytes;
}

std::string sha_of(const std::string& text) {
  const TempFolder folder;
  write_text(folder / "x", text);
  return duet::sha256_of(folder / "x");
}

// A hub with user/demo-GGUF: the demo model as Q4_K_M, a damaged one as Q8_0.
struct Hub {
  Hub() : server([this](const WebRequest& request) { return answer(request); }) {}

  WebReply answer(const WebRequest& request) {
    const auto entry = [](const std::string& path, const std::string& content) {
      return "{\"type\":\"file\",\"path\":\"" + path + "\",\"size\":134,\"lfs\":{\"oid\":\"" + sha_of(content) + "\",\"size\":" +
             std::to_string(content.size()) + "}}";
    };
    if (request.target == "/api/models/user/demo-GGUF/tree/main?recursive=true")
      return {200, {}, "[" + entry("demo.Q4_K_M.gguf", demo()) + "," + entry("demo.Q8_0.gguf", "no model at all, really") + "]"};
    WebReply reply{404, {}, "nothing"};
    if (request.target == "/user/demo-GGUF/resolve/main/demo.Q4_K_M.gguf" || request.target == "/files/demo.gguf") reply = file_reply(request, demo());
    if (request.target == "/user/demo-GGUF/resolve/main/demo.Q8_0.gguf") reply = file_reply(request, "no model at all, really");
    if (request.target == "/files/portal.gguf") reply = {200, {}, portal ? "<html>Sign in</html>" : demo()};
    reply.bytes_per_s = bytes_per_s;
    return reply;
  }

  ProcessResult duet(std::vector<std::string> arguments, ProcessOptions options = {}) const {
    options.environment = environment;  // the first of a name counts
    options.environment.insert(options.environment.end(), {{"HOME", home.path().string()}, {"XDG_DATA_HOME", (home / "data").string()},
                                                           {"HF_ENDPOINT", server.url()}, {"XDG_CACHE_HOME", (home / "cache").string()}});
    return run_duet(std::move(arguments), options);
  }
  fs::path models() const { return home / "data/duet/models"; }

  TempFolder home;
  std::vector<std::pair<std::string, std::string>> environment = {};
  std::atomic<size_t> bytes_per_s{0};
  std::atomic<bool> portal{true};  // answers for others
  WebServer server;
};

}  // namespace

TEST_CASE("pull: a model comes from the hub, is listed, runs by its name and is removed") {
  const Hub hub;
  const ProcessResult pulled = hub.duet({"pull", "user/demo-GGUF"});
  CAPTURE(pulled.err);
  REQUIRE(pulled.exit_code == 0);
  const fs::path file = hub.models() / "user/demo-GGUF/demo.Q4_K_M.gguf";
  CHECK(pulled.out == file.string() + "\n");
  CHECK(duet::read_file(file, 64 << 20) == demo());
  const ProcessResult listed = hub.duet({"list", "--json"});
  const Json models = duet::parse_json(listed.out, "list");
  REQUIRE(models.size() == 1);
  CHECK(models[0]["name"] == "user/demo-GGUF:Q4_K_M");
  CHECK(models[0]["bytes"] == demo().size());
  CHECK(hub.duet({"list"}).out.find("user/demo-GGUF:Q4_K_M  ") == 0);
  for (const char* name : {"user/demo-GGUF:Q4_K_M", "demo-gguf", "demo.Q4_K_M"}) {
    CAPTURE(name);
    CHECK(hub.duet({"run", name, "-p", "The", "-n", "2", "-t", "1"}).exit_code == 0);
  }
  CHECK(hub.duet({"tokenize", "demo-gguf", "--text", "The"}).exit_code == 0);
  CHECK(hub.duet({"inspect", "demo-gguf"}).exit_code == 0);
  const size_t n = hub.server.n_requests();
  const ProcessResult again = hub.duet({"pull", "user/demo-GGUF:q4_k_m"});
  CHECK(again.out == file.string() + "\n");
  CHECK(again.err.find("here already, of duet") != std::string::npos);
  CHECK(hub.server.n_requests() == n);
  CHECK(hub.duet({"rm", "demo-gguf"}).exit_code == 0);
  CHECK(!fs::exists(hub.models() / "user"));
  CHECK(refusal(hub.duet({"rm", "demo-gguf"}), 3, "no model of that name is here") == "");
  CHECK(refusal(hub.duet({"run", "demo-gguf", "-p", "x"}), 3, "duet list shows those that are") == "");
}

TEST_CASE("pull: refusals name what there is") {
  Hub hub;
  CHECK(refusal(hub.duet({"pull", "user/demo-GGUF:Q2_K"}), 2, "has no Q2_K; choose one: user/demo-GGUF:QUANT with Q4_K_M, Q8_0") == "");
  CHECK(refusal(hub.duet({"pull", "user/none"}), 3, "status 404") == "");
  CHECK(refusal(hub.duet({"pull", "nonsense"}), 2, "is neither USER/REPOSITORY") == "");
  CHECK(refusal(hub.duet({"pull", "user/demo-GGUF", "--offline"}), 3, "nothing is fetched (--offline)") == "");
  hub.environment = {{"HF_HUB_OFFLINE", "1"}};
  CHECK(refusal(hub.duet({"pull", "user/demo-GGUF"}), 3, "nothing is fetched (HF_HUB_OFFLINE)") == "");
  hub.environment = {{"HF_ENDPOINT", "nonsense"}};
  CHECK(refusal(hub.duet({"pull", "user/demo-GGUF"}), 2, "HF_ENDPOINT") == "");
  CHECK(!fs::exists(hub.models()));
}

TEST_CASE("pull: a file that is no model is told") {
  const Hub hub;
  CHECK(refusal(hub.duet({"pull", "user/demo-GGUF:Q8_0"}), 4, "demo.Q8_0.gguf") == "");
}

TEST_CASE("pull: Ctrl-C keeps what has arrived, and the same command goes on") {
  Hub hub;
  hub.bytes_per_s = 4 << 20;
  const ProcessResult stopped = hub.duet({"pull", "user/demo-GGUF"}, {.signal_after_s = 1.0});
  CHECK(refusal(stopped, 130, "the same command goes on where it stopped") == "");
  const fs::path part = hub.models() / "user/demo-GGUF/demo.Q4_K_M.gguf.part";
  CHECK(fs::exists(part));
  const ProcessResult listed = hub.duet({"list"});
  CHECK(listed.out.find("partial ") != std::string::npos);
  CHECK(refusal(hub.duet({"run", "demo-gguf", "-p", "x"}), 3, "no model of that name") == "");
  hub.bytes_per_s = 0;
  const size_t before = hub.server.n_bytes();
  const ProcessResult done = hub.duet({"pull", "user/demo-GGUF"});
  CHECK(done.exit_code == 0);
  CHECK(done.err.find("going on after") != std::string::npos);
  CHECK(hub.server.n_bytes() - before < demo().size());
  CHECK(duet::read_file(hub.models() / "user/demo-GGUF/demo.Q4_K_M.gguf", 64 << 20) == demo());
  CHECK(!fs::exists(part));
}

TEST_CASE("pull: killed, and the same command goes on") {
  Hub hub;
  hub.bytes_per_s = 3 << 20;
  const ProcessResult killed = hub.duet({"pull", "user/demo-GGUF"}, {.signal_after_s = 3.2, .signal = SIGKILL});
  CHECK(killed.exit_code == 128 + SIGKILL);
  hub.bytes_per_s = 0;
  const ProcessResult done = hub.duet({"pull", "user/demo-GGUF"});
  CHECK(done.exit_code == 0);
  CHECK(done.err.find("going on after") != std::string::npos);
  CHECK(duet::read_file(hub.models() / "user/demo-GGUF/demo.Q4_K_M.gguf", 64 << 20) == demo());
}

TEST_CASE("pull: a URL, into a folder of the user's choice") {
  Hub hub;
  hub.environment = {{"DUET_MODELS", (hub.home / "elsewhere/").string()}};
  const ProcessResult pulled = hub.duet({"pull", hub.server.url() + "/files/demo.gguf"});
  CAPTURE(pulled.err);
  CHECK(pulled.exit_code == 0);
  CHECK(hub.duet({"run", "demo", "-p", "The", "-n", "2", "-t", "1"}).exit_code == 0);
  CHECK(hub.duet({"rm", "demo"}).exit_code == 0);
  CHECK(fs::is_empty(hub.home / "elsewhere"));
}

TEST_CASE("pull: a portal's page is refused, and the same command gets the model later") {
  Hub hub;
  const std::vector<std::string> pull{"pull", hub.server.url() + "/files/portal.gguf"};
  CHECK(refusal(hub.duet(pull), 4, "is no GGUF file, it begins with '<html>Sign in</h'") == "");
  CHECK(hub.duet({"list"}).out == "");
  hub.portal = false;
  CHECK(hub.duet(pull).exit_code == 0);
}

TEST_CASE("pull: what Ollama has already is used where it lies") {
  const Hub hub;
  const fs::path ollama = hub.home / ".ollama/models";
  const std::string digest = sha_of(demo());
  fs::create_directories(ollama / "manifests/registry.ollama.ai/library/demo");
  fs::create_directories(ollama / "blobs");
  write_text(ollama / "manifests/registry.ollama.ai/library/demo/latest",
             R"({"layers":[{"mediaType":"application/vnd.ollama.image.model","digest":"sha256:)" + digest + R"("}]})");
  write_text(ollama / "blobs" / ("sha256-" + digest), demo());
  const ProcessResult pulled = hub.duet({"pull", "user/demo-GGUF"});
  CHECK(pulled.exit_code == 0);
  CHECK(pulled.err.find("here already, of ollama: demo:latest") != std::string::npos);
  CHECK(!fs::exists(hub.models()));
  CHECK(hub.duet({"run", "demo", "-p", "The", "-n", "2", "-t", "1"}).exit_code == 0);
  CHECK(refusal(hub.duet({"rm", "demo"}), 2, "belongs to ollama") == "");
}
