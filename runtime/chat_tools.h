// Tool calls for formats that have none of their own: tools and what came of them, told in words.
#pragma once

#include <string>
#include <vector>

#include "base/json_fwd.h"
#include "runtime/chat_template.h"

namespace duet {

// The same conversation without tool calls and results: a system message lists the tools (an array of OpenAI
// tools; empty or null: none) and asks for calls as a JSON array [{"name": ..., "arguments": {...}}]; earlier
// calls stand in that form, results are messages of the user. must_call: the answer has to be a call.
std::vector<ChatMessage> tools_as_text(const std::vector<ChatMessage>& messages, const Json& tools, bool must_call);

}  // namespace duet
