// duet chat on the demo model: through a pipe, and on a terminal.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <algorithm>
#include <csignal>
#include <fstream>
#include <sstream>

#include "base/json.h"
#include "base/mapped_file.h"
#include "tests/support/process.h"
#include "tests/support/terminal.h"
#include "tests/support/tiny_model.h"

using namespace duet::test;
using duet::Json;

namespace {

const std::string kModel = DUET_TEST_DIR "/demo-q4_k_m.gguf";

std::vector<std::string> command(std::vector<std::string> arguments) {
  std::vector<std::string> out{"chat", kModel, "--template", "mistral-v1", "-t", "1", "--ignore-eos"};
  for (const auto& [name, value] : {std::pair("--temp", "0"), std::pair("-n", "12")})
    if (std::find(arguments.begin(), arguments.end(), name) == arguments.end()) out.insert(out.end(), {name, value});
  out.insert(out.end(), arguments.begin(), arguments.end());
  return out;
}

ProcessResult piped(const std::string& input, std::vector<std::string> arguments = {}) {
  return run_duet(command(std::move(arguments)), {.input = input});
}

std::vector<std::string> lines_of(const std::string& text) {
  std::istringstream in(text);
  std::vector<std::string> out;
  for (std::string line; std::getline(in, line);) out.push_back(line);
  return out;
}

// The figures of each answer: "prompt NEW new of ALL".
std::vector<std::pair<int, int>> prompts(const std::string& err) {
  std::vector<std::pair<int, int>> out;
  for (const std::string& line : lines_of(err)) {
    int fresh = 0, all = 0;
    const size_t at = line.find("| prompt ");
    if (at != std::string::npos && std::sscanf(line.c_str() + at, "| prompt %d new of %d", &fresh, &all) == 2) out.emplace_back(fresh, all);
  }
  return out;
}

// The text of the last assistant message of a saved conversation.
Json saved(const std::filesystem::path& path) { return duet::parse_json(duet::read_file(path, 1 << 20), path.string()); }

// chat on a terminal with a home of its own.
struct OnTerminal {
  explicit OnTerminal(std::vector<std::string> arguments = {}, int columns = 80)
      : terminal(with_binary(command(std::move(arguments))),
                 {{"XDG_STATE_HOME", (home / "state").string()}, {"HOME", home.path().string()}}, columns) {}
  static std::vector<std::string> with_binary(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), DUET_BINARY);
    return arguments;
  }
  TempFolder home;
  Terminal terminal;
};

constexpr const char* kPrompt = ">>> ";

}  // namespace

TEST_CASE("chat: piped messages are answered one by one, and stdout has the answers alone") {
  const ProcessResult result = piped("The package manager\n\nAnd then?\n");
  CHECK(result.exit_code == 0);
  CHECK(result.out.find(kPrompt) == std::string::npos);
  CHECK(result.out.find('\033') == std::string::npos);
  CHECK(result.err.find('\033') == std::string::npos);
  CHECK(prompts(result.err).size() == 2);
  const ProcessResult one = run_duet({"run", kModel, "--template", "mistral-v1", "--temp", "0", "-n", "12", "-t", "1", "--ignore-eos",
                                      "-p", "The package manager"});
  CHECK(result.out.starts_with(one.out));
}

TEST_CASE("chat: a turn evaluates only what is new") {
  const ProcessResult result = piped("The package manager\nAnd then?\nAnd then?\n");
  const auto turns = prompts(result.err);
  REQUIRE(turns.size() == 3);
  CHECK(turns[0].first == turns[0].second);
  CHECK(turns[1].second > turns[0].second + 12);
  CHECK(turns[1].first <= turns[1].second - turns[0].second - 11);  // the last token made was not evaluated
  CHECK(turns[2].first <= turns[2].second - turns[1].second - 11);
}

TEST_CASE("chat: blocks and backslashes make one message of several lines") {
  const TempFolder folder;
  const std::string file = (folder / "a.json").string();
  const ProcessResult result = piped("\"\"\"one\n/exit\nthree\"\"\"\nfour \\\nfive\n/save " + file + "\n");
  CHECK(result.exit_code == 0);
  const Json json = saved(file);
  REQUIRE(json["messages"].size() == 4);
  CHECK(json["messages"][0]["content"] == "one\n/exit\nthree");
  CHECK(json["messages"][2]["content"] == "four \nfive");
}

