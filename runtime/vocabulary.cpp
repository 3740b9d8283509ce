#include "runtime/vocabulary.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "base/error.h"

namespace duet {
namespace {

constexpr Token kMistralV3Inst = 3, kMistralV3LastMarker = 9;  // [INST] ... [/TOOL_RESULTS]
constexpr size_t kMistralV3Size = 32768;

// Generation ends at these wherever a vocabulary has them.
constexpr std::array<std::string_view, 16> kEndNames = {"</s>",
                                                        "<|im_end|>",
                                                        "<|eot_id|>",
                                                        "<|eom_id|>",
                                                        "<|end|>",
                                                        "<|endoftext|>",
                                                        "<|end_of_text|>",
                                                        "<end_of_turn>",
                                                        "<|end_of_turn|>",
                                                        "<EOT>",
                                                        "_<EOT>",
                                                        "[EOS]",
                                                        "[EOT]",
                                                        "<eos>",
                                                        "<end_of_utterance>",
                                                        "<｜end▁of▁sentence｜>"};
// Not ends, but a user who types them must not open a turn either.
constexpr std::array<std::string_view, 8> kTurnNames = {
    "<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>",
    "<|user|>",     "<|assistant|>",       "<|system|>",        "<s>"};

bool named_in(std::span<const std::string_view> names, std::string_view piece) {
  return std::find(names.begin(), names.end(), piece) != names.end();
}

class Reader {
 public:
  Reader(const GgufFile& file, const NoticeFn& notice) : file_(file), notice_(notice) {}

  Vocabulary read() {
    read_tokens();
    read_types();
    read_scores();
    read_special_ids();
    repair_mistral_v3();
    repair_markers();
    collect_ends();
    return std::move(vocab_);
  }

 private:
  template <class... Parts>
  [[noreturn]] void bad(const Parts&... parts) const {
    fail(ErrorKind::format, file_.source(), ": ", parts...);
  }
  template <class... Parts>
  void remark(const Parts&... parts) const {
    if (notice_) notice_(concat(parts...));
  }

  bool spm() const { return vocab_.model == "llama"; }

  void read_tokens() {
    const std::string* model = file_.get_string("tokenizer.ggml.model");
    const auto* tokens = file_.get_strings("tokenizer.ggml.tokens");
    if (!model || *model == "none" || *model == "no_vocab" || !tokens || tokens->empty())
      bad("the file has no tokenizer (tokenizer.ggml.model and .tokens); convert the model again "
          "with its tokenizer beside it");
    if (*model != "llama" && *model != "gpt2")
      fail(ErrorKind::unsupported, file_.source(), ": tokenizer model '", *model,
           "' is not supported (llama and gpt2 are)");
    if (tokens->size() > (size_t{1} << 24))
      bad("vocabulary of ", tokens->size(), " tokens; at most 16777216 are accepted");
    vocab_.model = *model;
    vocab_.pieces = *tokens;
    if (const std::string* pre = file_.get_string("tokenizer.ggml.pre")) vocab_.pre = *pre;
  }

  // Any numeric array, as doubles; nullopt when the key is absent.
  std::optional<std::vector<double>> numbers(const char* key) const {
    const GgufValue* value = file_.find(key);
    if (!value) return std::nullopt;
    std::vector<double> out;
    const auto take = [&](const auto& list) { out.assign(list.begin(), list.end()); };
    if (const auto* reals = std::get_if<std::vector<double>>(&value->data))
      take(*reals);
    else if (const auto* ints = std::get_if<std::vector<int64_t>>(&value->data))
      take(*ints);
    else if (const auto* naturals = std::get_if<std::vector<uint64_t>>(&value->data))
      take(*naturals);
    else
      bad("key '", key, "' is not an array of numbers");
    if (out.size() != vocab_.size())
      bad("key '", key, "' has ", out.size(), " entries for ", vocab_.size(), " tokens");
    return out;
  }

  void read_types() {
    const auto types = numbers("tokenizer.ggml.token_type");
    vocab_.types.assign(vocab_.size(), TokenType::normal);
    if (!types) return guess_types();
    for (size_t i = 0; i < types->size(); ++i) {
      const double type = (*types)[i];
      if (!(type >= 0 && type <= 6)) bad("token ", i, " has the unknown type ", type);
      if (type >= 1) vocab_.types[i] = static_cast<TokenType>(type);
    }
  }

  // Early files have no types: the names tell.
  void guess_types() {
    remark("tokenizer.ggml.token_type is missing: token types taken from their names");
    if (!spm()) return;
    for (size_t i = 0; i < vocab_.size(); ++i) {
      const std::string& piece = vocab_.pieces[i];
      if (piece.size() == 6 && piece.starts_with("<0x") && piece.ends_with(">"))
        vocab_.types[i] = TokenType::byte;
      if (piece == "<unk>") vocab_.types[i] = TokenType::unknown;
      if (piece == "<s>" || piece == "</s>") vocab_.types[i] = TokenType::control;
    }
  }

  void read_scores() {
    if (!spm()) return;
    const auto scores = numbers("tokenizer.ggml.scores");
    if (!scores) bad("tokenizer.ggml.scores is missing; a SentencePiece vocabulary needs it");
    vocab_.scores.reserve(scores->size());
    for (size_t i = 0; i < scores->size(); ++i) {
      if (std::isnan((*scores)[i])) bad("token ", i, " has a score that is not a number");
      vocab_.scores.push_back(static_cast<float>((*scores)[i]));
    }
  }

