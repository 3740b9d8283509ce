// Ids of the demo model's vocabulary against sentencepiece and mistral-common
// (make_text_goldens.py). The real Mixtral vocabularies: tests/oracle/tokenizer_oracle.py.
#include "runtime/tokenizer.h"

#include <doctest/doctest.h>

#include <fstream>
#include <iterator>

#include "base/json.h"
#include "runtime/chat_template.h"
#include "tests/support/vocab.h"

namespace duet {
namespace {

Json read_golden(const std::string& name) {
  const std::string path = std::string(DUET_SOURCE_DIR) + "/tests/golden/data/" + name;
  std::ifstream in(path, std::ios::binary);
  REQUIRE(in.good());
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  return parse_json(text, path);
}

GgufFile demo() { return GgufFile::open(std::string(DUET_TEST_DIR) + "/demo-f32.gguf"); }

std::string stream(const Tokenizer& tokenizer, const std::vector<Token>& ids) {
  TextStream out(tokenizer, true);
  std::string text;
  for (const Token id : ids) text += out.push(id);
  return text + out.finish();
}

void check_cases(const Tokenizer& tokenizer, const Json& cases) {
  size_t n_wrong = 0;
  for (const Json& c : cases["encode"]) {
    const auto ids = tokenizer.encode(c["text"].get<std::string>());
    n_wrong += ids != c["ids"].get<std::vector<Token>>() ||
               tokenizer.decode(ids) != c["decoded"].get<std::string>() ||
               stream(tokenizer, ids) != c["decoded"].get<std::string>();
    if (n_wrong == 1) CHECK_MESSAGE(ids == c["ids"].get<std::vector<Token>>(), c["text"].dump());
  }
  CHECK(cases["encode"].size() > 150);
  for (const Json& c : cases["decode"]) {
    const auto ids = c["ids"].get<std::vector<Token>>();
    n_wrong += tokenizer.decode(ids) != c["text"].get<std::string>() ||
               stream(tokenizer, ids) != c["text"].get<std::string>();
  }
  CHECK(n_wrong == 0);
}

TEST_CASE("tokenizer golden: the demo vocabulary gives sentencepiece's ids and text") {
  const Tokenizer tokenizer = Tokenizer::load(demo(), {});
  check_cases(tokenizer, read_golden("tok_demo.json")["plain"]);
}

TEST_CASE("tokenizer golden: unused and user-defined pieces as sentencepiece treats them") {
  const Json golden = read_golden("tok_demo.json");
  std::vector<std::pair<size_t, TokenType>> types;
  for (const Json& change : golden["changed_types"])
    types.emplace_back(change[0].get<size_t>(), static_cast<TokenType>(change[1].get<int>()));
  CHECK(types.size() > 100);
  const auto loaded = test::load_tokenizer(test::changed_spm_file(demo(), types, {}));
  check_cases(loaded.tokenizer, golden["changed"]);
}

TEST_CASE("tokenizer golden: every text survives encode and decode") {
  const Tokenizer tokenizer = Tokenizer::load(demo(), {});
  for (const Json& c : read_golden("tok_v1.json")["cases"]) {
    const auto text = c["text"].get<std::string>();
    CHECK(tokenizer.decode(tokenizer.encode(text)) == c["decoded"].get<std::string>());
  }
}

TEST_CASE("chat golden: mistral-v1 and mistral-v3 give mistral-common's ids") {
  const Json golden = read_golden("chat_demo.json");
  std::vector<test::VocabEntry> markers;
  for (const Json& name : golden["markers"])
    markers.push_back({name.get<std::string>(), 0, TokenType::control});
  const Tokenizer plain = Tokenizer::load(demo(), {});
  const auto marked = test::load_tokenizer(test::changed_spm_file(demo(), {}, markers));
  CHECK(golden["cases"].size() > 40);
  for (const Json& c : golden["cases"]) {
    CAPTURE(c["name"].dump());
    const auto version = c["version"].get<std::string>();
    const auto segments =
        ChatTemplate::named("mistral-" + version).render(parse_messages(c["messages"]), c["tools"]);
    const Tokenizer& tokenizer = version == "v1" ? plain : marked.tokenizer;
    CHECK(tokenizer.encode(segments, true) == c["ids"].get<std::vector<Token>>());
  }
}

}  // namespace
}  // namespace duet
