#include "runtime/tokenizer.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "runtime/pretokenizer.h"
#include "tests/support/errors.h"
#include "tests/support/vocab.h"

namespace duet {
namespace {

using test::GgufBuilder;
using test::load_tokenizer;
using test::small_spm_vocab;
using test::spm_file;
using test::VocabEntry;

std::vector<std::string> pieces_of(const Tokenizer& tokenizer, const std::vector<Token>& ids) {
  std::vector<std::string> out;
  for (const Token id : ids) out.push_back(tokenizer.piece(id, true));
  return out;
}

using Pieces = std::vector<std::string>;

// ---- SentencePiece
// -------------------------------------------------------------------------------

TEST_CASE("tokenizer: merges go by score, not by length") {
  const auto loaded = load_tokenizer(spm_file(small_spm_vocab()));
  const Tokenizer& t = loaded.tokenizer;
  CHECK(loaded.notices.empty());
  CHECK(pieces_of(t, t.encode("the")) == Pieces{" the"});
  CHECK(pieces_of(t, t.encode("xabc")) == Pieces{" ", "x", "abc"});  // ab before bc, then abc
  CHECK(pieces_of(t, t.encode("xbcabc")) == Pieces{" ", "x", "bc", "abc"});
  CHECK(t.encode("").empty());
}

TEST_CASE("tokenizer: among equal scores the leftmost pair merges first") {
  auto vocab = small_spm_vocab();
  vocab.push_back({"xy", -3.5f});
  vocab.push_back({"yx", -3.5f});
  const auto loaded = load_tokenizer(spm_file(vocab));
  CHECK(pieces_of(loaded.tokenizer, loaded.tokenizer.encode("qyxyx")) ==
        Pieces{" ", "q", "yx", "yx"});
  CHECK(pieces_of(loaded.tokenizer, loaded.tokenizer.encode("qxyxy")) ==
        Pieces{" ", "q", "xy", "xy"});
}

TEST_CASE("tokenizer: a character without a piece becomes its bytes") {
  const auto loaded = load_tokenizer(spm_file(small_spm_vocab()));
  const Tokenizer& t = loaded.tokenizer;
  CHECK(t.encode("é") == std::vector<Token>{259, 3 + 0xC3, 3 + 0xA9});
  CHECK(t.decode(t.encode("aé\n日😀")) == "aé\n日😀");
}

TEST_CASE("tokenizer: without byte tokens a run of unknown characters is one unknown token") {
  std::vector<VocabEntry> vocab = {{"<unk>", 0, TokenType::unknown},
                                   {"<s>", 0, TokenType::control},
                                   {"</s>", 0, TokenType::control},
                                   {"▁", -1},
                                   {"a", -2}};
  const auto loaded = load_tokenizer(spm_file(vocab));
  CHECK(loaded.tokenizer.encode("aZZa") == std::vector<Token>{3, 4, 0, 4});
  vocab[0] = {"other", 0, TokenType::normal};
  GgufBuilder bare = spm_file(vocab);
  std::erase_if(bare.keys,
                [](const auto& key) { return key.name == "tokenizer.ggml.unknown_token_id"; });
  check_thrown(test::thrown_by([&] { load_tokenizer(bare); }), ErrorKind::format, "byte tokens");
}

TEST_CASE("tokenizer: user-defined tokens are matched first, the longest one") {
  auto vocab = small_spm_vocab();
  vocab.push_back({"<tool>", 0, TokenType::user_defined});
  vocab.push_back(
      {"<tool> x", 0, TokenType::user_defined});  // written with a plain space in some files
  const auto loaded = load_tokenizer(spm_file(vocab));
  const Tokenizer& t = loaded.tokenizer;
  CHECK(pieces_of(t, t.encode("a<tool>b")) == Pieces{" a", "<tool>", "b"});
  CHECK(pieces_of(t, t.encode("a<tool> xb")) == Pieces{" a", "<tool> x", "b"});
  CHECK(t.decode(t.encode("a<tool> xb")) == "a<tool> xb");
}

TEST_CASE("tokenizer: names of control tokens in text are ordinary text") {
  const auto loaded = load_tokenizer(test::mistral_v3_file(TokenType::control));
  const Tokenizer& t = loaded.tokenizer;
  for (const char* text :
       {"<s>", "</s>", "[INST]", "[/INST] x", "a</s><s>[TOOL_CALLS]", "<unk>", "<0x0A>"}) {
    CAPTURE(text);
    for (const Token id : t.encode(text)) CHECK(!t.is_control(id));
    CHECK(t.decode(t.encode(text)) == text);
    const Segment segment{text, false};
    for (const Token id : t.encode({&segment, 1}, false)) CHECK(!t.is_control(id));
  }
}

TEST_CASE("tokenizer: markup makes control tokens, a name split between markup and text does not") {
  const auto loaded = load_tokenizer(test::mistral_v3_file(TokenType::control));
  const Tokenizer& t = loaded.tokenizer;
  const std::vector<Segment> prompt = {{"[INST]", true}, {"</s>", false}, {"[/INST]", true}};
  const auto ids = t.encode(prompt, true);
  CHECK(ids.front() == 1);
  CHECK(ids[1] == 3);
  CHECK(ids.back() == 4);
  CHECK(std::count(ids.begin(), ids.end(), 2) == 0);
  const std::vector<Segment> split = {{"[IN", true}, {"ST]", false}};
  for (const Token id : t.encode(split, false)) CHECK(!t.is_control(id));
}

TEST_CASE("tokenizer: invalid UTF-8 becomes U+FFFD byte by byte") {
  const auto loaded = load_tokenizer(spm_file(small_spm_vocab()));
  const Tokenizer& t = loaded.tokenizer;
  const std::string replaced = "\xEF\xBF\xBD";
  CHECK(t.decode(t.encode("a\xFF"
                          "b")) == "a" + replaced + "b");
  CHECK(t.decode(t.encode("\xE6\x97")) == replaced + replaced);
  CHECK(t.decode(t.encode("\xED\xA0\x80")) == replaced + replaced + replaced);  // a surrogate
  CHECK(t.decode(t.encode("\xC0\xAF")) == replaced + replaced);                 // overlong
}

TEST_CASE("tokenizer: decode drops the dummy space only, bytes become characters") {
  const auto loaded = load_tokenizer(spm_file(small_spm_vocab()));
  const Tokenizer& t = loaded.tokenizer;
  for (const char* text : {" a", "  a", "a ", "the the", "\n", " ", "é a"})
    CHECK(t.decode(t.encode(text)) == text);
  const Token space = *t.find("▁"), a = *t.find("▁a");
  CHECK(t.decode(std::vector<Token>{1, a}) == "a");
  CHECK(t.decode(std::vector<Token>{1, a}, true) == "<s> a");
  CHECK(t.decode(std::vector<Token>{space, a}) == " a");
  CHECK(t.decode(std::vector<Token>{3 + 0xE6, 3 + 0x97, a}) == "\xEF\xBF\xBD\xEF\xBF\xBD a");
  check_thrown(test::thrown_by([&] { (void)t.decode(std::vector<Token>{99999}); }),
               ErrorKind::usage, "99999");
  check_thrown(test::thrown_by([&] { (void)t.piece(-1); }), ErrorKind::usage, "-1");
}

TEST_CASE("tokenizer: a stream releases whole characters only") {
  const auto loaded = load_tokenizer(spm_file(small_spm_vocab()));
  TextStream stream(loaded.tokenizer, true);
  CHECK(stream.push(*loaded.tokenizer.find("▁a")) == "a");
  CHECK(stream.push(3 + 0xE6).empty());
  CHECK(stream.push(3 + 0x97).empty());
  CHECK(stream.push(3 + 0xA5) == "日");
  CHECK(stream.push(*loaded.tokenizer.find("▁a")) == " a");
  CHECK(stream.push(3 + 0xF0).empty());
  CHECK(stream.finish() == "\xEF\xBF\xBD");
  TextStream inside(loaded.tokenizer, false);
  CHECK(inside.push(*loaded.tokenizer.find("▁a")) == " a");
}

TEST_CASE("tokenizer: a megabyte on one line is no problem") {
  const auto loaded = load_tokenizer(spm_file(small_spm_vocab()));
  const std::string text(1 << 20, 'a');
  const auto ids = loaded.tokenizer.encode(text);
  CHECK(ids.size() < text.size());
  CHECK(loaded.tokenizer.decode(ids) == text);
  const auto bpe = load_tokenizer(test::gpt2_file("llama-bpe", {"a a", "aa aa"}));
  CHECK(bpe.tokenizer.encode(text).size() == text.size() / 4);
}

// ---- rules of compatibility 3f
// -------------------------------------------------------------------

TEST_CASE("3f-3 double BOS: exactly one, also when the markup begins with it") {
  const auto loaded = load_tokenizer(spm_file(small_spm_vocab()));
  const Tokenizer& t = loaded.tokenizer;
  for (const char* start : {"", "<s>", "<s><s>"}) {
    const std::vector<Segment> prompt = {{start, true}, {"the", false}};
    CHECK(pieces_of(t, t.encode(prompt, true)) == Pieces{"<s>", " the"});
  }
  const std::vector<Segment> typed = {{"<s>", false}};  // of the user: text, and a BOS before it
  const auto ids = t.encode(typed, true);
  CHECK(ids.front() == 1);
  CHECK(std::count(ids.begin(), ids.end(), 1) == 1);
  CHECK(ids.size() > 2);
}

TEST_CASE("3f-3 double BOS: add_bos_token false in an 8x22B-Instruct file still means one BOS") {
  const auto loaded = load_tokenizer(
      test::mistral_v3_file(TokenType::control).boolean("tokenizer.ggml.add_bos_token", false));
  CHECK(loaded.tokenizer.add_bos());
  CHECK(loaded.noticed("add_bos_token"));
  const auto other =
      load_tokenizer(spm_file(small_spm_vocab()).boolean("tokenizer.ggml.add_bos_token", false));
  CHECK(!other.tokenizer.add_bos());
}

TEST_CASE("3f-4 space prefix: honoured for plain text, always there in Mistral's own formats") {
  const auto with = load_tokenizer(spm_file(small_spm_vocab()));
  const auto without =
      load_tokenizer(spm_file(small_spm_vocab()).boolean("tokenizer.ggml.add_space_prefix", false));
  CHECK(pieces_of(with.tokenizer, with.tokenizer.encode("a")) == Pieces{" a"});
  CHECK(pieces_of(without.tokenizer, without.tokenizer.encode("a")) == Pieces{"a"});
  CHECK(without.tokenizer.decode(without.tokenizer.encode(" a")) == " a");
  const std::vector<Segment> apart = {{"<s>", true}, {"a", false, true}, {"</s>", true}};
  for (const Tokenizer* t : {&with.tokenizer, &without.tokenizer})
    CHECK(pieces_of(*t, t->encode(apart, false)) == Pieces{"<s>", " a", "</s>"});
}

TEST_CASE("3f-5 untyped [INST]: ids 3-9 of a v3 vocabulary become control tokens, with a notice") {
  const auto good = load_tokenizer(test::mistral_v3_file(TokenType::control));
  CHECK(good.notices.empty());
  for (const TokenType type : {TokenType::normal, TokenType::user_defined}) {
    const auto repaired = load_tokenizer(test::mistral_v3_file(type));
    CHECK(repaired.notices.size() == 1);
    CHECK(repaired.noticed("[INST]"));
    for (Token id = 3; id <= 9; ++id) CHECK(repaired.tokenizer.is_control(id));
    const std::vector<Segment> prompt = {
        {"[INST]", true}, {"[INST] a", false, true}, {"[/INST]", true}};
    CHECK(repaired.tokenizer.encode(prompt, true) == good.tokenizer.encode(prompt, true));
  }
}

TEST_CASE("3f-8 several end tokens: generation stops at any declared one") {
  auto vocab = small_spm_vocab();
  vocab.push_back({"<|im_end|>", 0, TokenType::user_defined});
  vocab.push_back({"<|im_start|>", 0, TokenType::user_defined});
  vocab.push_back({"<turn_over>", 0, TokenType::user_defined});
  const auto n = static_cast<Token>(vocab.size());
  const auto loaded = load_tokenizer(
      spm_file(vocab).u32("tokenizer.ggml.eot_token_id", static_cast<uint32_t>(n - 1)));
  const Tokenizer& t = loaded.tokenizer;
  for (const Token id : {2, n - 3, n - 1}) {
    CHECK(t.is_eog(id));
    CHECK(t.is_control(id));
  }
  CHECK(!t.is_eog(n - 2));
  CHECK(t.is_control(n - 2));
  CHECK(!t.is_eog(1));
  CHECK(!t.is_eog(-1));
  CHECK(!t.is_eog(n));
  CHECK(loaded.noticed("<|im_end|>"));
  for (const Token id : t.encode("<|im_start|>system<|im_end|><turn_over>"))
    CHECK(!t.is_control(id));
}

TEST_CASE("3f-8 several end tokens: a missing eos_token_id is found by name") {
  GgufBuilder file = spm_file(small_spm_vocab());
  std::erase_if(file.keys,
                [](const auto& key) { return key.name == "tokenizer.ggml.eos_token_id"; });
  const auto loaded = load_tokenizer(file);
  CHECK(loaded.tokenizer.eos() == 2);
  CHECK(loaded.noticed("</s>"));
}

// ---- files that are wrong
// ------------------------------------------------------------------------

TEST_CASE("tokenizer: a file without a tokenizer") {
  check_thrown(
      test::thrown_by([] { load_tokenizer(GgufBuilder().text("general.architecture", "llama")); }),
      ErrorKind::format, "no tokenizer");
  GgufBuilder none;
  none.text("tokenizer.ggml.model", "no_vocab");
  check_thrown(test::thrown_by([&] { load_tokenizer(none); }), ErrorKind::format, "no tokenizer");
}

TEST_CASE("tokenizer: unknown kinds are named") {
  GgufBuilder bert = spm_file(small_spm_vocab());
  bert.key("tokenizer.ggml.model").bytes = test::raw_string("bert");
  check_thrown(test::thrown_by([&] { load_tokenizer(bert); }), ErrorKind::unsupported, "'bert'");
  check_thrown(test::thrown_by([] { load_tokenizer(test::gpt2_file("kimi-k2", {})); }),
               ErrorKind::unsupported, "'kimi-k2'");
}

TEST_CASE("tokenizer: inconsistent vocabularies") {
  struct Case {
    const char* name;
    std::function<void(std::vector<VocabEntry>&)> change_entries;
    std::function<void(GgufBuilder&)> change_file;
    const char* expected;
  };
  const std::vector<Case> cases = {
      {"scores too short",
       {},
       [](auto& f) {
         std::erase_if(f.keys, [](auto& k) { return k.name == "tokenizer.ggml.scores"; });
         f.floats("tokenizer.ggml.scores", {1, 2});
       },
       "2 entries"},
      {"no scores",
       {},
       [](auto& f) {
         std::erase_if(f.keys, [](auto& k) { return k.name == "tokenizer.ggml.scores"; });
       },
       "scores"},
      {"types too long",
       {},
       [](auto& f) {
         std::erase_if(f.keys, [](auto& k) { return k.name == "tokenizer.ggml.token_type"; });
         f.ints("tokenizer.ggml.token_type", std::vector<int32_t>(1000, 1));
       },
       "1000 entries"},
      {"unknown type",
       [](auto& v) { v[270].type = static_cast<TokenType>(9); },
       {},
       "unknown type 9"},
      {"NaN score", [](auto& v) { v[270].score = std::nanf(""); }, {}, "token 270"},
      {"same text twice", [](auto& v) { v[270].piece = v[271].piece; }, {}, "same text"},
      {"bad byte token", [](auto& v) { v[5].piece = "<0xZZ>"; }, {}, "byte token 5"},
      {"BOS outside",
       {},
       [](auto& f) { f.key("tokenizer.ggml.bos_token_id").bytes = test::raw(uint32_t{70000}); },
       "70000"},
      {"EOT outside",
       {},
       [](auto& f) { f.u32("tokenizer.ggml.eot_token_id", 4294967295u); },
       "4294967295"},
  };
  for (const Case& c : cases) {
    CAPTURE(c.name);
    std::vector<VocabEntry> vocab = small_spm_vocab();
    if (c.change_entries) c.change_entries(vocab);
    GgufBuilder file = spm_file(vocab);
    if (c.change_file) c.change_file(file);
    check_thrown(test::thrown_by([&] { load_tokenizer(file); }), ErrorKind::format, c.expected);
  }
}

TEST_CASE("tokenizer: token types are guessed from names when the file has none") {
  GgufBuilder file = spm_file(small_spm_vocab());
  std::erase_if(file.keys, [](const auto& key) { return key.name == "tokenizer.ggml.token_type"; });
  const auto loaded = load_tokenizer(file), typed = load_tokenizer(spm_file(small_spm_vocab()));
  CHECK(loaded.noticed("token_type"));
  for (const char* text : {"the é", "</s>", "<0x0A>"})
    CHECK(loaded.tokenizer.encode(text) == typed.tokenizer.encode(text));
}

TEST_CASE("tokenizer: odd vocabularies stay bounded") {
  auto vocab = small_spm_vocab();
  vocab.push_back({"", 5});  // empty pieces are never matched
  vocab.push_back({"", 5, TokenType::user_defined});
  vocab.push_back({std::string(1 << 20, 'a'), 9});  // a piece of a megabyte
  vocab.push_back({std::string((1 << 20) - 1, 'b') + "c", 9, TokenType::user_defined});
  vocab.push_back({std::string(5000, 'q'), 9, TokenType::unused});
  vocab.push_back({"\xFF\xFE", 9});                           // no UTF-8
  vocab.push_back({"\xE2\x96", 9, TokenType::user_defined});  // half a character
  const auto loaded = load_tokenizer(spm_file(vocab));
  for (const std::string& text : {std::string(3000, 'a'), std::string(200000, 'b'),
                                  std::string(6000, 'q'), std::string("▁▁ x ▁")})
    CHECK(loaded.tokenizer.decode(loaded.tokenizer.encode(text)).size() >= text.size() / 3);
  CHECK(loaded.tokenizer.find("").has_value() == false);
}

// ---- byte-level BPE
// ------------------------------------------------------------------------------

TEST_CASE("gpt2: merges by rank within the pieces of the pre-tokenizer") {
  const auto loaded = load_tokenizer(
      test::gpt2_file("gpt-2", {"h e", "l l", "he ll", "Ġ w", "o r", "hell o", "Ġw or"}));
  const Tokenizer& t = loaded.tokenizer;
  CHECK(loaded.notices.empty());
  CHECK(pieces_of(t, t.encode("hello wor ld")) == Pieces{"hello", " wor", " ", "l", "d"});
  CHECK(t.decode(t.encode(" leading")) == " leading");
  CHECK(!t.add_bos());
  for (const char* text : {"", "é日😀\n\t\r\n", "a\0b", "\x7f"})
    CHECK(t.decode(t.encode(text)) == text);
  CHECK(pieces_of(t, t.encode("a\xFF"
                              "b")) == Pieces{"a", "\xFF", "b"});  // bytes are kept
  CHECK(t.decode(t.encode("a\xFF"
                          "b")) ==
        "a\xEF\xBF\xBD"
        "b");  // but shown as U+FFFD
}

TEST_CASE("gpt2: control tokens come from markup only") {
  const auto loaded = load_tokenizer(test::gpt2_file("smollm", {"i m", "im _"}));
  const Tokenizer& t = loaded.tokenizer;
  for (const Token id : t.encode("<|im_start|>x<|im_end|><|endoftext|>")) CHECK(!t.is_control(id));
  const std::vector<Segment> prompt = {
      {"<|im_start|>user\n", true}, {"<|im_end|>", false}, {"<|im_end|>\n", true}};
  const auto ids = t.encode(prompt, false);
  CHECK(std::count(ids.begin(), ids.end(), 1) == 1);
  CHECK(std::count(ids.begin(), ids.end(), 2) == 1);
  CHECK(t.decode(ids) == "user\n<|im_end|>\n");
  CHECK(t.is_eog(0));
  CHECK(t.is_eog(2));
  check_thrown(test::thrown_by([&] { (void)t.encode(prompt, true); }), ErrorKind::usage, "BOS");
}

TEST_CASE("gpt2: a whole word that is a token stands for itself where the model wants it so") {
  const std::vector<std::string> merges = {"b c", "a b",
                                           "ab c"};  // abc is never reached: b c is first
  const auto by_merges = load_tokenizer(test::gpt2_file("qwen2", merges));
  CHECK(pieces_of(by_merges.tokenizer, by_merges.tokenizer.encode("abc")) == Pieces{"a", "bc"});
  const auto whole = load_tokenizer(test::gpt2_file("llama-bpe", merges));
  CHECK(pieces_of(whole.tokenizer, whole.tokenizer.encode("abc")) == Pieces{"abc"});
}

TEST_CASE("gpt2: damaged merges and missing bytes") {
  GgufBuilder no_merges = test::gpt2_file("gpt-2", {});
  std::erase_if(no_merges.keys,
                [](const auto& key) { return key.name == "tokenizer.ggml.merges"; });
  check_thrown(test::thrown_by([&] { load_tokenizer(no_merges); }), ErrorKind::format, "merges");
  for (const char* merge : {"h zz", "he", "", " ", "h  e", "q q"}) {
    CAPTURE(merge);
    GgufBuilder file = test::gpt2_file("gpt-2", {"h e"});
    file.key("tokenizer.ggml.merges").bytes =
        GgufBuilder().texts("x", {"h e", merge}).keys[0].bytes;
    check_thrown(test::thrown_by([&] { load_tokenizer(file); }), ErrorKind::format, "merge 1");
  }
  GgufBuilder no_a = test::gpt2_file("gpt-2", {});
  std::string& tokens = no_a.key("tokenizer.ggml.tokens").bytes;
  const std::string a = test::raw_string("a"), other = test::raw_string("\x01");
  tokens.replace(tokens.find(a), a.size(), other);  // outside the byte alphabet
  const auto lossy = load_tokenizer(no_a);
  CHECK(lossy.noticed("lacks tokens for 1 byte"));
  CHECK(lossy.tokenizer.decode(lossy.tokenizer.encode("bab")) == "bb");
  const auto no_pre = load_tokenizer(test::gpt2_file("", {}));
  CHECK(no_pre.noticed("tokenizer.ggml.pre"));
}

Pieces split_by(const char* pre, std::string_view text) {
  Pieces out;
  for (const std::string_view piece : split(pre_tokenizer_by_name(pre).value(), text))
    out.emplace_back(piece);
  return out;
}

TEST_CASE("pre-tokenizers: each splits as its regular expression does") {
  struct Case {
    const char* pre;
    std::string text;
    Pieces expected;
  };
  const std::vector<Case> cases = {
      {"gpt-2", "I'm here, it's  42!", {"I", "'m", " here", ",", " it", "'s", " ", " 42", "!"}},
      {"gpt-2", "I'M", {"I", "'", "M"}},
      {"gpt-2", "a \n b\n\nc  ", {"a", " \n", " b", "\n", "\n", "c", "  "}},
      {"smollm", "x12 34", {"x", "1", "2", " ", "3", "4"}},
      {"llama-bpe",
       "I'M 1234567 ok!!\n\nyes",
       {"I", "'M", " ", "123", "456", "7", " ok", "!!\n\n", "yes"}},
      {"llama-bpe", "x  \n \n y", {"x", "  \n \n", " y"}},
      {"llama-bpe", "(foo) $bar\tbaz", {"(foo", ")", " $", "bar", "\tbaz"}},
      {"qwen2", "1234", {"1", "2", "3", "4"}},
      {"tekken",
       "HelloWorld ABCdef 12 a/b\n",
       {"Hello", "World", " ABCdef", " ", "1", "2", " a", "/b", "\n"}},
      {"tekken", "日本 ÀÉ x.//\n", {"日本", " ÀÉ", " x", ".//\n"}},
      {"default", "a, b$1234 'll", {"a", ",", " b", "$", "123", "4", " ", "'", "ll"}},
  };
  for (const Case& c : cases) {
    CAPTURE(c.pre);
    CAPTURE(c.text);
    std::string got, expected;
    for (const auto& piece : split_by(c.pre, c.text)) got += "[" + piece + "]";
    for (const auto& piece : c.expected) expected += "[" + piece + "]";
    CHECK(got == expected);
  }
  CHECK(!pre_tokenizer_by_name("no-such").has_value());
}

}  // namespace
}  // namespace duet
