#include "runtime/tokenizer.h"

#include <algorithm>
#include <functional>

#include "base/error.h"
#include "runtime/prefix_matcher.h"
#include "runtime/tokenizer_bpe.h"
#include "runtime/tokenizer_spm.h"
#include "runtime/unicode.h"
#include "runtime/vocabulary.h"

namespace duet {
namespace {

constexpr std::string_view kUnknownText = " \xE2\x81\x87 ";  // " ⁇ ", as sentencepiece prints it

// Bytes of every token as they stand in running text; for control tokens their name.
std::vector<std::string> make_texts(const Vocabulary& vocab) {
  const bool spm = vocab.model == "llama";
  std::vector<std::string> texts(vocab.size());
  for (size_t i = 0; i < vocab.size(); ++i) {
    const std::string& piece = vocab.pieces[i];
    const TokenType type = vocab.types[i];
    if (type == TokenType::unknown)
      texts[i] = kUnknownText;
    else if (type == TokenType::byte && spm)
      texts[i] = std::string(1, static_cast<char>(byte_of_piece(piece).value()));
    else if (type == TokenType::control)
      texts[i] = piece;
    else if (spm)
      texts[i] = unescape_spaces(piece);
    else
      texts[i] = type == TokenType::normal ? bytes_of_bpe_piece(piece).value_or(piece) : piece;
  }
  return texts;
}

}  // namespace

struct Tokenizer::State {
  State(const GgufFile& file, const NoticeFn& notice)
      : vocab(read_vocabulary(file, notice)), map(vocab.pieces, file.source()) {
    if (vocab.model == "llama") {
      spm.emplace(vocab, map, file.source());
    } else {
      const auto* merges = file.get_strings("tokenizer.ggml.merges");
      if (!merges)
        fail(ErrorKind::format, file.source(),
             ": tokenizer.ggml.merges is missing; a gpt2 vocabulary needs it");
      bpe.emplace(vocab, map, *merges, file.source(), notice);
    }
    texts = make_texts(vocab);
    std::vector<std::pair<std::string, int32_t>> names;
    for (size_t i = 0; i < vocab.size(); ++i)
      if (vocab.types[i] == TokenType::control)
        names.emplace_back(vocab.pieces[i], static_cast<Token>(i));
    control_names = PrefixMatcher(std::move(names));
  }
  State(const State&) = delete;  // the encoders borrow the vocabulary
  State& operator=(const State&) = delete;

  const Vocabulary vocab;
  const PieceMap map;
  std::optional<SpmEncoder> spm;
  std::optional<BpeEncoder> bpe;
  std::vector<std::string> texts;
  PrefixMatcher control_names;

  void encode_text(std::string_view text, bool dummy_space, std::vector<Token>& out) const {
    if (spm)
      spm->encode(text, dummy_space, out);
    else
      bpe->encode(text, out);
  }
  bool known(Token id) const { return id >= 0 && static_cast<size_t>(id) < vocab.size(); }
  bool is_control(Token id) const { return known(id) && vocab.type(id) == TokenType::control; }
};

namespace {

// Collects text between control tokens and encodes each stretch as one.
class PromptEncoder {
 public:
  PromptEncoder(std::function<void(std::string_view, bool, std::vector<Token>&)> encode,
                bool dummy_space)
      : encode_(std::move(encode)), dummy_space_(dummy_space) {}

  void add(const Segment& segment, const PrefixMatcher& control_names) {
    if (segment.apart) flush(dummy_space_);
    if (segment.is_markup)
      add_markup(segment.text, control_names);
    else
      stretch_ += segment.text;
    if (segment.apart) flush(true);
  }
  std::vector<Token> finish() {
    flush(dummy_space_);
    return std::move(out_);
  }

 private:
  void add_markup(std::string_view text, const PrefixMatcher& control_names) {
    while (!text.empty()) {
      const auto match = control_names.longest(text);
      if (match.id >= 0) {
        flush(dummy_space_);
        out_.push_back(match.id);
      } else {
        stretch_ += text[0];
      }
      text.remove_prefix(match.id >= 0 ? match.n_bytes : 1);
    }
  }
  void flush(bool dummy_space) {
    encode_(stretch_, dummy_space, out_);
    stretch_.clear();
  }

