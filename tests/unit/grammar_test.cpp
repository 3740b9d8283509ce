#include "grammar/grammar.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <string>

#include "base/error.h"
#include "grammar/char_set.h"
#include "grammar/matcher.h"
#include "runtime/unicode.h"
#include "tests/support/errors.h"

namespace duet::grammar {
namespace {

enum class Verdict { complete, prefix, no };

Verdict judge(Matcher& matcher, std::string_view text) {
  Matcher::State state = matcher.start();
  for (const char c : text) state = matcher.next(state, static_cast<uint8_t>(c));
  return matcher.may_end(state) ? Verdict::complete : state != Matcher::kDead ? Verdict::prefix : Verdict::no;
}

Verdict judge(std::string_view gbnf, std::string_view text) {
  const Grammar grammar = Grammar::parse(gbnf);
  Matcher matcher(grammar);
  return judge(matcher, text);
}

bool takes(std::string_view gbnf, std::string_view text) { return judge(gbnf, text) == Verdict::complete; }

std::string refusal(std::string_view gbnf) {
  try {
    Grammar::parse(gbnf);
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::format);
    return e.what();
  }
  return {};
}

// Numbers and operators with parentheses, by precedence.
const char* const kArithmetic = R"g(
root ::= (expr "=" ws term "\n")+   # several lines
expr ::= term ([-+*/] term)*
term ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num ::= [0-9]+ ws
ws ::= [ \t\n]*
)g";

const char* const kJson = R"g(
root ::= object
value ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
)g";

}  // namespace

TEST_CASE("grammar: literals, alternatives, groups, repetitions") {
  CHECK(takes(R"(root ::= "ab" | "c")", "ab"));
  CHECK(takes(R"(root ::= "ab" | "c")", "c"));
  CHECK(judge(R"(root ::= "ab" | "c")", "a") == Verdict::prefix);
  CHECK(judge(R"(root ::= "ab" | "c")", "b") == Verdict::no);
  CHECK(takes(R"(root ::= "x"* "y"+ "z"?)", "xxyyz"));
  CHECK(takes(R"(root ::= "x"* "y"+ "z"?)", "y"));
  CHECK_FALSE(takes(R"(root ::= "x"* "y"+ "z"?)", "xz"));
  for (const int n : {1, 2, 3, 4, 5, 6}) {
    const std::string text(static_cast<size_t>(n), 'a');
    CHECK(takes(R"(root ::= "a"{2,4})", text) == (n >= 2 && n <= 4));
    CHECK(takes(R"(root ::= "a"{3})", text) == (n == 3));
    CHECK(takes(R"(root ::= "a"{ 3 , })", text) == (n >= 3));
  }
  CHECK(takes(R"(root ::= "a"{0} "b")", "b"));
  CHECK(takes(R"(root ::= ("a" | "b" "c")* "d")", "abcbcad"));
  CHECK(takes("root ::= | \"a\"", ""));
  CHECK(takes("root ::=\n  \"a\"\n", "a"));
  CHECK(takes("root ::= # where texts begin\n\n  other \"b\" |\n \"c\"\nother ::=\r\n  \"a\"", "ab"));
  CHECK(takes("root ::= none \"a\"\nnone ::=\nmore ::= \"b\"\n", "a"));  // a rule may have no body
  CHECK(takes("root ::= (\n \"a\" # one\n | \"b\"\n)\n", "b"));
  CHECK(takes("root ::= \"a\" |\n  \"b\"\n  | other\r\nother ::= \"c\"", "c"));
  CHECK(takes(R"(root ::= (("a"?)*)* "b")", "aab"));
  CHECK(takes(R"(root ::= "\x41\u00e4\U0001F600\"\\\n\[\]")", "A\xC3\xA4\xF0\x9F\x98\x80\"\\\n[]"));
}

