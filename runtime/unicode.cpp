#include "runtime/unicode.h"

#include <algorithm>

namespace duet {
namespace {

// Bytes that a character starting with this byte should have; 0: none starts so.
uint32_t sequence_bytes(unsigned char lead) {
  if (lead < 0x80) return 1;
  if (lead >= 0xC2 && lead <= 0xDF) return 2;
  if (lead >= 0xE0 && lead <= 0xEF) return 3;
  if (lead >= 0xF0 && lead <= 0xF4) return 4;
  return 0;
}

bool well_formed(char32_t cp, uint32_t n_bytes) {
  constexpr char32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
  const bool surrogate = cp >= 0xD800 && cp <= 0xDFFF;
  return cp >= kLeast[n_bytes] && cp <= 0x10FFFF && !surrogate;
}

}  // namespace

CharClass char_class(char32_t cp) {
  const auto ranges = char_ranges();
  const auto after =
      std::upper_bound(ranges.begin(), ranges.end(), static_cast<uint32_t>(cp) << 4 | 15u);
  return after == ranges.begin() ? CharClass::other : static_cast<CharClass>(*(after - 1) & 15u);
}

Utf8Char decode_utf8(std::string_view text) {
  const auto lead = static_cast<unsigned char>(text[0]);
  if (lead < 0x80) return {lead, 1, true};
  const uint32_t n = sequence_bytes(lead);
  if (n == 0 || text.size() < n) return {};
  char32_t cp = lead & (0x7Fu >> n);
  for (uint32_t i = 1; i < n; ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    if ((byte & 0xC0u) != 0x80u) return {};
    cp = cp << 6 | (byte & 0x3Fu);
  }
  return well_formed(cp, n) ? Utf8Char{cp, n, true} : Utf8Char{};
}

size_t incomplete_utf8_tail(std::string_view text) {
  const size_t most = std::min<size_t>(3, text.size());
  for (size_t back = 1; back <= most; ++back) {
    const auto byte = static_cast<unsigned char>(text[text.size() - back]);
    if ((byte & 0xC0u) == 0x80u) continue;  // a trail byte: look further for its lead
    return sequence_bytes(byte) > back ? back : 0;
  }
  return 0;
}

std::string sanitize_utf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const Utf8Char c = decode_utf8(text);
    out += c.valid ? text.substr(0, c.n_bytes) : kReplacement;
    text.remove_prefix(c.n_bytes);
  }
  return out;
}

void append_utf8(std::string& out, char32_t cp) {
  const auto put = [&](char32_t byte) {
    out += static_cast<char>(static_cast<unsigned char>(byte));
  };
  if (cp < 0x80) return put(cp);
  if (cp < 0x800) {
    put(0xC0 | cp >> 6);
  } else if (cp < 0x10000) {
    put(0xE0 | cp >> 12);
    put(0x80 | (cp >> 6 & 0x3F));
  } else {
    put(0xF0 | cp >> 18);
    put(0x80 | (cp >> 12 & 0x3F));
    put(0x80 | (cp >> 6 & 0x3F));
  }
  put(0x80 | (cp & 0x3F));
}

}  // namespace duet
