// The configuration file: flag > environment > file > default.
#include <doctest/doctest.h>

#include "base/json.h"
#include "tests/support/process.h"
#include "tests/support/server_process.h"
#include "tests/support/tiny_model.h"

using namespace duet::test;
using duet::Json;

namespace {

const std::string kModel = DUET_TEST_DIR "/demo-q4_k_m.gguf", kFolder = DUET_SOURCE_DIR "/models/demo";

struct Config {
  explicit Config(const std::string& text) { write_text(folder / "config.toml", text); }
  std::string path() const { return (folder / "config.toml").string(); }
  TempFolder folder;
};

ProcessResult run(const std::vector<std::string>& extra, const ProcessOptions& options = {}) {
  std::vector<std::string> arguments{"run", kModel, "-p", "The", "--raw", "--json", "--temp", "0"};
  arguments.insert(arguments.end(), extra.begin(), extra.end());
  return run_duet(arguments, options);
}

size_t n_ids(const ProcessResult& result) {
  CAPTURE(result.err);
  REQUIRE(result.exit_code == 0);
  return duet::parse_json(result.out, "stdout")["ids"].size();
}

}  // namespace

TEST_CASE("config: a flag beats the environment, which beats the file, which beats the default") {
  const Config config("[run]\nn-predict = 3\n");
  CHECK(n_ids(run({"--config", config.path()})) == 3);
  CHECK(n_ids(run({"--config", config.path()}, {.environment = {{"DUET_N_PREDICT", "2"}}})) == 2);
  CHECK(n_ids(run({"--config", config.path(), "-n", "1"}, {.environment = {{"DUET_N_PREDICT", "2"}}})) == 1);
  CHECK(n_ids(run({"-n", "1", "--config", config.path()})) == 1);
  CHECK(n_ids(run({}, {.environment = {{"DUET_CONFIG", config.path()}}})) == 3);
}

TEST_CASE("config: the file in the user's folder is found, a command's section beats the general lines") {
  const TempFolder folder;
  std::filesystem::create_directories(folder / "duet");
  write_text(folder / "duet/config.toml", "threads = 1\nn-predict = 9\n[run]\nn-predict = 2\n[chat]\nn-predict = 5\n");
  const ProcessResult result = run({}, {.environment = {{"XDG_CONFIG_HOME", folder.path().string()}}});
  CHECK(n_ids(result) == 2);
  CHECK(result.err.find(" 1 thread |") != std::string::npos);
  CHECK(n_ids(run({"-n", "1"}, {.environment = {{"XDG_CONFIG_HOME", (folder / "nothing").string()}}})) == 1);
  CHECK(n_ids(run({"-n", "1", "--config", "/dev/null"}, {.environment = {{"XDG_CONFIG_HOME", folder.path().string()}}})) == 1);
}

TEST_CASE("config: what is unknown or does not fit is refused with its line") {
  const auto refused = [](const std::string& text, const std::string& words) {
    const Config config(text);
    return refusal(run({"-n", "1", "--config", config.path()}), 2, words);
  };
  CHECK(refused("thread = 1\n", "config.toml:1: no command has flag --thread") == "");
  CHECK(refused("\n[run]\nport = 1\n", "config.toml:3: duet run has no flag --port") == "");
  CHECK(refused("[serve]\nprt = 1\n", "config.toml:2: duet serve has no flag --prt") == "");
  CHECK(refused("[server]\nport = 1\n", "config.toml:2: there is no command 'server'") == "");
  CHECK(refused("[run]\nthreads = \"many\"\n", "config.toml:2: ") == "");
  CHECK(refused("[run]\nthreads = [1, 2]\n", "config.toml:2: ") == "");
  CHECK(refused("kv-type = \"f8\"\n", "config.toml:1: ") == "");
  CHECK(refused("[run]\nconfig = \"other\"\n", "config.toml:2: ") == "");
  CHECK(refused("kv-type = f16\n", "config.toml:1: f16 needs quotes") == "");
  CHECK(refusal(run({"--config", "/nowhere/config.toml"}), 3, "/nowhere/config.toml") == "");
  const Config other("[serve]\nport = \"none of run's business\"\n");
  CHECK(n_ids(run({"-n", "1", "--config", other.path()})) == 1);
}

