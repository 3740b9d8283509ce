// duet run on the demo model: what reaches stdout and stderr, and how it ends.
#include <doctest/doctest.h>

#include <sys/stat.h>

#include <csignal>

#include "base/json.h"
#include "tests/support/process.h"
#include "tests/support/terminal.h"
#include "tests/support/tiny_model.h"

using namespace duet::test;
using duet::Json;

namespace {

const std::string kModel = DUET_TEST_DIR "/demo-q4_k_m.gguf";

ProcessResult run(std::vector<std::string> arguments, const ProcessOptions& options = {}) {
  arguments.insert(arguments.begin(), {"run", kModel});
  return run_duet(arguments, options);
}

// The document on stdout, which must be all there is.
Json document(const ProcessResult& result) {
  REQUIRE(result.exit_code == 0);
  REQUIRE(std::count(result.out.begin(), result.out.end(), '\n') == 1);
  return duet::parse_json(result.out, "stdout");
}

Json run_json(std::vector<std::string> arguments, const ProcessOptions& options = {}) {
  arguments.push_back("--json");
  return document(run(std::move(arguments), options));
}

}  // namespace

TEST_CASE("run generates text and says how fast") {
  const ProcessResult result = run({"-p", "The package manager", "-n", "24", "--temp", "0"});
  CHECK(result.exit_code == 0);
  CHECK(result.out.size() > 24);
  CHECK(result.out.back() == '\n');
  CHECK(result.err.find("generated 24 tok") != std::string::npos);
  CHECK(result.err.find("tok/s") != std::string::npos);
  CHECK(result.err.find("stop: length") != std::string::npos);
  CHECK(result.err.find("error") == std::string::npos);
}

TEST_CASE("run --json prints one document with the text that streaming prints") {
  const Json json = run_json({"-p", "The package manager", "-n", "16", "--temp", "0"});
  CHECK(json["ids"].size() == 16);
  CHECK(json["prompt_tokens"] == 5);
  CHECK(json["stop"] == "length");
  CHECK(json["prefill_s"].get<double>() > 0);
  CHECK(json["decode_tok_s"].get<double>() > 0);
  CHECK(json["major_faults"].is_number_unsigned());
  const ProcessResult streamed = run({"-p", "The package manager", "-n", "16", "--temp", "0"});
  CHECK(streamed.out == json["text"].get<std::string>() + "\n");
}

TEST_CASE("piped text is the prompt, and follows -p") {
  const std::vector<std::string> options{"-n", "8", "--temp", "0"};
  const auto with_prompt = [&](const char* prompt) {
    std::vector<std::string> arguments = options;
    arguments.insert(arguments.end(), {"-p", prompt});
    return arguments;
  };
  CHECK(run_json(options, {.input = "The package\n"})["ids"] ==
        run_json(with_prompt("The package"))["ids"]);
  const Json both = run_json(with_prompt("The package"), {.input = "manager"});
  CHECK(both["ids"] == run_json(with_prompt("The package\nmanager"))["ids"]);
  CHECK(both["prompt_tokens"] == run_json(with_prompt("The package\nmanager"))["prompt_tokens"]);
}

TEST_CASE("-f reads the prompt from a file") {
  const TempFolder folder;
  write_text(folder / "prompt.txt", "The package\n");
  const Json from_file =
      run_json({"-f", (folder / "prompt.txt").string(), "-n", "4", "--temp", "0"});
  CHECK(from_file["ids"] == run_json({"-p", "The package", "-n", "4", "--temp", "0"})["ids"]);
}

TEST_CASE("the same seed gives the same text, whatever the number of threads") {
  const auto ids = [](const char* seed, const char* threads) {
    return run_json(
        {"-p", "The", "-n", "24", "--temp", "1", "--seed", seed, "--threads", threads})["ids"];
  };
  const Json first = ids("5", "1");
  CHECK(ids("5", "1") == first);
  CHECK(ids("5", "2") == first);
  CHECK(ids("6", "1") != first);
}

TEST_CASE("without --seed two runs differ and the statistics show the seed to repeat them") {
  const Json first = run_json({"-p", "The", "-n", "24", "--temp", "1"});
  const Json second = run_json({"-p", "The", "-n", "24", "--temp", "1"});
  CHECK(first["seed"] != second["seed"]);
  const Json again = run_json({"-p", "The", "-n", "24", "--temp", "1", "--seed",
                               std::to_string(first["seed"].get<uint64_t>())});
  CHECK(again["ids"] == first["ids"]);
}

TEST_CASE("generation ends at the context when -n does not end it") {
  const Json json = run_json(
      {"-p", "The package manager", "-n", "-1", "--ctx", "20", "--temp", "0", "--ignore-eos"});
  CHECK(json["stop"] == "context");
  // The last token needs no place: nothing follows it.
  CHECK(json["prompt_tokens"].get<size_t>() + json["ids"].size() == 21);
}

TEST_CASE("-n 0 only evaluates the prompt") {
  const Json json = run_json({"-p", "The package manager", "-n", "0"});
  CHECK(json["ids"].empty());
  CHECK(json["text"] == "");
}

TEST_CASE("Ctrl-C keeps the text so far, ends the line, shows statistics and exits 130") {
  const ProcessResult result =
      run({"-p", "The", "-n", "-1", "--ignore-eos", "--temp", "1"}, {.signal_after_bytes = 20});
  CHECK(result.exit_code == 130);
  CHECK(result.out.size() > 20);
  CHECK(result.out.back() == '\n');
  CHECK(result.err.find("stop: interrupted") != std::string::npos);
  CHECK(result.err.find("error") == std::string::npos);
}

