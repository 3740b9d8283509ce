// `duet plan` on files, folders and names.
#include <doctest/doctest.h>

#include "base/json.h"
#include "tests/support/process.h"
#include "tests/support/tiny_model.h"

using namespace duet;
using namespace duet::test;

namespace {

const std::string kDemo = std::string(DUET_TEST_DIR) + "/demo-q4_k_m.gguf";

Json plan_json(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "plan");
  arguments.insert(arguments.end(), {"--json", "--threads", "1", "--path", kDemo});
  const ProcessResult output = run_duet(arguments);
  CAPTURE(output.err);
  REQUIRE(output.exit_code == 0);
  return parse_json(output.out, "duet plan");
}

}  // namespace

TEST_CASE("plan: a file that fits is resident") {
  const Json json = plan_json({kDemo});
  REQUIRE(json["plans"].size() == 1);
  const Json& plan = json["plans"][0];
  CHECK(plan["plan"]["streamed"] == false);
  CHECK(plan["speed"]["hit_rate"] == 1.0);
  CHECK(plan["speed"]["decode_tok_s"].get<double>() > 0);
  CHECK(json["rates"]["disk_bytes_per_s"].get<double>() > 0);
}

TEST_CASE("plan: 8x7B in 16 GiB streams, in every type") {
  const Json json = plan_json({"mixtral-8x7b", "--ram", "16GiB", "--ctx", "2048"});
  REQUIRE(json["plans"].size() == 16);
  size_t n_refused = 0;
  for (const Json& plan : json["plans"]) {
    if (plan.contains("error")) {
      ++n_refused;
      continue;
    }
    CHECK(plan["plan"]["total_bytes"].get<uint64_t>() <= uint64_t{16} << 30);
    CHECK(plan["plan"]["ctx"] == 2048);
    CHECK(plan["plan"]["streamed"] == true);
    CHECK(plan["speed"]["t_demand_s"] >= plan["speed"]["t_perfect_s"]);
  }
  CHECK(n_refused == 0);
}

TEST_CASE("plan: text of one type, of a folder, and a budget that is too small") {
  const ProcessResult one = run_duet({"plan", "mixtral-8x7b", "--type", "Q4_K_M", "--ram", "4GiB", "--path", kDemo});
  CHECK(one.exit_code == 0);
  CHECK(one.out.find("of memory, budget 4.0 GiB (--ram 4.0 GiB)") != std::string::npos);
  CHECK(one.out.find("of 8 in each layer") != std::string::npos);
  CHECK(one.out.find("expected: decode ") != std::string::npos);
  const ProcessResult folder = run_duet({"plan", std::string(DUET_SOURCE_DIR) + "/models/demo"});
  CHECK(folder.exit_code == 0);
  CHECK(folder.out.find("Q4_K_M") != std::string::npos);
  CHECK(folder.out.find("Q8_0") != std::string::npos);
  CHECK(refusal(run_duet({"plan", "mixtral-8x7b", "--type", "Q4_K_M", "--ram", "1GiB"}), 5, "MiB would do") == "");
  CHECK(refusal(run_duet({"plan", kDemo, "--type", "Q4_K_M"}), 2, "--type") == "");
  CHECK(refusal(run_duet({"plan", "mixtral-8x7b", "--type", "Q9"}), 2, "choose one of") == "");
  CHECK(refusal(run_duet({"plan", "mixtral-9x9b"}), 3, "mixtral-9x9b") == "");
}

TEST_CASE("plan: options that change no plan are not accepted") {
  for (const char* option : {"--pin", "--numa", "--io"}) CHECK(refusal(run_duet({"plan", kDemo, option, "auto"}), 2, option) == "");
}
