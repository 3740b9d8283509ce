// Conversations -> prompts. Built-in formats, recognised from a file's own template.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "runtime/tokenizer.h"

namespace duet {

struct ToolCall {
  std::string id, name;
  Json arguments;  // an object
};
struct ChatMessage {
  std::string role;  // system, user, assistant, tool
  std::string content;
  std::vector<ToolCall> tool_calls;  // assistant
  std::string tool_call_id, name;    // tool
};

// An array of OpenAI messages; content as a string, null, or [{type:"text",text}]. Error(usage).
std::vector<ChatMessage> parse_messages(const Json& messages);

class ChatTemplate {
 public:
  static const std::vector<std::string>& names();  // "mistral-v1", "mistral-v3", "chatml", ...
  // Error(usage) naming the choices when unknown.
  static ChatTemplate named(std::string_view name);
  // The template of a model: recognised from tokenizer.chat_template; without one an Instruct
  // file gets mistral-v1 (vocabulary 32000) or mistral-v3 (32768) with a notice; a base model none.
  // A template text that is not recognised: Error(unsupported) naming the choices.
  static std::optional<ChatTemplate> of_model(const GgufFile& file, const NoticeFn& notice);

  const std::string& name() const { return name_; }
  // `tools`: null or an array of OpenAI tools. add_generation_prompt opens the assistant's turn.
  // BOS is not part of the result (Tokenizer::encode adds it). Error(usage) where the format cannot
  // express the conversation (tools in mistral-v1).
  std::vector<Segment> render(const std::vector<ChatMessage>& messages, const Json& tools, bool add_generation_prompt = true) const;

 private:
  explicit ChatTemplate(std::string name) : name_(std::move(name)) {}
  std::string name_;
};

}  // namespace duet
