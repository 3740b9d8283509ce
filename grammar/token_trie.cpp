#include "grammar/token_trie.h"

#include <algorithm>

namespace duet::grammar {
namespace {

constexpr size_t kMaxText = 1024;  // no vocabulary has longer tokens but a damaged one

}  // namespace

TokenTrie::TokenTrie(const Tokenizer& tokenizer) : texts_(tokenizer.n_vocab()), drops_space_(tokenizer.n_vocab()) {
  const std::optional<Token> unknown = tokenizer.find("<unk>");
  std::vector<Token> sorted;
  for (Token id = 0; static_cast<size_t>(id) < texts_.size(); ++id) {
    if (tokenizer.is_eog(id)) ends_.push_back(id);
    if (tokenizer.is_eog(id) || tokenizer.is_control(id) || id == unknown) continue;
    std::string text = tokenizer.piece(id);
    if (text.empty() || text.size() > kMaxText) continue;
    drops_space_[static_cast<size_t>(id)] = text[0] == ' ' && tokenizer.decode({&id, 1}).size() < text.size();
    texts_[static_cast<size_t>(id)] = std::move(text);
    sorted.push_back(id);
  }
  std::sort(sorted.begin(), sorted.end(), [this](Token a, Token b) { return text(a) != text(b) ? text(a) < text(b) : a < b; });
  build(std::move(sorted));
}

void TokenTrie::build(std::vector<Token> sorted) {
  std::vector<size_t> open;  // nodes from the root to the current one
  std::string_view before;
  const auto close = [&](size_t depth) {
    for (; open.size() > depth; open.pop_back()) nodes_[open.back()].skip = static_cast<uint32_t>(nodes_.size());
  };
  for (size_t i = 0; i < sorted.size(); ++i) {
    const std::string_view own = text(sorted[i]);
    const auto common = static_cast<size_t>(std::mismatch(own.begin(), own.end(), before.begin(), before.end()).first - own.begin());
    close(common);
    for (size_t depth = common; depth < own.size(); ++depth) {
      open.push_back(nodes_.size());
      nodes_.push_back({0, static_cast<uint32_t>(i), static_cast<uint16_t>(depth), static_cast<uint8_t>(own[depth])});
    }
    max_depth_ = std::max(max_depth_, own.size());
    before = own;
  }
  close(0);
  nodes_.push_back({0, static_cast<uint32_t>(sorted.size()), 0, 0});
  tokens_ = std::move(sorted);
}

}  // namespace duet::grammar
