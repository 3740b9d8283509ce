#include "grammar/json_schema.h"

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <random>
#include <string>

#include "base/json.h"
#include "grammar/matcher.h"
#include "grammar/number_range.h"
#include "tests/support/errors.h"

namespace duet::grammar {
namespace {

Json json(const std::string& text) { return parse_json(text, "test"); }

bool matches(const Grammar& grammar, std::string_view text) {
  Matcher matcher(grammar);
  Matcher::State state = matcher.start();
  for (const char c : text) state = matcher.next(state, static_cast<uint8_t>(c));
  return matcher.may_end(state);
}

bool fits(const std::string& schema, std::string_view text) { return matches(Grammar::parse(schema_grammar(json(schema), "schema")), text); }

std::string refusal(const std::string& schema) {
  return test::thrown_by([&] { Grammar::parse(schema_grammar(json(schema), "schema")); }).message;
}

// Any text of a grammar, as a model of no sense would write it; "" when it gets too long.
std::string random_text(const Grammar& grammar, std::mt19937& random) {
  Matcher matcher(grammar);
  Matcher::State state = matcher.start();
  std::string out;
  while (out.size() < 2000) {
    std::string next;
    for (int byte = 0; byte < 256; ++byte)
      if (matcher.next(state, static_cast<uint8_t>(byte)) != Matcher::kDead) next += static_cast<char>(byte);
    if (matcher.may_end(state) && (next.empty() || random() % 4 == 0)) return out;
    REQUIRE(!next.empty());
    // What closes is taken more often, or objects would never end.
    const size_t closing = next.find_first_of("}]\"");
    out += closing != std::string::npos && random() % 3 == 0 ? next[closing] : next[random() % next.size()];
    state = matcher.next(state, static_cast<uint8_t>(out.back()));
  }
  return {};
}

}  // namespace

TEST_CASE("json schema: objects have their properties, in order") {
  const std::string schema = R"({"type":"object","properties":{"a":{"type":"integer"},"b":{"type":"string"},"c":{"type":"boolean"}},"required":["b"],"additionalProperties":false})";
  for (const char* text : {R"({"b":""})", R"({"a": 1, "b": "x"})", R"({"b":"x","c":true})", "{\n  \"a\": -20,\n  \"b\": \"\",\n  \"c\": false\n}"}) CHECK_MESSAGE(fits(schema, text), text);
  for (const char* text : {"{}", R"({"a":1})", R"({"b":"x","a":1})", R"({"b":"x",})", R"({"b":"x","d":1})", R"({"a":01,"b":""})", R"({"a":1.0,"b":""})", R"({"b":null})", R"({"a":1 "b":""})"})
    CHECK_FALSE_MESSAGE(fits(schema, text), text);
  const std::string optional = R"({"properties":{"a":{"const":1},"b":{"const":2},"c":{"const":3}}})";
  for (const char* text : {"{}", R"({"a":1})", R"({"c":3})", R"({"a":1,"c":3})", R"({"a":1,"b":2,"c":3})"}) CHECK_MESSAGE(fits(optional, text), text);
  for (const char* text : {R"({,"a":1})", R"({"b":2,"a":1})", R"({"d":1})"}) CHECK_FALSE_MESSAGE(fits(optional, text), text);
  CHECK(fits(R"({"type":"object","required":["x"]})", R"({"x":[1,{"y":null}]})"));
  CHECK_FALSE(fits(R"({"type":"object","required":["x"]})", "{}"));
}

TEST_CASE("json schema: other properties, none spelt like a declared one") {
  const std::string schema = R"({"properties":{"ab":{"type":"integer"},"a":{"type":"integer"}},"additionalProperties":{"type":"string"}})";
  for (const char* text : {R"({"ab":1,"x":"y"})", R"({"abc":"","b":"","aa":""})", R"({"x":"y","z":"\n"})", R"({"ab":1,"a":2})"}) CHECK_MESSAGE(fits(schema, text), text);
  for (const char* text : {R"({"ab":"x"})", R"({"x":1})", R"({"x":"y","ab":"z"})", R"({"x":"y","a":"z"})", R"({"x":"","\u0061":""})"}) CHECK_FALSE_MESSAGE(fits(schema, text), text);
  CHECK(fits(R"({"additionalProperties":{"type":"integer"}})", R"({"any \u0061":1,"x":2})"));
  CHECK(fits(R"({"type":"object"})", R"({"any":[{}]})"));
  CHECK_FALSE(fits(R"({"type":"object","additionalProperties":false})", R"({"any":1})"));
}

TEST_CASE("json schema: arrays") {
  const std::string some = R"({"type":"array","items":{"type":"integer"},"minItems":2,"maxItems":3})";
  CHECK_FALSE(fits(some, "[1]"));
  CHECK(fits(some, "[1, 2]"));
  CHECK(fits(some, "[1,2,3]"));
  CHECK_FALSE(fits(some, "[1,2,3,4]"));
  CHECK(fits(R"({"type":"array"})", "[]"));
  CHECK(fits(R"({"items":{"type":"null"}})", "[null,null ]"));
  CHECK(fits(R"({"type":"array","maxItems":0})", "[]"));
  CHECK_FALSE(fits(R"({"type":"array","maxItems":0})", "[1]"));
  CHECK(fits(R"({"type":"array","maxItems":1})", "[1]"));
  CHECK_FALSE(fits(R"({"type":"array","minItems":1})", "[]"));
  const std::string tuple = R"({"prefixItems":[{"type":"integer"},{"type":"string"}],"minItems":1})";
  CHECK(fits(tuple, R"([1,"a"])"));
  CHECK(fits(tuple, "[1]"));
  CHECK_FALSE(fits(tuple, "[]"));
  CHECK_FALSE(fits(tuple, R"([1,"a",2])"));
  CHECK(fits(R"({"prefixItems":[{"type":"integer"}],"items":{"type":"null"}})", "[1,null,null]"));
  CHECK(fits(R"({"items":[{"type":"integer"},{"type":"null"}]})", "[1,null]"));
}

TEST_CASE("json schema: strings") {
  CHECK(fits(R"({"type":"string"})", R"("ä\"\\\/\b\f\n\r\t\u00e4\ud83d\ude00")"));
  for (const char* text : {R"("\ud83d")", R"("\ude00")", R"("\x")", "\"\n\"", "\"", "a"}) CHECK_FALSE_MESSAGE(fits(R"({"type":"string"})", text), text);
  CHECK(fits(R"({"minLength":2,"maxLength":3})", R"("ä\n")"));
  CHECK_FALSE(fits(R"({"minLength":2,"maxLength":3})", R"("ä")"));
  CHECK_FALSE(fits(R"({"type":"string","maxLength":3})", R"("abcd")"));
  CHECK(fits(R"({"enum":["a","b c",1,null,{"x":[true]}]})", R"({"x":[true]})"));
  CHECK_FALSE(fits(R"({"type":"string","enum":["a",1]})", "1"));
  CHECK(fits(R"({"const":"a \"b\" \\"})", R"("a \"b\" \\")"));
  struct Row {
    const char *format, *good, *bad;
  };
  for (const Row& row : {Row{"date", "2024-02-29", "2023-02-29"}, Row{"date", "1999-12-31", "1999-04-31"}, Row{"time", "23:59:59.5+02:00", "24:00:00Z"},
                         Row{"date-time", "2024-01-02T03:04:05Z", "2024-01-02 03:04:05Z"}, Row{"uuid", "123e4567-e89b-12d3-a456-426614174000", "123e4567"},
                         Row{"ipv4", "255.0.10.1", "256.0.0.1"}, Row{"email", "a.b@c-d.org", "a.@b"}, Row{"hostname", "a-b.example", "-a"}, Row{"uri", "https://a.b/c", "a b"},
                         Row{"duration", "P3DT4H5M", "P"}, Row{"ipv6", "1:2:3:4:5:6:7:abcd", "1"}}) {
    const std::string schema = concat(R"({"type":"string","format":")", row.format, "\"}");
    CHECK_MESSAGE(fits(schema, concat('"', row.good, '"')), row.good);
    CHECK_FALSE_MESSAGE(fits(schema, concat('"', row.bad, '"')), row.bad);
  }
  for (const char* unknown : {"iri", "path", "uuid4", "ipv4network", "password", "no such"}) {
    CHECK_MESSAGE(fits(concat(R"({"type":"string","format":")", unknown, "\"}"), R"("any text")"), unknown);
    CHECK_MESSAGE(fits(concat(R"({"type":"string","minLength":2,"format":")", unknown, "\"}"), R"("ab")"), unknown);
    CHECK_FALSE_MESSAGE(fits(concat(R"({"type":"string","pattern":"^b$","format":")", unknown, "\"}"), R"("a")"), unknown);
  }
}

