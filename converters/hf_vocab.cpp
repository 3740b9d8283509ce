// Vocabularies from tokenizer.model and tokenizer.json.
#include <algorithm>
#include <array>
#include <unordered_map>

#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "converters/hf_tokenizer.h"
#include "converters/sp_model.h"

namespace duet {
namespace {

constexpr size_t kMaxVocab = size_t{1} << 21;
constexpr double kAddedScore = -1000.0;         // of tokens that no merge makes
constexpr const char* kSpace = "\xe2\x96\x81";  // U+2581, SentencePiece's space

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size())
    text.replace(at, from.size(), to);
}

bool is_byte_token(std::string_view text) {
  const auto hex = [](char c) { return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'F'); };
  return text.size() == 6 && text.starts_with("<0x") && hex(text[3]) && hex(text[4]) &&
         text[5] == '>';
}

// Some folders mark markup tokens as not special.
bool looks_special(std::string_view text) {
  return text == "<pad>" || text == "<mask>" || (text.starts_with("<|") && text.ends_with("|>"));
}

std::optional<uint32_t> id_of(int id) {
  return id < 0 ? std::nullopt : std::optional(static_cast<uint32_t>(id));
}

// ---- tokenizer.json --------------------------------------------------------------------------

const Json* member(const Json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

std::string type_of(const Json& object) {
  const Json* type = member(object, "type");
  return type != nullptr && type->is_string() ? type->get<std::string>() : std::string();
}

// A pipeline stage and, for "Sequence", its parts: visit(stage) in order.
template <class Visit>
void for_each_stage(const Json* stage, const char* parts_key, Visit&& visit) {
  if (stage == nullptr) return;
  if (type_of(*stage) != "Sequence") return visit(*stage);
  const Json* parts = member(*stage, parts_key);
  if (parts == nullptr || !parts->is_array()) return;
  for (const Json& part : *parts) visit(part);
}

uint32_t token_id(const Json& value, const std::string& source) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() >= kMaxVocab)
    fail(ErrorKind::format, source, ": a token id is not a number below ", kMaxVocab);
  return value.get<uint32_t>();
}

void read_pieces(const Json& model, const std::string& source, Vocab& vocab) {
  const Json* pieces = member(model, "vocab");
  if (pieces == nullptr || !pieces->is_object() || pieces->empty())
    fail(ErrorKind::format, source,
         ": key 'model.vocab' is not an object of tokens; the file is damaged");
  if (pieces->size() > kMaxVocab)
    fail(ErrorKind::format, source, ": ", pieces->size(), " tokens are more than any model has");
  uint32_t largest = 0;
  for (const auto& item : pieces->items())
    largest = std::max(largest, token_id(item.value(), source));
  // A hole or two is common (added tokens sit there); a sparse numbering is damage.
  if (largest >= 2 * pieces->size() + 65536)
    fail(ErrorKind::format, source, ": token id ", largest, " with only ", pieces->size(),
         " tokens");
  vocab.resize(size_t{largest} + 1);
  for (const auto& item : pieces->items()) {
    const uint32_t id = token_id(item.value(), source);
    if (vocab.types[id] != TokenType::unused)
      fail(ErrorKind::format, source, ": two tokens have id ", id);
    vocab.tokens[id] = item.key();
    vocab.types[id] =
        vocab.model == "llama" && is_byte_token(item.key()) ? TokenType::byte : TokenType::normal;
    vocab.scores[id] = kAddedScore;
  }
}

using MergePair = std::pair<std::string, std::string>;

// Both forms: "left right" (no spaces inside), and [left, right] of newer files.
MergePair parse_merge(const Json& merge, const std::string& source) {
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string())
    return {merge[0].get<std::string>(), merge[1].get<std::string>()};
  if (merge.is_string()) {
    const auto& text = merge.get_ref<const std::string&>();
    const size_t space = text.find(' ', 1);
    if (space != std::string::npos && space + 1 < text.size())
      return {text.substr(0, space), text.substr(space + 1)};
  }
  fail(ErrorKind::format, source, ": an entry of 'model.merges' is not a pair of tokens");
}

const Json& merge_list(const Json& model, const std::string& source) {
  const Json* merges = member(model, "merges");
  if (merges == nullptr || !merges->is_array())
    fail(ErrorKind::format, source,
         ": key 'model.merges' is not a list; only BPE tokenizers can be converted");
  if (merges->size() > 2 * kMaxVocab)
    fail(ErrorKind::format, source, ": too many merges: ", merges->size());
  return *merges;
}

