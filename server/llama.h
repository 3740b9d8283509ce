// llama-server's own protocol, and the tokenizer routes of lm-eval and vLLM.
#pragma once

#include <memory>

#include "base/json_fwd.h"
#include "server/answer.h"
#include "server/served_model.h"

namespace duet::server::llama {

// POST /completion. The renderer answers for the request, whose results it describes.
TextRequest parse_completion(const Json& body, const ServedModel& model);
std::unique_ptr<Renderer> make_renderer(const TextRequest& request, const ServedModel& model);

Json tokenize(const Json& body, const ServedModel& model);        // {content | prompt, add_special?, with_pieces?}
Json detokenize(const Json& body, const ServedModel& model);      // {tokens} -> {content, prompt}
Json apply_template(const Json& body, const ServedModel& model);  // {messages} -> {prompt}
Json tokenizer_info(const ServedModel& model);
Json props(const ServedModel& model, const Scheduler& scheduler);
Json slots(const ServedModel& model, const Scheduler& scheduler);
std::string metrics_text(const Metrics& metrics, const Scheduler& scheduler, std::optional<double> joules);

}  // namespace duet::server::llama
