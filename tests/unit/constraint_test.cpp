#include "grammar/constraint.h"

#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <string>

#include "base/json.h"
#include "grammar/json_schema.h"
#include "runtime/sampler.h"
#include "tests/support/errors.h"
#include "tests/support/vocab.h"

namespace duet::grammar {
namespace {

const Tokenizer& tokenizer() {
  static const test::LoadedTokenizer loaded = test::load_tokenizer(test::spm_file([] {
    auto entries = test::small_spm_vocab();
    for (const char* piece : {"{\"", "\":", "▁{", "▁\"", "\"}", "\",", "true", "ä", "äö", "[[", "]]", "▁{\""}) entries.push_back({piece, -200});
    entries.push_back({"[TOOL_CALLS]", 0, TokenType::control});
    return entries;
  }()));
  return loaded.tokenizer;
}
const TokenTrie& trie() {
  static const TokenTrie made(tokenizer());
  return made;
}

bool allowed(const std::vector<float>& logits, Token token) { return std::isfinite(logits[static_cast<size_t>(token)]); }

std::vector<float> after_apply(ConstraintState& state, bool ends = true) {
  std::vector<float> logits(trie().n_vocab(), 1.0f);
  state.apply(logits, ends);
  return logits;
}

Token token(std::string_view piece) { return tokenizer().find(piece).value(); }

// What a model of no sense writes, and that it is the text that is shown.
std::string write(const Constraint& constraint, uint64_t seed, bool at_start) {
  ConstraintState state(constraint, at_start);
  TextStream stream(tokenizer(), at_start);
  std::mt19937 random(static_cast<unsigned>(seed));
  std::uniform_real_distribution<float> logit(-4, 4);
  Sampler sampler({.temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0, .seed = seed});
  std::string text;
  for (int i = 0; i < 3000; ++i) {
    std::vector<float> logits(trie().n_vocab());
    for (float& x : logits) x = logit(random);
    for (const char* closing : {"}", "]", "\"", "\"}"}) logits[static_cast<size_t>(closing[1] == 0 ? token(closing[0] == '"' ? "<0x22>" : closing[0] == '}' ? "<0x7D>" : "]") : token(closing))] += 6;
    state.apply(logits, true);
    const Token next = sampler.sample(logits);
    if (tokenizer().is_eog(next)) break;
    state.accept(next);
    text += stream.push(next);
    if (state.complete()) break;
  }
  return text + stream.finish();
}

}  // namespace

TEST_CASE("constraint: a mask holds exactly the tokens that can be followed") {
  const Grammar grammar = Grammar::parse(json_object_grammar());
  const Constraint constraint{.vocabulary = &trie(), .grammar = grammar};
  for (const bool at_start : {false, true})
    for (const std::string written : {"", "{", "{\"", "{\"\xC3", "{\"a\": [", "{\"a\": [[1", "{}"}) {
      if (at_start && !written.empty()) continue;
      ConstraintState state(constraint, at_start);
      Matcher matcher(grammar);
      Matcher::State place = matcher.start();
      for (const char c : written) {
        state.accept(token(concat("<0x", "0123456789ABCDEF"[static_cast<unsigned char>(c) >> 4], "0123456789ABCDEF"[c & 15], ">")));
        place = matcher.next(place, static_cast<uint8_t>(c));
      }
      const std::vector<float> logits = after_apply(state);
      size_t n_wrong = 0;
      for (Token id = 0; static_cast<size_t>(id) < trie().n_vocab(); ++id) {
        std::string text = tokenizer().piece(id);
        const bool spaced = at_start && text.starts_with(' ') && id != token("<0x20>");
        if (spaced) text.erase(0, 1);
        Matcher::State to = place;
        for (const char c : text) to = matcher.next(to, static_cast<uint8_t>(c));
        const bool fits = tokenizer().is_eog(id) ? matcher.may_end(place) : !text.empty() && id != token("<unk>") && to != Matcher::kDead;
        n_wrong += fits != allowed(logits, id);
      }
      CHECK_MESSAGE(n_wrong == 0, written);
      CHECK(state.complete() == (written == "{}"));
    }
}

TEST_CASE("constraint: what a sampler writes under it fits") {
  const Constraint object{.vocabulary = &trie(), .grammar = Grammar::parse(json_object_grammar())};
  const Json schema = parse_json(R"({"type":"object","properties":{"a":{"type":"string","maxLength":9},"n":{"type":"integer","minimum":3,"maximum":500}},"required":["a","n"]})", "test");
  const Constraint person{.vocabulary = &trie(), .grammar = Grammar::parse(schema_grammar(schema, "test"))};
  int n_complete = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    const std::string text = write(person, seed, seed % 2 == 0);
    const Json json = parse_json(text, "text");
    CHECK(json["n"].get<int>() >= 3);
    CHECK(json["n"].get<int>() <= 500);
    CHECK(json.size() == 2);
    const std::string free = write(object, seed, seed % 2 == 0);
    const test::Thrown thrown = test::thrown_by([&] { n_complete += parse_json(free, "text").is_object(); });
    CHECK_MESSAGE((thrown.message.empty() || free.size() > 1000 || thrown.message.find("twice") != std::string::npos || thrown.message.find("deep") != std::string::npos), thrown.message, free);
  }
  CHECK(n_complete > 20);
}

