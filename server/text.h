// Small things that the protocols share: framing, text, time.
#pragma once

#include <string>
#include <string_view>

#include "base/json_fwd.h"
#include "server/params.h"
#include "server/served_model.h"

namespace duet::server {

std::string dump(const Json& json);           // one line; invalid UTF-8 as U+FFFD
std::string sse(std::string_view data);       // "data: ...\n\n"
size_t count_chars(std::string_view utf8);    // code points
std::string printable(std::string_view text); // invalid UTF-8 bytes as \xNN, so that different ones stay different
int64_t now_seconds();
std::string random_text(std::string_view alphabet, size_t n);  // n characters of the alphabet, for names

// The prompt of a conversation, for an answer to follow. ApiError 400: no chat template, bad messages. Tools: null or
// an array of OpenAI tools; must_call: the answer is to be a call of one.
PromptInput chat_prompt(const Json* messages, const Json& tools, const ServedModel& model, bool must_call = false);

}  // namespace duet::server