TEST_CASE("chat: a conversation goes on in another process as it would have here") {
  const TempFolder folder;
  const std::string file = (folder / "a.json").string();
  const ProcessResult first = piped("/system Be brief.\nThe package manager\n/save " + file + "\nAnd then?\n/save " + file + "\n");
  REQUIRE(first.exit_code == 0);
  const Json json = saved(file);
  REQUIRE(json["messages"].size() == 5);
  CHECK(json["messages"][0]["role"] == "system");
  CHECK(json["messages"][0]["content"] == "Be brief.");
  const ProcessResult again = piped("/load " + file + "\n/regen\n/save " + file + "\n");
  CHECK(again.exit_code == 0);
  CHECK(saved(file)["messages"] == json["messages"]);
  CHECK(first.out.ends_with(again.out));
}

TEST_CASE("chat: a conversation without messages is saved and loaded, too") {
  const TempFolder folder;
  const std::string file = (folder / "a.json").string();
  const ProcessResult result = piped("/save " + file + "\n/load " + file + "\n/system Be brief.\n/save " + file + "\n/clear\n/system -\n/load " + file + "\n/system\n");
  CAPTURE(result.err);
  CHECK(result.exit_code == 0);
  CHECK(result.err.find("note: loaded; there are no messages in it\n") != std::string::npos);
  CHECK(result.err.ends_with("Be brief.\n"));
}

TEST_CASE("chat: /regen draws another answer, /clear forgets") {
  const ProcessResult result = piped("The package manager\n/regen\n/clear\nThe\n", {"--temp", "2", "--seed", "3", "--top-k", "0", "--min-p", "0", "--top-p", "1"});
  CHECK(result.exit_code == 0);
  const auto turns = prompts(result.err);
  REQUIRE(turns.size() == 3);
  CHECK(turns[1].second == turns[0].second);
  CHECK(turns[1].first == 1);
  CHECK(turns[2].second < turns[0].second);
  const ProcessResult same = piped("The package manager\n/regen\n/clear\nThe\n", {"--temp", "2", "--seed", "3", "--top-k", "0", "--min-p", "0", "--top-p", "1"});
  CHECK(same.out == result.out);
}

TEST_CASE("chat: /set changes the next answer, /stats and /template tell") {
  const ProcessResult result = piped("/set n-predict 3\nThe\n/stats\n/template\n/template zephyr\n/template\n/help\n/exit\nnever\n");
  CHECK(result.exit_code == 0);
  CHECK(result.err.find("[3 tok, ") != std::string::npos);
  CHECK(result.err.find("2 messages | context ") != std::string::npos);
  CHECK(result.err.find("mistral-v1 (there are: mistral-v1") != std::string::npos);
  CHECK(result.err.find("\nzephyr (there are:") != std::string::npos);
  CHECK(result.err.find("/regen") != std::string::npos);
  CHECK(prompts(result.err).size() == 1);
}

TEST_CASE("chat: what fails ends a piped conversation with a word and a code") {
  const auto fails = [](const std::string& input, int code, const std::string& words) {
    const ProcessResult result = piped(input);
    CAPTURE(result.err);
    CHECK(result.exit_code == code);
    CHECK(result.err.find("error: ") != std::string::npos);
    CHECK(result.err.find(words) != std::string::npos);
    CHECK(result.out == "");
  };
  fails("/nonsense\nThe\n", 2, "no command /nonsense; /help lists them");
  fails("/set heat 3\n", 2, "no setting 'heat'");
  fails("/regen\n", 2, "no message to answer yet");
  fails("/load /nonexistent.json\n", 3, "/nonexistent.json");
  fails("/template nonsense\n", 2, "unknown chat template 'nonsense'");
}

TEST_CASE("chat: a full context is an error that says what to do, and nothing is cut") {
  const ProcessResult result = piped("The package manager\n" + std::string(300, 'x') + "\n", {"--ctx", "64"});
  CHECK(result.exit_code == 2);
  CHECK(result.err.find("tokens, the context 64; nothing was cut. /clear starts over") != std::string::npos);
  const ProcessResult within = piped("The package manager\n", {"--ctx", "24", "-n", "-1"});
  CHECK(within.exit_code == 0);
  CHECK(within.err.find("stop: context") != std::string::npos);
  CHECK(within.err.find("the context is full: the answer ends here") != std::string::npos);
}

