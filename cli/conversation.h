// The conversation of `duet chat`: what was said, how it is saved, and what of it the model has seen.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "base/json_fwd.h"
#include "runtime/chat_template.h"
#include "runtime/tokenizer.h"

namespace duet::cli {

struct Conversation {
  std::string system;                 // "": none
  std::vector<ChatMessage> messages;  // of user and assistant

  std::vector<ChatMessage> all() const;  // the system message first
};

// {"format": "duet-conversation", "version": 1, "model": ..., "messages": [OpenAI messages]}. `model` is for people.
// Written by way of a temporary file. An existing file that is no conversation is not replaced: Error(usage).
void save_conversation(const Conversation& conversation, const std::string& model, const std::filesystem::path& path);
// Error: io (missing), format (no conversation, damaged, other roles than system first, user and assistant).
Conversation load_conversation(const std::filesystem::path& path);

// The ids that a conversation is given to the model as. Answers stay the tokens that the model made, which can differ
// from how their text would be tokenized: so only what is new has to be evaluated in each turn.
class ConversationIds {
 public:
  ConversationIds(const Tokenizer& tokenizer, const ChatTemplate& chat) : tokenizer_(tokenizer), chat_(chat) {}

  // `messages` with the assistant's turn opened.
  std::vector<Token> prompt(const std::vector<ChatMessage>& messages) const;
  // `messages` ends with the answer; `prompt` was what it was made from, `made` its tokens.
  void answered(std::vector<ChatMessage> messages, const std::vector<Token>& prompt, const std::vector<Token>& made);

  // Another template, another conversation.
  void forget() { known_.clear(); }

 private:
  std::vector<Token> encode(const std::vector<ChatMessage>& messages) const;
  // The conversation up to the end of an answer's text.
  struct Known {
    std::vector<Token> as_text;  // how it would be tokenized
    std::vector<Token> as_made;  // what the model saw and made
  };
  const Tokenizer& tokenizer_;
  const ChatTemplate& chat_;
  std::vector<Known> known_;  // of one conversation, each the beginning of the next
};

}  // namespace duet::cli
