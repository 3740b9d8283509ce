// Embeddings in the shapes of OpenAI and Ollama: the mean of the last layer's hidden states, of length 1.
#pragma once

#include <memory>

#include "base/json_fwd.h"
#include "server/answer.h"
#include "server/served_model.h"

namespace duet::server::embeddings {

enum class Shape { openai_floats, openai_base64, ollama, ollama_single };
struct Parsed {
  TextRequest request;
  Shape shape;
};

Parsed parse_openai(const Json& body, const ServedModel& model);         // POST /v1/embeddings
Parsed parse_ollama(const Json& body, const ServedModel& model);         // POST /api/embed
Parsed parse_ollama_single(const Json& body, const ServedModel& model);  // POST /api/embeddings
std::unique_ptr<Renderer> make_renderer(Shape shape, const ServedModel& model);

std::string base64(std::string_view bytes);

}  // namespace duet::server::embeddings
