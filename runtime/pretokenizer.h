// Splits text into the pieces that byte-level BPE never merges across (tokenizer.ggml.pre): the
// regular expressions of GPT-2, Llama 3, Qwen2, Tekken ... as hand-written scanners.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "runtime/unicode.h"

namespace duet {

// A text as characters. Positions below are character indices.
struct CharRow {
  explicit CharRow(std::string_view bytes);

  std::string_view text;
  std::vector<uint32_t> offsets;   // [n + 1] first byte of each character, then text.size()
  std::vector<CharClass> classes;  // [n]

  size_t size() const { return classes.size(); }
  char ascii(size_t i) const { return text[offsets[i]]; }  // first byte: compare with ASCII only
};

// End of the match of an expression at `at` in [at, end), or `at` when it does not match there.
using Scanner = size_t (*)(const CharRow& row, size_t at, size_t end);

struct PreTokenizer {
  std::vector<Scanner> passes;     // each splits the pieces of the one before; gaps are pieces too
  bool whole_words_first = false;  // a piece that is a token is that token, whatever the merges say
};

// nullopt for a name that is not known.
std::optional<PreTokenizer> pre_tokenizer_by_name(std::string_view name);

// Byte ranges of the pieces, in order, covering the text.
std::vector<std::string_view> split(const PreTokenizer& pre, std::string_view text);

}  // namespace duet
