// UTF-8 and the character classes that tokenizers split by.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace duet {

enum class CharClass : uint8_t {
  other = 0,
  upper = 1,   // Lu, Lt
  lower = 2,   // Ll
  letter = 3,  // Lm, Lo
  mark = 4,    // M*
  number = 5,  // N*
  punctuation = 6,
  symbol = 7,
  space = 8,  // White_Space
};

// Ranges of the table: first code point << 4 | class, ascending (unicode_tables.cpp, generated).
std::span<const uint32_t> char_ranges();
CharClass char_class(char32_t cp);

inline constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

struct Utf8Char {
  char32_t cp = 0xFFFD;
  uint32_t n_bytes = 1;
  bool valid = false;  // else: one byte that begins no well-formed character, cp U+FFFD
};

// The first character of a text that is not empty. Surrogates, overlong forms and code points above
// U+10FFFF are invalid, byte by byte, as sentencepiece sees them.
Utf8Char decode_utf8(std::string_view text);

// How many bytes at the end of `text` may still become a character (0..3).
size_t incomplete_utf8_tail(std::string_view text);

// Every invalid byte replaced by U+FFFD.
std::string sanitize_utf8(std::string_view text);

void append_utf8(std::string& out, char32_t cp);

}  // namespace duet
