// A request's way from its jobs to the reply, whatever the protocol: all at once or piece by piece.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "server/http.h"
#include "server/params.h"
#include "server/scheduler.h"
#include "server/served_model.h"

namespace duet::server {

// What a protocol makes of a request's JSON: prompts, n sequences from each.
struct TextRequest {
  std::vector<PromptInput> prompts;
  GenerationParams params;  // of choice i with seed + i
  std::unique_ptr<const grammar::Constraint> constraint = {};  // of all choices; params.constraint is set to it
  size_t n = 1;             // choices per prompt; choice = prompt * n + i
  bool stream = false;
};

// A choice so far.
struct Choice {
  const PromptInput* input = nullptr;
  size_t n_prompt = 0, n_cached = 0, n_prompt_done = 0;
  std::string text = {};
  std::vector<TokenRecord> prompt = {}, tokens = {};
  std::vector<float> embedding = {};
  Finish finish = {};  // valid when all is done
};

// How a protocol writes. Knows no sockets; made for one request.
class Renderer {
 public:
  virtual ~Renderer() = default;
  virtual std::string content_type() const = 0;  // of a stream
  virtual std::string whole(const std::vector<Choice>& choices) = 0;
  // Of a stream: the first bytes; what an update adds (`choice` already includes it; update.finish: its
  // end); the last bytes.
  virtual std::string begin(const std::vector<Choice>&) { return {}; }
  virtual std::string piece(size_t index, const Choice& choice, const Update& update) = 0;
  virtual std::string end(const std::vector<Choice>& choices) = 0;
  virtual std::string failure(const std::string& message) = 0;  // instead of the rest
  virtual std::string ping() { return {}; }                     // keeps a waiting client patient
};

struct AnswerOptions {
  std::chrono::milliseconds timeout{0};  // of a whole request; 0: none
};

// The reply; not a stream: waits for it. ApiError: 503 when the queue is full, 504 on timeout, 500.
HttpReply answer(Scheduler& scheduler, TextRequest request, std::unique_ptr<Renderer> renderer, const HttpRequest& http, const AnswerOptions& options);

}  // namespace duet::server
