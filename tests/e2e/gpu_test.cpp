// --gpu and --vram: plans without a card, refusals, and the same text with one (kernels compiled for the CPU).
#include <doctest/doctest.h>

#include <filesystem>

#include "base/json.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/process.h"
#include "tests/support/skip.h"

using namespace duet::test;
using duet::Json;

namespace {

namespace fs = std::filesystem;

const std::string kDemo = DUET_TEST_DIR "/demo-q4_k_m.gguf";
const Environment kNoCard{{"DUET_GPU_MODULE", "/nowhere/module.so"}};

ProcessResult without_card(std::vector<std::string> arguments) { return run_duet(std::move(arguments), {.environment = kNoCard}); }

Json plan_json(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "plan");
  arguments.insert(arguments.end(), {"--json", "--path", kDemo});
  const ProcessResult result = without_card(std::move(arguments));
  REQUIRE(result.exit_code == 0);
  return duet::parse_json(result.out, "plan");
}

}  // namespace

TEST_CASE("plan --vram: 8x7B on a card of 22 GiB that is not here") {
  const Json plan = plan_json({"mixtral-8x7b", "--type", "Q4_K_M", "--vram", "22GiB", "--ram", "16GiB"})["plans"][0];
  const Json& card = plan["card"];
  CHECK(card["name"].is_null());
  CHECK(card["budget_bytes"] == uint64_t{22} << 30);
  CHECK(card["total_bytes"].get<uint64_t>() <= uint64_t{22} << 30);
  CHECK(card["layers"] == 32);
  CHECK(card["first_layer"].get<int>() >= 5);
  CHECK(card["first_layer"].get<int>() <= 9);
  CHECK(plan["plan"]["streamed"] == false);  // what is left fits into memory
  CHECK(plan["plan"]["kv_bytes"] == 0);
  CHECK(plan["speed"]["decode_tok_s"].get<double>() > plan_json({"mixtral-8x7b", "--type", "Q4_K_M", "--ram", "40GiB"})["plans"][0]["speed"]["decode_tok_s"].get<double>());
  const Json attention = plan_json({"mixtral-8x7b", "--type", "Q4_K_M", "--vram", "22GiB", "--gpu", "attention", "--ram", "16GiB"})["plans"][0];
  CHECK(attention["card"]["first_layer"] == 32);
  CHECK(attention["card"]["expert_bytes"] == 0);
  CHECK(attention["plan"]["streamed"] == true);
}

TEST_CASE("plan --vram: its text names what it assumes") {
  const ProcessResult one = without_card({"plan", "mixtral-8x7b", "--type", "Q4_K_M", "--vram", "22G", "--path", kDemo});
  CHECK(one.exit_code == 0);
  CHECK(one.out.find("card: a card that is not here: ") != std::string::npos);
  CHECK(one.out.find("experts of layers ") != std::string::npos);
  CHECK(one.out.find("936 GB/s (assumed: that of an RTX 3090)") != std::string::npos);
  const ProcessResult table = without_card({"plan", "mixtral-8x7b", "--vram", "22G", "--path", kDemo});
  CHECK(table.exit_code == 0);
  CHECK(table.out.find("on the card") != std::string::npos);
  const ProcessResult off = without_card({"plan", "mixtral-8x7b", "--type", "Q4_K_M", "--vram", "22G", "--gpu", "off", "--path", kDemo});
  CHECK(off.out.find("card") == std::string::npos);
}

TEST_CASE("--gpu and --vram: what cannot be is refused with what could be") {
  CHECK(refusal(without_card({"plan", "mixtral-8x7b", "--type", "Q4_K_M", "--vram", "1GiB"}), 5, "MiB would do") == "");
  CHECK(refusal(without_card({"plan", kDemo, "--gpu", "attention"}), 6, "--vram") == "");
  CHECK(refusal(without_card({"run", kDemo, "-p", "a", "--gpu", "attention"}), 6, "/nowhere/module.so: no such module") == "");
  CHECK(refusal(without_card({"run", kDemo, "-p", "a", "--gpu", "2"}), 6, "--gpu auto or off") == "");
  CHECK(refusal(without_card({"run", kDemo, "-p", "a", "--gpu", "some"}), 2, "auto, off, attention") == "");
  CHECK(refusal(without_card({"run", kDemo, "-p", "a", "--gpu", "-1"}), 2, "--gpu") == "");
  CHECK(refusal(without_card({"run", kDemo, "-p", "a", "--vram", "0"}), 2, "--vram") == "");
  CHECK(refusal(without_card({"run", kDemo, "-p", "a", "--vram", "much"}), 2, "much") == "");
  CHECK(refusal(without_card({"imatrix", kDemo, "-f", DUET_SOURCE_DIR "/README.md", "-o", "x", "--gpu", "attention"}), 6, "--gpu off") == "");
}