  std::optional<Token> special(const char* key) const {
    const auto id = file_.get_uint(key);
    if (!id) return std::nullopt;
    if (*id >= vocab_.size())
      bad("key '", key, "' is ", *id, ", outside the vocabulary of ", vocab_.size());
    return static_cast<Token>(*id);
  }

  std::optional<Token> by_name(std::string_view name) const {
    const auto at = std::find(vocab_.pieces.begin(), vocab_.pieces.end(), name);
    if (at == vocab_.pieces.end()) return std::nullopt;
    return static_cast<Token>(at - vocab_.pieces.begin());
  }

  void read_special_ids() {
    vocab_.bos = special("tokenizer.ggml.bos_token_id");
    vocab_.eos = special("tokenizer.ggml.eos_token_id");
    vocab_.unknown = special("tokenizer.ggml.unknown_token_id");
    if (spm() && !vocab_.bos) vocab_.bos = by_name("<s>");
    if (spm() && !vocab_.unknown) vocab_.unknown = by_name("<unk>");
    if (!vocab_.eos) find_missing_end();
    const bool llama3_style = vocab_.pre == "llama-bpe" || vocab_.pre == "llama3" ||
                              vocab_.pre == "llama-v3" || vocab_.pre == "tekken";
    vocab_.add_bos = file_.get_bool("tokenizer.ggml.add_bos_token").value_or(spm() || llama3_style);
    vocab_.add_space_prefix =
        spm() && file_.get_bool("tokenizer.ggml.add_space_prefix").value_or(true);
    if (vocab_.add_bos && !vocab_.bos) {
      remark("the vocabulary has no BOS token: prompts start without one");
      vocab_.add_bos = false;
    }
  }

  void find_missing_end() {
    for (const std::string_view name : kEndNames) {
      vocab_.eos = by_name(name);
      if (!vocab_.eos) continue;
      return remark("tokenizer.ggml.eos_token_id is missing: token ", *vocab_.eos, " '", name,
                    "' ends a generation");
    }
    remark("the vocabulary names no end token: a generation ends at its length only");
  }

  // Compatibility 3f-5 and 3f-3: 8x22B-Instruct files whose markers are typed as ordinary text, and
  // whose add_bos_token is false because the chat template once wrote the BOS.
  void repair_mistral_v3() {
    if (!spm() || vocab_.size() != kMistralV3Size || vocab_.piece(kMistralV3Inst) != "[INST]")
      return;
    size_t n_repaired = 0;
    for (Token id = kMistralV3Inst; id <= kMistralV3LastMarker; ++id)
      n_repaired += make_control(id);
    if (n_repaired > 0)
      remark(
          "tokens 3-9 ([INST] ... [/TOOL_RESULTS]) are not marked as control tokens in this file: "
          "treated as such");
    if (vocab_.bos && !vocab_.add_bos) {
      vocab_.add_bos = true;
      remark(
          "add_bos_token is false, but this model expects one BOS: prompts start with exactly one");
    }
  }

  void repair_markers() {
    size_t n_repaired = 0;
    std::string first;
    for (size_t i = 0; i < vocab_.size(); ++i) {
      const std::string& piece = vocab_.pieces[i];
      if (!named_in(kEndNames, piece) && !named_in(kTurnNames, piece)) continue;
      if (is_ordinary_word(i)) continue;
      if (make_control(static_cast<Token>(i)) && ++n_repaired == 1) first = piece;
    }
    if (n_repaired > 0)
      remark(n_repaired, " chat marker(s) such as ", first,
             " are typed as text in this file: treated as control tokens");
    for (const auto id : {vocab_.bos, vocab_.eos})
      if (id) make_control(*id);
  }

  // Byte-level vocabularies can hold "<s>" or "</s>" as a common string of source code.
  bool is_ordinary_word(size_t i) const {
    return !spm() && vocab_.types[i] == TokenType::normal && !vocab_.pieces[i].starts_with("<|");
  }

  bool make_control(Token id) {
    TokenType& type = vocab_.types[static_cast<size_t>(id)];
    if (type == TokenType::control || type == TokenType::unknown) return false;
    type = TokenType::control;
    return true;
  }

  // Compatibility 3f-8: fine-tunes declare several ends; generation stops at any of them.
  void collect_ends() {
    vocab_.is_eog.assign(vocab_.size(), false);
    const auto mark = [&](std::optional<Token> id) {
      if (!id) return;
      make_control(*id);
      vocab_.is_eog[static_cast<size_t>(*id)] = true;
    };
    mark(vocab_.eos);
    for (const char* key : {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"})
      mark(special(key));
    for (size_t i = 0; i < vocab_.size(); ++i)
      if (vocab_.types[i] == TokenType::control && named_in(kEndNames, vocab_.pieces[i]))
        vocab_.is_eog[i] = true;
  }

  const GgufFile& file_;
  const NoticeFn& notice_;
  Vocabulary vocab_;
};

}  // namespace

Vocabulary read_vocabulary(const GgufFile& file, const NoticeFn& notice) {
  return Reader(file, notice).read();
}

}  // namespace duet
