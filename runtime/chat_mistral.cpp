#include "runtime/chat_mistral.h"

#include <algorithm>

#include "base/error.h"
#include "base/json.h"
#include "runtime/python_json.h"

namespace duet {
namespace {

constexpr std::string_view kEos = "</s>";
constexpr size_t kCallIdSize = 9;

Segment markup(std::string_view text) { return {std::string(text), true, false}; }
Segment apart(std::string text) { return {std::move(text), false, true}; }

void join(std::string& text, std::string_view more) {
  if (more.empty()) return;
  if (!text.empty()) text += "\n\n";
  text += more;
}

// What mistral-common's normalizer leaves: one message per turn, a user first.
std::vector<ChatMessage> normalized(const std::vector<ChatMessage>& messages) {
  std::vector<ChatMessage> out = merge_neighbours(messages);
  if (out.empty() || out.front().role != "user")
    out.insert(out.begin(), ChatMessage{.role = "user"});
  for (size_t i = 0; i + 1 < out.size(); ++i)
    if (out[i].prefix)
      fail(ErrorKind::usage, "only the last message can be continued (\"prefix\")");
  return out;
}

std::string json_or_string(std::string_view text) {
  if (text.empty()) return "{}";
  const auto json = python_json(text);
  return json ? *json : python_json_string(text);
}

std::string render_call_id(const std::string& id) {
  const bool fits =
      id.size() == kCallIdSize && std::all_of(id.begin(), id.end(), [](char c) {
        return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
      });
  return fits ? id : mistral_call_id(id);
}

std::string tools_json(const Json& tools) {
  Json out = Json::array();
  for (size_t i = 0; i < tools.size(); ++i) {
    const Json& tool = tools[i];
    const auto function = tool.is_object() ? tool.find("function") : tool.end();
    if (!tool.is_object() || function == tool.end() || !function->is_object() ||
        !function->contains("name") || !function->at("name").is_string())
      fail(ErrorKind::usage, "tool ", i,
           " is not of the form {\"type\": \"function\", \"function\": {\"name\": ...}}");
    Json description = function->value("description", Json(""));
    Json parameters = function->value("parameters", Json::object());
    if (description.is_null()) description = "";
    if (parameters.is_null()) parameters = Json::object();
    if (!description.is_string() || !parameters.is_object())
      fail(ErrorKind::usage, "tool ", i, ": description must be a string and parameters an object");
    out.push_back({{"type", "function"},
                   {"function",
                    {{"name", function->at("name")},
                     {"description", description},
                     {"parameters", parameters}}}});
  }
  return python_json(out.dump(-1, ' ', false, Json::error_handler_t::replace)).value();
}

std::string tool_calls_json(const std::vector<ToolCall>& calls) {
  std::string out = "[";
  for (const ToolCall& call : calls) {
    if (out.size() > 1) out += ", ";
    out += "{\"name\": " + python_json_string(call.name) +
           ", \"arguments\": " + json_or_string(call.arguments);
    if (!call.id.empty() && call.id != "null")
      out += ", \"id\": " + python_json_string(render_call_id(call.id));
    out += "}";
  }
  return out + "]";
}

std::string tool_result_json(const ChatMessage& message) {
  if (message.tool_call_id.empty())
    fail(ErrorKind::usage, "a message of role 'tool' needs its tool_call_id");
  return "{\"content\": " + json_or_string(message.content) +
         ", \"call_id\": " + python_json_string(render_call_id(message.tool_call_id)) + "}";
}

void check_tools(const Json& tools) {
  if (!tools.is_null() && !tools.is_array()) fail(ErrorKind::usage, "tools must be an array");
}

class V3Writer {
 public:
  V3Writer(std::string system, std::string tools)
      : system_(std::move(system)), tools_(std::move(tools)) {}

