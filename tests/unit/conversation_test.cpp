// The conversation of duet chat: saved files, and the ids that the model is given.
#include "cli/conversation.h"

#include <doctest/doctest.h>

#include "base/json.h"
#include "base/mapped_file.h"
#include "formats/gguf.h"
#include "tests/support/errors.h"
#include "tests/support/tiny_model.h"

using namespace duet;
using namespace duet::cli;
using namespace duet::test;

namespace {

struct Talker {
  explicit Talker(const char* chat_name)
      : bytes(tiny_model_bytes({})),
        tokenizer(Tokenizer::load(GgufFile::parse(bytes, "tiny"), {})),
        chat(ChatTemplate::named(chat_name)),
        ids(tokenizer, chat) {}

  std::vector<Token> ask(const std::string& text) {
    talk.messages.push_back({.role = "user", .content = text});
    return ids.prompt(talk.all());
  }
  void answer(const std::vector<Token>& prompt, const std::vector<Token>& made) {
    talk.messages.push_back({.role = "assistant", .content = tokenizer.decode(made)});
    ids.answered(talk.all(), prompt, made);
  }
  std::vector<Token> canonical() const { return tokenizer.encode(chat.render(talk.all(), Json()), chat.wants_bos(tokenizer)); }

  std::vector<std::byte> bytes;
  Tokenizer tokenizer;
  ChatTemplate chat;
  ConversationIds ids;
  Conversation talk;
};

bool begins_with(const std::vector<Token>& ids, std::vector<Token> first, const std::vector<Token>& second) {
  first.insert(first.end(), second.begin(), second.end());
  return ids.size() > first.size() && std::equal(first.begin(), first.end(), ids.begin());
}

// A space before an answer depends on who wrote it, tokenizer or model.
std::string without_spaces(std::string text) {
  std::erase(text, ' ');
  return text;
}

// "the", letter by letter, as no tokenizer would write it.
std::vector<Token> spelled(const Tokenizer& tokenizer) {
  std::vector<Token> out;
  for (const char* piece : {"t", "h", "e"}) {
    const std::string name = concat("<0x", std::hex, static_cast<int>(*piece), ">");
    const std::optional<Token> id = tokenizer.find(name);
    REQUIRE(id);
    out.push_back(*id);
  }
  return out;
}

}  // namespace

TEST_CASE("the next prompt begins with the tokens that were seen and made") {
  for (const char* name : {"chatml", "mistral-v1", "zephyr"}) {
    CAPTURE(name);
    Talker t(name);
    const std::vector<Token> first = t.ask("the one");
    CHECK(first == t.canonical());
    const std::vector<Token> made = spelled(t.tokenizer);
    t.answer(first, made);
    const std::vector<Token> second = t.ask("the two");
    CHECK(begins_with(second, first, made));
    CHECK(without_spaces(t.tokenizer.decode(second, true)) == without_spaces(t.tokenizer.decode(t.canonical(), true)));
    CHECK(second != t.canonical());
    t.answer(second, made);
    CHECK(begins_with(t.ask("x"), second, made));
  }
}

TEST_CASE("taking an answer back leaves what came before as it was made") {
  Talker t("chatml");
  const std::vector<Token> first = t.ask("the one");
  t.answer(first, spelled(t.tokenizer));
  const std::vector<Token> second = t.ask("the two");
  t.answer(second, spelled(t.tokenizer));
  t.talk.messages.pop_back();
  CHECK(t.ids.prompt(t.talk.all()) == second);
}

TEST_CASE("another system message makes another prompt, and the old one comes back with its tokens") {
  Talker t("chatml");
  t.talk.system = "be brief";
  const std::vector<Token> first = t.ask("the one");
  t.answer(first, spelled(t.tokenizer));
  t.talk.system = "be long";
  const std::vector<Token> other = t.ask("x");
  CHECK(other == t.canonical());
  t.talk.system = "be brief";
  CHECK(begins_with(t.ids.prompt(t.talk.all()), first, spelled(t.tokenizer)));
  t.ids.forget();
  CHECK(t.ids.prompt(t.talk.all()) == t.canonical());
}

TEST_CASE("a conversation is saved and comes back") {
  const TempFolder folder;
  Conversation out;
  out.system = "be brief";
  out.messages = {{.role = "user", .content = "a \"quoted\"\nline \xc3\xa4"}, {.role = "assistant", .content = ""}};
  save_conversation(out, "model", folder / "a.json");
  save_conversation(out, "model", folder / "a.json");  // its own file may be replaced
  const Conversation in = load_conversation(folder / "a.json");
  CHECK(in.system == "be brief");
  REQUIRE(in.messages.size() == 2);
  CHECK(in.messages[0].content == out.messages[0].content);
  CHECK(in.messages[1].role == "assistant");
  out.system.clear();
  save_conversation(out, "model", folder / "a.json");
  CHECK(load_conversation(folder / "a.json").system == "");
  save_conversation({}, "model", folder / "a.json");
  CHECK(load_conversation(folder / "a.json").messages.empty());
  CHECK(std::distance(std::filesystem::directory_iterator(folder.path()), {}) == 1);
}

TEST_CASE("a file that is no conversation is not replaced") {
  const TempFolder folder;
  write_text(folder / "notes.txt", "mine\n");
  check_thrown(thrown_by([&] { save_conversation({}, "model", folder / "notes.txt"); }), ErrorKind::usage, "is there and is not a conversation");
  CHECK(read_file(folder / "notes.txt", 100) == "mine\n");
  CHECK(thrown_by([&] { save_conversation({}, "model", folder / "none" / "a.json"); }).kind == ErrorKind::io);
}

TEST_CASE("hostile and damaged conversations are refused") {
  const TempFolder folder;
  const auto refused = [&](const std::string& text, const std::string& words) {
    write_text(folder / "x.json", text);
    check_thrown(thrown_by([&] { load_conversation(folder / "x.json"); }), ErrorKind::format, words);
  };
  const std::string head = R"({"format":"duet-conversation","version":1,"messages":)";
  refused("", "JSON");
  refused("[]", "is not a conversation");
  refused(R"({"messages":[]})", "is not a conversation");
  refused(R"({"format":"duet-conversation","version":2,"messages":[]})", "version 2");
  refused(R"({"format":"duet-conversation","version":1})", "'messages' is missing");
  refused(head + "3}", "x.json");
  refused(head + "{}}", "x.json");
  refused(head + R"([{"role":"user"}]})", "x.json");
  refused(head + R"([{"role":"tool","content":"x","tool_call_id":"a"}]})", "message 0");
  refused(head + R"([{"role":"user","content":"x"},{"role":"system","content":"x"}]})", "message 1");
  refused(head + R"([{"role":"user","content":"x","content":"y"}]})", "twice");
  refused(head + "[{\"role\":\"user\",\"content\":\"\xff\"}]}", "JSON");
  refused(head + std::string(200, '[') + std::string(200, ']') + "}", "nested deeper");
  check_thrown(thrown_by([&] { load_conversation(folder / "none.json"); }), ErrorKind::io, "none.json");
}