TEST_CASE("chat: a base model without a template is refused with the choices") {
  const ProcessResult result = run_duet({"chat", kModel}, {.input = "The\n"});
  CHECK(refusal(result, 2, "").find("choose one") == std::string::npos);
  CHECK(result.exit_code == 2);
  CHECK(result.err.find("choose one with --template: mistral-v1") != std::string::npos);
}

TEST_CASE("chat: Ctrl-C ends a piped conversation with 130") {
  const ProcessResult result = run_duet(command({"-n", "-1"}), {.input = "The\nThe\n", .signal_after_bytes = 20});
  CHECK(result.exit_code == 130);
  CHECK(result.out.back() == '\n');
}

TEST_CASE("chat on a terminal: prompt, answer, one line of statistics, Ctrl-D leaves") {
  OnTerminal chat;
  Terminal& t = chat.terminal;
  REQUIRE(t.wait_for("/help lists commands"));
  REQUIRE(t.wait_for(kPrompt));
  t.read_for(0.2);
  CHECK(t.output().find(kPrompt, t.seen()) == std::string::npos);  // once
  t.type("The package manager\r");
  REQUIRE(t.wait_for("[12 tok, "));
  REQUIRE(t.wait_for("| ctx "));
  REQUIRE(t.wait_for(kPrompt));
  t.type("\x04");
  CHECK(t.wait_exit() == 0);
  CHECK(t.output().find("error") == std::string::npos);
}

TEST_CASE("chat on a terminal: Ctrl-C stops the answer only, and leaves at the prompt when pressed twice") {
  OnTerminal chat({"-n", "-1", "--ctx", "4000"});
  Terminal& t = chat.terminal;
  REQUIRE(t.wait_for(kPrompt));
  t.type("The package manager\r");
  REQUIRE(t.wait_for("\n"));
  t.read_for(0.3);
  t.type("\x03");
  REQUIRE(t.wait_for("stop: interrupted"));
  REQUIRE(t.wait_for(kPrompt));
  t.type("/set n-predict 4\r");
  REQUIRE(t.wait_for(kPrompt));
  t.type("And then?\r");
  REQUIRE(t.wait_for("[4 tok, "));
  REQUIRE(t.wait_for(kPrompt));
  t.type("half a line\x03");
  REQUIRE(t.wait_for("(Ctrl-C again or /exit leaves)"));
  REQUIRE(t.wait_for(kPrompt));
  t.type("/stats\r");
  REQUIRE(t.wait_for("4 messages"));
  REQUIRE(t.wait_for(kPrompt));
  t.type("\x03");
  REQUIRE(t.wait_for("again or /exit leaves"));
  REQUIRE(t.wait_for(kPrompt));
  t.type("\x03");
  CHECK(t.wait_exit() == 130);
}

TEST_CASE("chat on a terminal: an error is told and the conversation goes on") {
  OnTerminal chat;
  Terminal& t = chat.terminal;
  REQUIRE(t.wait_for(kPrompt));
  t.type("/nonsense\r");
  REQUIRE(t.wait_for("no command /nonsense"));
  REQUIRE(t.wait_for(kPrompt));
  t.type("/exit\r");
  CHECK(t.wait_exit() == 0);
}