// SentencePiece merges the pair whose result has the highest score; tokenizer.json the pair of the
// lowest rank. So a token's score is minus the rank of the first merge that makes it.
void scores_from_merges(const Json& model, const std::string& source, Vocab& vocab) {
  std::unordered_map<std::string_view, size_t> ids;
  for (size_t i = 0; i < vocab.tokens.size(); ++i) ids.emplace(vocab.tokens[i], i);
  std::vector<bool> made(vocab.tokens.size());
  double rank = 0;
  for (const Json& entry : merge_list(model, source)) {
    const MergePair pair = parse_merge(entry, source);
    const auto it = ids.find(pair.first + pair.second);
    if (it == ids.end())
      fail(ErrorKind::format, source, ": merge of '", pair.first, "' and '", pair.second,
           "' gives no token");
    if (made[it->second]) continue;
    made[it->second] = true;
    vocab.scores[it->second] = -rank++;
  }
  // What no merge makes must lose against everything (single characters never need their score).
  for (size_t i = 0; i < made.size(); ++i) {
    if (!made[i] && vocab.types[i] == TokenType::normal) vocab.scores[i] = -rank - 1;
  }
}

void copy_merges(const Json& model, const std::string& source, Vocab& vocab) {
  for (const Json& entry : merge_list(model, source)) {
    const MergePair pair = parse_merge(entry, source);
    if (pair.first.find(' ') != std::string::npos || pair.second.find(' ') != std::string::npos)
      fail(ErrorKind::unsupported, source,
           ": a merge contains a space, so this is no byte-level tokenizer");
    vocab.merges.push_back(pair.first + " " + pair.second);
  }
}

// ---- how byte-level tokenizers split words ------------------------------------------------------