TEST_CASE("grammar: classes hold whole characters") {
  CHECK(takes("root ::= [a-c\\-x-]", "-"));
  CHECK(takes("root ::= [ä-ö]", "ö"));
  CHECK(judge("root ::= [ä-ö]", "\xC3") == Verdict::prefix);
  CHECK(judge("root ::= [ä-ö]", "\xC3\x9F") == Verdict::no);  // ß lies before ä
  CHECK(takes("root ::= [^a]", "\xF0\x9F\x98\x80"));
  CHECK_FALSE(takes("root ::= [^a]", "a"));
  CHECK_FALSE(takes("root ::= [^😀]", "\xF0\x9F\x98\x80"));
  CHECK(takes("root ::= .{3}", "a\xE2\x82\xAC\n"));
  for (const char* invalid : {"\x80", "\xC0\x80", "\xE0\x80\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xFF"}) CHECK(judge("root ::= .", invalid) == Verdict::no);
}

TEST_CASE("grammar: a class takes what it says, for all characters") {
  const CharSet set = CharSet::of({{U'a', U'f'}, {0x7E, 0x90}, {0x7FE, 0x801}, {0xFFFE, 0x10003}, {0xD000, 0xE005}, {U'c', U'z'}});
  const Grammar grammar = Grammar::parse(R"(root ::= [c-za-f\x7e-\u0090\u07fe-\u0801\uFFFE-\U00010003\uD000-\uE005])");
  Matcher matcher(grammar);
  size_t n_wrong = 0;
  for (char32_t c = 0; c <= 0x10FFFF; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    std::string text;
    append_utf8(text, c);
    n_wrong += (judge(matcher, text) == Verdict::complete) != set.contains(c);
    n_wrong += set.contains(c) == set.complement().contains(c);
  }
  CHECK(n_wrong == 0);
}

TEST_CASE("grammar: recursion") {
  CHECK(takes(kArithmetic, "(a+1)*b2=3\nx=(((y)))\n"));
  CHECK(judge(kArithmetic, "(a+1") == Verdict::prefix);
  CHECK(judge(kArithmetic, "a+)") == Verdict::no);
  CHECK(takes(kJson, R"({"a": [1, -2.5e3, {"b": null}], "ü\u00e4": "\"x"})"));
  CHECK(judge(kJson, R"({"a": [1,])") == Verdict::no);
  CHECK(judge(kJson, R"({"a" )") == Verdict::prefix);
  CHECK(takes(R"(root ::= "a" root "b" | "")", "aaabbb"));
  CHECK_FALSE(takes(R"(root ::= "a" root "b" | "")", "aaabb"));
  CHECK(takes(R"(root ::= "a" root | "a")", std::string(1000, 'a')));
}

TEST_CASE("grammar: what cannot work is refused with its line") {
  CHECK(refusal("root ::= x") == "grammar: line 1: there is no rule 'x'");
  CHECK(refusal("x ::= \"a\"") == "grammar: there is no rule 'root', where texts begin");
  CHECK(refusal("root ::= \"a\"\nroot ::= \"b\"").find("line 2: the rule 'root' is defined twice") != std::string::npos);
  CHECK(refusal("root ::= root \"a\" | \"b\"").find("left-recursive") != std::string::npos);
  CHECK(refusal("root ::= \"x\"\na ::= b? c\nc ::= a \"y\" | \"x\"\nb ::= \"z\"").find("left-recursive") != std::string::npos);
  CHECK(refusal("root ::= \"a\" root").find("never ends") != std::string::npos);
  for (const char* bad : {"root ::= \"a", "root ::= [a", "root ::= (\"a\"", "root ::= \"a\")", "root \"a\"", "root ::= \"\\q\"", "root ::= \"\\uD800\"", "root ::= [b-a]",
                          "root ::= []", "root ::= \"a\"{2,1}", "root ::= \"a\"{", "root ::= \"a\"{x}", "root ::= * \"a\"", "::= \"a\"", "root ::= \"\xFF\"", "", "root ::= <think>"})
    CHECK_MESSAGE(!refusal(bad).empty(), bad);
}

TEST_CASE("grammar: hostile sizes are refused at once") {
  CHECK(refusal("root ::= \"a\"{1000000}").find("more than") != std::string::npos);
  CHECK(refusal("root ::= (((\"a\"{1000}){1000}){1000}){1000}").find("larger than") != std::string::npos);
  CHECK(refusal("root ::= ((\"\"{200000}){200000}){200000}").find("come to more than") != std::string::npos);
  CHECK(refusal("root ::= " + std::string(1000, '(') + "\"a\"" + std::string(1000, ')')).find("deeper") != std::string::npos);
  CHECK(refusal("root ::= \"a\"" + std::string(1000, '*')).find("repetition of a repetition") != std::string::npos);
  CHECK(refusal("root ::= \"" + std::string(2000000, 'a') + "\"").find("bytes") != std::string::npos);
}

