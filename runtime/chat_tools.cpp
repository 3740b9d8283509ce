#include "runtime/chat_tools.h"

#include <map>

#include "base/error.h"
#include "base/json.h"
#include "runtime/python_json.h"

namespace duet {
namespace {

std::string instructions(const Json& tools, bool must_call) {
  Json functions = Json::array();
  for (const Json& tool : tools) functions.push_back(tool.at("function"));
  const std::string list = functions.dump(-1, ' ', false, Json::error_handler_t::replace);
  std::string out = concat("You can call these tools:\n", python_json(list).value_or(list),
                           "\n\nTo call tools, answer with nothing but a JSON array of calls: [{\"name\": \"a tool's name\", \"arguments\": {...}}]. "
                           "Their results come with the next message.");
  out += must_call ? " Call a tool now." : " When no tool is needed, answer in words.";
  return out;
}

std::string calls_text(const std::vector<ToolCall>& calls) {
  std::string out = "[";
  for (const ToolCall& call : calls) {
    const std::string arguments = call.arguments.empty() ? "{}" : python_json(call.arguments).value_or(python_json_string(call.arguments));
    out += concat(out.size() > 1 ? ", " : "", "{\"name\": ", python_json_string(call.name), ", \"arguments\": ", arguments, "}");
  }
  return out + "]";
}

}  // namespace

std::vector<ChatMessage> tools_as_text(const std::vector<ChatMessage>& messages, const Json& tools, bool must_call) {
  std::vector<ChatMessage> out;
  std::map<std::string, std::string> names;  // of tools, by call
  const auto call_name = [&](const ChatMessage& result) {
    if (!result.name.empty()) return result.name;
    const auto found = names.find(result.tool_call_id);
    return found == names.end() ? std::string("a tool") : found->second;
  };
  bool in_results = false;
  for (const ChatMessage& message : messages) {
    const bool is_result = message.role == "tool";
    if (is_result) {
      const std::string text = concat("Result of ", call_name(message), ":\n", message.content);
      if (in_results) out.back().content += "\n\n" + text;
      else out.push_back({.role = "user", .content = text});
    } else {
      out.push_back(message);
      std::vector<ToolCall>& calls = out.back().tool_calls;
      for (const ToolCall& call : calls) names[call.id] = call.name;
      if (!calls.empty()) out.back().content += (out.back().content.empty() ? "" : "\n") + calls_text(calls);
      calls.clear();
    }
    in_results = is_result;
  }
  if (tools.empty()) return out;
  // Behind the system message that there is: formats join them or take the first.
  const std::string text = instructions(tools, must_call);
  if (!out.empty() && out.front().role == "system") out.front().content += (out.front().content.empty() ? "" : "\n\n") + text;
  else out.insert(out.begin(), ChatMessage{.role = "system", .content = text});
  return out;
}

}  // namespace duet