TEST_CASE("constraint: a trigger opens another text") {
  const Token trigger = token("[TOOL_CALLS]");
  const Constraint free{.vocabulary = &trie(), .trigger = trigger, .triggered = Grammar::parse("root ::= \"abc\"")};
  ConstraintState state(free, true);
  CHECK(allowed(after_apply(state), token("he")));
  state.accept(token("he"));
  CHECK(allowed(after_apply(state), trigger));
  CHECK_FALSE(state.complete());
  state.accept(trigger);
  CHECK_FALSE(allowed(after_apply(state), token("he")));
  CHECK_FALSE(allowed(after_apply(state), trigger));
  state.accept(token("abc"));
  CHECK(state.complete());
  // Beside a form of words: only in its place.
  const Constraint both{.vocabulary = &trie(), .grammar = Grammar::parse("root ::= \"aa\"+"), .trigger = trigger, .triggered = Grammar::parse("root ::= \"abc\"")};
  ConstraintState other(both, true);
  CHECK(allowed(after_apply(other), trigger));
  CHECK_FALSE(allowed(after_apply(other), token("he")));
  other.accept(token("aa"));
  CHECK_FALSE(allowed(after_apply(other), trigger));
}

TEST_CASE("constraint: the end comes where the grammar ends, and only if wanted") {
  const Constraint constraint{.vocabulary = &trie(), .grammar = Grammar::parse("root ::= \"a\" \"b\"?")};
  ConstraintState state(constraint, false);
  const Token eos = tokenizer().eos().value();
  CHECK_FALSE(allowed(after_apply(state), eos));
  state.accept(token("a"));
  CHECK(allowed(after_apply(state), eos));
  CHECK_FALSE(allowed(after_apply(state, false), eos));
  state.accept(token("b"));
  CHECK(state.complete());
  CHECK(test::thrown_by([&] { after_apply(state, false); }).message.find("no token") != std::string::npos);
}

TEST_CASE("constraint: a long text does not fill the memory") {
  const Constraint constraint{.vocabulary = &trie(), .grammar = Grammar::parse("root ::= \"[\" root \"]\" | \"x\"")};
  ConstraintState state(constraint, false);
  const Token open = token("[[");
  for (int i = 0; i < 100000; ++i) {
    if (i % 20000 == 0) CHECK(allowed(after_apply(state), open));
    state.accept(open);
  }
  CHECK(allowed(after_apply(state), open));
  CHECK_FALSE(allowed(after_apply(state), token("]")));
}

}  // namespace duet::grammar
