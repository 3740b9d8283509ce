// GPT-2 style byte-level BPE over a GGUF vocabulary ("gpt2").
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "runtime/prefix_matcher.h"
#include "runtime/pretokenizer.h"
#include "runtime/vocabulary.h"

namespace duet {

// The bytes that a piece stands for: each of its characters is one byte in GPT-2's printable
// alphabet. nullopt when it is not written in that alphabet (added tokens are plain text).
std::optional<std::string> bytes_of_bpe_piece(std::string_view piece);

// Immutable and thread-safe; borrows the vocabulary.
class BpeEncoder {
 public:
  // `merges`: "left right" in order of priority. Throws Error: format (a merge whose parts or
  // result are not tokens), unsupported (tokenizer.ggml.pre).
  BpeEncoder(const Vocabulary& vocab, const PieceMap& map, const std::vector<std::string>& merges,
             const std::string& source, const NoticeFn& notice);

  // Appends the ids of `text`: user-defined tokens first, then piece by piece. Invalid UTF-8 keeps
  // its bytes.
  void encode(std::string_view text, std::vector<Token>& out) const;

 private:
  struct Merge {
    uint32_t rank;
    Token id;
  };
  struct Scratch;
  void read_merges(const PieceMap& map, const std::vector<std::string>& merges,
                   const std::string& source);
  void find_byte_tokens(const std::string& source, const NoticeFn& notice);
  void encode_plain(std::string_view text, Scratch& scratch, std::vector<Token>& out) const;
  void encode_word(std::string_view word, Scratch& scratch, std::vector<Token>& out) const;
  void merge_word(std::string_view word, Scratch& scratch, std::vector<Token>& out) const;

  const Vocabulary& vocab_;
  PreTokenizer pre_;
  PrefixMatcher user_defined_;
  std::vector<std::string> words_;  // bytes of each normal token, "" for the others
  std::unique_ptr<PieceMap> word_map_;
  std::array<Token, 256> byte_tokens_{};          // -1: the vocabulary lacks this byte
  std::unordered_map<uint64_t, Merge> merges_;    // left id << 32 | right id
  std::unique_ptr<std::atomic<bool>[]> reached_;  // by id: merging its own bytes gives it
};

}  // namespace duet
