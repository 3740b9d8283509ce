// Tokenizers of Hugging Face folders -> GGUF keys.
#include "converters/hf_tokenizer.h"

#include <doctest/doctest.h>
#include <sentencepiece_processor.h>

#include <map>

#include "base/json.h"
#include "base/mapped_file.h"
#include "converters/sp_model.h"
#include "tests/support/close.h"
#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/hf_folder.h"

namespace duet {
namespace {

using test::TempFolder;
using Files = std::vector<std::pair<std::string, std::string>>;

// The keys as a map, from a folder of these files.
struct Keys {
  std::map<std::string, GgufValue> values;
  std::vector<std::string> notices;

  bool has(const std::string& key) const { return values.contains(key); }
  const GgufValue& at(const std::string& key) const {
    REQUIRE_MESSAGE(has(key), key);
    return values.at(key);
  }
  uint64_t id(const std::string& name) const {
    return std::get<uint64_t>(at("tokenizer.ggml." + name + "_token_id").data);
  }
  bool flag(const std::string& name) const {
    return std::get<bool>(at("tokenizer.ggml." + name).data);
  }
  std::string text(const std::string& key) const { return std::get<std::string>(at(key).data); }
  std::vector<std::string> tokens() const {
    return std::get<std::vector<std::string>>(at("tokenizer.ggml.tokens").data);
  }
  std::vector<int64_t> types() const {
    return std::get<std::vector<int64_t>>(at("tokenizer.ggml.token_type").data);
  }
  std::vector<double> scores() const {
    return std::get<std::vector<double>>(at("tokenizer.ggml.scores").data);
  }
};

Keys read(const Files& files, uint32_t n_vocab = 264, const Json& config = Json::object()) {
  TempFolder folder;
  for (const auto& [name, content] : files) test::write_text(folder / name, content);
  Keys keys;
  for (auto& kv : read_hf_tokenizer(folder.path(), config, n_vocab,
                                    [&](const std::string& text) { keys.notices.push_back(text); }))
    keys.values.emplace(kv.key, std::move(kv.value));
  return keys;
}

const std::string kSmallModel = test::small_sp_model().build();

TEST_CASE("hf_tokenizer: the demo's tokenizer.model reads as the sentencepiece library reads it") {
  const std::string path = DUET_SOURCE_DIR "/models/demo/tokenizer.model";
  const MappedFile file = MappedFile::open(path);
  const SpModel model = parse_sp_model(file.bytes(), path);
  sentencepiece::SentencePieceProcessor library;
  REQUIRE(library.Load(path).ok());
  REQUIRE(static_cast<int>(model.pieces.size()) == library.GetPieceSize());
  for (int id = 0; id < library.GetPieceSize(); ++id) {
    const SpPiece& piece = model.pieces[static_cast<size_t>(id)];
    CHECK(piece.text == library.IdToPiece(id));
    CHECK(piece.score == library.GetScore(id));
    CHECK((piece.type == 2) == library.IsUnknown(id));
    CHECK((piece.type == 3) == library.IsControl(id));
    CHECK((piece.type == 5) == library.IsUnused(id));
    CHECK((piece.type == 6) == library.IsByte(id));
  }
  CHECK(model.unk_id == library.unk_id());
  CHECK(model.bos_id == library.bos_id());
  CHECK(model.eos_id == library.eos_id());
  CHECK(model.pad_id == library.pad_id());
  CHECK(model.model_type == 2);
}

TEST_CASE("hf_tokenizer: tokenizer.model with padding up to vocab_size") {
  const Keys keys = read({{"tokenizer.model", kSmallModel}}, 265);
  CHECK(keys.text("tokenizer.ggml.model") == "llama");
  REQUIRE(keys.tokens().size() == 265);
  CHECK(keys.tokens()[1] == "<s>");
  CHECK(keys.tokens()[3 + 0x41] == "<0x41>");
  CHECK(keys.tokens()[261] == "ab");
  CHECK(keys.tokens()[262] == "[PAD262]");
  CHECK(keys.types()[0] == 2);
  CHECK(keys.types()[1] == 3);
  CHECK(keys.types()[3] == 6);
  CHECK(keys.types()[261] == 1);
  CHECK(keys.types()[264] == 5);
  CHECK(keys.scores()[261] == -3.0);
  CHECK(keys.id("bos") == 1);
  CHECK(keys.id("eos") == 2);
  CHECK(keys.id("unknown") == 0);
  CHECK(!keys.has("tokenizer.ggml.padding_token_id"));
  CHECK(keys.flag("add_bos_token"));
  CHECK(!keys.flag("add_eos_token"));
  CHECK(keys.flag("add_space_prefix"));
}

TEST_CASE("hf_tokenizer: user-defined pieces and the dummy prefix switch survive") {
  test::SpModelBuilder model = test::small_sp_model();
  model.pieces.push_back({"[X]", 0, 4});
  model.add_dummy_prefix = false;
  model.pad_id = 2;
  const Keys keys = read({{"tokenizer.model", model.build()}});
  CHECK(keys.types()[262] == 4);
  CHECK(!keys.flag("add_space_prefix"));
  CHECK(keys.id("padding") == 2);
}

TEST_CASE("hf_tokenizer: *.model.vN serves without tokenizer.model, the highest version") {
  const std::string v1 = test::small_sp_model({"one"}).build(),
                    v3 = test::small_sp_model({"three"}).build();
  const Keys keys = read({{"x.model.v1", v1}, {"mistral_240323.model.v3", v3}});
  CHECK(keys.tokens()[259] == "three");
  const Keys plain = read({{"tokenizer.model", v1}, {"tokenizer.model.v3", v3}});
  CHECK(plain.tokens()[259] == "one");
}

TEST_CASE("hf_tokenizer: added tokens of a ChatML fine-tune") {
  const Keys keys =
      read({{"tokenizer.model", kSmallModel},
            {"added_tokens.json", R"({"<|im_end|>": 262, "<|im_start|>": 263})"},
            {"tokenizer_config.json", R"({"add_bos_token": true, "eos_token": "<|im_end|>",
                            "added_tokens_decoder": {"0": {"content": "<unk>", "special": true},
                              "1": {"content": "<s>", "special": true},
                              "262": {"content": "<|im_end|>", "special": true},
                              "263": {"content": "<|im_start|>", "special": false}}})"}});
  CHECK(keys.tokens()[262] == "<|im_end|>");
  CHECK(keys.tokens()[263] == "<|im_start|>");
  CHECK(keys.types()[262] == 3);
  CHECK(keys.types()[263] == 3);  // looks like markup
  CHECK(keys.types()[0] == 2);    // the unknown token stays one
  CHECK(keys.id("eos") == 262);
}

TEST_CASE("hf_tokenizer: a plain added token is user-defined, one beyond the model is left out") {
  const Keys keys = read({{"tokenizer.model", kSmallModel},
                          {"added_tokens.json", "{\"\xe2\x96\x81word\": 262, \"far\": 9000}"}});
  CHECK(keys.tokens()[262] == " word");
  CHECK(keys.types()[262] == 4);
  REQUIRE(keys.notices.size() == 1);
  CHECK(keys.notices[0].find("token 9000 'far' left out") != std::string::npos);
}

TEST_CASE("hf_tokenizer: several end tokens") {
  const Json config = {{"eos_token_id", {2, 260}}, {"bos_token_id", 1}};
  const Keys keys =
      read({{"tokenizer.model", kSmallModel},
            {"generation_config.json", R"({"eos_token_id": [2, 260, 261, 259, 70000]})"}},
           264, config);
  CHECK(keys.id("eos") == 2);
  CHECK(keys.id("eot") == 260);
  CHECK(keys.id("eom") == 261);
  REQUIRE(keys.notices.size() == 1);
  CHECK(keys.notices[0].find("end token 259 'a'") != std::string::npos);
}

TEST_CASE("hf_tokenizer: tokenizer_config.json decides over BOS, EOS and the space prefix") {
  const Keys keys =
      read({{"tokenizer.model", kSmallModel},
            {"tokenizer_config.json",
             R"({"add_bos_token": false, "add_eos_token": true, "add_prefix_space": false,
                             "bos_token": {"content": "</s>"}, "unk_token": null})"}});
  CHECK(!keys.flag("add_bos_token"));
  CHECK(keys.flag("add_eos_token"));
  CHECK(!keys.flag("add_space_prefix"));
  CHECK(keys.id("bos") == 2);
}

TEST_CASE("hf_tokenizer: chat templates by precedence") {
  const std::string config = R"({"chat_template": "from config"})";
  const std::string json = R"({"chat_template": "from json"})";
  const auto text = [&](const Files& more) {
    Files files = {{"tokenizer.model", kSmallModel}, {"tokenizer_config.json", config}};
    files.insert(files.end(), more.begin(), more.end());
    return read(files).text("tokenizer.chat_template");
  };
  CHECK(text({}) == "from config");
  CHECK(text({{"chat_template.json", json}}) == "from json");
  CHECK(text({{"chat_template.json", json}, {"chat_template.jinja", "from jinja"}}) ==
        "from jinja");
  const Keys several = read(
      {{"tokenizer.model", kSmallModel},
       {"tokenizer_config.json",
        R"({"chat_template": [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]})"}});
  CHECK(several.text("tokenizer.chat_template") == "A");
  CHECK(several.text("tokenizer.chat_template.tool_use") == "B");
  CHECK(!read({{"tokenizer.model", kSmallModel}}).has("tokenizer.chat_template"));
}

// ---- tokenizer.json
// --------------------------------------------------------------------------------

// SentencePiece style: byte fallback, U+2581.
const char* const kLlamaJson = R"({
  "added_tokens": [{"id": 0, "content": "<unk>", "special": true}, {"id": 1, "content": "<s>", "special": true},
                   {"id": 9, "content": "<tool>", "special": true}, {"id": 10, "content": "plain", "special": false}],
  "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace"}]},
  "pre_tokenizer": null,
  "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]},
  "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]},
  "model": {"type": "BPE", "byte_fallback": true, "unk_token": "<unk>",
            "vocab": {"<unk>": 0, "<s>": 1, "<0x41>": 2, "a": 3, "b": 4, "c": 5, "ab": 6, "abc": 7, "bc": 8},
            "merges": ["b c", "a b", "ab c", "a bc"]}})";

