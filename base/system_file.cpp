#include "base/system_file.h"

#include <cctype>
#include <charconv>
#include <fstream>
#include <sstream>

namespace duet {

std::string read_system_file(const std::filesystem::path& path) {
  std::ifstream in(path);
  std::ostringstream out;
  if (in) out << in.rdbuf();
  return out.str();
}

std::optional<int64_t> parse_system_number(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front())))
    text.remove_prefix(1);
  int64_t value = 0;
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (code != std::errc{} || end == text.data()) return std::nullopt;
  return value;
}

std::optional<int64_t> read_system_number(const std::filesystem::path& path) {
  return parse_system_number(read_system_file(path));
}

}  // namespace duet
