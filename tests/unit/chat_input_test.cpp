// Messages of several lines, commands and settings of duet chat.
#include "cli/chat_input.h"

#include <doctest/doctest.h>

#include "tests/support/errors.h"

using namespace duet;
using namespace duet::cli;

namespace {

// The messages that these lines make, joined by '|'; what is still open at the end after '>'.
std::string messages(const std::vector<std::string>& lines) {
  MessageAssembler assembler;
  std::string out;
  for (const std::string& line : lines)
    if (const auto input = assembler.add(line)) out += input->text + (input->is_line ? "|" : "!");
  if (const auto rest = assembler.finish()) out += ">" + rest->text;
  return out;
}

std::string refusal_of(GenerateOptions& options, const std::string& text) {
  try {
    apply_setting(options, text);
  } catch (const Error& e) {
    return e.kind() == ErrorKind::usage ? e.what() : "wrong kind";
  }
  return "";
}

}  // namespace

TEST_CASE("a line is a message unless it opens a block or ends with a backslash") {
  CHECK(messages({"one", "two"}) == "one|two|");
  CHECK(messages({"one \\", "two", "three"}) == "one \ntwo!three|");
  CHECK(messages({"\"\"\"one", "two\"\"\"", "three"}) == "one\ntwo!three|");
  CHECK(messages({"\"\"\"", "one", "", "  two", "\"\"\""}) == "one\n\n  two!");
  CHECK(messages({"\"\"\"one\"\"\"", "\"\"\"\"\"\"", "x"}) == "one!!x|");
  CHECK(messages({"\"\"\"", "a \\", "/exit", "\"\"\""}) == "a \\\n/exit!");
  CHECK(messages({"say \"\"\" now"}) == "say \"\"\" now|");
}

TEST_CASE("what is open when the input ends is a message, too") {
  CHECK(messages({"one\\"}) == ">one");
  CHECK(messages({"\"\"\"", "one"}) == ">one");
  CHECK(messages({}) == "");
}

TEST_CASE("pasted lines belong together and are taken as they stand") {
  MessageAssembler assembler;
  CHECK(!assembler.add("/exit", true));
  CHECK(assembler.is_open());
  CHECK(!assembler.add("\"\"\"x\\", true));
  const auto input = assembler.add("end");
  REQUIRE(input);
  CHECK(input->text == "/exit\n\"\"\"x\\\nend");
  CHECK(!parse_command(*input));
  CHECK(!assembler.is_open());
}

TEST_CASE("a command is a slash and a word") {
  const auto command = parse_command({"  /Set  top-k   20  "});
  REQUIRE(command);
  CHECK(command->name == "set");
  CHECK(command->argument == "top-k   20");
  CHECK(parse_command({"/?"})->name == "?");
  CHECK(parse_command({"/exit"})->argument == "");
  CHECK(!parse_command({"/usr/bin is what?"}));
  CHECK(!parse_command({"/"}));
  CHECK(!parse_command({"// a comment"}));
  CHECK(!parse_command({"exit"}));
  CHECK(!parse_command({"/exit", false}));
}

TEST_CASE("/set changes one setting, by our name or by ollama's") {
  GenerateOptions options;
  apply_setting(options, "top-k 7");
  CHECK(options.sampling.top_k == 7);
  apply_setting(options, "parameter temperature 0.25");
  CHECK(options.sampling.temperature == 0.25f);
  apply_setting(options, "parameter num_predict 12");
  CHECK(options.n_predict == 12);
  apply_setting(options, "seed 42");
  CHECK(options.seed == uint64_t{42});
  apply_setting(options, "seed random");
  CHECK(!options.seed);
  CHECK(list_settings(options).find("temp 0.25\n") != std::string::npos);
}

TEST_CASE("/set refuses what it does not know and then changes nothing") {
  GenerateOptions options;
  CHECK(refusal_of(options, "heat 1").find("'heat'; there are temp, top-k") != std::string::npos);
  CHECK(refusal_of(options, "top-k many").find("'many' is not a number") != std::string::npos);
  CHECK(refusal_of(options, "top-k").find("the value is missing; it is 40") != std::string::npos);
  CHECK(refusal_of(options, "temp nan") != "");
  CHECK(refusal_of(options, "top-k 99999999999999").find("that fits") != std::string::npos);
  CHECK(refusal_of(options, "n-predict -2") != "");
  CHECK(options.sampling.top_k == 40);
  CHECK(options.sampling.temperature == 0.8f);
  CHECK(options.n_predict == 512);
}