TEST_CASE("chat on a terminal: lines are edited by characters, and remembered across sessions by their owner alone") {
  const TempFolder home;
  const std::vector<std::pair<std::string, std::string>> environment{{"XDG_STATE_HOME", home.path().string()}};
  const std::string file = (home / "a.json").string();
  {
    Terminal t(OnTerminal::with_binary(command({})), environment);
    REQUIRE(t.wait_for(kPrompt));
    t.type("a \xc3\xa4\xe2\x82\xac\x7f\xc3\xb6\x01X\r");  // the euro sign erased; X at the start of the line
    REQUIRE(t.wait_for("[12 tok, "));
    REQUIRE(t.wait_for(kPrompt));
    t.type("/save " + file + "\r");
    REQUIRE(t.wait_for("2 messages saved"));
    REQUIRE(t.wait_for(kPrompt));  // typed before, the key would be the end of a line of the terminal
    t.type("\x04");
    CHECK(t.wait_exit() == 0);
  }
  CHECK(saved(file)["messages"][0]["content"] == "Xa \xc3\xa4\xc3\xb6");
  struct stat info {};
  REQUIRE(::stat((home / "duet/chat_history").c_str(), &info) == 0);
  CHECK((info.st_mode & 0777) == 0600);
  Terminal t(OnTerminal::with_binary(command({})), environment);
  REQUIRE(t.wait_for(kPrompt));
  t.type("\033[A\033[A\r");  // two lines back
  REQUIRE(t.wait_for("[12 tok, "));
  REQUIRE(t.wait_for(kPrompt));
  t.type("/save " + file + "\r");
  REQUIRE(t.wait_for("2 messages saved"));
  CHECK(saved(file)["messages"][0]["content"] == "Xa \xc3\xa4\xc3\xb6");
}

TEST_CASE("chat on a terminal: blocks, and pasted lines as one message") {
  OnTerminal chat;
  Terminal& t = chat.terminal;
  const std::string file = (chat.home / "a.json").string();
  REQUIRE(t.wait_for(kPrompt));
  t.type("\"\"\"one\r");
  REQUIRE(t.wait_for("... "));
  t.type("two\"\"\"\r");
  REQUIRE(t.wait_for("[12 tok, "));
  REQUIRE(t.wait_for(kPrompt));
  t.type("\033[200~/exit\rsecond\r\033[201~third\r");
  REQUIRE(t.wait_for("[12 tok, "));
  REQUIRE(t.wait_for(kPrompt));
  t.type("/save " + file + "\r");
  REQUIRE(t.wait_for("4 messages saved"));
  const Json json = saved(file);
  CHECK(json["messages"][0]["content"] == "one\ntwo");
  CHECK(json["messages"][2]["content"] == "/exit\nsecond\nthird");
}

TEST_CASE("chat on a terminal: another size of the window while a line is typed") {
  OnTerminal chat({}, 100);
  Terminal& t = chat.terminal;
  const std::string file = (chat.home / "a.json").string();
  REQUIRE(t.wait_for(kPrompt));
  t.type(std::string(60, 'a'));
  t.read_for(0.3);
  t.resize(40);
  REQUIRE(t.wait_for("\033[1A\r\033[K"));  // up to where the prompt stands when 64 columns fill two lines
  REQUIRE(t.wait_for(kPrompt));
  t.type("bc\r");
  REQUIRE(t.wait_for("[12 tok, "));
  REQUIRE(t.wait_for(kPrompt));
  t.resize(120);
  t.type("/save " + file + "\r");
  REQUIRE(t.wait_for("2 messages saved"));
  CHECK(saved(file)["messages"][0]["content"] == std::string(60, 'a') + "bc");
}

TEST_CASE("chat on a terminal: SIGTERM leaves at the prompt and in an answer") {
  for (const bool in_answer : {false, true}) {
    OnTerminal chat({"-n", "-1"});
    Terminal& t = chat.terminal;
    REQUIRE(t.wait_for(kPrompt));
    if (in_answer) {
      t.type("The\r");
      t.read_for(0.2);
    }
    t.signal(SIGTERM);
    CHECK(t.wait_exit() == 130);
  }
}

TEST_CASE("chat on a terminal: NO_COLOR is respected") {
  const TempFolder home;
  const auto said = [&](const char* no_colour) {
    Terminal t(OnTerminal::with_binary(command({})), {{"XDG_STATE_HOME", home.path().string()}, {"NO_COLOR", no_colour}});
    REQUIRE(t.wait_for(kPrompt));
    t.type("The\r");
    REQUIRE(t.wait_for("[12 tok, "));
    return t.output();
  };
  CHECK(said("").find("\033[2m[12 tok") != std::string::npos);
  CHECK(said("1").find("\033[2m") == std::string::npos);
}

TEST_CASE("chat: where experts are streamed the line after an answer has the hit rate") {
  const ProcessResult result = piped("The package manager\n", {"--slots", "2"});
  CHECK(result.exit_code == 0);
  CHECK(result.err.find(" % in memory") != std::string::npos);
}
