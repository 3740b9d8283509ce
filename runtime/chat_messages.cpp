#include <algorithm>
#include <array>

#include "base/error.h"
#include "base/json.h"
#include "runtime/chat_template.h"

namespace duet {
namespace {

constexpr std::array<std::string_view, 5> kRoles = {"system", "developer", "user", "assistant",
                                                    "tool"};

class MessageReader {
 public:
  MessageReader(const Json& message, size_t index) : json_(message), index_(index) {}

  ChatMessage read() {
    if (!json_.is_object()) bad("is not an object");
    ChatMessage out;
    out.role = role();
    const auto content = json_.find("content");
    const bool has_content = content != json_.end() && !content->is_null();
    if (has_content)
      out.content = text_of(*content);
    else if (out.role != "assistant")
      bad("(", out.role, ") has no content");
    if (out.role == "assistant") {
      out.tool_calls = tool_calls();
      out.prefix = flag("prefix");
    }
    if (out.role == "tool") {
      out.tool_call_id = string_or_empty(json_, "tool_call_id");
      out.name = string_or_empty(json_, "name");
    }
    return out;
  }

 private:
  template <class... Parts>
  [[noreturn]] void bad(const Parts&... parts) const {
    fail(ErrorKind::usage, "message ", index_, " ", parts...);
  }

  std::string role() const {
    const auto role = json_.find("role");
    if (role == json_.end() || !role->is_string()) bad("has no role");
    const std::string& name = role->get_ref<const std::string&>();
    if (std::find(kRoles.begin(), kRoles.end(), name) == kRoles.end())
      bad("has the role '", name, "'; roles are system, user, assistant and tool");
    return name == "developer" ? "system" : name;
  }

  std::string text_of(const Json& content) const {
    if (content.is_string()) return content.get<std::string>();
    if (!content.is_array())
      bad("has a content that is neither a string nor an array of text parts");
    std::string out;
    for (const Json& part : content) {
      const bool is_text = part.is_object() && part.contains("text") && part["text"].is_string() &&
                           (!part.contains("type") || part["type"] == "text");
      if (!is_text)
        bad("has a content part that is not text; only {\"type\": \"text\", \"text\": ...} is "
            "supported");
      const std::string& text = part["text"].get_ref<const std::string&>();
      if (!out.empty() && !text.empty()) out += "\n\n";
      out += text;
    }
    return out;
  }

  std::vector<ToolCall> tool_calls() const {
    std::vector<ToolCall> out;
    const auto calls = json_.find("tool_calls");
    if (calls == json_.end() || calls->is_null()) return out;
    if (!calls->is_array()) bad("has tool_calls that are not an array");
    for (const Json& call : *calls) out.push_back(tool_call(call));
    return out;
  }

  ToolCall tool_call(const Json& call) const {
    const auto function = call.is_object() ? call.find("function") : call.end();
    if (!call.is_object() || function == call.end() || !function->is_object())
      bad("has a tool call without its function");
    ToolCall out{string_or_empty(call, "id"), string_or_empty(*function, "name"), {}};
    if (out.name.empty()) bad("has a tool call whose function has no name");
    const auto arguments = function->find("arguments");
    if (arguments == function->end() || arguments->is_null()) return out;
    if (arguments->is_string())
      out.arguments = arguments->get<std::string>();
    else if (arguments->is_object())
      out.arguments = arguments->dump(-1, ' ', false, Json::error_handler_t::replace);
    else
      bad("has tool call arguments that are neither a string nor an object");
    return out;
  }

  std::string string_or_empty(const Json& object, const char* key) const {
    const auto value = object.find(key);
    if (value == object.end() || value->is_null()) return {};
    if (!value->is_string()) bad("has a ", key, " that is not a string");
    return value->get<std::string>();
  }

  bool flag(const char* key) const {
    const auto value = json_.find(key);
    if (value == json_.end() || value->is_null()) return false;
    if (!value->is_boolean()) bad("has a ", key, " that is not true or false");
    return value->get<bool>();
  }

  const Json& json_;
  size_t index_;
};

}  // namespace

std::vector<ChatMessage> parse_messages(const Json& messages) {
  if (!messages.is_array()) fail(ErrorKind::usage, "messages must be an array");
  if (messages.empty()) fail(ErrorKind::usage, "messages is empty; at least one message is needed");
  std::vector<ChatMessage> out;
  out.reserve(messages.size());
  for (size_t i = 0; i < messages.size(); ++i) out.push_back(MessageReader(messages[i], i).read());
  return out;
}

}  // namespace duet
