#include "base/error.h"

#include <array>
#include <cstdio>

namespace duet {

std::string quote(std::string_view text) {
  constexpr size_t kMost = 80;
  std::string out = "'";
  for (const char c : text.substr(0, kMost)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte != 0x7f) {
      out += c;
      continue;
    }
    std::array<char, 8> escape{};
    std::snprintf(escape.data(), escape.size(), "\\x%02x", unsigned{byte});
    out += escape.data();
  }
  return out + (text.size() > kMost ? "...'" : "'");
}

}  // namespace duet
