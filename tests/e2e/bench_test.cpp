// duet bench on the demo model: what it prints in each form, and what it refuses.
#include <doctest/doctest.h>

#include <algorithm>
#include <sstream>

#include "base/json.h"
#include "tests/support/process.h"
#include "tests/support/tiny_model.h"

using namespace duet::test;
using duet::Json;

namespace {

constexpr int kUsage = 2;
const std::string kModel = DUET_TEST_DIR "/demo-q4_k_m.gguf";

Json bench(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "bench");
  arguments.push_back("--json");
  const ProcessResult result = run_duet(arguments);
  CAPTURE(result.err);
  REQUIRE(result.exit_code == 0);
  return duet::parse_json(result.out, "stdout");
}

std::vector<std::string> tests_of(const Json& json) {
  std::vector<std::string> names;
  for (const Json& result : json.at("results")) names.push_back(result.at("test"));
  return names;
}

uint64_t sum(const Json& layers) {
  uint64_t n = 0;
  for (const Json& layer : layers)
    for (const Json& count : layer) n += count.get<uint64_t>();
  return n;
}

size_t count_lines(const std::string& text) { return static_cast<size_t>(std::count(text.begin(), text.end(), '\n')); }

}  // namespace

TEST_CASE("bench: JSON has machine, limits and one result per test, depth and number of threads") {
  const Json json = bench({kModel, "-p", "8,20", "-n", "3", "--depth", "0,40", "-r", "2", "-t", "1,2"});
  for (const char* key : {"cpu", "cores", "isa", "threads", "memory_bytes", "version", "commit"})
    CHECK_MESSAGE(json.at("machine").contains(key), key);
  for (const char* key : {"read_gb_s", "int8_gmac_s", "f32_gmac_s"}) CHECK(json.at("limits").at(key).get<double>() > 0.0);
  CHECK_FALSE(json.at("limits").contains("disk_gb_s"));  // nothing is streamed
  CHECK(json.at("limits_by_threads").size() == 2);
  const std::vector<std::string> each = {"pp8", "pp20", "tg3", "pp8@d40", "pp20@d40", "tg3@d40"};
  std::vector<std::string> all = each;
  all.insert(all.end(), each.begin(), each.end());
  CHECK(tests_of(json) == all);
  for (const Json& result : json.at("results")) {
    for (const char* key : {"tok_s", "bytes_per_token", "macs_per_token", "share_of_limit"}) CHECK(result.at(key).get<double>() > 0.0);
    CHECK(result.at("tok_s_std").get<double>() >= 0.0);
    CHECK(result.at("samples_tok_s").size() == 2);
    CHECK((result.at("joules_per_token").is_null() || result.at("joules_per_token").get<double>() > 0.0));
  }
  CHECK(json.at("results")[0].at("threads") == 1);
  CHECK(json.at("results")[11].at("threads") == 2);
}

TEST_CASE("bench: work per token grows with depth, and adds up") {
  const Json json = bench({kModel, "-p", "16", "-n", "2", "--depth", "0,64", "-r", "1", "-t", "1"});
  const Json &prefill = json.at("results")[0], &decode = json.at("results")[1], &deep = json.at("results")[3];
  CHECK(deep.at("test") == "tg2@d64");
  CHECK(deep.at("bytes_per_token") > decode.at("bytes_per_token"));
  CHECK(deep.at("macs_per_token") > decode.at("macs_per_token"));
  CHECK(prefill.at("bytes_per_token") < decode.at("bytes_per_token"));  // weights are read once for all
  CHECK(prefill.at("read_gb_s").is_null());
  const double limit = decode.at("read_gb_s").get<double>() * 1e9;  // measured beside the runs
  const double share = decode.at("bytes_per_token").get<double>() * decode.at("tok_s").get<double>() / limit;
  CHECK(decode.at("share_of_limit").get<double>() == doctest::Approx(share));
}

