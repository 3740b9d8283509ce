// The texts of a vocabulary's tokens as a tree of bytes: tokens that begin alike are looked at together.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "runtime/tokenizer.h"

namespace duet::grammar {

// Immutable and thread-safe.
class TokenTrie {
 public:
  // In order of depth first; a node's descendants follow it up to `skip`. tokens()[first_token ..
  // next node's first_token) end here.
  struct Node {
    uint32_t skip, first_token;
    uint16_t depth;  // of its byte: 0 for the first of a token
    uint8_t byte;
  };
  explicit TokenTrie(const Tokenizer& tokenizer);

  std::span<const Node> nodes() const { return {nodes_.data(), nodes_.size() - 1}; }
  std::span<const Token> tokens_of(size_t node) const {
    return std::span(tokens_).subspan(nodes_[node].first_token, nodes_[node + 1].first_token - nodes_[node].first_token);
  }
  size_t max_depth() const { return max_depth_; }  // bytes of the longest token
  size_t n_vocab() const { return texts_.size(); }
  const std::string& text(Token token) const { return texts_[static_cast<size_t>(token)]; }  // "": may not be used
  // At the start of a text its first space is not shown (Tokenizer::dummy_space()).
  bool drops_space(Token token) const { return drops_space_[static_cast<size_t>(token)]; }
  const std::vector<Token>& ends() const { return ends_; }  // end-of-generation tokens

 private:
  void build(std::vector<Token> sorted);
  std::vector<std::string> texts_;
  std::vector<bool> drops_space_;
  std::vector<Node> nodes_;  // and one behind the last
  std::vector<Token> tokens_, ends_;
  size_t max_depth_ = 0;
};

}  // namespace duet::grammar
