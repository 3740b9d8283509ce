// Conversations -> prompts. Built-in formats, recognised from a file's own template.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json_fwd.h"
#include "runtime/tokenizer.h"

namespace duet {

struct ToolCall {
  std::string id, name;   // id: may be empty
  std::string arguments;  // JSON text; models also write text that is none; empty means {}
};
struct ChatMessage {
  std::string role;  // system, user, assistant, tool
  std::string content{};
  std::vector<ToolCall> tool_calls{};  // assistant
  std::string tool_call_id{}, name{};  // tool
  bool prefix = false;                 // assistant, last: to be continued, its turn stays open
};

// An array of OpenAI messages; content as a string, null, or [{type:"text",text}] (several texts
// are joined by a blank line, as mistral-common does); tool call arguments as a string or an
// object; role "developer" is system. Error(usage) naming the message by its index.
std::vector<ChatMessage> parse_messages(const Json& messages);

// How one role's turn is written: prefix and suffix are markup, the content between them is text.
struct TurnFormat {
  std::string prefix, suffix;
};

class ChatTemplate {
 public:
  static const std::vector<std::string>& names();  // "mistral-v1", "mistral-v3", "chatml", ...
  // Error(usage) naming the choices when unknown.
  static ChatTemplate named(std::string_view name);
  // The template of a model: recognised from tokenizer.chat_template; without one an Instruct
  // file gets mistral-v1 (vocabulary 32000) or mistral-v3 (32768) with a notice; a base model none.
  // A template text that is not recognised: Error(unsupported) naming the choices.
  static std::optional<ChatTemplate> of_model(const GgufFile& file, const NoticeFn& notice);
  // The same for the text of a template. `source` is for messages.
  static ChatTemplate recognized(std::string_view jinja, const std::string& source);

  const std::string& name() const { return name_; }
  // Whether render() takes tools, tool calls and results; for others: runtime/chat_tools.h.
  bool has_tools() const { return name_ == "mistral-v3"; }
  // Whether a rendered prompt is encoded with BOS: always where the format begins with it, else as
  // the vocabulary says.
  bool wants_bos(const Tokenizer& tokenizer) const;
  // `tools`: null or an array of OpenAI tools. add_generation_prompt opens the assistant's turn.
  // BOS is not part of the result (Tokenizer::encode adds it). Neighbours of one role are merged
  // where the format wants roles to alternate, and system messages go where it has a place for
  // them: no conversation is refused for the order of its roles. Error(usage) where the format
  // cannot express the conversation (tools in mistral-v1).
  std::vector<Segment> render(const std::vector<ChatMessage>& messages, const Json& tools,
                              bool add_generation_prompt = true) const;

 private:
  explicit ChatTemplate(std::string name) : name_(std::move(name)) {}
  std::vector<Segment> render_turns(const std::vector<ChatMessage>& messages,
                                    bool add_generation_prompt) const;
  std::vector<Segment> render_llama2(const std::vector<ChatMessage>& messages) const;

  std::string name_;
  TurnFormat system_, user_, assistant_;  // of the formats made of turns
  std::string generation_;                // opens the assistant's turn
  std::string default_system_;            // the system message when a conversation has none
  std::string lead_;                      // begins the system turn, which then is always there
  bool trim_ = false;                     // contents lose leading and trailing spaces
  bool alternate_ = false;                // system first, then user and assistant in turn
};

}  // namespace duet