TEST_CASE("config: flags that are repeated and flags without values, for a server") {
  const Config config("[serve]\napi-key = [\"one\", \"two words\"]\nno-api-key = false\nthreads = 2\nctx = 128\nparallel = 3\n");
  ServerProcess server({kModel, "--config", config.path()});
  const auto status = [&](const std::string& key) { return status_of(http(server.port(), "GET", "/slots", "", "Authorization: Bearer " + key + "\r\n")); };
  CHECK(status("one") == 200);
  CHECK(status("two words") == 200);
  CHECK(status("three") == 401);
  CHECK(duet::parse_json(body_of(http(server.port(), "GET", "/slots", "", "x-api-key: one\r\n")), "slots").size() == 3);
}

TEST_CASE("config: settings that a command does not need are ignored, flags that lack another are refused") {
  const Config config("ram = \"4GiB\"\njson = true\n[convert]\ncalibrate-tokens = 9\n");
  const auto ok = [](std::vector<std::string> arguments, const Environment& settings) {
    const ProcessResult result = run_duet(std::move(arguments), {.environment = settings});
    CAPTURE(result.err);
    CHECK(result.exit_code == 0);
    return result.out;
  };
  const std::string out = (config.folder / "x.gguf").string();
  const Environment settings{{"DUET_RAM", "4GiB"}, {"DUET_CALIBRATE_TOKENS", "9"}, {"DUET_JSON", "1"}};
  CHECK(ok({"convert", kFolder, "--vocab-only", "-o", out}, settings) == "");
  CHECK(ok({"convert", kFolder, "--vocab-only", "--force", "-o", out, "--config", config.path()}, {}) == "");
  for (const std::string& model : {kModel, kFolder}) {
    const Environment other{{"DUET_TYPE", "Q8_0"}, {model == kFolder ? "DUET_LORA" : "DUET_FILE", "nowhere"}};
    CHECK(ok({"plan", model, "--path", kModel}, other).find("expected: decode ") != std::string::npos);
  }
  const auto refused = [](std::vector<std::string> arguments, const std::string& words) { return refusal(run_duet(std::move(arguments)), 2, words); };
  CHECK(refused({"convert", kFolder, "-o", "x.gguf", "--ram", "4GiB"}, "--ram belongs to --calibrate") == "");
  CHECK(refused({"quantize", kModel, "x.gguf", "Q8_0", "--calibrate-tokens", "9"}, "--calibrate-tokens belongs to --calibrate") == "");
  CHECK(refused({"convert", kFolder, "-o", "x.gguf", "--json"}, "--json belongs to --dry-run") == "");
  CHECK(refused({"plan", kFolder, "--lora", "x"}, "--lora") == "");
  // What is needed may be a setting.
  CHECK(ok({"convert", kFolder, "--json"}, {{"DUET_DRY_RUN", "1"}}).starts_with("{"));
}

TEST_CASE("config: what excludes a setting and counts more drops it") {
  const auto types = [](std::vector<std::string> extra, const Environment& settings) {
    extra.insert(extra.begin(), {"convert", kFolder, "--dry-run", "--json"});
    const ProcessResult result = run_duet(extra, {.environment = settings});
    CAPTURE(result.err);
    REQUIRE(result.exit_code == 0);
    return duet::parse_json(result.out, "stdout")["recipe"].get<std::string>();
  };
  const Config config("[convert]\ntype = \"Q8_0\"\n");
  CHECK(types({"-q", "Q8_0"}, {{"DUET_TARGET_SIZE", "12MB"}}) == "Q8_0");
  CHECK(types({"--config", config.path()}, {}) == "Q8_0");
  CHECK(types({"--config", config.path()}, {{"DUET_TARGET_SIZE", "12MB"}}) != "Q8_0");
  CHECK(types({"--config", config.path(), "--target-bpw", "4"}, {{"DUET_TARGET_SIZE", "12MB"}}) == types({"--target-bpw", "4"}, {}));
  CHECK(types({"--target-bpw", "4"}, {{"DUET_SPLIT_MAX_SIZE", "5M"}, {"DUET_VOCAB_ONLY", "1"}}) == types({"--target-bpw", "4"}, {}));
  const ProcessResult ids = run_duet({"tokenize", kModel, "--text", "The"}, {.environment = {{"DUET_FILE", "nowhere.txt"}}});
  CHECK(ids.exit_code == 0);
}
