// Input: a byte that chooses a protocol, then the body of a request. What is not taken is an ApiError of
// status 400 or 404; what is taken fits the limits that the scheduler relies on.
#include <cstdint>
#include <cstdlib>
#include <filesystem>

#include "base/json.h"
#include "server/api_error.h"
#include "server/llama.h"
#include "server/ollama.h"
#include "server/openai.h"
#include "tests/support/tiny_model.h"

namespace {

using namespace duet;
using namespace duet::server;

constexpr uint32_t kContext = 64;

const Engine& engine() {
  static const Engine made = [] {
    const std::filesystem::path path = std::filesystem::temp_directory_path() / "duet_requests_fuzz.gguf";
    test::write_tiny_model(path, {});
    return Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}});
  }();
  return made;
}

void check(const TextRequest& request, size_t n_vocab) {
  DUET_ASSERT(!request.prompts.empty() && request.n >= 1);
  for (const PromptInput& prompt : request.prompts) {
    DUET_ASSERT(!prompt.ids.empty() && prompt.ids.size() <= kContext);
    for (const Token id : prompt.ids) DUET_ASSERT(id >= 0 && static_cast<size_t>(id) < n_vocab);
  }
  for (const auto& [id, bias] : request.params.logit_bias) DUET_ASSERT(id >= 0 && static_cast<size_t>(id) < n_vocab && bias == bias);
  for (const std::string& stop : request.params.stop) DUET_ASSERT(!stop.empty());
  const Sampler sampler(request.params.sampling);
}

void parse(unsigned protocol, const Json& body, const ServedModel& model) {
  const size_t n_vocab = model.tokenizer.n_vocab();
  switch (protocol) {
    case 0: return check(openai::parse_chat(body, model).request, n_vocab);
    case 1: return check(openai::parse_completion(body, model).request, n_vocab);
    case 2: return check(llama::parse_completion(body, model), n_vocab);
    case 3:
      if (const auto parsed = ollama::parse_chat(body, model); parsed.request) check(*parsed.request, n_vocab);
      return;
    case 4:
      if (const auto parsed = ollama::parse_generate(body, model); parsed.request) check(*parsed.request, n_vocab);
      return;
    case 5: return static_cast<void>(llama::tokenize(body, model));
    default: return static_cast<void>(llama::detokenize(body, model));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  static const ServedModel model{.engine = engine(), .tokenizer = engine().tokenizer(), .chat = ChatTemplate::named("chatml"), .id = "m", .aliases = {"*"},
                                 .n_ctx = kContext, .created = 0, .file_name = "m.gguf", .version = "0", .vocabulary = grammar::TokenTrie(engine().tokenizer())};
  try {
    parse(data[0] % 7, parse_body({reinterpret_cast<const char*>(data) + 1, size - 1}), model);
  } catch (const ApiError& e) {
    DUET_ASSERT(e.status == 400 || e.status == 404);
  }
  return 0;
}
