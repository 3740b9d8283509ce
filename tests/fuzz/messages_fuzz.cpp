// Input: a byte that chooses a template, then {"messages":...,"tools":...,"template":"jinja"}.
// Whatever is accepted renders; contents never end up in markup; JSON rewriting is idempotent.
#include <algorithm>
#include <cstdint>

#include "base/error.h"
#include "base/json.h"
#include "runtime/chat_template.h"
#include "runtime/python_json.h"

namespace {

using namespace duet;

void check_render(const ChatTemplate& chat, const std::vector<ChatMessage>& messages,
                  const Json& tools) {
  size_t n_markup = 0;
  for (const Segment& segment : chat.render(messages, tools))
    n_markup = std::max(n_markup, segment.is_markup ? segment.text.size() : 0);
  DUET_ASSERT(n_markup <= 200);  // of the longest piece a format writes itself
}

void check_json(std::string_view text) {
  const auto once = python_json(text);
  if (!once) return;
  const auto twice = python_json(*once);
  DUET_ASSERT(twice && *twice == *once);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  check_json(text);
  const auto& names = ChatTemplate::names();
  try {
    const Json json = parse_json(text, "fuzz");
    if (!json.is_object()) return 0;
    const auto part = [&](const char* key) { return json.contains(key) ? json[key] : Json(); };
    const auto messages = parse_messages(part("messages"));
    check_render(ChatTemplate::named(names[data[0] % names.size()]), messages, part("tools"));
    if (part("template").is_string())
      check_render(ChatTemplate::recognized(part("template").get<std::string>(), "fuzz"), messages,
                   {});
  } catch (const Error& e) {
    if (e.kind() == ErrorKind::internal) throw;
  }
  return 0;
}
