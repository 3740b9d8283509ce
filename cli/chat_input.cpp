#include "cli/chat_input.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <type_traits>
#include <variant>
#include <vector>

#include "base/error.h"

namespace duet::cli {
namespace {

constexpr std::string_view kBlock = "\"\"\"";

using Value = std::variant<float*, int32_t*, int64_t*, std::optional<uint64_t>*>;
struct Setting {
  std::string_view name, alias;
  Value value;
};

std::vector<Setting> settings_of(GenerateOptions& o) {
  SamplerParams& s = o.sampling;
  return {{"temp", "temperature", &s.temperature},
          {"top-k", "top-k", &s.top_k},
          {"top-p", "top-p", &s.top_p},
          {"min-p", "min-p", &s.min_p},
          {"repeat-penalty", "repeat-penalty", &s.repeat_penalty},
          {"presence-penalty", "presence-penalty", &s.presence_penalty},
          {"frequency-penalty", "frequency-penalty", &s.frequency_penalty},
          {"penalty-last-n", "repeat-last-n", &s.penalty_last_n},
          {"n-predict", "num-predict", &o.n_predict},
          {"seed", "seed", &o.seed}};
}

std::string text_of(const Value& value) {
  return std::visit(
      [](auto* v) -> std::string {
        if constexpr (std::is_same_v<decltype(v), std::optional<uint64_t>*>)
          return *v ? std::to_string(**v) : "random";
        else
          return concat(*v);
      },
      value);
}

template <class T>
T parse_number(std::string_view text, std::string_view name) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size())
    fail(ErrorKind::usage, "/set ", name, ": ", quote(text), " is not a number that fits");
  return value;
}

void assign(const Value& target, std::string_view text, std::string_view name) {
  std::visit(
      [&](auto* v) {
        using T = std::remove_pointer_t<decltype(v)>;
        if constexpr (std::is_same_v<T, std::optional<uint64_t>>)
          *v = text == "random" ? std::nullopt : std::optional(parse_number<uint64_t>(text, name));
        else
          *v = parse_number<T>(text, name);
      },
      target);
}

// "Top_K" -> "top-k".
std::string normalized(std::string_view name) {
  std::string out(name);
  for (char& c : out) c = c == '_' ? '-' : c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return out;
}

// The first word, which is removed from `text`.
std::string_view next_word(std::string_view& text) {
  text = trimmed(text);
  const std::string_view word = text.substr(0, text.find_first_of(" \t"));
  text = trimmed(text.substr(word.size()));
  return word;
}

}  // namespace

std::string_view trimmed(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t\r\n") + 1 - begin);
}

std::optional<ChatInput> MessageAssembler::add(std::string_view line, bool goes_on) {
  const bool opens = !is_open() && !goes_on && line.starts_with(kBlock);
  if (opens) line.remove_prefix(kBlock.size());
  in_block_ = in_block_ || opens;
  const bool closes = in_block_ && !goes_on && line.ends_with(kBlock);
  const bool continues = !in_block_ && !goes_on && line.ends_with('\\');
  if (closes || continues) line.remove_suffix(closes ? kBlock.size() : 1);
  is_line_ = is_line_ && !in_block_ && !goes_on && !continues;
  if (!line.empty() || !(opens || closes)) lines_.emplace_back(line);  // the marks have lines of their own
  return closes || !(in_block_ || goes_on || continues) ? std::optional(take()) : std::nullopt;
}

std::optional<ChatInput> MessageAssembler::finish() {
  if (!is_open()) return std::nullopt;
  return take();
}

ChatInput MessageAssembler::take() {
  ChatInput out{"", is_line_};
  for (size_t i = 0; i < lines_.size(); ++i) out.text += (i > 0 ? "\n" : "") + lines_[i];
  clear();
  return out;
}

std::optional<ChatCommand> parse_command(const ChatInput& input) {
  std::string_view text = trimmed(input.text);
  if (!input.is_line || !text.starts_with('/')) return std::nullopt;
  const std::string name = normalized(next_word(text).substr(1));
  const bool is_name = name == "?" || (!name.empty() && std::all_of(name.begin(), name.end(), [](char c) { return c >= 'a' && c <= 'z'; }));
  if (!is_name) return std::nullopt;
  return ChatCommand{name, std::string(text)};
}

std::string list_settings(const GenerateOptions& options) {
  GenerateOptions copy = options;
  std::string out;
  for (const Setting& setting : settings_of(copy)) out += concat(setting.name, " ", text_of(setting.value), "\n");
  return out;
}

void apply_setting(GenerateOptions& options, std::string_view text) {
  std::string name = normalized(next_word(text));
  if (name == "parameter") name = normalized(next_word(text));
  GenerateOptions changed = options;
  std::string names;
  for (const Setting& setting : settings_of(changed)) {
    if (name != setting.name && name != setting.alias) {
      names += concat(names.empty() ? "" : ", ", setting.name);
      continue;
    }
    if (text.empty()) fail(ErrorKind::usage, "/set ", name, ": the value is missing; it is ", text_of(setting.value));
    assign(setting.value, text, name);
    if (changed.n_predict < -1) fail(ErrorKind::usage, "/set n-predict: ", changed.n_predict, " is less than -1 (no limit)");
    static_cast<void>(Sampler(changed.sampling));
    options = changed;
    return;
  }
  fail(ErrorKind::usage, "/set: no setting ", quote(name), "; there are ", names);
}

}  // namespace duet::cli