  std::function<void(std::string_view, bool, std::vector<Token>&)> encode_;
  bool dummy_space_;
  std::string stretch_;
  std::vector<Token> out_;
};

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<const State> state) : state_(std::move(state)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::load(const GgufFile& file, const NoticeFn& notice) {
  return Tokenizer(std::make_unique<const State>(file, notice));
}

size_t Tokenizer::n_vocab() const { return state_->vocab.size(); }
std::optional<Token> Tokenizer::bos() const { return state_->vocab.bos; }
std::optional<Token> Tokenizer::eos() const { return state_->vocab.eos; }
bool Tokenizer::add_bos() const { return state_->vocab.add_bos; }
bool Tokenizer::dummy_space() const { return state_->vocab.add_space_prefix; }
bool Tokenizer::is_control(Token token) const { return state_->is_control(token); }
std::optional<Token> Tokenizer::find(std::string_view piece) const {
  return state_->map.find(piece);
}

bool Tokenizer::is_eog(Token token) const {
  return state_->known(token) && state_->vocab.is_eog[static_cast<size_t>(token)];
}

std::vector<Token> Tokenizer::encode(std::string_view text) const {
  std::vector<Token> out;
  state_->encode_text(text, state_->vocab.add_space_prefix, out);
  return out;
}

std::vector<Token> Tokenizer::encode(std::span<const Segment> segments, bool add_bos) const {
  const auto encode_text = [this](std::string_view text, bool dummy_space,
                                  std::vector<Token>& out) {
    state_->encode_text(text, dummy_space, out);
  };
  PromptEncoder prompt(encode_text, state_->vocab.add_space_prefix);
  for (const Segment& segment : segments) prompt.add(segment, state_->control_names);
  std::vector<Token> ids = prompt.finish();
  if (!add_bos) return ids;
  const auto bos = state_->vocab.bos;
  if (!bos) fail(ErrorKind::usage, "a BOS token was asked for, but the vocabulary has none");
  const auto first = std::find_if(ids.begin(), ids.end(), [&](Token id) { return id != *bos; });
  ids.erase(ids.begin(), first);
  ids.insert(ids.begin(), *bos);
  return ids;
}

std::string Tokenizer::piece(Token token, bool show_control) const {
  std::string out;
  bool at_start = false;
  append_piece(token, show_control, at_start, out);
  return out;
}

// As sentencepiece, the dummy space goes only from a piece that begins with U+2581, be it the first
// one or after control tokens that show nothing.
void Tokenizer::append_piece(Token token, bool show_control, bool& at_start,
                             std::string& out) const {
  if (!state_->known(token))
    fail(ErrorKind::usage, "token id ", token, " is outside the vocabulary of ", n_vocab());
  if (state_->is_control(token) && !show_control) return;
  std::string_view text = state_->texts[static_cast<size_t>(token)];
  const TokenType type = state_->vocab.type(token);
  const bool spaced =
      type == TokenType::normal || type == TokenType::user_defined || type == TokenType::unused;
  if (at_start && dummy_space() && spaced && text.starts_with(' ')) text.remove_prefix(1);
  at_start = false;
  out += text;
}

std::string Tokenizer::decode(std::span<const Token> tokens, bool show_control) const {
  std::string bytes;
  bool at_start = true;
  for (const Token token : tokens) append_piece(token, show_control, at_start, bytes);
  return sanitize_utf8(bytes);
}

std::string TextStream::push(Token token) {
  tokenizer_->append_piece(token, false, at_start_, held_);
  const size_t n_held = incomplete_utf8_tail(held_);
  std::string out = sanitize_utf8(std::string_view(held_).substr(0, held_.size() - n_held));
  held_.erase(0, held_.size() - n_held);
  return out;
}

std::string TextStream::finish() {
  std::string out = sanitize_utf8(held_);
  held_.clear();
  return out;
}

}  // namespace duet
