// OpenAI's protocol: JSON to typed requests, results to JSON and server-sent events.
#pragma once

#include <memory>
#include <string>

#include "base/json_fwd.h"
#include "server/answer.h"
#include "server/served_model.h"
#include "server/tools.h"

namespace duet::server::openai {

// How a request wants to be answered.
struct Format {
  bool chat = false, include_usage = false, echo = false;
  bool logprobs = false;
  bool progress = false;  // of the prompt, as llama-server's "return_progress"
  CallForm calls = CallForm::none;
  Tools tools = {};
};
struct Parsed {
  TextRequest request;
  Format format;
};

Parsed parse_chat(const Json& body, const ServedModel& model);        // POST /v1/chat/completions
Parsed parse_completion(const Json& body, const ServedModel& model);  // POST /v1/completions
std::unique_ptr<Renderer> make_renderer(const Parsed& parsed, const ServedModel& model);

Json model_object(const ServedModel& model);
Json model_list(const ServedModel& model);
// {"error":{message,type,param,code}}
std::string error_body(int status, const std::string& message, const std::string& param);

}  // namespace duet::server::openai
