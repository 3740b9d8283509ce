// SentencePiece BPE over a GGUF vocabulary ("llama"): the same ids as sentencepiece with an
// identity normalizer (no NFKC, extra spaces kept), as Mistral and Llama vocabularies have it.
#pragma once

#include <array>
#include <atomic>
#include <bitset>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/prefix_matcher.h"
#include "runtime/vocabulary.h"

namespace duet {

struct Symbol;

// Spaces for U+2581.
std::string unescape_spaces(std::string_view piece);
// The byte of a piece "<0xAB>".
std::optional<unsigned char> byte_of_piece(std::string_view piece);

// Immutable and thread-safe; borrows the vocabulary and the map.
class SpmEncoder {
 public:
  // Throws Error(format) when some byte of text could not be encoded at all.
  SpmEncoder(const Vocabulary& vocab, const PieceMap& map, const std::string& source);

  // Appends the ids of `text`. Spaces become U+2581; `dummy_space` puts one before a text that is
  // not empty. Invalid UTF-8 becomes U+FFFD byte by byte, as sentencepiece does it. A character
  // without a piece becomes its byte tokens, or the unknown token where the vocabulary has none.
  void encode(std::string_view text, bool dummy_space, std::vector<Token>& out) const;

 private:
  struct Scratch;
  Token mergeable(std::string_view piece) const;
  size_t word_bytes(std::string_view text) const;
  static size_t pair_index(char last, char first) {
    return size_t{static_cast<unsigned char>(last)} << 8 | static_cast<unsigned char>(first);
  }
  bool may_join(char last, char first) const { return joins_[pair_index(last, first)]; }
  void encode_word(std::string_view word, Scratch& scratch, std::vector<Token>& out) const;
  void merge_word(std::string_view word, Scratch& scratch, std::vector<Token>& out) const;
  void emit(std::string_view word, const Symbol& symbol, Scratch& scratch,
            std::vector<Token>& out) const;
  void emit_unknown(std::string_view piece, std::vector<Token>& out) const;

  const Vocabulary& vocab_;
  const PieceMap& map_;
  PrefixMatcher user_defined_;
  std::array<Token, 256> byte_tokens_{};
  bool has_bytes_ = false;
  bool split_words_ = false;                      // no piece reaches across the start of a word
  std::bitset<65536> joins_;                      // bytes that follow each other in some piece
  std::unique_ptr<std::atomic<bool>[]> reached_;  // by id: merging its own characters gives it
};

}  // namespace duet