TEST_CASE("hf_tokenizer: scores of a SentencePiece-style tokenizer.json follow the merges") {
  const Keys keys = read({{"tokenizer.json", kLlamaJson}}, 12);
  CHECK(keys.text("tokenizer.ggml.model") == "llama");
  CHECK(keys.tokens()[7] == "abc");
  const auto scores = keys.scores();
  CHECK(scores[8] > scores[6]);  // "b c" is the first merge
  CHECK(scores[6] > scores[7]);
  CHECK(scores[7] > scores[3]);  // never merged: below all
  CHECK(keys.types() == std::vector<int64_t>{2, 3, 6, 1, 1, 1, 1, 1, 1, 3, 4, 5});
  CHECK(keys.flag("add_bos_token"));
  CHECK(!keys.flag("add_eos_token"));
  CHECK(keys.flag("add_space_prefix"));
  CHECK(keys.id("bos") == 1);
  CHECK(keys.id("unknown") == 0);
}

TEST_CASE("hf_tokenizer: merges as pairs, Metaspace instead of a normalizer") {
  std::string text = kLlamaJson;
  text.replace(text.find(R"(["b c", "a b", "ab c", "a bc"])"), 30,
               R"([["b","c"],["a","b"],["ab","c"]])");
  text.replace(text.find(R"("pre_tokenizer": null)"), 21,
               R"("pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"})");
  const Keys keys = read({{"tokenizer.json", text}}, 12);
  CHECK(keys.scores()[8] > keys.scores()[7]);
  CHECK(!keys.flag("add_space_prefix"));
}