TEST_CASE("matcher: ambiguity costs no more than the length of the text") {
  // Two ways at each step: 2^400 in all.
  const Grammar twice = Grammar::parse(R"(root ::= "a" root "b" | "a" root "c" | "d" | (("e"*)*)*)");
  Matcher matcher(twice);
  CHECK(judge(matcher, std::string(400, 'a') + "d" + std::string(200, 'b') + std::string(200, 'c')) == Verdict::complete);
  CHECK(judge(matcher, std::string(400, 'a') + "d" + std::string(401, 'b')) == Verdict::no);
  const Grammar sums = Grammar::parse("root ::= x x x x x x x x\nx ::= \"a\"* y*\ny ::= \"a\"? \"a\"+");
  Matcher many(sums);
  CHECK(judge(many, std::string(2000, 'a')) == Verdict::complete);
  // A text that is in the grammar in as many ways as there are binary trees.
  const Grammar trees = Grammar::parse(R"(root ::= "a" | "a" root root | "a" root root root)");
  Matcher forest(trees);
  CHECK(judge(forest, std::string(100, 'a')) == Verdict::complete);
}

TEST_CASE("grammar: either of two") {
  const Grammar both = Grammar::either(Grammar::parse(kJson), Grammar::either(Grammar::parse("root ::= \"yes\" x\nx ::= \"\" | \"!\""), Grammar::parse("root ::= [0-9]{2}")));
  Matcher matcher(both);
  for (const char* text : {"{\"a\": [1]}", "yes", "yes!", "42"}) CHECK_MESSAGE(judge(matcher, text) == Verdict::complete, text);
  for (const char* text : {"{\"a\": 1", "ye", "4"}) CHECK_MESSAGE(judge(matcher, text) == Verdict::prefix, text);
  for (const char* text : {"yes?", "423", "", "{}x"}) CHECK_MESSAGE((judge(matcher, text) == Verdict::no) == (*text != 0), text);
}

TEST_CASE("matcher: a limit of work ends what is too ambiguous") {
  const Grammar trees = Grammar::parse(R"(root ::= "a" | "a" root root | "a" root root root)");
  Matcher matcher(trees, {.max_work = 1000});
  CHECK(test::thrown_by([&] { judge(matcher, std::string(1000, 'a')); }).message.find("too ambiguous") != std::string::npos);
  matcher.allow_work();
  CHECK(judge(matcher, "aaa") == Verdict::complete);  // usable afterwards
}

TEST_CASE("matcher: equal situations are one state, and forgetting keeps the present one") {
  const Grammar json = Grammar::parse(kJson);
  Matcher matcher(json);
  const auto follow = [&](Matcher::State state, std::string_view text) {
    for (const char c : text) state = matcher.next(state, static_cast<uint8_t>(c));
    return state;
  };
  const Matcher::State a = follow(matcher.start(), R"({"a": "x)"), b = follow(matcher.start(), R"({"b": 1, "cdef": "some other text)");
  CHECK(a == b);
  CHECK(a != follow(matcher.start(), R"({"a": ["x)"));
  Matcher::State deep = matcher.start();
  for (int i = 0; i < 300; ++i) deep = follow(deep, R"({"k": [1, )");
  const size_t before = matcher.bytes();
  deep = follow(deep, "2");
  for (int i = 0; i < 300; ++i) deep = follow(deep, "]}");
  CHECK(matcher.may_end(deep));
  CHECK(follow(deep, "  ") == Matcher::kDead);  // more than one space
  deep = follow(matcher.start(), R"({"k": [)");
  deep = matcher.forget(deep);
  CHECK(matcher.bytes() < before / 10);
  CHECK(matcher.may_end(follow(deep, "1]}")));
  CHECK(follow(deep, "1}") == Matcher::kDead);
  CHECK(matcher.may_end(follow(matcher.start(), "{}")));
}

}  // namespace duet::grammar