struct Splitter {
  const char* pre;    // tokenizer.ggml.pre
  const char* regex;  // of the Split stage
};
constexpr Splitter kSplitters[] = {
    {"llama-bpe",
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"},
    {"qwen2",
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"},
    {"tekken",
     R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)"},
};

std::string pre_of_regex(const std::string& regex, const std::string& source) {
  for (const Splitter& splitter : kSplitters) {
    if (regex == splitter.regex) return splitter.pre;
  }
  fail(ErrorKind::unsupported, source, ": words are split by an unknown rule: ", regex);
}

std::string find_pre(const Json& tokenizer, const std::string& source) {
  std::string regex;
  bool digits = false, byte_level_splits = false;
  for_each_stage(member(tokenizer, "pre_tokenizer"), "pretokenizers", [&](const Json& stage) {
    const std::string type = type_of(stage);
    if (type == "Split") {
      const Json* pattern = member(stage, "pattern");
      const Json* text = pattern == nullptr ? nullptr : member(*pattern, "Regex");
      if (text == nullptr || !text->is_string() || !regex.empty())
        fail(ErrorKind::unsupported, source,
             ": words are split by other means than one regular expression");
      regex = text->get<std::string>();
    } else if (type == "Digits") {
      digits = json_get_or<bool>(stage, "individual_digits", false, source);
    } else if (type == "ByteLevel") {
      byte_level_splits = json_get_or<bool>(stage, "use_regex", true, source);
    } else {
      fail(ErrorKind::unsupported, source, ": unknown word splitter '", type, "'");
    }
  });
  if (!regex.empty()) return pre_of_regex(regex, source);
  if (!byte_level_splits)
    fail(ErrorKind::unsupported, source, ": a tokenizer that does not split words");
  return digits ? "smollm" : "gpt-2";
}

// ---- switches
// ------------------------------------------------------------------------------------

// Whether text gets a leading space: a Prepend normalizer, or Metaspace that prepends.
bool finds_space_prefix(const Json& tokenizer, const std::string& source) {
  bool prefix = false;
  for_each_stage(member(tokenizer, "normalizer"), "normalizers", [&](const Json& stage) {
    if (type_of(stage) == "Prepend") prefix = true;
  });
  for_each_stage(member(tokenizer, "pre_tokenizer"), "pretokenizers", [&](const Json& stage) {
    if (type_of(stage) != "Metaspace") return;
    const auto scheme = json_get_or<std::string>(stage, "prepend_scheme", "", source);
    prefix = scheme.empty() ? json_get_or<bool>(stage, "add_prefix_space", true, source)
                            : scheme != "never";
  });
  return prefix;
}

std::string special_name(const Json& template_item) {
  const Json* special = member(template_item, "SpecialToken");
  const Json* id = special == nullptr ? nullptr : member(*special, "id");
  return id != nullptr && id->is_string() ? id->get<std::string>() : std::string();
}

// TemplateProcessing: [BOS] $A [EOS].
void read_post_processor(const Json& tokenizer, Vocab& vocab) {
  for_each_stage(member(tokenizer, "post_processor"), "processors", [&](const Json& stage) {
    const Json* single = member(stage, "single");
    if (type_of(stage) != "TemplateProcessing" || single == nullptr || !single->is_array() ||
        single->empty())
      return;
    const std::string first = special_name(single->front()), last = special_name(single->back());
    vocab.add_bos = !first.empty();
    vocab.add_eos = !last.empty() && single->size() > 1;
    if (!first.empty()) vocab.bos = vocab.find(first);
    if (*vocab.add_eos) vocab.eos = vocab.find(last);
  });
}

bool is_byte_level(const Json& tokenizer) {
  bool found = false;
  const auto look = [&](const Json& stage) { found |= type_of(stage) == "ByteLevel"; };
  for_each_stage(member(tokenizer, "pre_tokenizer"), "pretokenizers", look);
  for_each_stage(member(tokenizer, "decoder"), "decoders", look);
  return found;
}

}  // namespace

void Vocab::resize(size_t n) {
  for (size_t i = tokens.size(); i < n; ++i) tokens.push_back(concat("[PAD", i, "]"));
  tokens.resize(n);
  scores.resize(n, -10000.0);
  types.resize(n, TokenType::unused);
}

std::optional<uint32_t> Vocab::find(std::string_view text) const {
  const auto it = std::find(tokens.begin(), tokens.end(), text);
  if (it == tokens.end()) return std::nullopt;
  return static_cast<uint32_t>(it - tokens.begin());
}

void add_token(Vocab& vocab, uint64_t id, const std::string& text, bool special, size_t n_vocab,
               const NoticeFn& notice) {
  if (id >= n_vocab) {
    if (notice)
      notice(concat("token ", id, " '", text, "' left out: the model has ", n_vocab, " tokens"));
    return;
  }
  if (id >= vocab.tokens.size()) vocab.resize(id + 1);
  // The unknown and byte tokens are often listed as special too; they keep what they are for.
  const bool fixed = vocab.types[id] == TokenType::unknown || vocab.types[id] == TokenType::byte;
  if (fixed && vocab.tokens[id] == text) return;
  if (vocab.types[id] == TokenType::unused) vocab.scores[id] = kAddedScore;
  vocab.types[id] = special || looks_special(text) ? TokenType::control : TokenType::user_defined;
  vocab.tokens[id] = text;
  if (vocab.types[id] == TokenType::user_defined) replace_all(vocab.tokens[id], kSpace, " ");
}

Vocab spm_vocab(const std::filesystem::path& file, const NoticeFn& notice) {
  const MappedFile bytes = MappedFile::open(file);
  const SpModel model = parse_sp_model(bytes.bytes(), file.string());
  if (model.model_type != 2)
    fail(ErrorKind::unsupported, file.string(), ": a SentencePiece model of type ",
         model.model_type, "; only BPE (type 2) can be converted");
  if (notice && (model.has_normalization_rules || model.remove_extra_whitespaces))
    notice(concat(file.filename().string(),
                  ": text normalization (character rules, removal of extra spaces) "
                  "has no place in GGUF and is left out"));
  Vocab vocab;
  vocab.model = "llama";
  vocab.pre = "default";
  for (const SpPiece& piece : model.pieces) {
    vocab.tokens.push_back(piece.text);
    vocab.scores.push_back(static_cast<double>(piece.score));
    vocab.types.push_back(static_cast<TokenType>(piece.type));
  }
  vocab.unk = id_of(model.unk_id);
  vocab.bos = id_of(model.bos_id);
  vocab.eos = id_of(model.eos_id);
  vocab.pad = id_of(model.pad_id);
  vocab.add_space_prefix = model.add_dummy_prefix;
  return vocab;
}

void add_json_tokens(Vocab& vocab, const Json& tokenizer, const std::string& source, size_t n_vocab,
                     const NoticeFn& notice) {
  const Json* added = member(tokenizer, "added_tokens");
  if (added == nullptr) return;
  if (!added->is_array()) fail(ErrorKind::format, source, ": 'added_tokens' is not a list");
  for (const Json& token : *added) {
    add_token(vocab, json_get<uint64_t>(token, "id", source),
              json_get<std::string>(token, "content", source),
              json_get_or<bool>(token, "special", false, source), n_vocab, notice);
  }
}

Vocab json_vocab(const Json& tokenizer, const std::string& source, size_t n_vocab,
                 const NoticeFn& notice) {
  const Json* model = member(tokenizer, "model");
  if (model == nullptr || !model->is_object())
    fail(ErrorKind::format, source, ": no 'model'; not a tokenizer.json");
  const std::string type = type_of(*model);
  if (!type.empty() && type != "BPE")
    fail(ErrorKind::unsupported, source, ": tokenizer type '", type,
         "'; only BPE can be converted");
  Vocab vocab;
  if (json_get_or<bool>(*model, "byte_fallback", false, source)) {
    vocab.model = "llama";
    vocab.pre = "default";
    read_pieces(*model, source, vocab);
    scores_from_merges(*model, source, vocab);
    vocab.add_space_prefix = finds_space_prefix(tokenizer, source);
  } else if (is_byte_level(tokenizer)) {
    vocab.model = "gpt2";
    vocab.pre = find_pre(tokenizer, source);
    read_pieces(*model, source, vocab);
    copy_merges(*model, source, vocab);
  } else {
    fail(ErrorKind::unsupported, source,
         ": a BPE tokenizer with neither byte fallback nor byte level");
  }
  const auto unk = json_get_or<std::string>(*model, "unk_token", "", source);
  if (!unk.empty()) vocab.unk = vocab.find(unk);
  if (vocab.unk && vocab.model == "llama") vocab.types[*vocab.unk] = TokenType::unknown;
  add_json_tokens(vocab, tokenizer, source, n_vocab, notice);
  read_post_processor(tokenizer, vocab);
  return vocab;
}

}  // namespace duet
