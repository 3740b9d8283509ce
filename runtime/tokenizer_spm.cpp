#include "runtime/tokenizer_spm.h"

#include <bit>
#include <functional>
#include <limits>
#include <unordered_map>

#include "base/error.h"
#include "runtime/bpe_merge.h"
#include "runtime/unicode.h"

namespace duet {
namespace {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581
constexpr size_t kMaxWholeWord = 64;                 // bytes; longer words are just merged
constexpr size_t kMaxMemos = 4096;
constexpr Token kNone = -1;

std::string escape_spaces(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == ' ')
      out += kSpace;
    else
      out += c;
  }
  return out;
}

// What sentencepiece's identity normalizer makes of a text.
std::string normalize(std::string_view text, bool dummy_space) {
  std::string out;
  out.reserve(text.size() + text.size() / 3 + kSpace.size());
  if (dummy_space) out += kSpace;
  while (!text.empty()) {
    if (static_cast<signed char>(text[0]) >= 0) {
      if (text[0] == ' ')
        out += kSpace;
      else
        out += text[0];
      text.remove_prefix(1);
      continue;
    }
    const Utf8Char c = decode_utf8(text);
    out += c.valid ? text.substr(0, c.n_bytes) : kReplacement;
    text.remove_prefix(c.n_bytes);
  }
  return out;
}

// Bytes of the character that begins with `lead`, in text known to be well-formed; a piece of a
// damaged vocabulary may be anything, so the caller clips.
uint32_t char_bytes(char lead) {
  constexpr uint8_t kByHighNibble[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4};
  return kByHighNibble[static_cast<unsigned char>(lead) >> 4];
}

bool reaches_across_words(std::string_view piece) {
  for (size_t at = piece.find(kSpace); at != std::string_view::npos;
       at = piece.find(kSpace, at + 1))
    if (at >= kSpace.size() ? piece.substr(at - kSpace.size(), kSpace.size()) != kSpace : at > 0)
      return true;
  return false;
}

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

std::string unescape_spaces(std::string_view piece) {
  std::string out;
  while (!piece.empty()) {
    const bool space = piece.starts_with(kSpace);
    out += space ? ' ' : piece[0];
    piece.remove_prefix(space ? kSpace.size() : 1);
  }
  return out;
}

std::optional<unsigned char> byte_of_piece(std::string_view piece) {
  if (piece.size() != 6 || !piece.starts_with("<0x") || piece[5] != '>') return std::nullopt;
  const int high = hex_digit(piece[3]), low = hex_digit(piece[4]);
  if (high < 0 || low < 0) return std::nullopt;
  return static_cast<unsigned char>(high << 4 | low);
}

// Buffers of one encode() call.
struct SpmEncoder::Scratch {
  // Words met before in this text, by hash: where their ids stand in the output.
  struct Memo {
    std::string_view word;
    size_t first = 0, n_ids = 0;
  };
  std::vector<Memo> memos;
  std::vector<Symbol> symbols;
  std::vector<MergeCandidate> heap;
  std::vector<std::pair<uint32_t, uint32_t>> pending;  // stretches still to be resegmented
  std::unordered_map<Token, uint32_t> left_bytes;      // unused piece -> bytes of its left part
};

SpmEncoder::SpmEncoder(const Vocabulary& vocab, const PieceMap& map, const std::string& source)
    : vocab_(vocab), map_(map) {
  std::vector<std::pair<std::string, int32_t>> user_defined;
  byte_tokens_.fill(vocab.unknown.value_or(kNone));
  split_words_ = true;
  bool has_unused = false;
  for (Token id = 0; static_cast<size_t>(id) < vocab.size(); ++id) {
    const std::string& piece = vocab.piece(id);
    switch (vocab.type(id)) {
      case TokenType::byte: {
        const auto byte = byte_of_piece(piece);
        if (!byte)
          fail(ErrorKind::format, source, ": byte token ", id, " is not of the form <0x00>");
        byte_tokens_[*byte] = id;
        has_bytes_ = true;
        break;
      }
      case TokenType::user_defined:
        user_defined.emplace_back(escape_spaces(piece), id);
        [[fallthrough]];
      case TokenType::normal:
        split_words_ = split_words_ && !reaches_across_words(piece);
        for (size_t at = 1; at < piece.size(); ++at)
          joins_[pair_index(piece[at - 1], piece[at])] = true;
        break;
      case TokenType::unused:
        has_unused = true;
        break;
      case TokenType::unknown:
      case TokenType::control:
        break;
    }
  }
  for (const Token id : byte_tokens_)
    if (id == kNone)
      fail(ErrorKind::format, source,
           ": the vocabulary has neither all byte tokens nor an unknown token");
  // Which parts an unused piece falls apart into depends on merges elsewhere in the text, and a run
  // of unknown characters is one token.
  split_words_ = split_words_ && !has_unused && has_bytes_;
  user_defined_ = PrefixMatcher(std::move(user_defined));
  reached_ = std::make_unique<std::atomic<bool>[]>(vocab_.size());
}

// The piece that merging may build with this text, kNone when there is none.
Token SpmEncoder::mergeable(std::string_view piece) const {
  const auto id = map_.find(piece);
  if (!id) return kNone;
  const TokenType type = vocab_.type(*id);
  const bool ok =
      type == TokenType::normal || type == TokenType::user_defined || type == TokenType::unused;
  return ok ? *id : kNone;
}