TEST_CASE("without a module nothing changes, and nothing is said") {
  const std::vector<std::string> arguments{"run", kDemo, "-p", "The", "-n", "8", "--temp", "0"};
  std::vector<std::string> off = arguments;
  off.insert(off.end(), {"--gpu", "off"});
  const ProcessResult plain = run_duet(arguments), without = run_duet(off);
  CHECK(plain.exit_code == 0);
  CHECK(plain.out == without.out);
  CHECK(without.err.find("card") == std::string::npos);
  const ProcessResult named = without_card(arguments);
  CHECK(named.exit_code == 0);
  CHECK(named.out == plain.out);
  CHECK(named.err.find("note: no card is used: /nowhere/module.so: no such module") != std::string::npos);
}

TEST_CASE("a module that is there and does not work is told, a machine without a card is not") {
  const TempFolder folder;
  const std::string program = folder / "duet", module = folder / "libduet_cuda.so";
  fs::copy_file(DUET_BINARY, program);
  const std::vector<std::string> run{program, "run", kDemo, "-p", "The", "-n", "2", "--temp", "0"}, plan{program, "plan", kDemo, "--path", kDemo};
  write_text(module, "no library");
  const std::string words = ": the module cannot be loaded: ";
  const ProcessResult told = run_process(run), planned = run_process(plan);
  CHECK(told.exit_code == 0);
  CHECK(told.err.find("note: no card is used" + words) != std::string::npos);
  CHECK(planned.exit_code == 0);
  CHECK(planned.err.find("note: no card is planned for" + words) != std::string::npos);
  CHECK(run_process({program, "run", kDemo, "-p", "The", "-n", "2", "--gpu", "off"}).err.find("card") == std::string::npos);
  fs::remove(module);
  fs::copy_file(DUET_GPU_EMULATED, module);
  const ProcessResult silent = run_process(run, {.environment = {{"DUET_EMULATED_GPU_BYTES", "0"}}});
  CHECK(silent.exit_code == 0);
  CHECK(silent.out == told.out);
  CHECK(silent.err.find("card") == std::string::npos);
}

TEST_CASE("serve has as many sequences as the CPU's memory holds where the card that is there is not used") {
  const auto at_once = [](const Environment& environment, const std::vector<std::string>& more) {
    std::vector<std::string> arguments{"serve", kDemo, "--port", "0", "-t", "1"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const std::string err = run_duet(arguments, {.environment = environment, .signal_after_bytes = 1}).err;
    const size_t end = err.find(" at once");
    return end == std::string::npos ? err : err.substr(err.rfind('|', end) + 2, end - err.rfind('|', end) - 2);
  };
  const std::string of_cpu = at_once({}, {"--gpu", "off"});
  CHECK(of_cpu != "1");
  CHECK(at_once({{"DUET_GPU_MODULE", DUET_GPU_EMULATED}, {"DUET_EMULATED_GPU_BYTES", "1000000"}}, {}) == of_cpu);
  CHECK(at_once({{"DUET_GPU_MODULE", DUET_GPU_EMULATED}}, {"--vram", "64MiB"}) != of_cpu);
}

TEST_CASE("doctor says whether there is a card") {
  CHECK(without_card({"doctor"}).out.find("card:          none used: /nowhere/module.so: no such module") != std::string::npos);
  const Json card = duet::parse_json(without_card({"doctor", "--json"}).out, "doctor")["card"];
  CHECK(card["name"].is_null());
  CHECK(card["reason"] == "/nowhere/module.so: no such module");
}

TEST_CASE("the demo model's greedy text is the same with a card, whatever share of the experts it has") {
  const std::vector<std::string> arguments{"run", kDemo, "-p", "The package manager", "-n", "24", "--temp", "0"};
  const ProcessResult cpu = run_duet(arguments);
  REQUIRE(cpu.exit_code == 0);
  for (const char* gpu : {"auto", "attention", "1"}) {
    CAPTURE(gpu);
    std::vector<std::string> with = arguments;
    with.insert(with.end(), {"--gpu", gpu});
    const ProcessResult card = run_duet(with, {.environment = {{"DUET_GPU_MODULE", DUET_GPU_EMULATED}}});
    CHECK(card.exit_code == 0);
    CHECK(card.out == cpu.out);
    CHECK(card.err.find("weights ") != std::string::npos);
    CHECK(card.err.find("(budget ") != std::string::npos);
  }
}

TEST_CASE("bench and plan stream beside a card what is left to the CPU, and nothing where nothing is") {
  const ProcessOptions card{.environment = {{"DUET_GPU_MODULE", DUET_GPU_EMULATED}}};
  const auto json = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.end(), {"--slots", "2", "--json"});
    const ProcessResult result = run_duet(arguments, card);
    CAPTURE(result.err);
    REQUIRE(result.exit_code == 0);
    return duet::parse_json(result.out, "stdout");
  };
  const Json bench = json({"bench", kDemo, "-p", "0", "-n", "1", "-r", "1", "-t", "1", "--gpu", "1"});
  CHECK(bench["limits"].contains("disk_gb_s"));
  CHECK(bench["results"][0].contains("hit_rate"));
  for (const auto& [gpu, streams] : {std::pair{"1", true}, {"auto", false}})
    CHECK((json({"plan", kDemo, "--path", kDemo, "-t", "1", "--gpu", gpu})["plans"][0]["plan"]["streamed"] == true) == streams);
}