std::string gpt2_json(const std::string& pre_tokenizer) {
  return R"({"added_tokens": [{"id": 4, "content": "<|begin_of_text|>", "special": true}, {"id": 5, "content": "<|eot_id|>", "special": true}],
    "pre_tokenizer": )" +
         pre_tokenizer + R"(, "decoder": {"type": "ByteLevel"},
    "post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"},
      {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|begin_of_text|>"}}, {"Sequence": {"id": "A"}}]}]},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "\u0120": 2, "ab": 3}, "merges": ["a b"]}})";
}

const char* const kLlama3Splitter =
    R"({"type": "Sequence", "pretokenizers": [{"type": "Split", "behavior": "Isolated",
  "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}},
  {"type": "ByteLevel", "use_regex": false}]})";

TEST_CASE("hf_tokenizer: a byte-level tokenizer.json keeps its merges") {
  const Keys keys = read({{"tokenizer.json", gpt2_json(kLlama3Splitter)},
                          {"tokenizer_config.json", R"({"eos_token": "<|eot_id|>"})"}},
                         6);
  CHECK(keys.text("tokenizer.ggml.model") == "gpt2");
  CHECK(keys.text("tokenizer.ggml.pre") == "llama-bpe");
  CHECK(std::get<std::vector<std::string>>(keys.at("tokenizer.ggml.merges").data) ==
        std::vector<std::string>{"a b"});
  CHECK(!keys.has("tokenizer.ggml.scores"));
  CHECK(keys.id("bos") == 4);
  CHECK(keys.id("eos") == 5);
  CHECK(keys.flag("add_bos_token"));
  CHECK(keys.types()[5] == 3);
}

TEST_CASE("hf_tokenizer: word splitters are recognized") {
  const auto pre = [](const std::string& json) {
    return read({{"tokenizer.json", gpt2_json(json)}}, 6).text("tokenizer.ggml.pre");
  };
  CHECK(pre(R"({"type": "ByteLevel", "use_regex": true})") == "gpt-2");
  CHECK(
      pre(R"({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, {"type": "ByteLevel"}]})") ==
      "smollm");
  const auto thrown = test::thrown_by([&] {
    pre(R"({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "x+"}}, {"type": "ByteLevel"}]})");
  });
  test::check_thrown(thrown, ErrorKind::unsupported, "unknown rule: x+");
  test::check_thrown(test::thrown_by([&] { pre(R"({"type": "Whitespace"})"); }),
                     ErrorKind::unsupported, "Whitespace");
}

