// Requests with tools: what may be called, how the model is told, what it may write.
#pragma once

#include <set>
#include <string>

#include "base/json.h"
#include "server/answer.h"
#include "server/params.h"
#include "server/served_model.h"
#include "server/tool_calls.h"

namespace duet::server {

struct Tools {
  enum class Choice { none, automatic, required } choice = Choice::none;
  Json list = Json::array();       // of OpenAI's form; those that may be called
  bool parallel = true;            // more than one call in an answer
  std::set<std::string> names = {};
};
// tools, tool_choice, parallel_tool_calls. ApiError 400.
Tools parse_tools(const Fields& fields);
// Ollama's: tools only.
Tools parse_ollama_tools(const Fields& fields);

// The prompt and the constraint of a conversation with these tools; `gbnf` is the form of answers in words, "" for
// any. Returns how calls stand in the answer. ApiError 400.
//
// mistral-v3 has tokens for all of it: [TOOL_CALLS] opens calls, whose form a grammar ensures. Other templates tell
// the model in words. Arguments fit the schema of their tool where it is "strict" or can be kept to, else they are
// any object.
CallForm prepare_chat(const Json* messages, const Tools& tools, const std::string& gbnf, const ServedModel& model, TextRequest& request);

}  // namespace duet::server
