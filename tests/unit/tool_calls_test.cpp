#include "server/tool_calls.h"

#include <doctest/doctest.h>

#include "base/error.h"
#include "base/json.h"

namespace duet::server {
namespace {

struct Joined {
  std::string content;
  std::vector<ToolCall> calls;
};

// In pieces of n bytes.
Joined in_pieces(AnswerParts parts, std::string_view text, size_t n) {
  Joined out;
  do {
    const AnswerParts::Piece piece = parts.push(text.substr(0, n), text.size() <= n);
    text.remove_prefix(std::min(n, text.size()));
    out.content += piece.content;
    add_pieces(out.calls, piece.calls);
  } while (!text.empty());
  return out;
}

}  // namespace

TEST_CASE("tool calls: the same from any pieces") {
  const std::string calls = R"([{"name": "a\"b", "arguments": {"x": "}],{\"name\"", "y": [{"z": {}}]}}, {"arguments":{"late":1}, "id": "123456789", "name": "second"},{"name":"none"}])";
  for (size_t n = 1; n <= calls.size(); ++n) {
    const Joined joined = in_pieces({CallForm::calls, {}, false}, calls, n);
    REQUIRE(joined.calls.size() == 3);
    CHECK(joined.content.empty());
    CHECK(joined.calls[0].name == "a\"b");
    CHECK(joined.calls[0].arguments == R"({"x": "}],{\"name\"", "y": [{"z": {}}]})");
    CHECK(joined.calls[0].id.size() == 9);
    CHECK(joined.calls[0].id != joined.calls[1].id);
    CHECK(joined.calls[1].name == "second");
    CHECK(joined.calls[1].arguments == R"({"late":1})");
    CHECK(joined.calls[2].arguments.empty());
  }
  const Joined one = in_pieces({CallForm::calls, {}, true}, calls, 7);
  CHECK(one.calls.size() == 1);
}

TEST_CASE("tool calls: arguments come as they are written") {
  CallReader reader;
  const auto first = reader.push(R"([{"name": "f", "arguments": {"a)");
  REQUIRE(first.size() == 2);
  CHECK(first[0].name == "f");
  CHECK(first[1].arguments == "{\"a");
  const auto second = reader.push(R"(": 1}}])");
  REQUIRE(second.size() == 1);
  CHECK(second[0].arguments == "\": 1}");
  CHECK(second[0].name.empty());
}

TEST_CASE("tool calls: behind a marker, with words before it") {
  const std::string text = concat("I ask. ", kControlMark, R"( [{"name":"f","arguments":{}}])");
  for (size_t n = 1; n <= text.size(); ++n) {
    const Joined joined = in_pieces({CallForm::marked, {"f"}, false}, text, n);
    CHECK(joined.content == "I ask. ");
    REQUIRE(joined.calls.size() == 1);
    CHECK(joined.calls[0].arguments == "{}");
  }
  // The token's name, spelt by others, is text.
  for (const char* words : {"no [TOOL", R"(I say [TOOL_CALLS] [{"name":"f","arguments":{}}])"}) {
    const Joined joined = in_pieces({CallForm::marked, {"f"}, false}, words, 1);
    CHECK(joined.content == words);
    CHECK(joined.calls.empty());
  }
}

TEST_CASE("tool calls: guessed where all of the text is calls of known tools") {
  const auto guess = [](std::string_view text, size_t n) { return in_pieces({CallForm::guess, {"f", "g"}, false}, text, n); };
  for (const char* text : {R"([{"name":"f","arguments":{"a":1}}])", R"( {"name": "f", "arguments": {"a":1}} )", "```json\n[{\"name\":\"f\",\"arguments\":{\"a\":1}}]\n```",
                           R"(<tool_call>{"name":"f","parameters":{"a":1}}</tool_call>)", R"([TOOL_CALLS] [{"name":"f","arguments":"{\"a\":1}"}])"})
    for (const size_t n : {size_t{1}, size_t{5}, size_t{1000}}) {
      const Joined joined = guess(text, n);
      CHECK_MESSAGE(joined.content.empty(), text);
      REQUIRE(joined.calls.size() == 1);
      CHECK(joined.calls[0].name == "f");
      CHECK(joined.calls[0].arguments == R"({"a":1})");
    }
  // Any JSON is read, also such as no grammar here writes.
  for (const char* arguments : {R"({"id":12345678901234567890})", R"({"x":1.23456789012345678901e-123})", "{\r\n\t \"x\" :\n\n [ ] \r\n}", "{\"x\":\"\x7f\"}"}) {
    const Joined joined = guess(concat(R"([{"name" : "f",  "arguments": )", arguments, "}]\r\n"), 3);
    CHECK_MESSAGE(joined.content.empty(), arguments);
    REQUIRE(joined.calls.size() == 1);
    CHECK(parse_json(joined.calls[0].arguments, "arguments") == parse_json(arguments, "arguments"));
  }
  for (const char* text : {"Hello [there]", R"({"answer": 42})", R"([{"name":"h","arguments":{}}])", R"([{"name":"f","arguments":{}}] or so)", R"([{"name":"f","arguments":{})", R"([{"name":"f","arguments":[1]}])", ""})
    for (const size_t n : {size_t{1}, size_t{1000}}) {
      const Joined joined = guess(text, n);
      CHECK(joined.calls.empty());
      CHECK(joined.content == text);
    }
  // Words are not held back.
  AnswerParts parts(CallForm::guess, {"f"}, false);
  CHECK(parts.push("He", false).content == "He");
}

TEST_CASE("tool calls: what is cut off keeps what there is") {
  const Joined joined = in_pieces({CallForm::calls, {}, false}, R"([{"name": "f", "arguments": {"a": "lo)", 3);
  REQUIRE(joined.calls.size() == 1);
  CHECK(joined.calls[0].arguments == R"({"a": "lo)");
  CHECK(in_pieces({CallForm::calls, {}, false}, R"([{"na)", 3).calls.empty());
}

TEST_CASE("tool calls: without a name there is none") {
  for (const size_t n : {size_t{1}, size_t{3}, size_t{1000}}) {
    CHECK(in_pieces({CallForm::calls, {}, false}, R"([{"name": "", "arguments": {}}])", n).calls.empty());
    const Joined joined = in_pieces({CallForm::calls, {}, false}, R"([{"arguments": {"a": 1}, "name": ""}, {"name": "f", "arguments": {"b": 2}}])", n);
    REQUIRE(joined.calls.size() == 1);
    CHECK(joined.calls[0].arguments == R"({"b": 2})");
  }
}

}  // namespace duet::server
