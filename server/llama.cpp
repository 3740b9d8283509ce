#include "server/llama.h"

#include <sys/resource.h>

#include <limits>

#include "base/json.h"
#include "runtime/memory_plan.h"
#include "server/api_error.h"
#include "server/structured.h"
#include "server/text.h"
#include "server/timings.h"
#include "server/tools.h"

namespace duet::server::llama {
namespace {

constexpr size_t kMaxTokens = size_t{1} << 22;
constexpr size_t kMaxChoices = 256;

std::string piece_of(const ServedModel& model, Token id) { return model.tokenizer.piece(id, true); }

class CompletionRenderer : public Renderer {
 public:
  CompletionRenderer(const TextRequest& request, const ServedModel& model) : n_top_(request.params.n_top), sampling_(request.params.sampling), model_(model) {}

  std::string content_type() const override { return "text/event-stream"; }
  std::string whole(const std::vector<Choice>& choices) override {
    if (choices.size() == 1) return dump(last(0, choices[0], choices[0].text, choices[0].tokens));
    Json out = Json::array();
    for (size_t i = 0; i < choices.size(); ++i) out.push_back(last(i, choices[i], choices[i].text, choices[i].tokens));
    return dump(out);
  }
  std::string piece(size_t index, const Choice& choice, const Update& update) override {
    std::string out;
    if (!update.text.empty() || !update.tokens.empty()) {
      Json event{{"index", index}, {"content", update.text}, {"tokens", ids(update.tokens)}, {"stop", false}, {"id_slot", index},
                 {"tokens_predicted", choice.tokens.size()}, {"tokens_evaluated", choice.n_prompt}};
      if (n_top_ >= 0) event["completion_probabilities"] = probabilities(update.tokens);
      out = sse(dump(event));
    }
    if (update.finish) out += sse(dump(last(index, choice, "", {})));
    return out;
  }
  std::string end(const std::vector<Choice>&) override { return {}; }
  std::string failure(const std::string& message) override { return concat("error: ", dump({{"code", 500}, {"message", message}, {"type", "server_error"}}), "\n\n"); }
  std::string ping() override { return ": still working\n\n"; }

 private:
  Json last(size_t index, const Choice& c, const std::string& text, const std::vector<TokenRecord>& tokens) const {
    const bool word = !c.finish.stop_string.empty(), limit = c.finish.reason == FinishReason::length;
    Json out{{"index", index}, {"content", text}, {"tokens", ids(tokens)}, {"id_slot", index}, {"stop", true}, {"model", model_.id},
             {"tokens_predicted", c.finish.n_generated}, {"tokens_evaluated", c.n_prompt}, {"tokens_cached", c.n_prompt + c.finish.n_generated},
             {"truncated", false}, {"stop_type", word ? "word" : limit ? "limit" : "eos"}, {"stopping_word", c.finish.stop_string},
             {"stopped_eos", !word && !limit}, {"stopped_word", word}, {"stopped_limit", limit},
             {"generation_settings", {{"seed", sampling_.seed}, {"temperature", sampling_.temperature}, {"top_k", sampling_.top_k}, {"top_p", sampling_.top_p}, {"min_p", sampling_.min_p}}},
             {"timings", timings(c)}};
    if (n_top_ >= 0) out["completion_probabilities"] = probabilities(tokens);
    return out;
  }
  static Json ids(const std::vector<TokenRecord>& tokens) {
    Json out = Json::array();
    for (const TokenRecord& token : tokens) out.push_back(token.id);
    return out;
  }
  Json probabilities(const std::vector<TokenRecord>& tokens) const {
    Json out = Json::array();
    for (const TokenRecord& token : tokens) {
      Json top = Json::array();
      for (const auto& [id, logprob] : token.top) top.push_back({{"id", id}, {"token", piece_of(model_, id)}, {"logprob", logprob}});
      out.push_back({{"id", token.id}, {"token", piece_of(model_, token.id)}, {"logprob", token.logprob}, {"top_logprobs", std::move(top)}});
    }
    return out;
  }

