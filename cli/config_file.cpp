#include "cli/config_file.h"

#include <cctype>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "cli/options.h"

namespace duet::cli {
namespace {

// One line of the file.
class Line {
 public:
  Line(std::string_view text, const std::string& name, size_t number) : text_(text), name_(name), number_(number) {}

  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    fail(ErrorKind::usage, name_, ":", number_, ": ", parts...);
  }
  bool at_end() {
    skip_space();
    return text_.empty() || text_[0] == '#';
  }
  bool take(char c) {
    skip_space();
    if (text_.empty() || text_[0] != c) return false;
    text_.remove_prefix(1);
    return true;
  }
  std::string word() {
    skip_space();
    size_t n = 0;
    while (n < text_.size() && (std::isalnum(static_cast<unsigned char>(text_[n])) || std::string_view("_-.+").find(text_[n]) != std::string_view::npos)) ++n;
    const std::string out(text_.substr(0, n));
    text_.remove_prefix(n);
    return out;
  }
  std::string value() {
    if (take('"')) return basic_string();
    if (take('\'')) return literal_string();
    const std::string bare = word();
    const bool number = !bare.empty() && bare.find_first_not_of("+-.0123456789eE") == std::string::npos && bare.find_first_of("0123456789") != std::string::npos;
    if (number || bare == "true" || bare == "false") return bare;
    if (bare.empty()) refuse("a value is missing after '='");
    refuse(bare, " needs quotes: \"", bare, "\"");
  }
  void expect_end() {
    if (!at_end()) refuse("nothing is expected at '", text_, "'");
  }

 private:
  void skip_space() {
    while (!text_.empty() && (text_[0] == ' ' || text_[0] == '\t' || text_[0] == '\r')) text_.remove_prefix(1);
  }
  std::string literal_string() {
    const size_t end = text_.find('\'');
    if (end == std::string_view::npos) refuse("a string does not end");
    const std::string out(text_.substr(0, end));
    text_.remove_prefix(end + 1);
    return out;
  }
  std::string basic_string() {
    std::string out;
    for (size_t i = 0; i < text_.size(); ++i) {
      if (text_[i] == '"') {
        text_.remove_prefix(i + 1);
        return out;
      }
      if (text_[i] != '\\') {
        out += text_[i];
        continue;
      }
      const char c = i + 1 < text_.size() ? text_[++i] : ' ';
      const size_t which = std::string_view("\"\\nt").find(c);
      if (which == std::string_view::npos) refuse("\\", c, " is not known in strings; '...' takes all characters as they are");
      out += "\"\\\n\t"[which];
    }
    refuse("a string does not end");
  }

  std::string_view text_;
  const std::string& name_;
  size_t number_;
};

std::vector<std::string> values_of(Line& line) {
  if (!line.take('[')) return {line.value()};
  std::vector<std::string> out;
  while (!line.take(']')) {
    out.push_back(line.value());
    if (line.take(']')) break;
    if (!line.take(',')) line.refuse("',' or ']' is expected in the array");
  }
  return out;
}

}  // namespace

std::vector<ConfigEntry> parse_config(const std::string& text, const std::string& name) {
  std::vector<ConfigEntry> out;
  std::string section;
  size_t number = 0;
  for (size_t at = 0; at < text.size(); ++number) {
    const size_t end = std::min(text.find('\n', at), text.size());
    Line line(std::string_view(text).substr(at, end - at), name, number + 1);
    at = end + 1;
    if (line.at_end()) continue;
    if (line.take('[')) {
      section = line.word();
      if (section.empty() || !line.take(']')) line.refuse("a section is written [command]");
    } else {
      const std::string key = line.word();
      if (key.empty() || !line.take('=')) line.refuse("a setting is written key = value");
      for (const ConfigEntry& entry : out)
        if (entry.section == section && entry.key == key) line.refuse(key, " has been set in line ", entry.line, " already");
      out.push_back({section, key, values_of(line), number + 1});
    }
    line.expect_end();
  }
  return out;
}

std::vector<ConfigEntry> read_config(const std::filesystem::path& path) { return parse_config(read_text(path.string()), path.string()); }

std::filesystem::path default_config_path() {
  const auto of = [](const char* variable) {
    const char* value = std::getenv(variable);
    return std::filesystem::path(value != nullptr && *value == '/' ? value : "");
  };
  const std::filesystem::path xdg = of("XDG_CONFIG_HOME"), home = of("HOME");
  if (!xdg.empty()) return xdg / "duet/config.toml";
  return home.empty() ? home : home / ".config/duet/config.toml";
}

}  // namespace duet::cli
