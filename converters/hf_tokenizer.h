// The tokenizer of a Hugging Face folder -> tokenizer.* keys of GGUF.
//
// Vocabulary: the first of tokenizer.model, *.model.v* (Mistral's naming; the highest version),
// tokenizer.json. On top of it added_tokens.json, the added tokens of tokenizer.json and of
// tokenizer_config.json (added_tokens_decoder), the later overriding the earlier.
// End of text: tokenizer_config's eos_token, else config.json, else generation_config.json, else
// the vocabulary; further ids of those lists become eot_token_id and eom_token_id. BOS/EOS at
// prompt start/end: tokenizer_config's add_bos_token/add_eos_token, else the post-processor of
// tokenizer.json, else BOS for SentencePiece vocabularies only. Chat template: chat_template.jinja,
// else chat_template.json, else tokenizer_config.json.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/json_fwd.h"
#include "formats/gguf.h"
#include "formats/schema.h"

namespace duet {

// A vocabulary in the making: token id = index.
struct Vocab {
  std::string model;  // "llama" (SentencePiece BPE by scores) or "gpt2" (byte-level BPE by merges)
  std::string pre;    // how "gpt2" splits words; "default" for "llama"
  std::vector<std::string> tokens;
  std::vector<double> scores;
  std::vector<TokenType> types;
  std::vector<std::string> merges;  // "left right", gpt2 only
  std::optional<uint32_t> bos, eos, unk, pad;
  std::optional<bool> add_bos, add_eos, add_space_prefix;

  void resize(size_t n);  // new entries are unused "[PADn]" tokens
  std::optional<uint32_t> find(std::string_view text) const;
};

// From tokenizer.model.
Vocab spm_vocab(const std::filesystem::path& file, const NoticeFn& notice);
// From tokenizer.json with its added tokens: "llama" when it falls back to bytes, "gpt2" when it is
// byte-level. Throws Error: format (damage), unsupported (another kind of tokenizer, an unknown
// word splitter).
Vocab json_vocab(const Json& tokenizer, const std::string& source, size_t n_vocab,
                 const NoticeFn& notice);
// The added_tokens of tokenizer.json, on top of a vocabulary.
void add_json_tokens(Vocab& vocab, const Json& tokenizer, const std::string& source, size_t n_vocab,
                     const NoticeFn& notice);
// One added token: control when special (or when it looks like markup), user-defined otherwise. An
// id of n_vocab or more is left out with a notice.
void add_token(Vocab& vocab, uint64_t id, const std::string& text, bool special, size_t n_vocab,
               const NoticeFn& notice);

// All tokenizer keys for a model of n_vocab tokens. `config` is the parsed config.json.
// Throws Error: format (no tokenizer in the folder, more pieces than n_vocab, damaged files),
// unsupported.
std::vector<GgufKeyValue> read_hf_tokenizer(const std::filesystem::path& folder, const Json& config,
                                            uint32_t n_vocab, const NoticeFn& notice);
std::vector<GgufKeyValue> vocab_metadata(const Vocab& vocab);

}  // namespace duet
