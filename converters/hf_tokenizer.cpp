#include "converters/hf_tokenizer.h"

#include <algorithm>
#include <charconv>

#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMaxJsonBytes = uint64_t{64} << 20;
constexpr uint64_t kMaxTemplateBytes = uint64_t{1} << 20;

// A JSON file of the folder that may be absent: null then.
Json optional_json(const fs::path& file) {
  if (!fs::exists(file)) return nullptr;
  const std::string source = file.string();
  Json json = parse_json(read_file(file, kMaxJsonBytes), source);
  if (!json.is_object()) fail(ErrorKind::format, source, ": not a JSON object");
  return json;
}

// The files that say something about the tokenizer; absent ones are null.
struct TokenizerFiles {
  fs::path folder;
  Json tokenizer, config, added, generation;

  explicit TokenizerFiles(const fs::path& path)
      : folder(path),
        tokenizer(optional_json(path / "tokenizer.json")),
        config(optional_json(path / "tokenizer_config.json")),
        added(optional_json(path / "added_tokens.json")),
        generation(optional_json(path / "generation_config.json")) {}
  std::string source(const char* file) const { return (folder / file).string(); }
};

// tokenizer.model, else the *.model.vN of the highest N; empty when there is none.
fs::path find_sp_model(const fs::path& folder) {
  if (fs::exists(folder / "tokenizer.model")) return folder / "tokenizer.model";
  std::vector<fs::path> found;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name.find(".model.v") != std::string::npos) found.push_back(entry.path());
  }
  const auto by_version = [](const fs::path& a, const fs::path& b) {
    const std::string va = a.extension().string(), vb = b.extension().string();
    return va.size() != vb.size() ? va.size() < vb.size() : va < vb;
  };
  const auto best = std::max_element(found.begin(), found.end(), by_version);
  return best == found.end() ? fs::path() : *best;
}