TEST_CASE("bench: the use of experts counts the runs measured, not the warm-up or the depth") {
  const Json json = bench({kModel, "-p", "8", "-n", "4", "--depth", "0,32", "-r", "3", "-t", "2"});
  const size_t n_layer = json.at("expert_uses").at("prefill").size();
  REQUIRE(n_layer == json.at("model").at("layers").get<size_t>());
  constexpr uint64_t kUsed = 2, kRuns = 3 * 2;  // repetitions at both depths
  CHECK(sum(json.at("expert_uses").at("prefill")) == ((n_layer - 1) * 8 + 1) * kUsed * kRuns);  // the last layer's for the last token
  CHECK(sum(json.at("expert_uses").at("decode")) == n_layer * kUsed * kRuns * 4);
}

TEST_CASE("bench: the same seed feeds the same ids") {
  const auto uses = [](const char* seed) {
    return bench({kModel, "-p", "32", "-n", "8", "-r", "1", "-t", "1", "--seed", seed}).at("expert_uses");
  };
  const Json first = uses("7");
  CHECK(uses("7") == first);
  CHECK(uses("8") != first);
}

TEST_CASE("bench: -p 0 and -n 0 leave that part out") {
  CHECK(tests_of(bench({kModel, "-p", "0", "-n", "2", "-r", "1"})) == std::vector<std::string>{"tg2"});
  const Json prefill = bench({kModel, "-p", "5", "-n", "0", "-r", "1"});
  CHECK(tests_of(prefill) == std::vector<std::string>{"pp5"});
  CHECK(prefill.at("expert_uses").at("decode").empty());
  CHECK(refusal(run_duet({"bench", kModel, "-p", "0", "-n", "0"}), kUsage, "nothing to measure") == "");
}

TEST_CASE("bench: tables for people, Markdown and CSV") {
  const std::vector<std::string> common = {"bench", kModel, "-p", "4", "-n", "2", "-r", "1", "-t", "1"};
  const auto output = [&](const char* form) {
    std::vector<std::string> arguments = common;
    if (*form != '\0') arguments.emplace_back(form);
    const ProcessResult result = run_duet(arguments);
    CHECK(result.exit_code == 0);
    return result.out;
  };
  for (const char* form : {"", "--md"}) {
    const std::string text = output(form);
    for (const char* words : {"machine: ", "limits: 1 thread", "GB/s", "GMAC/s", "pp4", "tg2", "of limit", "experts used in prefill", "experts used in decode"})
      CHECK_MESSAGE(text.find(words) != std::string::npos, words);
  }
  CHECK(output("--md").find("| test | ") != std::string::npos);
  const std::string csv = output("--csv");
  CHECK(csv.starts_with("test,threads,tok_s,tok_s_std,bytes_per_token,macs_per_token,share_of_limit,joules_per_token,"));
  CHECK(count_lines(csv) == 3);
  CHECK(refusal(run_duet({"bench", kModel, "--csv", "--json"}), kUsage, "--json excludes --csv") == "");
}

TEST_CASE("bench --roofline needs no model and shows every instruction set") {
  const Json json = bench({"--roofline", "-t", "1"});
  CHECK(json.at("results").empty());
  CHECK_FALSE(json.contains("model"));
  CHECK(json.at("limits_by_threads").back().at("isa") == "scalar");
  const Json forced = bench({"--roofline", "-t", "1", "--isa", "scalar"});
  CHECK(forced.at("limits_by_threads").size() == 1);
}

TEST_CASE("bench: bad arguments are usage errors, a missing file is an I/O error") {
  CHECK(refusal(run_duet({"bench"}), kUsage, "MODEL is required") == "");
  CHECK(refusal(run_duet({"bench", kModel, "-p", "many"}), kUsage, "many") == "");
  CHECK(refusal(run_duet({"bench", kModel, "-p", "-4"}), kUsage, "-p") == "");
  CHECK(refusal(run_duet({"bench", kModel, "-r", "0"}), kUsage, "-r") == "");
  CHECK(refusal(run_duet({"bench", kModel, "-t", "1,0"}), kUsage, "-t") == "");
  CHECK(refusal(run_duet({"bench", "/nonexistent.gguf"}), 3, "/nonexistent.gguf") == "");
  CHECK(refusal(run_duet({"bench", kModel, "--isa", "sse9"}), 6, "sse9") == "");
}
