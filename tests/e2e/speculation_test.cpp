// duet run --speculate: the same text sooner, and what it says about it.
#include <doctest/doctest.h>
#include <unistd.h>

#include <filesystem>

#include "base/json.h"
#include "runtime/expert_replay.h"
#include "runtime/expert_trace.h"
#include "tests/support/process.h"

using namespace duet::test;
using duet::Json;

namespace {

const std::string kDemo = DUET_TEST_DIR "/demo-q4_k_m.gguf";
// Repeats itself, and so does the demo model after it.
const std::string kCopies = "The package manager installs the package. The package manager installs";

Json run_json(std::vector<std::string> arguments, const std::string& model = kDemo) {
  arguments.insert(arguments.begin(), {"run", model, "--raw", "--json"});
  const ProcessResult result = run_duet(arguments);
  CAPTURE(result.err);
  REQUIRE(result.exit_code == 0);
  return duet::parse_json(result.out, "stdout");
}

// With every kind of speculation what there is without; gives the proposals accepted.
uint64_t check_same(const std::vector<std::string>& arguments, const std::string& model = kDemo) {
  const Json plain = run_json(arguments, model);
  CHECK_FALSE(plain.contains("speculation"));
  uint64_t accepted = 0;
  for (const char* mode : {"auto", "1", "2", "5", "16"}) {
    CAPTURE(mode);
    std::vector<std::string> with = arguments;
    with.insert(with.end(), {"--speculate", mode});
    const Json json = run_json(with, model);
    for (const char* key : {"ids", "text", "stop", "generated_tokens"}) CHECK(json[key] == plain[key]);
    accepted += json["speculation"]["accepted"].get<uint64_t>();
  }
  return accepted;
}

}  // namespace

TEST_CASE("speculation: run gives the same text, greedy and sampled, resident and streamed") {
  CHECK(check_same({"-p", kCopies, "-n", "120", "--temp", "0", "--ignore-eos"}) > 0);
  CHECK(check_same({"-p", kCopies, "-n", "60", "--temp", "0", "--slots", "2", "--batch", "3"}) > 0);
  for (const char* seed : {"1", "2", "3"})
    CHECK(check_same({"-p", kCopies, "-n", "100", "--temp", "0.5", "--seed", seed, "--repeat-penalty", "1.02", "--slots", "3"}) > 0);
}

TEST_CASE("speculation: run stops where it would, at the end of the answer and of the context") {
  for (const char* seed : {"1", "2", "3", "4"}) check_same({"-p", kCopies, "-n", "-1", "--temp", "0.8", "--seed", seed, "--ctx", "200"});
  for (const char* ctx : {"40", "41", "42", "43", "47"}) {
    check_same({"-p", kCopies, "-n", "-1", "--temp", "0", "--ignore-eos", "--ctx", ctx});
    check_same({"-p", kCopies, "-n", ctx, "--temp", "0", "--ignore-eos"});
  }
}

TEST_CASE("speculation: float weights propose few tokens, say so, and keep the text") {
  const std::string model = DUET_TEST_DIR "/demo-bf16.gguf";
  CHECK(check_same({"-p", kCopies, "-n", "80", "--temp", "0", "--ignore-eos"}, model) > 0);
  const ProcessResult result = run_duet({"run", model, "-p", kCopies, "-n", "4", "--temp", "0", "--speculate", "auto"});
  CHECK(result.err.find("note: at most 2 tokens are proposed") != std::string::npos);
}

TEST_CASE("speculation: run tells what was proposed and accepted") {
  const Json json = run_json({"-p", kCopies, "-n", "100", "--temp", "0", "--ignore-eos", "--speculate", "4"})["speculation"];
  const auto proposed = json["proposed"].get<uint64_t>(), accepted = json["accepted"].get<uint64_t>(), steps = json["steps"].get<uint64_t>();
  CHECK(proposed >= accepted);
  CHECK(steps + accepted == 99);  // the first token comes from the prompt's logits
  CHECK(json["tokens_per_step"].get<double>() == doctest::Approx(99.0 / static_cast<double>(steps)));
  CHECK(json["gate"].is_null());
  const ProcessResult shown = run_duet({"run", kDemo, "--raw", "-p", kCopies, "-n", "100", "--temp", "0", "--speculate", "auto"});
  CHECK(shown.err.find("[proposed ") != std::string::npos);
  CHECK(shown.err.find("tok/step | gate ") != std::string::npos);
  CHECK(run_json({"-p", "The", "-n", "4", "--speculate", "auto"})["speculation"]["gate"].is_number());
}

TEST_CASE("speculation: a trace holds every token that was evaluated, and replays to the engine's counts") {
  const std::string path = DUET_TEST_DIR "/speculation-" + std::to_string(::getpid()) + ".jsonl";
  const Json json = run_json({"-p", kCopies, "-n", "80", "--temp", "0", "--ignore-eos", "--slots", "2", "--speculate", "4", "--trace-experts", path});
  const duet::ExpertTrace trace = duet::read_expert_trace(path);
  std::filesystem::remove(path);
  duet::ReplayCounts all;
  for (const auto& c : duet::replay_engine(trace, trace.header.slots)) all += c;
  REQUIRE(trace.engine.has_value());
  CHECK(trace.engine->hits == all.hits);
  CHECK(trace.engine->misses == all.misses);
  size_t n_tokens = 0;
  for (const auto& chunk : trace.chunks) n_tokens += trace.n_tokens(chunk);
  const Json& s = json["speculation"];
  CHECK(n_tokens == json["prompt_tokens"].get<size_t>() + s["steps"].get<size_t>() + s["proposed"].get<size_t>());
  CHECK(s["proposed"].get<size_t>() > s["accepted"].get<size_t>());
}

TEST_CASE("speculation: what is no mode is refused") {
  for (const char* bad : {"on", "17", "-1", "4x", ""})
    CHECK(refusal(run_duet({"run", kDemo, "-p", "x", "--speculate", bad}), 2, "--speculate") == "");
  CHECK(run_json({"-p", "The", "-n", "4", "--temp", "0", "--speculate", "0"}) .contains("speculation") == false);
}
