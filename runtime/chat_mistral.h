// The formats of Mistral's own models, with the ids of mistral-common 1.13.
#pragma once

#include <vector>

#include "runtime/chat_template.h"

namespace duet {

// 8x7B-Instruct-v0.1: "[INST] q [/INST] a</s>", all of it text, the system prompt before the first
// question. Error(usage) on tools.
std::vector<Segment> render_mistral_v1(const std::vector<ChatMessage>& messages, const Json& tools);
// 8x22B-Instruct-v0.1: control tokens, tools, the system prompt before the last question.
std::vector<Segment> render_mistral_v3(const std::vector<ChatMessage>& messages, const Json& tools);

// Nine letters and digits for an id of another form; the same for the same id.
std::string mistral_call_id(std::string_view seed);

// Neighbours of one role joined by a blank line (tool results stay apart); system messages removed.
std::vector<ChatMessage> merge_neighbours(const std::vector<ChatMessage>& messages);
// The system messages joined by a blank line.
std::string system_prompt(const std::vector<ChatMessage>& messages);

}  // namespace duet
