#include "server/embeddings.h"

#include <algorithm>
#include <cstring>

#include "base/json.h"
#include "server/api_error.h"
#include "server/text.h"

namespace duet::server::embeddings {
namespace {

constexpr size_t kMaxInputs = 2048;  // as OpenAI

// Little-endian floats, as all machines that duet runs on store them.
std::string bytes_of(const std::vector<float>& values) {
  std::string out(values.size() * sizeof(float), '\0');
  std::memcpy(out.data(), values.data(), out.size());
  return out;
}

TextRequest request_of(const Fields& f, const char* field, const ServedModel& model) {
  model.check_name(f.string("model"));
  const int64_t n_embd = model.engine.info().hparams.n_embd;
  if (f.integer("dimensions", n_embd, 1, 1 << 20) != n_embd) bad_request("dimensions", "'dimensions' is fixed for this model: ", n_embd);
  TextRequest r;
  const Json* input = f.find(field);
  if (input == nullptr) bad_request(field, "'", field, "' is missing");
  r.prompts = prompt_inputs(*input, field, model.tokenizer, kMaxInputs, true);
  if (f.boolean("truncate", false))
    for (PromptInput& prompt : r.prompts) prompt.ids.resize(std::min<size_t>(prompt.ids.size(), model.n_ctx));
  for (const PromptInput& prompt : r.prompts) check_length(prompt.ids.size(), model.n_ctx, field);
  r.params.embedding = true;
  return r;
}

class EmbeddingRenderer : public Renderer {
 public:
  EmbeddingRenderer(Shape shape, const ServedModel& model) : shape_(shape), model_(model) {}
  std::string content_type() const override { return "application/json"; }
  std::string piece(size_t, const Choice&, const Update&) override { return {}; }
  std::string end(const std::vector<Choice>&) override { return {}; }
  std::string failure(const std::string&) override { return {}; }

  std::string whole(const std::vector<Choice>& choices) override {
    if (shape_ == Shape::ollama_single) return dump({{"embedding", choices[0].embedding}});
    size_t n_prompt = 0;
    double time = 0;
    Json data = Json::array();
    for (size_t i = 0; i < choices.size(); ++i) {
      n_prompt += choices[i].n_prompt;
      time = std::max(time, choices[i].finish.queue_s + choices[i].finish.prompt_s);
      data.push_back(shape_ == Shape::ollama ? Json(choices[i].embedding) : entry(i, choices[i].embedding));
    }
    if (shape_ == Shape::ollama)
      return dump({{"model", model_.id}, {"embeddings", std::move(data)}, {"total_duration", static_cast<int64_t>(time * 1e9)}, {"load_duration", 0}, {"prompt_eval_count", n_prompt}});
    return dump({{"object", "list"}, {"data", std::move(data)}, {"model", model_.id}, {"usage", {{"prompt_tokens", n_prompt}, {"total_tokens", n_prompt}}}});
  }

 private:
  Json entry(size_t index, const std::vector<float>& values) const {
    return {{"object", "embedding"}, {"index", index}, {"embedding", shape_ == Shape::openai_base64 ? Json(base64(bytes_of(values))) : Json(values)}};
  }

  Shape shape_;
  const ServedModel& model_;
};

}  // namespace

std::string base64(std::string_view bytes) {
  static constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const auto byte = [&](size_t j) { return i + j < bytes.size() ? static_cast<unsigned>(static_cast<unsigned char>(bytes[i + j])) : 0u; };
    const unsigned bits = byte(0) << 16 | byte(1) << 8 | byte(2);
    out += {kDigits[bits >> 18], kDigits[bits >> 12 & 63], i + 1 < bytes.size() ? kDigits[bits >> 6 & 63] : '=', i + 2 < bytes.size() ? kDigits[bits & 63] : '='};
  }
  return out;
}

Parsed parse_openai(const Json& body, const ServedModel& model) {
  const Fields f(body);
  const std::string format = f.string("encoding_format", "float");
  if (format != "float" && format != "base64") bad_request("encoding_format", "'encoding_format' is ", quote(format), "; it must be 'float' or 'base64'");
  return {request_of(f, "input", model), format == "base64" ? Shape::openai_base64 : Shape::openai_floats};
}

Parsed parse_ollama(const Json& body, const ServedModel& model) { return {request_of(Fields(body), "input", model), Shape::ollama}; }

Parsed parse_ollama_single(const Json& body, const ServedModel& model) {
  const Fields f(body);
  f.string("prompt");
  return {request_of(f, "prompt", model), Shape::ollama_single};
}

std::unique_ptr<Renderer> make_renderer(Shape shape, const ServedModel& model) { return std::make_unique<EmbeddingRenderer>(shape, model); }

}  // namespace duet::server::embeddings