  int n_top_;
  SamplerParams sampling_;
  const ServedModel& model_;
};

std::string control_text(const ServedModel& model, std::optional<Token> id) { return id ? piece_of(model, *id) : std::string(); }

std::string counter(const char* name, const char* kind, const char* help, double value) {
  return concat("# HELP ", name, " ", help, "\n# TYPE ", name, " ", kind, "\n", name, " ", value, "\n");
}

}  // namespace

TextRequest parse_completion(const Json& body, const ServedModel& model) {
  const Fields f(body);
  model.check_name(f.string("model"));
  TextRequest r;
  const Json* prompt = f.find("prompt");
  if (prompt == nullptr) bad_request("prompt", "'prompt' is missing");
  r.prompts = prompt_inputs(*prompt, "prompt", model.tokenizer, 64, f.boolean("parse_special", true));
  for (const PromptInput& input : r.prompts) check_length(input.ids.size(), model.n_ctx, "prompt");
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const int64_t n = f.integer("n_predict", f.integer("max_tokens", -1, -2, kMost), -2, kMost);
  r.params.max_tokens = n < 0 ? SIZE_MAX : static_cast<size_t>(n);
  r.params.sampling = sampling_params(f);
  r.params.penalize_prompt = true;
  r.params.stop = stop_strings(f);
  r.params.logit_bias = logit_bias(f, model.tokenizer);
  r.params.ignore_eos = f.boolean("ignore_eos", false);
  const auto n_probs = static_cast<int>(f.integer("n_probs", 0, 0, 100));
  r.params.n_top = n_probs > 0 ? n_probs : -1;
  r.n = static_cast<size_t>(f.integer("n", 1, 1, 64));
  if (r.prompts.size() * r.n > kMaxChoices) bad_request("n", r.prompts.size() * r.n, " choices in all; at most ", kMaxChoices, " are made at once");
  r.stream = f.boolean("stream", false);
  r.constraint = text_constraint(requested_grammar(f), model);
  for (const char* name : {"image_data", "lora", "input_prefix", "input_suffix"}) f.refuse(name, "");
  refuse_other_samplers(f);
  return r;
}

std::unique_ptr<Renderer> make_renderer(const TextRequest& request, const ServedModel& model) { return std::make_unique<CompletionRenderer>(request, model); }

Json tokenize(const Json& body, const ServedModel& model) {
  const Fields f(body);
  const bool chat = f.find("messages") != nullptr;
  std::vector<Token> ids;
  if (chat) {
    refuse_other_templates(f);
    ids = chat_prompt(f.find("messages"), Json(), model).ids;
  } else {
    // llama-server says content and adds nothing; vLLM and lm-eval say prompt.
    const char* name = f.find("content") != nullptr ? "content" : "prompt";
    if (f.find(name) == nullptr) bad_request("content", "'content' (or 'prompt') is missing");
    const std::string text = f.string(name);
    const bool special = f.boolean("add_special", f.boolean("add_special_tokens", f.find("prompt") != nullptr && model.tokenizer.add_bos()));
    const Segment segment{text, f.boolean("parse_special", true)};
    ids = model.tokenizer.encode({&segment, 1}, special && model.tokenizer.bos().has_value());
  }
  Json tokens = Json::array();
  for (const Token id : ids) tokens.push_back(f.boolean("with_pieces", false) ? Json{{"id", id}, {"piece", piece_of(model, id)}} : Json(id));
  return {{"tokens", std::move(tokens)}, {"count", ids.size()}, {"max_model_len", model.n_ctx}};
}

Json detokenize(const Json& body, const ServedModel& model) {
  const Fields f(body);
  const Json* tokens = f.find("tokens");
  if (tokens == nullptr || !tokens->is_array() || tokens->size() > kMaxTokens) bad_request("tokens", "'tokens' must be an array of token ids");
  if (tokens->empty()) return {{"content", ""}, {"prompt", ""}};
  const std::string text = id_input(*tokens, "tokens", model.tokenizer).text;
  return {{"content", text}, {"prompt", text}};
}

Json apply_template(const Json& body, const ServedModel& model) {
  const Fields f(body);
  const Tools tools = parse_tools(f);
  refuse_other_templates(f);
  const bool must_call = tools.choice == Tools::Choice::required;
  const PromptInput prompt = chat_prompt(f.find("messages"), tools.choice == Tools::Choice::none ? Json() : tools.list, model, must_call);
  return {{"prompt", prompt.text}, {"tokens", prompt.ids}};
}

Json tokenizer_info(const ServedModel& model) {
  const std::string bos = control_text(model, model.tokenizer.bos()), eos = control_text(model, model.tokenizer.eos());
  return {{"bos_token", bos.empty() ? Json() : Json(bos)}, {"eos_token", eos.empty() ? Json() : Json(eos)}, {"pad_token", nullptr},
          {"chat_template", model.chat ? Json(model.chat->name()) : Json()}, {"add_bos_token", model.tokenizer.add_bos()}, {"vocab_size", model.tokenizer.n_vocab()}};
}

Json props(const ServedModel& model, const Scheduler& scheduler) {
  const SamplerParams sampling;
  const Json params{{"temperature", sampling.temperature}, {"top_k", sampling.top_k}, {"top_p", sampling.top_p}, {"min_p", sampling.min_p}, {"repeat_penalty", sampling.repeat_penalty}};
  return {{"default_generation_settings", {{"n_ctx", model.n_ctx}, {"params", params}}},
          {"total_slots", scheduler.options().n_parallel},
          {"model_alias", model.id},
          {"model_path", model.file_name},
          {"chat_template", model.chat ? model.chat->name() : ""},
          {"bos_token", control_text(model, model.tokenizer.bos())},
          {"eos_token", control_text(model, model.tokenizer.eos())},
          {"modalities", {{"vision", false}, {"audio", false}}},
          {"build_info", concat("duet ", model.version)}};
}

Json slots(const ServedModel& model, const Scheduler& scheduler) {
  const Scheduler::Status status = scheduler.status();
  Json out = Json::array();
  for (size_t i = 0; i < scheduler.options().n_parallel; ++i) {
    const bool busy = i < status.running.size();
    const Scheduler::Slot slot = busy ? status.running[i] : Scheduler::Slot{};
    out.push_back({{"id", i}, {"n_ctx", model.n_ctx}, {"is_processing", busy}, {"n_prompt_tokens", slot.n_prompt}, {"n_past", slot.n_evaluated}, {"n_decoded", slot.n_generated}});
  }
  return out;
}

std::string metrics_text(const Metrics& m, const Scheduler& scheduler, std::optional<double> joules) {
  const Scheduler::Status status = scheduler.status();
  const auto n = [](const std::atomic<uint64_t>& v) { return static_cast<double>(v.load(std::memory_order_relaxed)); };
  std::string out = counter("duet_requests_total", "counter", "Generations taken.", n(m.requests));
  out += counter("duet_requests_refused_total", "counter", "Requests refused because the queue was full.", n(m.refused));
  out += counter("duet_requests_cancelled_total", "counter", "Generations whose client left.", n(m.cancelled));
  out += counter("duet_requests_failed_total", "counter", "Generations that ended in an error.", n(m.failed));
  out += counter("duet_requests_running", "gauge", "Generations being processed.", static_cast<double>(status.running.size()));
  out += counter("duet_requests_waiting", "gauge", "Generations in the queue.", static_cast<double>(status.n_waiting));
  out += counter("duet_prompt_tokens_total", "counter", "Prompt tokens evaluated.", n(m.prompt_tokens));
  out += counter("duet_prompt_seconds_total", "counter", "Time from admission to the first token, summed over generations.", n(m.prompt_us) / 1e6);
  out += counter("duet_prefix_cache_tokens_total", "counter", "Prompt tokens taken from earlier requests.", n(m.cached_tokens));
  out += counter("duet_generated_tokens_total", "counter", "Tokens generated.", n(m.generated_tokens));
  out += counter("duet_generated_seconds_total", "counter", "Time from the first to the last token, summed over generations.", n(m.decode_us) / 1e6);
  out += counter("duet_steps_total", "counter", "Batches evaluated.", n(m.steps));
  out += counter("duet_step_rows_total", "counter", "Tokens in those batches.", n(m.step_rows));
  out += counter("duet_cached_sequences", "gauge", "Finished sequences kept for their prefixes.", static_cast<double>(status.n_cached_sequences));
  out += counter("duet_kv_cache_bytes", "gauge", "Memory of keys and values.", static_cast<double>(status.sequence_bytes));
  out += m.first_token.text("duet_time_to_first_token_seconds", "From arrival to the first token.");
  out += m.next_token.text("duet_time_between_tokens_seconds", "From a token to the next.");
  if (const auto& stream = status.stream) {
    out += counter("duet_expert_cache_hits_total", "counter", "Experts needed that were in memory.", static_cast<double>(stream->hits));
    out += counter("duet_expert_cache_misses_total", "counter", "Experts needed that were not.", static_cast<double>(stream->misses));
    out += counter("duet_expert_cache_bytes_read_total", "counter", "Bytes of experts read.", static_cast<double>(stream->reads.bytes));
  }
  if (joules) out += counter("duet_energy_joules_total", "counter", "Energy of the processor packages since the server began.", *joules);
  struct rusage usage {};
  if (::getrusage(RUSAGE_SELF, &usage) == 0) out += counter("duet_major_page_faults_total", "counter", "Pages of the process that were read from disk.", static_cast<double>(usage.ru_majflt));
  // The names that dashboards for llama-server know.
  out += counter("llamacpp:prompt_tokens_total", "counter", "Prompt tokens evaluated.", n(m.prompt_tokens));
  out += counter("llamacpp:prompt_seconds_total", "counter", "Prompt time.", n(m.prompt_us) / 1e6);
  out += counter("llamacpp:tokens_predicted_total", "counter", "Tokens generated.", n(m.generated_tokens));
  out += counter("llamacpp:tokens_predicted_seconds_total", "counter", "Generation time.", n(m.decode_us) / 1e6);
  const auto rate = [](double count, double us) { return us > 0 ? count / us * 1e6 : 0; };
  out += counter("llamacpp:prompt_tokens_seconds", "gauge", "Prompt tokens a second, on average.", rate(n(m.prompt_tokens), n(m.prompt_us)));
  out += counter("llamacpp:predicted_tokens_seconds", "gauge", "Generated tokens a second of a generation, on average.", rate(n(m.generated_tokens), n(m.decode_us)));
  out += counter("llamacpp:n_decode_total", "counter", "Batches evaluated.", n(m.steps));
  out += counter("llamacpp:n_busy_slots_per_decode", "gauge", "Tokens in a batch, on average.", n(m.steps) > 0 ? n(m.step_rows) / n(m.steps) : 0);
  out += counter("llamacpp:requests_processing", "gauge", "Generations being processed.", static_cast<double>(status.running.size()));
  out += counter("llamacpp:requests_deferred", "gauge", "Generations in the queue.", static_cast<double>(status.n_waiting));
  return out;
}

}  // namespace duet::server::llama
