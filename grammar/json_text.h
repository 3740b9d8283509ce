// Pieces of GBNF for texts inside JSON strings.
#pragma once

#include <string>
#include <string_view>

#include "grammar/char_set.h"

namespace duet::grammar {

std::string gbnf_literal(std::string_view text);        // "..." for exactly this text
std::string gbnf_class(const CharSet& set);             // [...]; not empty
// A character of the set as it stands in a JSON string: quotes, backslashes and control characters escaped.
// Not empty.
std::string json_char(const CharSet& set);

// Texts that fit an ECMAScript pattern, as they stand in a JSON string. Error(unsupported) naming what has no
// counterpart: assertions, references back, Unicode properties.
std::string pattern_to_gbnf(std::string_view pattern);

// Texts of a JSON schema "format"; "" when it is not known.
std::string_view format_to_gbnf(std::string_view format);

}  // namespace duet::grammar
