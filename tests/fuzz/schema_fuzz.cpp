// Input: a JSON schema, a zero byte, bytes that choose. What is taken as a schema is a grammar, unless it calls itself
// without end or is too large, and what is written by it is JSON.
#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/json.h"
#include "grammar/json_schema.h"
#include "grammar/matcher.h"

namespace {

using namespace duet;
using namespace duet::grammar;

bool has_any(const std::string& message, std::initializer_list<const char*> parts) {
  return std::any_of(parts.begin(), parts.end(), [&](const char* part) { return message.find(part) != std::string::npos; });
}

void write(const Grammar& grammar, std::string_view choices) {
  Matcher matcher(grammar, {.max_work = 1 << 20, .max_places = 1 << 12});
  Matcher::State state = matcher.start();
  std::string text;
  for (const char choice : choices) {
    std::string next;
    for (int byte = 0; byte < 256; ++byte)
      if (matcher.next(state, static_cast<uint8_t>(byte)) != Matcher::kDead) next += static_cast<char>(byte);
    if (next.empty()) break;
    text += next[static_cast<unsigned char>(choice) % next.size()];
    state = matcher.next(state, static_cast<uint8_t>(text.back()));
  }
  if (!matcher.may_end(state)) return;
  try {
    parse_json(text, "text");
  } catch (const Error& e) {
    DUET_ASSERT(has_any(e.what(), {"twice", "deep"}));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t end = std::min(input.find('\0'), input.size());
  std::string gbnf;
  try {
    gbnf = schema_grammar(parse_json(input.substr(0, end), "schema", {.max_bytes = 1 << 16}), "schema");
  } catch (const Error& e) {
    DUET_ASSERT(e.kind() == ErrorKind::format || e.kind() == ErrorKind::unsupported || e.kind() == ErrorKind::usage);
    return 0;
  }
  try {
    write(Grammar::parse(gbnf, {.max_states = 1 << 16}), input.substr(std::min(end + 1, input.size())));
  } catch (const Error& e) {
    DUET_ASSERT(has_any(e.what(), {"left-recursive", "never ends", "larger than", "come to more", "more than", "too ambiguous", "bytes; at most"}));
  }
  return 0;
}
