// Text <-> token ids from a GGUF vocabulary: SentencePiece BPE ("llama") and GPT-2 byte-level BPE
// ("gpt2"). Own code, tested against sentencepiece and mistral-common ids.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/gguf.h"
#include "formats/schema.h"
#include "runtime/vocabulary.h"

namespace duet {

// A piece of a rendered prompt. Only markup may become control tokens; text never does. Neighbours
// with no control token between them are tokenized as one text, except where one stands apart.
struct Segment {
  std::string text;
  bool is_markup = false;
  // Tokenized by itself and, in a SentencePiece vocabulary, always behind a dummy space (what
  // mistral-common does with each message, whatever add_space_prefix says).
  bool apart = false;
};

// Immutable and thread-safe.
class Tokenizer {
 public:
  // Throws Error: format (no or inconsistent vocabulary), unsupported (tokenizer.ggml.model or .pre
  // not known). Vocabulary repairs (untyped [INST], missing EOS, ...) go through `notice`.
  static Tokenizer load(const GgufFile& file, const NoticeFn& notice);
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  size_t n_vocab() const;
  std::optional<Token> bos() const;
  std::optional<Token> eos() const;
  bool add_bos() const;      // whether prompts start with BOS by default
  bool dummy_space() const;  // SentencePiece: text begins with a space that is not its own
  bool is_eog(
      Token token) const;  // any declared end-of-generation token (EOS, EOT, <|im_end|> ...)
  bool is_control(Token token) const;
  std::optional<Token> find(std::string_view piece) const;  // exact piece, any type

  // Plain text to ids, no BOS: user-defined tokens are matched, control tokens never.
  std::vector<Token> encode(std::string_view text) const;
  // A rendered prompt: markup segments may contain control tokens by name. With add_bos exactly one
  // BOS comes first, also when the markup already begins with it.
  std::vector<Token> encode(std::span<const Segment> segments, bool add_bos) const;

  // Bytes of one token as they stand in running text (a SentencePiece "▁" is a space); control
  // tokens give "" unless show_control.
  std::string piece(Token token, bool show_control = false) const;
  // Text of a sequence; the SentencePiece dummy space at the start is removed. Ids outside the
  // vocabulary: Error(usage).
  std::string decode(std::span<const Token> tokens, bool show_control = false) const;

 private:
  friend class TextStream;
  void append_piece(Token token, bool show_control, bool& at_start, std::string& out) const;
  struct State;
  explicit Tokenizer(std::unique_ptr<const State> state);
  std::unique_ptr<const State> state_;
};

// Text of a growing sequence, released only at UTF-8 boundaries.
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer, bool at_text_start)
      : tokenizer_(&tokenizer), at_start_(at_text_start) {}
  std::string push(Token token);  // what became printable
  std::string finish();           // held-back bytes, invalid ones as U+FFFD

 private:
  const Tokenizer* tokenizer_;
  bool at_start_;  // drop the dummy space of the first piece
  std::string held_;
};

}  // namespace duet
