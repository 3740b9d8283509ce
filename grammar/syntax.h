// A grammar as written, before it is compiled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "grammar/char_set.h"
#include "grammar/grammar.h"

namespace duet::grammar {

struct SyntaxNode {
  enum class Type : uint8_t { literal, chars, reference, sequence, choice, repeat };
  static constexpr uint32_t kNoLimit = UINT32_MAX;
  Type type;
  std::string text = {};                 // literal: UTF-8
  CharSet chars = {};
  std::vector<uint32_t> children = {};   // indices of nodes; repeat: one
  uint32_t rule = 0;                     // reference
  uint32_t least = 0, most = 0;          // repeat
};

struct Syntax {
  struct Rule {
    std::string name;
    size_t line = 0;    // where it is defined, or named first
    uint32_t body = 0;  // index of a node
    bool defined = false;
  };
  std::vector<SyntaxNode> nodes;
  std::vector<Rule> rules;
};

// Error(format): syntax errors by line, a rule that is missing or defined twice.
Syntax parse_gbnf(std::string_view text, const GrammarLimits& limits);

}  // namespace duet::grammar