  void user(const ChatMessage& message, bool is_last) {
    if (is_last && !tools_.empty()) add("[AVAILABLE_TOOLS]", tools_, "[/AVAILABLE_TOOLS]");
    // Not join(): an empty question still follows the blank line.
    const bool with_system = is_last && !system_.empty();
    add("[INST]", with_system ? system_ + "\n\n" + message.content : message.content, "[/INST]");
  }
  void assistant(const ChatMessage& message) {
    const size_t end = message.content.find_last_not_of(' ');
    out_.push_back(apart(message.content.substr(0, end == std::string::npos ? 0 : end + 1)));
    if (!message.tool_calls.empty()) add("[TOOL_CALLS]", tool_calls_json(message.tool_calls), "");
    if (!message.prefix) out_.push_back(markup(kEos));
  }
  void tool(const ChatMessage& message) {
    add("[TOOL_RESULTS]", tool_result_json(message), "[/TOOL_RESULTS]");
  }
  std::vector<Segment> take() { return std::move(out_); }

 private:
  void add(std::string_view open, std::string text, std::string_view close) {
    out_.push_back(markup(open));
    out_.push_back(apart(std::move(text)));
    if (!close.empty()) out_.push_back(markup(close));
  }

  std::string system_, tools_;
  std::vector<Segment> out_;
};

}  // namespace

std::string mistral_call_id(std::string_view seed) {
  constexpr std::string_view kAlphabet =
      "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
  uint64_t hash =
      0xCBF29CE484222325;  // FNV-1a, then a finalizer: neighbouring ids must not look alike
  for (const char c : seed) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3;
  hash = (hash ^ hash >> 33) * 0xFF51AFD7ED558CCD;
  hash ^= hash >> 33;
  std::string out;
  for (size_t i = 0; i < kCallIdSize; ++i, hash /= kAlphabet.size())
    out += kAlphabet[hash % kAlphabet.size()];
  return out;
}

std::vector<ChatMessage> merge_neighbours(const std::vector<ChatMessage>& messages) {
  std::vector<ChatMessage> out;
  std::string_view previous;
  for (const ChatMessage& message : messages) {
    const bool same = message.role == previous && message.role != "tool";
    previous = message.role;
    if (message.role == "system") continue;
    if (!same) {
      out.push_back(message);
      continue;
    }
    join(out.back().content, message.content);
    out.back().tool_calls.insert(out.back().tool_calls.end(), message.tool_calls.begin(),
                                 message.tool_calls.end());
    out.back().prefix = out.back().prefix || message.prefix;
  }
  return out;
}

std::string system_prompt(const std::vector<ChatMessage>& messages) {
  std::string out;
  for (const ChatMessage& message : messages)
    if (message.role == "system") join(out, message.content);
  return out;
}

std::vector<Segment> render_mistral_v1(const std::vector<ChatMessage>& messages,
                                       const Json& tools) {
  check_tools(tools);
  if (!tools.empty())
    fail(ErrorKind::usage, "the template mistral-v1 has no tools; mistral-v3 has");
  const std::string system = system_prompt(messages);
  std::vector<Segment> out;
  bool is_first = true;
  for (const ChatMessage& message : normalized(messages)) {
    if (message.role == "tool" || !message.tool_calls.empty())
      fail(ErrorKind::usage,
           "the template mistral-v1 has no tool calls or results; mistral-v3 has");
    if (message.role == "assistant") {
      out.push_back(apart(message.content));
      if (!message.prefix) out.push_back(markup(kEos));
      continue;
    }
    const std::string lead = is_first && !system.empty() ? system + "\n\n" : "";
    out.push_back(apart("[INST] " + lead + message.content + " [/INST]"));
    is_first = false;
  }
  return out;
}

std::vector<Segment> render_mistral_v3(const std::vector<ChatMessage>& messages,
                                       const Json& tools) {
  check_tools(tools);
  const std::vector<ChatMessage> turns = normalized(messages);
  const auto is_user = [](const ChatMessage& message) { return message.role == "user"; };
  const auto last_user =
      std::find_if(turns.rbegin(), turns.rend(), is_user).base() - turns.begin() - 1;
  V3Writer writer(system_prompt(messages), tools.empty() ? "" : tools_json(tools));
  for (size_t i = 0; i < turns.size(); ++i) {
    if (turns[i].role == "user")
      writer.user(turns[i], static_cast<ptrdiff_t>(i) == last_user);
    else if (turns[i].role == "tool")
      writer.tool(turns[i]);
    else
      writer.assistant(turns[i]);
  }
  return writer.take();
}

}  // namespace duet