void SpmEncoder::encode(std::string_view text, bool dummy_space, std::vector<Token>& out) const {
  if (text.empty()) return;
  if (text.size() > std::numeric_limits<uint32_t>::max() / 4)
    fail(ErrorKind::usage, "text of ", text.size(),
         " bytes is too long to be tokenized at once; at most 1 GiB");
  const std::string normalized = normalize(text, dummy_space);
  std::string_view rest = normalized;
  Scratch scratch;
  scratch.memos.resize(std::bit_ceil(std::min<size_t>(kMaxMemos, normalized.size() / 16 + 1)));
  while (!rest.empty()) {
    const auto match = user_defined_.longest(rest);
    if (match.id != kNone) {
      out.push_back(match.id);
      rest.remove_prefix(match.n_bytes);
      continue;
    }
    const std::string_view word = rest.substr(0, word_bytes(rest));
    encode_word(word, scratch, out);
    rest.remove_prefix(word.size());
  }
}

// Up to where `text` can be encoded by itself: a user-defined token, the start of the next word, or
// two characters that stand side by side in no piece.
size_t SpmEncoder::word_bytes(std::string_view text) const {
  bool in_spaces = true;
  for (size_t at = 0; at < text.size();) {
    const bool space = text[at] == kSpace[0] && text.substr(at, kSpace.size()) == kSpace;
    if (at > 0 && split_words_ && ((space && !in_spaces) || !may_join(text[at - 1], text[at])))
      return at;
    if (at > 0 && !user_defined_.empty() && user_defined_.longest(text.substr(at)).id != kNone)
      return at;
    in_spaces = space;
    at += char_bytes(text[at]);
  }
  return text.size();
}

// Merging does not reach every piece from its own characters; one that it reached once, it always
// reaches, which saves most words the merging. Of the others a text repeats many.
void SpmEncoder::encode_word(std::string_view word, Scratch& scratch,
                             std::vector<Token>& out) const {
  if (word.size() > kMaxWholeWord) return merge_word(word, scratch, out);
  const Token whole = mergeable(word);
  std::atomic<bool>* reached = whole == kNone ? nullptr : &reached_[static_cast<size_t>(whole)];
  if (reached && reached->load(std::memory_order_relaxed)) return out.push_back(whole);
  const size_t slot = std::hash<std::string_view>{}(word) & (scratch.memos.size() - 1);
  Scratch::Memo& memo = scratch.memos[slot];
  if (memo.word == word) {
    for (size_t i = 0; i < memo.n_ids; ++i) out.push_back(out[memo.first + i]);
    return;
  }
  const size_t first = out.size();
  merge_word(word, scratch, out);
  memo = {word, first, out.size() - first};
  if (reached && out.size() == first + 1 && out.back() == whole)
    reached->store(true, std::memory_order_relaxed);
}

void SpmEncoder::merge_word(std::string_view word, Scratch& scratch,
                            std::vector<Token>& out) const {
  auto& symbols = scratch.symbols;
  symbols.clear();
  scratch.left_bytes.clear();
  for (size_t at = 0; at < word.size();) {
    const uint32_t n =
        static_cast<uint32_t>(std::min<size_t>(char_bytes(word[at]), word.size() - at));
    const auto index = static_cast<int32_t>(symbols.size());
    symbols.push_back({static_cast<uint32_t>(at), n, index - 1, index + 1, kNone, false});
    at += n;
  }
  symbols.back().next = -1;
  merge_symbols(
      symbols, scratch.heap, [&](const Symbol& left, const Symbol&, MergeCandidate& merged) {
        merged.id = mergeable(word.substr(left.begin, merged.n_bytes));
        if (merged.id == kNone) return false;
        merged.priority = static_cast<double>(vocab_.scores[static_cast<size_t>(merged.id)]);
        if (vocab_.type(merged.id) == TokenType::unused)
          scratch.left_bytes[merged.id] = left.n_bytes;
        return true;
      });
  for (int32_t i = 0; i >= 0; i = symbols[static_cast<size_t>(i)].next)
    emit(word, symbols[static_cast<size_t>(i)], scratch, out);
}

// Unused pieces serve as steps of merging but are taken apart again at the end.
void SpmEncoder::emit(std::string_view word, const Symbol& symbol, Scratch& scratch,
                      std::vector<Token>& out) const {
  auto& pending = scratch.pending;
  pending.assign(1, {symbol.begin, symbol.n_bytes});
  while (!pending.empty()) {
    const auto [begin, n_bytes] = pending.back();
    pending.pop_back();
    const std::string_view piece = word.substr(begin, n_bytes);
    const Token id = mergeable(piece);
    if (id == kNone) {
      emit_unknown(piece, out);
      continue;
    }
    const auto split = vocab_.type(id) == TokenType::unused ? scratch.left_bytes.find(id)
                                                            : scratch.left_bytes.end();
    if (split == scratch.left_bytes.end()) {
      out.push_back(id);
      continue;
    }
    pending.emplace_back(begin + split->second, n_bytes - split->second);
    pending.emplace_back(begin, split->second);
  }
}

void SpmEncoder::emit_unknown(std::string_view piece, std::vector<Token>& out) const {
  if (has_bytes_) {
    for (const char c : piece) out.push_back(byte_tokens_[static_cast<unsigned char>(c)]);
  } else if (out.empty() ||
             out.back() != *vocab_.unknown) {  // a run of unknown characters is one token
    out.push_back(*vocab_.unknown);
  }
}

}  // namespace duet
