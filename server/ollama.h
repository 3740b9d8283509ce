// Ollama's protocol: JSON to typed requests, results to JSON lines.
#pragma once

#include <memory>
#include <optional>

#include "base/json.h"
#include "server/answer.h"
#include "server/served_model.h"
#include "server/tools.h"

namespace duet::server::ollama {

// No request: nothing to generate (an empty prompt loads or unloads a model), `reply` says it all.
struct Parsed {
  std::optional<TextRequest> request;
  Json reply;
  bool chat = false;
  CallForm calls = CallForm::none;
  Tools tools = {};
};

Parsed parse_chat(const Json& body, const ServedModel& model);      // POST /api/chat
Parsed parse_generate(const Json& body, const ServedModel& model);  // POST /api/generate
std::unique_ptr<Renderer> make_renderer(const Parsed& parsed, const ServedModel& model);  // of one with a request

Json tags(const ServedModel& model);                      // GET /api/tags
Json running(const ServedModel& model);                   // GET /api/ps
Json show(const Json& body, const ServedModel& model);    // POST /api/show
std::string error_body(const std::string& message);

// Newer than what clients ask for at least.
inline constexpr const char* kVersion = "0.12.0";

}  // namespace duet::server::ollama
