// Small vocabularies as GGUF bytes, and tokenizers made from them.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "formats/gguf.h"
#include "runtime/tokenizer.h"
#include "tests/support/gguf_builder.h"

namespace duet::test {

struct VocabEntry {
  std::string piece;
  float score = 0;
  TokenType type = TokenType::normal;
};

// <unk>, <s>, </s>, the 256 byte tokens, U+2581, a-z with low scores, and a few merged pieces.
std::vector<VocabEntry> small_spm_vocab();
GgufBuilder spm_file(const std::vector<VocabEntry>& entries);

// 32768 tokens laid out as in Mistral's v3 vocabulary, the markers 3-9 of the type given.
GgufBuilder mistral_v3_file(TokenType marker_type);

// <|endoftext|>, <|im_start|>, <|im_end|> (control), the 256 byte tokens, then the results of
// `merges` ("h e" ...) in order.
GgufBuilder gpt2_file(const std::string& pre, const std::vector<std::string>& merges);

// A vocabulary like `file`'s SentencePiece one with some types changed and entries added.
GgufBuilder changed_spm_file(const GgufFile& file,
                             const std::vector<std::pair<size_t, TokenType>>& types,
                             const std::vector<VocabEntry>& more);

struct LoadedTokenizer {
  Tokenizer tokenizer;
  std::vector<std::string> notices;

  bool noticed(std::string_view part) const;
};
LoadedTokenizer load_tokenizer(const GgufBuilder& file);

}  // namespace duet::test