TEST_CASE("hf_tokenizer: folders that cannot be converted") {
  const auto attempt = [](const Files& files, uint32_t n_vocab = 264) {
    return test::thrown_by([&] { read(files, n_vocab); });
  };
  test::check_thrown(attempt({{"config.json", "{}"}}), ErrorKind::format, "no tokenizer");
  test::check_thrown(attempt({{"tekken.json", "{}"}}), ErrorKind::unsupported, "tekken.json");
  test::check_thrown(attempt({{"tokenizer.model", kSmallModel}}, 100), ErrorKind::format,
                     "262 tokens");
  test::check_thrown(attempt({{"tokenizer.model", ""}}), ErrorKind::format, "no pieces");
  test::check_thrown(attempt({{"tokenizer.model", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"}}),
                     ErrorKind::format, "tokenizer.model");
  test::SpModelBuilder unigram = test::small_sp_model();
  unigram.model_type = 1;
  test::check_thrown(attempt({{"tokenizer.model", unigram.build()}}), ErrorKind::unsupported,
                     "only BPE");
  test::check_thrown(attempt({{"tokenizer.json", "{\"model\": "}}), ErrorKind::format,
                     "not valid JSON");
  test::check_thrown(attempt({{"tokenizer.json", "[]"}}), ErrorKind::format, "not a JSON object");
  test::check_thrown(attempt({{"tokenizer.json", "{}"}}), ErrorKind::format, "no 'model'");
  test::check_thrown(
      attempt({{"tokenizer.json", R"({"model": {"type": "Unigram", "vocab": []}})"}}),
      ErrorKind::unsupported, "Unigram");
  test::check_thrown(attempt({{"tokenizer.json",
                               R"({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})"}}),
                     ErrorKind::unsupported, "neither byte fallback");
}

TEST_CASE("hf_tokenizer: hostile tokenizer.json") {
  const auto attempt = [](const std::string& vocab, const std::string& merges) {
    const std::string text = R"({"model": {"type": "BPE", "byte_fallback": true, "vocab": )" +
                             vocab + R"(, "merges": )" + merges + "}}";
    return test::thrown_by([&] { read({{"tokenizer.json", text}}, 1000); });
  };
  test::check_thrown(attempt(R"({"a": 4000000000})", "[]"), ErrorKind::format, "token id");
  test::check_thrown(attempt(R"({"a": 2000000})", "[]"), ErrorKind::format,
                     "token id 2000000 with only 1 tokens");
  test::check_thrown(attempt(R"({"a": -1})", "[]"), ErrorKind::format, "token id");
  test::check_thrown(attempt(R"({"a": "b"})", "[]"), ErrorKind::format, "token id");
  test::check_thrown(attempt(R"({"a": 0, "b": 0})", "[]"), ErrorKind::format,
                     "two tokens have id 0");
  test::check_thrown(attempt("[]", "[]"), ErrorKind::format, "model.vocab");
  test::check_thrown(attempt(R"({"a": 0})", "{}"), ErrorKind::format, "model.merges");
  test::check_thrown(attempt(R"({"a": 0})", R"(["ab"])"), ErrorKind::format, "pair of tokens");
  test::check_thrown(attempt(R"({"a": 0})", R"(["a a"])"), ErrorKind::format, "gives no token");
  test::check_thrown(attempt(R"({"a": 0})", R"([[1, 2]])"), ErrorKind::format, "pair of tokens");
}

TEST_CASE("hf_tokenizer: damaged models throw Error and nothing else") {
  test::Rng rng(5);
  size_t n_refused = 0;
  for (int i = 0; i < 2000; ++i) {
    std::string model = kSmallModel;
    for (size_t n = 1 + rng.below(4); n > 0; --n)
      model[rng.below(model.size())] = static_cast<char>(rng.next());
    if (rng.below(4) == 0) model.resize(rng.below(model.size()));
    const auto bytes = std::as_bytes(std::span(model.data(), model.size()));
    n_refused += test::thrown_by([&] { parse_sp_model(bytes, "m"); }).kind.has_value();
  }
  CHECK(n_refused > 100);
}

TEST_CASE("hf_tokenizer: a vocabulary of 130000 tokens is read in reasonable time") {
  std::string vocab = "{", merges = "[";
  for (int i = 0; i < 130000; ++i) vocab += concat(i == 0 ? "" : ",", "\"t", i, "\":", i);
  const std::string text = R"({"model": {"type": "BPE", "byte_fallback": true, "vocab": )" + vocab +
                           R"(}, "merges": []}})";
  CHECK(read({{"tokenizer.json", text}}, 131000).tokens().size() == 131000);
}

}  // namespace
}  // namespace duet