TEST_CASE("SIGTERM stops like Ctrl-C") {
  const ProcessResult result = run({"-p", "The", "-n", "-1", "--ignore-eos", "--temp", "1"},
                                   {.signal_after_bytes = 20, .signal = SIGTERM});
  CHECK(result.exit_code == 130);
}

TEST_CASE("a reader that goes away ends the run quietly with 141") {
  const ProcessResult result = run({"-p", "The", "-n", "-1", "--ignore-eos", "--temp", "1"},
                                   {.close_stdout_after_bytes = 20});
  CHECK(result.exit_code == 141);
  CHECK(result.err.find("error") == std::string::npos);
}

TEST_CASE("a full disk under stdout is an I/O error") {
  const ProcessResult result = run({"-p", "The", "-n", "4"}, {.stdout_path = "/dev/full"});
  CHECK(result.exit_code == 3);
  CHECK(result.err.find("error: cannot write to standard output: No space left") !=
        std::string::npos);
}

TEST_CASE("environment variables stand for flags, and flags win") {
  const std::vector<std::string> arguments{"-p", "The", "-n", "1"};
  CHECK(run(arguments, {.environment = {{"DUET_THREADS", "1"}}}).err.find(" 1 thread |") !=
        std::string::npos);
  std::vector<std::string> with_flag = arguments;
  with_flag.insert(with_flag.end(), {"--threads", "2"});
  CHECK(run(with_flag, {.environment = {{"DUET_THREADS", "1"}}}).err.find(" 2 threads") !=
        std::string::npos);
  CHECK(run(arguments, {.environment = {{"DUET_CTX", "77"}}}).err.find("ctx 77") !=
        std::string::npos);
  CHECK(document(run(arguments, {.environment = {{"DUET_JSON", "1"}}}))["ids"].size() == 1);
  CHECK(refusal(run(arguments, {.environment = {{"DUET_THREADS", "many"}}}), 2, "DUET_THREADS") ==
        "");
  CHECK(refusal(run(arguments, {.environment = {{"DUET_KV_TYPE", "f8"}}}), 2, "DUET_KV_TYPE") ==
        "");
}

TEST_CASE("every instruction set gives text, by flag and by variable") {
  for (const char* isa : {"scalar", "avx2", "avx512", "neon"}) {
    const ProcessResult result =
        run({"-p", "The", "-n", "4"}, {.environment = {{"DUET_ISA", isa}}});
    CAPTURE(isa);
    if (result.exit_code == 6) continue;  // not on this processor
    CHECK(result.exit_code == 0);
    CHECK(result.err.find(std::string("| ") + isa + ",") != std::string::npos);
  }
}

TEST_CASE("a chat template wraps the prompt unless --raw") {
  const auto n_prompt = [](std::vector<std::string> extra) {
    std::vector<std::string> arguments{"-p", "The", "-n", "1"};
    arguments.insert(arguments.end(), extra.begin(), extra.end());
    return run_json(arguments)["prompt_tokens"].get<int>();
  };
  CHECK(n_prompt({}) == 2);  // BOS and the word: the demo is a base model
  CHECK(n_prompt({"--template", "chatml"}) > 10);
  CHECK(refusal(run({"-p", "The", "--template", "chatml", "--raw"}), 2, "--raw excludes --template") == "");
  const auto n_with_settings = [](std::vector<std::string> extra, const Environment& settings) {
    extra.insert(extra.end(), {"-p", "The", "-n", "1"});
    return run_json(extra, {.environment = settings})["prompt_tokens"].get<int>();
  };
  CHECK(n_with_settings({"--raw"}, {{"DUET_TEMPLATE", "chatml"}}) == 2);
  CHECK(n_with_settings({"--template", "chatml"}, {{"DUET_RAW", "1"}}) > 10);
}

TEST_CASE("Ctrl-C ends the wait for a prompt that nobody writes to a named pipe") {
  const TempFolder folder;
  const std::string pipe = (folder / "pipe").string();
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  CHECK(refusal(run({"-f", pipe}, {.signal_after_s = 1}), 130, "interrupted while waiting for " + pipe) == "");
}

TEST_CASE("a terminal gets no control characters from the model, a pipe gets what it wrote") {
  const TempFolder folder;
  const std::string grammar = (folder / "escapes.gbnf").string();
  write_text(grammar, R"(root ::= "a\x1b[2J\x07\tb\x7f\nc")");
  const std::vector<std::string> arguments{"run", kModel, "-p", "The", "--grammar", grammar};
  CHECK(run_duet(arguments).out == "a\x1b[2J\x07\tb\x7f\nc\n");
  std::vector<std::string> command{DUET_BINARY};
  command.insert(command.end(), arguments.begin(), arguments.end());
  Terminal terminal(command, {});
  CHECK(terminal.wait_for("a[2J"));
  CHECK(terminal.wait_exit() == 0);
  CHECK(terminal.output().find("\x1b[2J") == std::string::npos);
  CHECK(terminal.output().find('\x07') == std::string::npos);
  CHECK(terminal.output().find('\x7f') == std::string::npos);
}

TEST_CASE("escapes in a model's name stay out of the line about it") {
  const TempFolder folder;
  const std::string model = (folder / "model.gguf").string();
  GgufBuilder builder = tiny_model({});
  builder.key("general.name").bytes = raw_string("evil\x1b[2J\xc2\x9b" "2J\nna\xc3\xafve");
  write_bytes(model, builder.build());
  const ProcessResult result = run_duet({"run", model, "-p", "the", "-n", "1"});
  CHECK(result.exit_code == 0);
  CHECK(result.err.find("[evil [2J 2J na\xc3\xafve | ") != std::string::npos);
  CHECK(result.err.find('\x1b') == std::string::npos);
}
