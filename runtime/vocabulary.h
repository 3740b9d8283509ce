// The token list of a GGUF file, checked and repaired: what both tokenizer kinds build on.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "formats/gguf.h"
#include "formats/schema.h"

namespace duet {

using Token = int32_t;

// Piece -> id by open addressing; borrows the pieces it was built from. Empty pieces are not found.
class PieceMap {
 public:
  // Throws Error(format) when a piece appears twice.
  PieceMap(const std::vector<std::string>& pieces, const std::string& source);
  std::optional<Token> find(std::string_view piece) const;

 private:
  struct Slot {
    uint32_t hash = 0;
    Token id = -1;
  };
  const std::vector<std::string>* pieces_;
  std::vector<Slot> slots_;
  size_t mask_ = 0;
};

struct Vocabulary {
  std::string model, pre;  // tokenizer.ggml.model, .pre ("" when absent)
  std::vector<std::string> pieces;
  std::vector<float> scores;  // empty when the file has none
  std::vector<TokenType> types;
  std::optional<Token> bos, eos, unknown;
  bool add_bos = false, add_space_prefix = false;
  std::vector<bool> is_eog;

  size_t size() const { return pieces.size(); }
  TokenType type(Token id) const { return types[static_cast<size_t>(id)]; }
  const std::string& piece(Token id) const { return pieces[static_cast<size_t>(id)]; }
};

// Reads tokenizer.ggml.*. Throws Error: format (none, inconsistent), unsupported (model).
// Repairs, each with a notice: [INST] and other chat markers typed as ordinary tokens become
// control; a missing end token is looked for by name; a Mistral v3 vocabulary wants BOS.
Vocabulary read_vocabulary(const GgufFile& file, const NoticeFn& notice);

}  // namespace duet
