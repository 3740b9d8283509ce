#include "runtime/tokenizer_bpe.h"

#include <algorithm>
#include <limits>

#include "base/error.h"
#include "runtime/bpe_merge.h"
#include "runtime/unicode.h"

namespace duet {
namespace {

// GPT-2's alphabet: printable Latin-1 bytes are themselves, the others follow from U+0100 on.
std::array<int, 512> make_alphabet() {
  std::array<int, 512> byte_of{};
  byte_of.fill(-1);
  size_t next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    byte_of[printable ? static_cast<size_t>(byte) : next++] = byte;
  }
  return byte_of;
}

// Not a control character, nor a byte of unassigned or impossible UTF-8: those many vocabularies
// lack.
bool is_common_byte(size_t byte) {
  if (byte < 0x80) return (byte >= 0x20 && byte < 0x7F) || byte == '\t' || byte == '\n';
  return byte <= 0xF0 && byte != 0xC0 && byte != 0xC1;
}

uint64_t pair_key(Token left, Token right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

std::optional<std::string> bytes_of_bpe_piece(std::string_view piece) {
  static const std::array<int, 512> kByteOf = make_alphabet();
  std::string out;
  while (!piece.empty()) {
    const Utf8Char c = decode_utf8(piece);
    if (!c.valid || c.cp >= kByteOf.size() || kByteOf[c.cp] < 0) return std::nullopt;
    out += static_cast<char>(static_cast<unsigned char>(kByteOf[c.cp]));
    piece.remove_prefix(c.n_bytes);
  }
  return out;
}

struct BpeEncoder::Scratch {
  std::vector<Symbol> symbols;
  std::vector<MergeCandidate> heap;
};

BpeEncoder::BpeEncoder(const Vocabulary& vocab, const PieceMap& map,
                       const std::vector<std::string>& merges, const std::string& source,
                       const NoticeFn& notice)
    : vocab_(vocab), words_(vocab.size()) {
  if (vocab.pre.empty() && notice)
    notice(
        "tokenizer.ggml.pre is missing: text is split the default way, which may not suit this "
        "model");
  const auto pre = pre_tokenizer_by_name(vocab.pre.empty() ? "default" : vocab.pre);
  if (!pre)
    fail(ErrorKind::unsupported, source, ": pre-tokenizer '", vocab.pre,
         "' (tokenizer.ggml.pre) is not supported");
  pre_ = *pre;
  std::vector<std::pair<std::string, int32_t>> user_defined;
  for (size_t i = 0; i < vocab.size(); ++i) {
    if (vocab.types[i] == TokenType::user_defined)
      user_defined.emplace_back(vocab.pieces[i], static_cast<Token>(i));
    if (vocab.types[i] == TokenType::normal)
      words_[i] = bytes_of_bpe_piece(vocab.pieces[i]).value_or("");
  }
  user_defined_ = PrefixMatcher(std::move(user_defined));
  word_map_ = std::make_unique<PieceMap>(words_, source);
  find_byte_tokens(source, notice);
  read_merges(map, merges, source);
  reached_ = std::make_unique<std::atomic<bool>[]>(vocab.size());
}

void BpeEncoder::find_byte_tokens(const std::string& source, const NoticeFn& notice) {
  size_t n_missing = 0, n_missing_common = 0;
  for (size_t byte = 0; byte < 256; ++byte) {
    const char text = static_cast<char>(static_cast<unsigned char>(byte));
    byte_tokens_[byte] = word_map_->find({&text, 1}).value_or(-1);
    if (byte_tokens_[byte] >= 0) continue;
    ++n_missing;
    n_missing_common += is_common_byte(byte);
  }
  if (n_missing == 256)
    fail(ErrorKind::format, source,
         ": the vocabulary has no byte tokens; it is not of the gpt2 kind");
  if (n_missing_common > 0 && notice)
    notice(concat("the vocabulary lacks tokens for ", n_missing_common,
                  " bytes of ordinary text: such text loses them"));
}

void BpeEncoder::read_merges(const PieceMap& map, const std::vector<std::string>& merges,
                             const std::string& source) {
  if (merges.size() > std::numeric_limits<uint32_t>::max())
    fail(ErrorKind::format, source, ": too many merges");
  merges_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const std::string_view merge = merges[rank];
    const size_t space = merge.find(' ', 1);
    if (space == std::string_view::npos)
      fail(ErrorKind::format, source, ": merge ", rank, " is not of the form 'left right'");
    const auto left = map.find(merge.substr(0, space)), right = map.find(merge.substr(space + 1));
    const auto whole =
        map.find(std::string(merge.substr(0, space)) + std::string(merge.substr(space + 1)));
    if (!left || !right || !whole)
      fail(ErrorKind::format, source, ": merge ", rank,
           " names a token that is not in the vocabulary");
    if (vocab_.type(*whole) == TokenType::control) continue;  // never out of plain text
    merges_.try_emplace(pair_key(*left, *right), Merge{static_cast<uint32_t>(rank), *whole});
  }
}

void BpeEncoder::encode(std::string_view text, std::vector<Token>& out) const {
  if (text.size() > std::numeric_limits<uint32_t>::max() / 4)
    fail(ErrorKind::usage, "text of ", text.size(),
         " bytes is too long to be tokenized at once; at most 1 GiB");
  Scratch scratch;
  size_t begin = 0;
  for (size_t at = 0; at < text.size() && !user_defined_.empty();) {
    const auto match = user_defined_.longest(text.substr(at));
    if (match.id < 0) {
      ++at;
      continue;
    }
    encode_plain(text.substr(begin, at - begin), scratch, out);
    out.push_back(match.id);
    begin = at += match.n_bytes;
  }
  encode_plain(text.substr(begin), scratch, out);
}

void BpeEncoder::encode_plain(std::string_view text, Scratch& scratch,
                              std::vector<Token>& out) const {
  for (const std::string_view word : split(pre_, text)) encode_word(word, scratch, out);
}

// As in SpmEncoder: what merging reached once it always reaches.
void BpeEncoder::encode_word(std::string_view word, Scratch& scratch,
                             std::vector<Token>& out) const {
  const auto whole = word_map_->find(word);
  if (!whole) return merge_word(word, scratch, out);
  std::atomic<bool>& reached = reached_[static_cast<size_t>(*whole)];
  if (pre_.whole_words_first || reached.load(std::memory_order_relaxed))
    return out.push_back(*whole);
  const size_t before = out.size();
  merge_word(word, scratch, out);
  if (out.size() == before + 1 && out.back() == *whole)
    reached.store(true, std::memory_order_relaxed);
}

void BpeEncoder::merge_word(std::string_view word, Scratch& scratch,
                            std::vector<Token>& out) const {
  auto& symbols = scratch.symbols;
  symbols.clear();
  for (size_t at = 0; at < word.size(); ++at) {
    const auto index = static_cast<int32_t>(at);
    const Token id = byte_tokens_[static_cast<unsigned char>(word[at])];
    symbols.push_back({static_cast<uint32_t>(at), 1, index - 1, index + 1, id, id < 0});
  }
  symbols.back().next = -1;
  merge_symbols(symbols, scratch.heap,
                [&](const Symbol& left, const Symbol& right, MergeCandidate& merged) {
                  const auto merge = merges_.find(pair_key(left.id, right.id));
                  if (merge == merges_.end()) return false;
                  merged.id = merge->second.id;
                  merged.priority = -static_cast<double>(merge->second.rank);
                  return true;
                });
  for (int32_t i = 0; i >= 0; i = symbols[static_cast<size_t>(i)].next)
    if (const Token id = symbols[static_cast<size_t>(i)].id; id >= 0) out.push_back(id);
}

}  // namespace duet