const Json* find_member(const Json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

Vocab base_vocab(const TokenizerFiles& files, size_t n_vocab, const NoticeFn& notice) {
  const fs::path model = find_sp_model(files.folder);
  if (!model.empty()) {
    Vocab vocab = spm_vocab(model, notice);
    add_json_tokens(vocab, files.tokenizer, files.source("tokenizer.json"), n_vocab, notice);
    return vocab;
  }
  if (!files.tokenizer.is_null())
    return json_vocab(files.tokenizer, files.source("tokenizer.json"), n_vocab, notice);
  if (fs::exists(files.folder / "tekken.json"))
    fail(ErrorKind::unsupported, files.folder.string(),
         ": only tekken.json; a tokenizer.json of the same model is needed");
  fail(ErrorKind::format, files.folder.string(),
       ": no tokenizer (tokenizer.model, *.model.v3 or tokenizer.json); copy it from the model's "
       "repository");
}

// added_tokens.json {text: id}; whether a token is special stands elsewhere, if at all.
void add_added_tokens(Vocab& vocab, const TokenizerFiles& files, size_t n_vocab,
                      const NoticeFn& notice) {
  if (files.added.is_null()) return;
  const std::string source = files.source("added_tokens.json");
  for (const auto& item : files.added.items()) {
    if (!item.value().is_number_unsigned())
      fail(ErrorKind::format, source, ": id of '", item.key(), "' is not a number");
    const auto id = item.value().get<uint64_t>();
    const bool known = id < vocab.tokens.size() && vocab.tokens[id] == item.key();
    if (!known) add_token(vocab, id, item.key(), false, n_vocab, notice);
  }
}

// tokenizer_config.json: added_tokens_decoder {"id": {content, special}}.
void add_decoder_tokens(Vocab& vocab, const TokenizerFiles& files, size_t n_vocab,
                        const NoticeFn& notice) {
  const Json* decoder = find_member(files.config, "added_tokens_decoder");
  if (decoder == nullptr) return;
  const std::string source = files.source("tokenizer_config.json");
  if (!decoder->is_object())
    fail(ErrorKind::format, source, ": 'added_tokens_decoder' is not an object");
  for (const auto& item : decoder->items()) {
    const std::string& key = item.key();
    uint64_t id = 0;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (error != std::errc() || end != key.data() + key.size())
      fail(ErrorKind::format, source, ": token id '", key, "' is not a number");
    add_token(vocab, id, json_get<std::string>(item.value(), "content", source),
              json_get_or<bool>(item.value(), "special", false, source), n_vocab, notice);
  }
}

// "bos_token" and the like: a string or {"content": string}.
std::optional<uint32_t> named_token(const Vocab& vocab, const Json& config, const char* key) {
  const Json* token = find_member(config, key);
  if (token != nullptr && token->is_object()) token = find_member(*token, "content");
  if (token == nullptr || !token->is_string()) return std::nullopt;
  return vocab.find(token->get<std::string>());
}

// "eos_token_id" and the like: an id or a list of ids; those outside the vocabulary are dropped.
std::vector<uint32_t> listed_ids(const Json& config, const char* key, size_t n_vocab) {
  std::vector<uint32_t> ids;
  const Json* value = find_member(config, key);
  if (value == nullptr) return ids;
  for (const Json& id : value->is_array() ? *value : Json::array({*value})) {
    if (id.is_number_unsigned() && id.get<uint64_t>() < n_vocab) ids.push_back(id.get<uint32_t>());
  }
  return ids;
}

std::optional<uint32_t> special_id(const Vocab& vocab, const TokenizerFiles& files,
                                   const Json& model_config, const std::string& name,
                                   std::optional<uint32_t> fallback) {
  if (auto id = named_token(vocab, files.config, (name + "_token").c_str())) return id;
  for (const Json* json : {&model_config, &files.generation}) {
    const auto ids = listed_ids(*json, (name + "_token_id").c_str(), vocab.tokens.size());
    if (!ids.empty()) return ids.front();
  }
  return fallback && *fallback < vocab.tokens.size() ? fallback : std::nullopt;
}

void read_switches(Vocab& vocab, const TokenizerFiles& files) {
  const std::string source = files.source("tokenizer_config.json");
  const auto read = [&](const char* key, std::optional<bool>& value) {
    const Json* flag = find_member(files.config, key);
    if (flag != nullptr && flag->is_boolean()) value = flag->get<bool>();
  };
  if (!vocab.add_bos) vocab.add_bos = vocab.model == "llama";
  if (!vocab.add_eos) vocab.add_eos = false;
  read("add_bos_token", vocab.add_bos);
  read("add_eos_token", vocab.add_eos);
  read("add_prefix_space", vocab.add_space_prefix);
}

void read_special_ids(Vocab& vocab, const TokenizerFiles& files, const Json& config) {
  vocab.bos = special_id(vocab, files, config, "bos", vocab.bos);
  vocab.eos = special_id(vocab, files, config, "eos", vocab.eos);
  vocab.unk = special_id(vocab, files, config, "unk", vocab.unk);
  vocab.pad = special_id(vocab, files, config, "pad", vocab.pad);
}

// End tokens beside EOS. GGUF has two more places; the rest is recognized by name at run time.
void add_end_tokens(std::vector<GgufKeyValue>& out, const Vocab& vocab, const TokenizerFiles& files,
                    const Json& config, const NoticeFn& notice) {
  std::vector<uint32_t> more;
  for (const Json* json : {&config, &files.generation}) {
    for (const uint32_t id : listed_ids(*json, "eos_token_id", vocab.tokens.size())) {
      if (vocab.eos != id && std::find(more.begin(), more.end(), id) == more.end())
        more.push_back(id);
    }
  }
  const char* keys[] = {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"};
  for (size_t i = 0; i < more.size(); ++i) {
    if (i < std::size(keys))
      out.push_back({keys[i], GgufValue::u32(more[i])});
    else if (notice)
      notice(concat("end token ", more[i], " '", vocab.tokens[more[i]],
                    "' has no place in GGUF; it is left out"));
  }
}

// ---- chat templates -----------------------------------------------------------------------------

std::optional<std::string> template_file(const fs::path& file) {
  if (!fs::exists(file)) return std::nullopt;
  return read_file(file, kMaxTemplateBytes);
}

// A template string, or a list of {name, template}: "default" becomes the template of the file, the
// others tokenizer.chat_template.NAME, listed in tokenizer.chat_templates.
void add_templates(std::vector<GgufKeyValue>& out, const Json& value, const std::string& source) {
  if (value.is_string()) {
    out.push_back({"tokenizer.chat_template", GgufValue::string(value.get<std::string>())});
    return;
  }
  if (!value.is_array())
    fail(ErrorKind::format, source, ": 'chat_template' is neither a string nor a list");
  std::vector<std::string> names;
  for (const Json& entry : value) {
    const auto name = json_get<std::string>(entry, "name", source);
    const std::string key =
        name == "default" ? "tokenizer.chat_template" : "tokenizer.chat_template." + name;
    if (name != "default") names.push_back(name);
    out.push_back({key, GgufValue::string(json_get<std::string>(entry, "template", source))});
  }
  if (!names.empty()) out.push_back({"tokenizer.chat_templates", GgufValue::strings(names)});
}

void add_chat_template(std::vector<GgufKeyValue>& out, const TokenizerFiles& files) {
  if (auto text = template_file(files.folder / "chat_template.jinja"))
    return add_templates(out, *text, "");
  const Json file = optional_json(files.folder / "chat_template.json");
  for (const auto& [json, name] :
       {std::pair{&file, "chat_template.json"}, {&files.config, "tokenizer_config.json"}}) {
    if (const Json* value = find_member(*json, "chat_template"))
      return add_templates(out, *value, files.source(name));
  }
}

void check_size(Vocab& vocab, uint32_t n_vocab, const fs::path& folder) {
  if (vocab.tokens.size() > n_vocab)
    fail(ErrorKind::format, folder.string(), ": the tokenizer has ", vocab.tokens.size(),
         " tokens, config.json says vocab_size ", n_vocab,
         "; tokenizer and model do not belong together");
  vocab.resize(n_vocab);
}

}  // namespace

std::vector<GgufKeyValue> vocab_metadata(const Vocab& vocab) {
  std::vector<int64_t> types;
  for (const TokenType type : vocab.types) types.push_back(static_cast<int64_t>(type));
  std::vector<GgufKeyValue> out = {{"tokenizer.ggml.model", GgufValue::string(vocab.model)},
                                   {"tokenizer.ggml.pre", GgufValue::string(vocab.pre)},
                                   {"tokenizer.ggml.tokens", GgufValue::strings(vocab.tokens)}};
  if (vocab.model == "llama")
    out.push_back({"tokenizer.ggml.scores", GgufValue::f32s(vocab.scores)});
  out.push_back({"tokenizer.ggml.token_type", GgufValue::i32s(types)});
  if (vocab.model == "gpt2")
    out.push_back({"tokenizer.ggml.merges", GgufValue::strings(vocab.merges)});
  const auto add_id = [&out](const char* key, std::optional<uint32_t> id) {
    if (id) out.push_back({key, GgufValue::u32(*id)});
  };
  add_id("tokenizer.ggml.bos_token_id", vocab.bos);
  add_id("tokenizer.ggml.eos_token_id", vocab.eos);
  add_id("tokenizer.ggml.unknown_token_id", vocab.unk);
  add_id("tokenizer.ggml.padding_token_id", vocab.pad);
  const auto add_flag = [&out](const char* key, std::optional<bool> flag) {
    if (flag) out.push_back({key, GgufValue::boolean(*flag)});
  };
  add_flag("tokenizer.ggml.add_bos_token", vocab.add_bos);
  add_flag("tokenizer.ggml.add_eos_token", vocab.add_eos);
  add_flag("tokenizer.ggml.add_space_prefix", vocab.add_space_prefix);
  return out;
}

std::vector<GgufKeyValue> read_hf_tokenizer(const fs::path& folder, const Json& config,
                                            uint32_t n_vocab, const NoticeFn& notice) {
  const TokenizerFiles files(folder);
  Vocab vocab = base_vocab(files, n_vocab, notice);
  check_size(vocab, n_vocab, folder);
  add_added_tokens(vocab, files, n_vocab, notice);
  add_decoder_tokens(vocab, files, n_vocab, notice);
  read_special_ids(vocab, files, config);
  read_switches(vocab, files);
  std::vector<GgufKeyValue> out = vocab_metadata(vocab);
  add_end_tokens(out, vocab, files, config, notice);
  add_chat_template(out, files);
  return out;
}

}  // namespace duet