TEST_CASE("json schema: patterns") {
  const auto pattern = [](const std::string& text) { return Json{{"type", "string"}, {"pattern", text}}.dump(); };
  struct Row {
    const char *pattern, *good, *bad;
  };
  for (const Row& row : {Row{"^[a-z]+\\d{2,3}$", "ab12", "ab1"}, Row{"^(foo|ba(r|z))?$", "baz", "ba"}, Row{"b", "abc", "ac"}, Row{"^a|b$", "xb", "xbx"}, Row{"^(?:a\\.b){2}$", "a.ba.b", "axbaxb"},
                         Row{"^[^x]$", "y", "x"}, Row{"^\\w+?\\s\\S$", "a_1 -", "- -"}, Row{"^\\u00e4[\\x41-C]$", "äB", "äD"}, Row{"^(?<year>\\d{4})$", "2024", "202"}, Row{"^[\\w.-]+@x$", "a-b.c@x", "a b@x"}})
    {
      CHECK_MESSAGE(fits(pattern(row.pattern), concat('"', row.good, '"')), row.pattern);
      CHECK_FALSE_MESSAGE(fits(pattern(row.pattern), concat('"', row.bad, '"')), row.pattern);
    }
  for (const char* none : {"^\\S$", "^[^\\s]$"})
    for (const char* space : {" ", "\u00a0", "\u3000", "\ufeff", "\u2028", "\u2003"}) CHECK_FALSE_MESSAGE(fits(pattern(none), concat('"', space, '"')), space);
  CHECK(fits(pattern("^\\s$"), "\"\u3000\""));
  for (const char* separator : {"\u2028", "\u2029"}) CHECK_FALSE(fits(pattern("^.$"), concat('"', separator, '"')));
  CHECK(fits(pattern("^a{2,}$"), R"("aaa")"));
  for (const char* bad : {"^a{1,2,3}$", "^a{5,2}$", "^a{1x}$", "^a{1000000}$", "^a{99999999999999999999}$"}) {
    CAPTURE(bad);
    CHECK(refusal(pattern(bad)).find(concat("the pattern '", bad, "' cannot be used: a repetition")) != std::string::npos);
  }
  CHECK(fits(pattern("^[\"\\\\]\\n.$"), R"("\"\n\\")"));
  for (const char* bad : {"(?=a)", "(?<!a)", "(a)\\1", "\\bword", "\\p{L}", "(a", "a)", "[a", "a**", "*a", "a{2", "x^y", "[b-a]"}) CHECK_MESSAGE(refusal(pattern(bad)).find("pattern") != std::string::npos, bad);
}

TEST_CASE("json schema: bounds of integers hold for every integer") {
  for (const auto& [low, high] : {std::pair{-13, 107}, {0, 0}, {-5, -5}, {7, 1234}, {-1000, -99}, {99, 100}, {-1, 1}, {10, 99}, {0, 9}}) {
    const Grammar grammar = Grammar::parse(schema_grammar({{"type", "integer"}, {"minimum", low}, {"maximum", high}}, "schema"));
    size_t n_wrong = 0;
    for (int i = -1500; i <= 1500; ++i) n_wrong += matches(grammar, std::to_string(i)) != (i >= low && i <= high);
    CHECK_MESSAGE(n_wrong == 0, low, " ", high);
  }
  for (const char* bound : {"minimum", "exclusiveMinimum"}) {  // a zero with a sign is zero
    CHECK(fits(concat(R"({"type":"number",")", bound, R"(":-0.0})"), "0") == (std::string_view(bound) == "minimum"));
    CHECK_FALSE(fits(concat(R"({"type":"number",")", bound, R"(":-0.0})"), "-1"));
    CHECK(fits(concat(R"({"type":"number",")", bound, R"(":-0.0})"), "0.5"));
  }
  const std::string open = R"({"type":"integer","exclusiveMinimum":-3})";
  for (const char* text : {"-2", "0", "99", "1234567890123456"}) CHECK_MESSAGE(fits(open, text), text);
  for (const char* text : {"-3", "-10", "-0", "01", "1.5"}) CHECK_FALSE_MESSAGE(fits(open, text), text);
  CHECK(fits(R"({"type":"integer","maximum":-1})", "-123456"));
  CHECK_FALSE(fits(R"({"type":"integer","minimum":0.5,"maximum":1.5})", "2"));
  CHECK(fits(R"({"type":"integer","minimum":0.5,"maximum":1.5})", "1"));
}

TEST_CASE("json schema: bounds of numbers hold for every decimal") {
  struct Row {
    double low, high;
    bool low_exclusive, high_exclusive;
  };
  for (const Row& row : {Row{-1.25, 2.5, false, false}, Row{0, 1, true, true}, Row{0.105, 0.11, false, true}, Row{-0.5, -0.25, true, false}, Row{1, 1, false, false}, Row{-2, 0, false, true}, Row{9.99, 10.01, false, false}}) {
    const Json schema{{"type", "number"}, {row.low_exclusive ? "exclusiveMinimum" : "minimum", row.low}, {row.high_exclusive ? "exclusiveMaximum" : "maximum", row.high}};
    const Grammar grammar = Grammar::parse(schema_grammar(schema, "schema"));
    size_t n_wrong = 0;
    for (int i = -12000; i <= 12000; ++i) {
      const double x = i / 1000.0;
      if (i == 0 && row.low_exclusive) continue;  // "0.000", which the row of (0, 1) refuses as it should
      std::array<char, 32> text{};
      std::snprintf(text.data(), text.size(), "%.3f", x);
      const bool inside = (row.low_exclusive ? x > row.low : x >= row.low) && (row.high_exclusive ? x < row.high : x <= row.high);
      n_wrong += matches(grammar, text.data()) != inside;
    }
    CHECK_MESSAGE(n_wrong == 0, schema.dump());
  }
  CHECK(fits(R"({"type":"number","minimum":0})", "12.5"));
  CHECK_FALSE(fits(R"({"type":"number","minimum":0})", "-0.1"));
  CHECK(fits(R"({"type":"number"})", "-1.5e-10"));
  CHECK_FALSE(fits(R"({"type":"number"})", "1e400"));
  CHECK(refusal(R"({"type":"number","minimum":2,"maximum":1})").find("no number") != std::string::npos);
}

TEST_CASE("json schema: combinations and references") {
  const std::string list = R"({"$ref":"#/$defs/node","$defs":{"node":{"type":"object","properties":{"value":{"type":"integer"},"next":{"anyOf":[{"$ref":"#/$defs/node"},{"type":"null"}]}},"required":["value","next"]}}})";
  CHECK(fits(list, R"({"value":1,"next":{"value":2,"next":null}})"));
  CHECK_FALSE(fits(list, R"({"value":1,"next":{"value":2}})"));
  CHECK(fits(R"({"type":["integer","null"],"minimum":3})", "null"));
  CHECK_FALSE(fits(R"({"type":["integer","null"],"minimum":3})", "2"));
  CHECK(fits(R"({"anyOf":[{"type":"integer"},{"type":"string"}]})", "\"a\""));
  CHECK(fits(R"({"oneOf":[{"const":1},{"const":2}]})", "2"));
  const std::string all = R"({"allOf":[{"properties":{"a":{"type":"integer"}},"required":["a"]},{"$ref":"#/definitions/b"}],"definitions":{"b":{"properties":{"b":{"type":"null"}},"required":["b"]}}})";
  CHECK(fits(all, R"({"a":1,"b":null})"));
  CHECK_FALSE(fits(all, R"({"a":1})"));
  CHECK(fits(R"({"type":"object","properties":{"a":{"type":"integer"},"b":{"type":"integer"}},"anyOf":[{"required":["a"]},{"required":["b"]}]})", R"({"b":1})"));
  CHECK(fits(R"({"$ref":"#/$defs/x","minimum":5,"$defs":{"x":{"type":"integer","minimum":1,"maximum":9}}})", "6"));
  CHECK_FALSE(fits(R"({"$ref":"#/$defs/x","minimum":5,"$defs":{"x":{"type":"integer","minimum":1,"maximum":9}}})", "4"));
  CHECK(fits("{}", R"([1,{"a":"b"}])"));
  CHECK(fits(R"({"type":"object","properties":{"self":{"$ref":"#"}}})", R"({"self":{"self":{}}})"));
  CHECK(fits(R"({"title":"T","description":"d","type":"boolean","default":true})", "false"));
}

TEST_CASE("json schema: what cannot be kept is refused by name") {
  CHECK(refusal(R"({"not":{}})").find("'not' is not supported") != std::string::npos);
  CHECK(refusal(R"({"properties":{"a":{"type":"array","uniqueItems":true}}})").find("'uniqueItems' is not supported") != std::string::npos);
  CHECK(refusal(R"({"type":"integer","multipleOf":5})").find("'multipleOf'") != std::string::npos);
  CHECK(refusal(R"({"type":"string","pattern":"a","minLength":2})").find("'pattern'") != std::string::npos);
  CHECK(refusal(R"({"enum":[{"a":1},"b"],"additionalProperties":false})").find("'additionalProperties' beside 'enum'") != std::string::npos);
  CHECK(refusal(R"({"const":[1],"prefixItems":[{"type":"string"}]})").find("'prefixItems' beside 'enum'") != std::string::npos);
  CHECK(refusal(R"({"enum":["a"],"additionalProperties":false})").empty());  // says nothing of texts
  CHECK(refusal(R"({"$ref":"other.json"})").find("another document") != std::string::npos);
  CHECK(refusal(R"({"$ref":"#/x"})").find("leads nowhere") != std::string::npos);
  CHECK(refusal(R"({"$ref":"#"})") != "");
  CHECK(refusal(R"({"allOf":[{"$ref":"#"},{"type":"object"}]})") != "");
  CHECK(refusal(R"({"type":"thing"})").find("no type 'thing'") != std::string::npos);
  CHECK(refusal(R"({"type":"object","properties":{"a":{"$ref":"#","required":["b"],"title":"x"}},"required":["a"]})") != "");  // never ends
  CHECK(refusal(R"({"type":"array","minItems":3,"maxItems":2})") != "");
  CHECK(refusal(R"({"type":"array","minItems":1000000})") != "");
  CHECK(refusal(R"({"allOf":[{"type":"string"},{"type":"integer"}]})").find("no value has all") != std::string::npos);
  CHECK(refusal(R"({"type":5})") != "");
  CHECK(refusal(R"({"properties":[]})") != "");
  CHECK(refusal("false") != "");
  // Combinations of combinations: 2^60 in all, and a long one again and again.
  Json doubling{{"$ref", "#/$defs/x0"}, {"$defs", Json::object()}};
  for (int i = 0; i < 60; ++i) {
    const Json next{{"$ref", concat("#/$defs/x", i + 1)}};
    doubling["$defs"][concat("x", i)] = {{"allOf", Json::array({next, next})}};
  }
  doubling["$defs"]["x60"] = {{"type", "string"}};
  CHECK(refusal(doubling.dump()) != "");
  Json many{{"type", "object"}, {"properties", Json::object()}, {"anyOf", Json::array()}};
  for (int i = 0; i < 1000; ++i) {
    many["properties"][concat("property", i)] = {{"type", "string"}};
    many["anyOf"].push_back({{"required", Json::array({concat("property", i)})}});
  }
  CHECK(refusal(many.dump()) != "");
  CHECK(refusal("5") != "");
}

TEST_CASE("json schema: small ones that ask for much are written or refused soon") {
  // Parts of an allOf with the same 500 names each, all of which the other must have too.
  const auto names = [](int n, const Json& value) {
    Json out = Json::object();
    for (int i = 0; i < n; ++i) out[std::to_string(i)] = value;
    return out;
  };
  const auto repeated = [](const Json& a, const Json& b, int n) {
    Json parts = Json::array({{{"$ref", "#/b"}}});
    for (int i = 0; i < n; ++i) parts.push_back({{"$ref", "#/a"}});
    return Json{{"allOf", parts}, {"a", {{"properties", a}}}, {"b", {{"properties", b}}}};
  };
  const auto seconds = [](const Json& schema) {
    const std::clock_t start = std::clock();  // of the processor: others may use it too
    static_cast<void>(refusal(schema.dump()));
    return static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  };
  const Json same = repeated(names(500, Json::object()), {{"0", true}}, 200);
  CHECK(refusal(same.dump()).empty());
  CHECK(seconds(same) < 10);
  Json different{{"allOf", Json::array()}, {"$defs", Json::object()}};  // none like another
  for (int i = 0; i < 90; ++i) {
    different["allOf"].push_back({{"$ref", concat("#/$defs/", i)}});
    different["$defs"][std::to_string(i)] = {{"properties", names(60, {{"maxLength", i + 1}})}};
  }
  CHECK(seconds(different) < 10);
  CHECK(seconds(repeated(names(2000, {{"minLength", 1}}), names(2000, {{"minLength", 2}}), 1000)) < 10);
  Json keywords{{"allOf", Json::array()}, {"a", Json::object()}};  // that nobody knows
  for (int i = 0; i < 5000; ++i) keywords["a"][concat("x", i)] = i;
  for (int i = 0; i < 1000; ++i) keywords["allOf"].push_back({{"$ref", "#/a"}});
  CHECK(seconds(keywords) < 10);
}

TEST_CASE("json schema: a part that nothing fits is left out, unless it is needed") {
  const std::string text = R"({"type":"string","anyOf":[{"type":"string"},{"type":"integer"}]})";
  CHECK(fits(text, R"("a")"));
  CHECK_FALSE(fits(text, "1"));
  CHECK(fits(R"({"type":"integer","oneOf":[{"minimum":3,"maximum":2},{"const":"a"},{"enum":[7,"b"]}]})", "7"));
  CHECK(fits(R"({"type":["integer","null"],"minimum":3,"maximum":2})", "null"));
  CHECK(fits(R"({"properties":{"a":{"allOf":[{"type":"string"},{"type":"null"}]},"b":{"const":1}}})", R"({"b":1})"));
  CHECK_FALSE(fits(R"({"properties":{"a":{"allOf":[{"type":"string"},{"type":"null"}]},"b":{"const":1}}})", R"({"a":null,"b":1})"));
  CHECK(fits(R"({"items":{"const":1,"type":"null"}})", "[]"));
  CHECK_FALSE(fits(R"({"items":{"const":1,"type":"null"}})", "[1]"));
  CHECK(fits(R"({"prefixItems":[{"const":1},false,{"const":3}]})", "[1]"));
  // What refers to the part that is left out can still be used.
  const std::string knot = R"({"$defs":{"a":{"required":["x","y"],"properties":{"x":{"$ref":"#/$defs/b"},"y":false}},"b":{"anyOf":[{"$ref":"#/$defs/a"},{"type":"null"}]}},"anyOf":[{"$ref":"#/$defs/a"},{"$ref":"#/$defs/b"}]})";
  CHECK(fits(knot, "null"));
  CHECK_FALSE(fits(knot, R"({"x":null,"y":1})"));
  CHECK(refusal(R"({"type":"string","anyOf":[{"type":"null"},{"type":"integer"}]})").find("nothing fits any part of 'anyOf'") != std::string::npos);
  CHECK(refusal(R"({"properties":{"a":{"type":"string","enum":[1]}},"required":["a"]})") != "");
  CHECK(refusal(R"({"items":{"const":1,"type":"null"},"minItems":1})").find("room for fewer items") != std::string::npos);
  CHECK(refusal(R"({"type":"string","anyOf":[{"type":"string"},{"not":{}}]})").find("'not' is not supported") != std::string::npos);
  Json defs = Json::object();  // 2^60 times nothing
  for (int i = 0; i < 60; ++i) defs[concat("x", i)] = {{"anyOf", Json::array({{{"$ref", concat("#/$defs/x", i + 1)}}, {{"$ref", concat("#/$defs/x", i + 1)}, {"title", "t"}}})}};
  defs["x60"] = false;
  CHECK(refusal(Json{{"$ref", "#/$defs/x0"}, {"$defs", defs}}.dump()) != "");
}

TEST_CASE("json schema: places of an array keep to what every part says of them") {
  const std::string all = R"({"allOf":[{"prefixItems":[{"type":"number"}],"minItems":1},{"items":{"const":1}}]})";
  CHECK(fits(all, "[1]"));
  CHECK(fits(all, "[1,1]"));
  CHECK_FALSE(fits(all, "[2]"));
  CHECK_FALSE(fits(all, "[1,2]"));
  const std::string lists = R"({"allOf":[{"prefixItems":[{"minimum":5}],"items":{"type":"integer"}},{"items":[{"maximum":6},{"maximum":0}],"additionalItems":{"const":3}}]})";
  CHECK(fits(lists, "[6,0,3]"));
  CHECK_FALSE(fits(lists, "[4]"));
  CHECK_FALSE(fits(lists, "[6,1]"));
  CHECK_FALSE(fits(lists, "[6,0,4]"));
  CHECK(fits(R"({"allOf":[{"prefixItems":[{},{}],"items":false},{"prefixItems":[{"const":1},{"const":2},{"const":3}]}]})", "[1,2]"));
  CHECK_FALSE(fits(R"({"allOf":[{"prefixItems":[{},{}],"items":false},{"prefixItems":[{"const":1},{"const":2},{"const":3}]}]})", "[1,2,3]"));
  const std::string short_list = R"({"prefixItems":[{"const":1}],"minItems":2})";
  CHECK(fits(short_list, R"([1,"x"])"));
  CHECK_FALSE(fits(short_list, "[1]"));
  CHECK_FALSE(fits(short_list, "[1,2,3]"));
  CHECK(fits(R"({"items":{"type":"integer"},"additionalItems":false})", "[1,2]"));
}

TEST_CASE("json schema: 'false' is the strictest schema, what says nothing is taken") {
  CHECK(fits(R"({"prefixItems":[{"const":1}],"minItems":1,"unevaluatedItems":false})", "[1]"));
  CHECK(refusal(R"({"prefixItems":[{"const":1}],"minItems":2,"unevaluatedItems":false})") != "");
  CHECK_FALSE(fits(R"({"type":"array","unevaluatedItems":false})", "[1]"));
  CHECK(refusal(R"({"type":"object","propertyNames":false})").find("'propertyNames' is not supported") != std::string::npos);
  CHECK(refusal(R"({"type":"array","contains":false})").find("'contains' is not supported") != std::string::npos);
  CHECK(refusal(R"({"type":"object","if":false,"else":{"required":["a"]}})").find("'if' is not supported") != std::string::npos);
  CHECK(refusal(R"({"type":"object","if":true,"then":false})").find("'if' is not supported") != std::string::npos);
  CHECK(refusal(R"({"type":"object","minProperties":1})").find("'minProperties'") != std::string::npos);
  for (const char* nothing : {R"("not":false)", R"("uniqueItems":false)", R"("if":{"required":["a"]})", R"("then":false)", R"("patternProperties":{})", R"("patternProperties":{"^x":true})", R"("unevaluatedProperties":true)",
                              R"("unevaluatedItems":{})", R"("propertyNames":{"type":"string"})", R"("minProperties":0)", R"("dependentRequired":{"a":[]})", R"("contains":{},"minContains":0)",
                              R"("maxContains":1)", R"("required":["a"],"minProperties":1)", R"("additionalItems":false)"})
    CHECK_MESSAGE(fits(concat(R"({"type":"object",)", nothing, "}"), R"({"a":1})"), nothing);
  // In one schema it is about what all of its parts name; in a part about that part's.
  const std::string closed = R"({"allOf":[{"properties":{"a":{"const":1}}},{"properties":{"b":{"const":2}}}],"unevaluatedProperties":false})";
  CHECK(fits(closed, R"({"a":1,"b":2})"));
  CHECK_FALSE(fits(R"({"type":"object","unevaluatedProperties":false})", R"({"a":1})"));
  CHECK(fits(R"({"properties":{"a":{"const":1}},"anyOf":[{"properties":{"b":{"const":2}},"required":["b"]},{"required":["a"]}],"unevaluatedProperties":false})", R"({"a":1,"b":2})"));
  CHECK(refusal(R"({"allOf":[{"properties":{"a":{"const":1}},"unevaluatedProperties":false},{"properties":{"b":{"const":2}}}]})") != "");
  CHECK_FALSE(fits(R"({"type":"number","multipleOf":1})", "1.5"));
  CHECK(fits(R"({"type":"number","multipleOf":1})", "15"));
}

TEST_CASE("json schema: bounds beyond all numbers that are written bind nothing") {
  CHECK(fits(R"({"type":"integer","minimum":-9223372036854775808,"maximum":9223372036854775807})", "-1234567890123456"));
  CHECK(fits(R"({"type":"integer","minimum":0,"maximum":18446744073709551615})", "9999999999999999"));
  CHECK_FALSE(fits(R"({"type":"integer","minimum":0,"maximum":18446744073709551615})", "-1"));
  CHECK(fits(R"({"type":"number","minimum":-1.7976931348623157e308,"exclusiveMaximum":1.7976931348623157e308})", "1.5"));
  CHECK(refusal(R"({"type":"integer","minimum":18446744073709551615})").find("too many digits") != std::string::npos);
  CHECK(refusal(R"({"type":"number","maximum":-1e300})").find("too many digits") != std::string::npos);
}

TEST_CASE("json schema: names in references") {
  CHECK(fits(R"({"$ref":"#/$defs/A%20B%2fc~1","$defs":{"A B":{"c/":{"const":1}}}})", "1"));
  CHECK(fits(R"({"$ref":"#/$defs/100%","$defs":{"100%":{"const":1}}})", "1"));
  CHECK(refusal(R"({"$ref":"#name","$defs":{"x":{"$anchor":"name"}}})").find("'$anchor'") != std::string::npos);
}

TEST_CASE("json schema: values that are listed keep to the other keywords") {
  CHECK(fits(R"({"type":"string","enum":["a","b"],"minLength":1})", R"("b")"));
  const std::string texts = R"({"enum":["ä","äö","äöü",5],"minLength":2,"maxLength":2})";
  CHECK(fits(texts, R"("äö")"));
  for (const char* other : {R"("ä")", R"("äöü")"}) CHECK_FALSE(fits(texts, other));
  CHECK(fits(texts, "5"));
  CHECK(fits(R"({"type":"integer","enum":[1.0,1.5]})", "1.0"));
  CHECK_FALSE(fits(R"({"type":"integer","enum":[1.0,1.5]})", "1.5"));
  CHECK_FALSE(fits(R"({"enum":[1,2,3],"minimum":1,"exclusiveMinimum":true,"exclusiveMaximum":3})", "1"));
  CHECK(fits(R"({"enum":[1,2,3],"minimum":1,"exclusiveMinimum":true,"exclusiveMaximum":3})", "2"));
  CHECK_FALSE(fits(R"({"enum":[1,2,3],"minimum":1,"exclusiveMinimum":true,"exclusiveMaximum":3})", "3"));
  CHECK(fits(R"({"enum":[[1],[1,2],{"a":1}],"minItems":2,"required":["a"]})", "[1,2]"));
  CHECK_FALSE(fits(R"({"enum":[[1],[1,2],{"a":1}],"minItems":2,"required":["b"]})", R"({"a":1})"));
  CHECK(fits(R"({"enum":["a"],"format":"uri"})", R"("a")"));
  CHECK(refusal(R"({"enum":["a"],"pattern":"b"})").find("'pattern' beside 'enum'") != std::string::npos);
  CHECK(refusal(R"({"enum":["a"],"minLength":2})") != "");
}

TEST_CASE("json schema: whatever is written can be read and fits") {
  std::mt19937 random(1);
  const Grammar any = Grammar::parse(json_object_grammar());
  const Grammar person = Grammar::parse(schema_grammar(
      json(R"({"type":"object","properties":{"name":{"type":"string","maxLength":20},"age":{"type":"integer","minimum":0,"maximum":150},"tags":{"type":"array","items":{"enum":["a","b"]},"maxItems":4},
               "extra":{"type":"object"},"score":{"type":"number","minimum":-1,"maximum":1}},"required":["name","age","score"],"additionalProperties":{"type":"boolean"}})"),
      "schema"));
  int n_read = 0, n_objects = 0;
  for (int i = 0; i < 300; ++i) {
    if (const std::string text = random_text(any, random); !text.empty()) {
      ++n_read;
      // Two members of one name are JSON; this reader refuses them.
      const test::Thrown thrown = test::thrown_by([&] { n_objects += parse_json(text, "text").is_object(); });
      CHECK_MESSAGE((thrown.message.empty() || thrown.message.find("twice") != std::string::npos || thrown.message.find("duplicate") != std::string::npos || thrown.message.find("deep") != std::string::npos), thrown.message, text);
    }
    const std::string text = random_text(person, random);
    if (text.empty()) continue;
    ++n_read;
    Json read;
    const test::Thrown thrown = test::thrown_by([&] { read = parse_json(text, "text"); });
    CHECK_MESSAGE((thrown.message.empty() || thrown.message.find("twice") != std::string::npos || thrown.message.find("deep") != std::string::npos), thrown.message, text);
    if (!thrown.message.empty()) continue;
    CHECK(read["age"].get<int64_t>() <= 150);
    CHECK(std::abs(read["score"].get<double>()) <= 1);
    CHECK(read["name"].is_string());
  }
  CHECK(n_read > 200);
  CHECK(n_objects > 100);
}

}  // namespace duet::grammar
