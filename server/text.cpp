#include "server/text.h"

#include <chrono>
#include <random>

#include "base/json.h"
#include "runtime/chat_tools.h"
#include "runtime/unicode.h"
#include "server/api_error.h"

namespace duet::server {

std::string dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

std::string sse(std::string_view data) { return concat("data: ", data, "\n\n"); }

size_t count_chars(std::string_view utf8) {
  size_t n = 0;
  for (const char c : utf8) n += (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  return n;
}

std::string random_text(std::string_view alphabet, size_t n) {
  std::random_device device;
  std::string out;
  for (size_t i = 0; i < n; ++i) out += alphabet[device() % alphabet.size()];
  return out;
}

std::string printable(std::string_view text) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  while (!text.empty()) {
    const Utf8Char c = decode_utf8(text);
    const auto byte = static_cast<unsigned char>(text[0]);
    if (c.valid) out += text.substr(0, c.n_bytes);
    else out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    text.remove_prefix(c.n_bytes);
  }
  return out;
}

int64_t now_seconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

PromptInput chat_prompt(const Json* messages, const Json& tools, const ServedModel& model, bool must_call) {
  if (messages == nullptr) bad_request("messages", "'messages' is missing");
  if (!model.chat) bad_request("messages", "this model has no chat template; use /v1/completions, or start the server with --template NAME");
  try {
    PromptInput out;
    std::vector<ChatMessage> turns = parse_messages(*messages);
    const bool in_words = !model.chat->has_tools();
    if (in_words) turns = tools_as_text(turns, tools, must_call);
    const std::vector<Segment> segments = model.chat->render(turns, in_words ? Json() : tools);
    for (const Segment& segment : segments) out.text += segment.text;
    out.ids = model.tokenizer.encode(segments, model.chat->wants_bos(model.tokenizer));
    return out;
  } catch (const Error& e) {
    bad_request("messages", e.what());
  }
}

}  // namespace duet::server
