#include "runtime/pretokenizer.h"

#include <algorithm>
#include <array>
#include <utility>

namespace duet {
namespace {

bool is_letter(CharClass c) {
  return c == CharClass::upper || c == CharClass::lower || c == CharClass::letter;
}
bool is_number(CharClass c) { return c == CharClass::number; }
bool is_space(CharClass c) { return c == CharClass::space; }
// [^\s\p{L}\p{N}]
bool is_other(CharClass c) { return !is_letter(c) && !is_number(c) && !is_space(c); }
bool is_newline(char c) { return c == '\r' || c == '\n'; }

template <class Is>
size_t run_end(const CharRow& row, size_t at, size_t end, Is is) {
  while (at < end && is(row.classes[at])) ++at;
  return at;
}

// 's 't 're 've 'm 'll 'd
size_t contraction_end(const CharRow& row, size_t at, size_t end, bool any_case) {
  if (row.ascii(at) != '\'') return at;
  const auto is = [&](size_t i, char wanted) {
    if (i >= end) return false;
    const char c = row.ascii(i);
    return c == wanted || (any_case && c == wanted - 'a' + 'A');
  };
  for (const char c : {'s', 't', 'm', 'd'})
    if (is(at + 1, c)) return at + 2;
  constexpr std::pair<char, char> kPairs[] = {{'r', 'e'}, {'v', 'e'}, {'l', 'l'}};
  for (const auto& [first, second] : kPairs)
    if (is(at + 1, first) && is(at + 2, second)) return at + 3;
  return at;
}

// \s+(?!\S)|\s+ : leaves the last space to the word behind it.
size_t spaces_end(const CharRow& row, size_t at, size_t end) {
  const size_t stop = run_end(row, at, end, is_space);
  return stop < end && stop - at > 1 ? stop - 1 : stop;
}

// \s*[\r\n]+ : up to the last line break of a run of spaces.
size_t line_breaks_end(const CharRow& row, size_t at, size_t end) {
  for (size_t stop = run_end(row, at, end, is_space); stop > at; --stop)
    if (is_newline(row.ascii(stop - 1))) return stop;
  return at;
}

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
size_t scan_gpt2(const CharRow& row, size_t at, size_t end) {
  if (const size_t stop = contraction_end(row, at, end, false); stop > at) return stop;
  const size_t first = row.ascii(at) == ' ' && at + 1 < end ? at + 1 : at;
  const CharClass c = row.classes[first];
  if (is_letter(c)) return run_end(row, first, end, is_letter);
  if (is_number(c)) return run_end(row, first, end, is_number);
  if (is_other(c)) return run_end(row, first, end, is_other);
  return spaces_end(row, at, end);
}

// ` ?[^\s\p{L}\p{N}]+[\r\n]*`, with slash also `/` among the trailing characters
size_t others_end(const CharRow& row, size_t at, size_t end, bool slash) {
  const size_t first = row.ascii(at) == ' ' && at + 1 < end ? at + 1 : at;
  size_t stop = run_end(row, first, end, is_other);
  if (stop == first) return at;
  while (stop < end && (is_newline(row.ascii(stop)) || (slash && row.ascii(stop) == '/'))) ++stop;
  return stop;
}

// What may stand before a word: [^\r\n\p{L}\p{N}]
bool is_word_prefix(const CharRow& row, size_t at) {
  return !is_newline(row.ascii(at)) && !is_letter(row.classes[at]) && !is_number(row.classes[at]);
}

size_t spaces_or_others_end(const CharRow& row, size_t at, size_t end, bool slash) {
  if (const size_t stop = others_end(row, at, end, slash); stop > at) return stop;
  if (const size_t stop = line_breaks_end(row, at, end); stop > at) return stop;
  return spaces_end(row, at, end);
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|
// \s*[\r\n]+|\s+(?!\S)|\s+
template <size_t digits>
size_t scan_llama3(const CharRow& row, size_t at, size_t end) {
  if (const size_t stop = contraction_end(row, at, end, true); stop > at) return stop;
  const size_t first = is_word_prefix(row, at) ? at + 1 : at;
  if (first < end && is_letter(row.classes[first])) return run_end(row, first, end, is_letter);
  if (is_number(row.classes[at])) return run_end(row, at, std::min(end, at + digits), is_number);
  return spaces_or_others_end(row, at, end, false);
}

bool starts_word(CharClass c) {
  return c == CharClass::upper || c == CharClass::letter || c == CharClass::mark;
}
bool ends_word(CharClass c) {
  return c == CharClass::lower || c == CharClass::letter || c == CharClass::mark;
}

// [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+ ; caseless letters are in both sets,
// so the first run gives them back when nothing follows it.
size_t capitalized_end(const CharRow& row, size_t at, size_t end) {
  const size_t upper = run_end(row, at, end, starts_word);
  const size_t stop = run_end(row, upper, end, ends_word);
  if (stop > upper) return stop;
  for (size_t i = upper; i > at; --i)
    if (ends_word(row.classes[i - 1])) return i;
  return at;
}

// prefix? capitalized | prefix? upper+ lower* | \p{N} | ...; prefix = [^\r\n\p{L}\p{N}]
size_t scan_tekken(const CharRow& row, size_t at, size_t end) {
  const size_t after_prefix = is_word_prefix(row, at) && at + 1 < end ? at + 1 : at;
  for (const size_t first : {after_prefix, at})
    if (const size_t stop = capitalized_end(row, first, end); stop > first) return stop;
  for (const size_t first : {after_prefix, at})
    if (const size_t stop = run_end(row, first, end, starts_word); stop > first) return stop;
  if (is_number(row.classes[at])) return at + 1;
  return spaces_or_others_end(row, at, end, true);
}

// \p{N}
size_t scan_digit(const CharRow& row, size_t at, size_t) {
  return is_number(row.classes[at]) ? at + 1 : at;
}
// \p{N}+
size_t scan_digits(const CharRow& row, size_t at, size_t end) {
  return run_end(row, at, end, is_number);
}

// [0-9][0-9][0-9]
size_t scan_three_digits(const CharRow& row, size_t at, size_t end) {
  if (end - at < 3) return at;
  const auto is_digit = [&](size_t i) { return row.ascii(i) >= '0' && row.ascii(i) <= '9'; };
  return is_digit(at) && is_digit(at + 1) && is_digit(at + 2) ? at + 3 : at;
}

// [\p{P}\$\+<=>\^~\|]+
size_t scan_punctuation(const CharRow& row, size_t at, size_t end) {
  constexpr std::string_view kAlso = "$+<=>^~|";
  while (at < end && (row.classes[at] == CharClass::punctuation ||
                      kAlso.find(row.ascii(at)) != std::string_view::npos))
    ++at;
  return at;
}

using Spans = std::vector<std::pair<size_t, size_t>>;

Spans apply(Scanner scan, const CharRow& row, const Spans& spans) {
  Spans out;
  for (const auto& [begin, end] : spans) {
    size_t gap = begin;
    for (size_t at = begin; at < end;) {
      const size_t stop = scan(row, at, end);
      if (stop == at) {
        ++at;
        continue;
      }
      if (gap < at) out.emplace_back(gap, at);
      out.emplace_back(at, stop);
      gap = at = stop;
    }
    if (gap < end) out.emplace_back(gap, end);
  }
  return out;
}

struct Entry {
  std::string_view name;
  enum Kind { standard, gpt2, smollm, llama3, dbrx, qwen2, tekken } kind;
};

constexpr std::array kEntries = {
    Entry{"default", Entry::standard},
    Entry{"gpt-2", Entry::gpt2},
    Entry{"phi-2", Entry::gpt2},
    Entry{"mpt", Entry::gpt2},
    Entry{"olmo", Entry::gpt2},
    Entry{"jais", Entry::gpt2},
    Entry{"smollm", Entry::smollm},
    Entry{"starcoder", Entry::smollm},
    Entry{"refact", Entry::smollm},
    Entry{"command-r", Entry::smollm},
    Entry{"codeshell", Entry::smollm},
    Entry{"exaone", Entry::smollm},
    Entry{"llama3", Entry::llama3},
    Entry{"llama-v3", Entry::llama3},
    Entry{"llama-bpe", Entry::llama3},
    Entry{"falcon3", Entry::llama3},
    Entry{"pixtral", Entry::llama3},
    Entry{"lfm2", Entry::llama3},
    Entry{"dbrx", Entry::dbrx},
    Entry{"smaug-bpe", Entry::dbrx},
    Entry{"qwen2", Entry::qwen2},
    Entry{"stablelm2", Entry::qwen2},
    Entry{"deepseek-r1-qwen", Entry::qwen2},
    Entry{"tekken", Entry::tekken},
};

PreTokenizer make(Entry::Kind kind) {
  switch (kind) {
    case Entry::standard:
      return {{scan_punctuation, scan_gpt2, scan_digits, scan_three_digits}, false};
    case Entry::gpt2:
      return {{scan_gpt2}, false};
    case Entry::smollm:
      return {{scan_digit, scan_gpt2}, false};
    case Entry::llama3:
      return {{scan_llama3<3>}, true};
    case Entry::dbrx:
      return {{scan_llama3<3>}, false};
    case Entry::qwen2:
      return {{scan_llama3<1>}, false};
    case Entry::tekken:
      return {{scan_tekken}, true};
  }
  return {};
}

}  // namespace

CharRow::CharRow(std::string_view bytes) : text(bytes) {
  offsets.reserve(bytes.size() + 1);
  classes.reserve(bytes.size());
  for (size_t at = 0; at < bytes.size();) {
    const Utf8Char c = decode_utf8(bytes.substr(at));
    offsets.push_back(static_cast<uint32_t>(at));
    classes.push_back(char_class(c.cp));
    at += c.n_bytes;
  }
  offsets.push_back(static_cast<uint32_t>(bytes.size()));
}

std::optional<PreTokenizer> pre_tokenizer_by_name(std::string_view name) {
  for (const Entry& entry : kEntries)
    if (entry.name == name) return make(entry.kind);
  return std::nullopt;
}

std::vector<std::string_view> split(const PreTokenizer& pre, std::string_view text) {
  const CharRow row(text);
  Spans spans;
  if (row.size() > 0) spans.emplace_back(0, row.size());
  for (const Scanner scan : pre.passes) spans = apply(scan, row, spans);
  std::vector<std::string_view> out;
  out.reserve(spans.size());
  for (const auto& [begin, end] : spans)
    out.push_back(text.substr(row.offsets[begin], row.offsets[end] - row.offsets[begin]));
  return out;
}

}  // namespace duet
