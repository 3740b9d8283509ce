#include "server/openai.h"

#include <cmath>
#include <limits>

#include "base/json.h"
#include "server/api_error.h"
#include "server/structured.h"
#include "server/text.h"
#include "server/timings.h"

namespace duet::server::openai {
namespace {

constexpr int64_t kMaxChoices = 64, kMaxTop = 100;
constexpr size_t kMaxPrompts = 256, kMaxRecords = 1 << 20;

size_t max_tokens(const Fields& f, const char* first, const char* second, size_t fallback) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const int64_t n = f.integer(first, second != nullptr ? f.integer(second, -1, -1, kMost) : -1, -1, kMost);
  return n < 0 ? fallback : static_cast<size_t>(n);
}

// What both kinds of request share.
Parsed parse_common(const Fields& f, const ServedModel& model) {
  Parsed out;
  TextRequest& r = out.request;
  model.check_name(f.string("model"));
  r.params.sampling = sampling_params(f);
  // The penalties here count what has been generated, all of it; repeat_penalty, if asked for, the prompt too.
  r.params.penalize_prompt = r.params.sampling.repeat_penalty != 1;
  if (!r.params.penalize_prompt) r.params.sampling.penalty_last_n = -1;
  r.params.stop = stop_strings(f);
  r.params.logit_bias = logit_bias(f, model.tokenizer);
  r.params.ignore_eos = f.boolean("ignore_eos", false);
  r.n = static_cast<size_t>(f.integer("n", 1, 1, kMaxChoices));
  r.stream = f.boolean("stream", false);
  if (const Json* options = f.find("stream_options")) {
    if (!r.stream) bad_request("stream_options", "'stream_options' is for streams only");
    out.format.include_usage = Fields(*options, "stream_options.").boolean("include_usage", false);
  }
  out.format.progress = f.boolean("return_progress", false);
  refuse_other_samplers(f);
  return out;
}

std::string new_id(const char* prefix) { return prefix + random_text("0123456789abcdefghijklmnopqrstuvwxyz", 24); }

Json bytes_of(const std::string& text) {
  Json out = Json::array();
  for (const char c : text) out.push_back(static_cast<unsigned char>(c));
  return out;
}

// -infinity has no place in JSON.
Json finite(float logprob) { return std::isfinite(logprob) ? Json(logprob) : Json(-9999.0); }

class RendererBase : public Renderer {
 public:
  RendererBase(const Parsed& parsed, const ServedModel& model, const char* id_prefix)
      : format_(parsed.format), model_(model), id_(new_id(id_prefix)), n_per_prompt_(parsed.request.n), created_(now_seconds()) {}

  std::string content_type() const override { return "text/event-stream"; }
  std::string failure(const std::string& message) override { return sse(error_body(500, message, {})); }
  std::string ping() override { return ": still working\n\n"; }

  std::string end(const std::vector<Choice>& choices) override {
    std::string out;
    if (format_.include_usage) {
      Json chunk = head(object_chunk());
      chunk["choices"] = Json::array();
      chunk["usage"] = usage(choices);
      out = sse(dump(chunk));
    }
    return out + "data: [DONE]\n\n";
  }

 protected:
  virtual const char* object_chunk() const = 0;

  Json head(const char* object) const { return {{"id", id_}, {"object", object}, {"created", created_}, {"model", model_.id}}; }

  Json usage(const std::vector<Choice>& choices) const {
    size_t n_prompt = 0, n_cached = 0, n_generated = 0;
    for (size_t i = 0; i < choices.size(); ++i) {
      if (i % n_per_prompt_ == 0) {
        n_prompt += choices[i].n_prompt;
        n_cached += choices[i].n_cached;
      }
      n_generated += choices[i].finish.n_generated;
    }
    return {{"prompt_tokens", n_prompt},
            {"completion_tokens", n_generated},
            {"total_tokens", n_prompt + n_generated},
            {"prompt_tokens_details", {{"cached_tokens", n_cached}}}};
  }

  static Json reason(const Finish& finish) { return finish.reason == FinishReason::length ? "length" : "stop"; }
  std::string piece_of(Token id) const { return model_.tokenizer.piece(id, true); }

  Format format_;
  const ServedModel& model_;
  std::string id_;
  size_t n_per_prompt_;
  int64_t created_;
};

// ---- chat --------------------------------------------------------------------------------------

class ChatRenderer : public RendererBase {
 public:
  ChatRenderer(const Parsed& parsed, const ServedModel& model) : RendererBase(parsed, model, "chatcmpl-") {}


  std::string whole(const std::vector<Choice>& choices) override {
    Json out = head("chat.completion");
    out["choices"] = Json::array();
    for (size_t i = 0; i < choices.size(); ++i) {
      const WholeAnswer answer = whole_answer(new_parts(), choices[i].text);
      out["choices"].push_back({{"index", i},
                                {"message", message(answer)},
                                {"logprobs", logprobs(choices[i].tokens)},
                                {"finish_reason", reason(choices[i].finish, !answer.calls.empty())}});
    }
    out["usage"] = usage(choices);
    if (choices.size() == 1) out["timings"] = timings(choices[0]);
    return dump(out);
  }

  std::string begin(const std::vector<Choice>& choices) override {
    std::string out;
    for (size_t i = 0; i < choices.size(); ++i) {
      out += chunk(i, {{"role", "assistant"}, {"content", format_.calls == CallForm::calls ? Json() : Json("")}}, Json(), Json());
      parts_.push_back(new_parts());
    }
    return out;
  }

  std::string piece(size_t index, const Choice& choice, const Update& update) override {
    const AnswerParts::Piece piece = parts_[index].push(update.text, update.finish.has_value());
    std::string out;
    if (format_.progress && choice.tokens.empty() && !update.finish) out = progress(index, choice);
    if (!piece.content.empty() || (format_.logprobs && !update.tokens.empty()))
      out += chunk(index, {{"content", piece.content}}, logprobs(update.tokens), Json());
    for (const CallPiece& call : piece.calls) out += chunk(index, {{"tool_calls", Json::array({delta(call)})}}, Json(), Json());
    if (update.finish) out += chunk(index, Json::object(), Json(), reason(choice.finish, parts_[index].has_calls()), {{"timings", timings(choice)}});
    return out;
  }

 private:
  const char* object_chunk() const override { return "chat.completion.chunk"; }
  AnswerParts new_parts() const { return {format_.calls, format_.tools.names, !format_.tools.parallel}; }

  static Json reason(const Finish& finish, bool has_calls) {
    return has_calls && finish.reason == FinishReason::stop ? Json("tool_calls") : RendererBase::reason(finish);
  }

  static Json message(const WholeAnswer& answer) {
    if (answer.calls.empty()) return {{"role", "assistant"}, {"content", answer.content}};
    Json calls = Json::array();
    for (const ToolCall& call : answer.calls)
      calls.push_back({{"id", call.id}, {"type", "function"}, {"function", {{"name", call.name}, {"arguments", call.arguments}}}});
    return {{"role", "assistant"}, {"content", answer.content.empty() ? Json() : Json(answer.content)}, {"tool_calls", std::move(calls)}};
  }

  static Json delta(const CallPiece& call) {
    if (call.name.empty()) return {{"index", call.index}, {"function", {{"arguments", call.arguments}}}};
    return {{"index", call.index}, {"id", call.id}, {"type", "function"}, {"function", {{"name", call.name}, {"arguments", call.arguments}}}};
  }

  std::string progress(size_t index, const Choice& choice) const {
    const Json done{{"total", choice.n_prompt}, {"cache", choice.n_cached}, {"processed", choice.n_prompt_done}};
    return chunk(index, Json::object(), Json(), Json(), {{"prompt_progress", done}});
  }

  std::string chunk(size_t index, Json delta, Json logprobs_of, Json finish_reason, const Json& more = Json::object()) const {
    Json out = head(object_chunk());
    out.update(more);
    out["choices"] = Json::array({{{"index", index}, {"delta", std::move(delta)}, {"logprobs", std::move(logprobs_of)}, {"finish_reason", std::move(finish_reason)}}});
    if (format_.include_usage) out["usage"] = nullptr;
    return sse(dump(out));
  }

  Json logprobs(const std::vector<TokenRecord>& tokens) const {
    if (!format_.logprobs) return Json();
    Json content = Json::array();
    for (const TokenRecord& token : tokens) {
      Json top = Json::array();
      for (const auto& [id, logprob] : token.top) top.push_back(entry(id, logprob));
      Json one = entry(token.id, token.logprob);
      one["top_logprobs"] = std::move(top);
      content.push_back(std::move(one));
    }
    return {{"content", std::move(content)}, {"refusal", nullptr}};
  }

  Json entry(Token id, float logprob) const {
    const std::string text = piece_of(id);
    return {{"token", text}, {"logprob", finite(logprob)}, {"bytes", bytes_of(text)}};
  }

  std::vector<AnswerParts> parts_;  // of a stream, by choice
};

// ---- completions -------------------------------------------------------------------------------

class CompletionRenderer : public RendererBase {
 public:
  CompletionRenderer(const Parsed& parsed, const ServedModel& model) : RendererBase(parsed, model, "cmpl-") {}

  std::string whole(const std::vector<Choice>& choices) override {
    Json out = head("text_completion");
    out["choices"] = Json::array();
    for (size_t i = 0; i < choices.size(); ++i) {
      const Choice& c = choices[i];
      LegacyLogprobs legacy = start(c);
      add_tokens(legacy, c.tokens);
      out["choices"].push_back(choice_object(i, (format_.echo ? c.input->text : "") + c.text, legacy, reason(c.finish)));
    }
    out["usage"] = usage(choices);
    return dump(out);
  }

  std::string piece(size_t index, const Choice& choice, const Update& update) override {
    if (legacy_.size() <= index) legacy_.resize(index + 1);
    if (started_.size() <= index) started_.resize(index + 1);
    std::string text = update.text, out;
    LegacyLogprobs& legacy = legacy_[index];
    const bool first = !started_[index] && (!update.tokens.empty() || update.finish);
    if (first) {
      started_[index] = true;
      legacy = start(choice);
      if (format_.echo) text = choice.input->text + text;
    }
    add_tokens(legacy, update.tokens);
    if (!text.empty() || (format_.logprobs && !update.tokens.empty())) out = chunk(index, text, legacy, Json());
    legacy.clear();
    if (update.finish) out += chunk(index, "", legacy, reason(choice.finish));
    return out;
  }

 private:
  // Columns of the same length; offsets count characters of the text.
  struct LegacyLogprobs {
    Json tokens = Json::array(), logprobs = Json::array(), top = Json::array(), offsets = Json::array();
    size_t offset = 0;
    void clear() { tokens = logprobs = top = offsets = Json::array(); }
  };

  const char* object_chunk() const override { return "text_completion"; }

  std::string chunk(size_t index, const std::string& text, const LegacyLogprobs& legacy, Json finish_reason) const {
    Json out = head(object_chunk());
    out["choices"] = Json::array({choice_object(index, text, legacy, std::move(finish_reason))});
    if (format_.include_usage) out["usage"] = nullptr;
    return sse(dump(out));
  }

  Json choice_object(size_t index, const std::string& text, const LegacyLogprobs& legacy, Json finish_reason) const {
    Json logprobs;
    if (format_.logprobs)
      logprobs = {{"tokens", legacy.tokens}, {"token_logprobs", legacy.logprobs}, {"top_logprobs", legacy.top}, {"text_offset", legacy.offsets}};
    return {{"text", text}, {"index", index}, {"logprobs", std::move(logprobs)}, {"finish_reason", std::move(finish_reason)}};
  }

  // With the prompt's tokens, when it is echoed. Control tokens (BOS) and the space before the first
  // word are no part of the echoed text.
  LegacyLogprobs start(const Choice& choice) const {
    LegacyLogprobs out;
    if (!format_.echo || !format_.logprobs) {
      out.offset = format_.echo ? count_chars(choice.input->text) : 0;
      return out;
    }
    const std::vector<Token>& ids = choice.input->ids;
    TextStream shown(model_.tokenizer, true);
    for (size_t i = 0; i < ids.size(); ++i) {
      if (i == 0) add(out, ids[0], nullptr, shown.push(ids[0]));
      else add(out, ids[i], i - 1 < choice.prompt.size() ? &choice.prompt[i - 1] : nullptr, shown.push(ids[i]));
    }
    out.offset = count_chars(choice.input->text);
    return out;
  }

  void add_tokens(LegacyLogprobs& out, const std::vector<TokenRecord>& tokens) const {
    if (!format_.logprobs) return;
    for (const TokenRecord& token : tokens) add(out, token.id, &token, model_.tokenizer.piece(token.id));
  }

  void add(LegacyLogprobs& out, Token id, const TokenRecord* record, const std::string& shown) const {
    out.tokens.push_back(piece_of(id));
    out.offsets.push_back(out.offset);
    out.offset += count_chars(shown);
    out.logprobs.push_back(record != nullptr ? finite(record->logprob) : Json());
    if (record == nullptr) return out.top.push_back(nullptr);
    Json top = Json::object();
    for (const auto& [token, logprob] : record->top) {
      const std::string text = printable(piece_of(token));
      if (!top.contains(text)) top[text] = finite(logprob);
    }
    const std::string own = printable(piece_of(id));
    if (!top.contains(own)) top[own] = finite(record->logprob);
    out.top.push_back(std::move(top));
  }

  std::vector<LegacyLogprobs> legacy_;
  std::vector<bool> started_;
};

// Records of all tokens of all prompts are kept until the reply is whole.
void check_records(const TextRequest& r) {
  size_t n = 0;
  for (const PromptInput& input : r.prompts) n += input.ids.size() * r.n * (static_cast<size_t>(r.params.n_top) + 1);
  if (n > kMaxRecords)
    bad_request("logprobs", "'echo' with 'logprobs' would give ", n, " log probabilities; at most ", kMaxRecords, ": send fewer prompts at once or ask for fewer");
}

}  // namespace

Parsed parse_chat(const Json& body, const ServedModel& model) {
  const Fields f(body);
  Parsed out = parse_common(f, model);
  TextRequest& r = out.request;
  out.format.chat = true;
  r.params.max_tokens = max_tokens(f, "max_completion_tokens", "max_tokens", SIZE_MAX);
  out.format.logprobs = f.boolean("logprobs", false);
  const auto n_top = static_cast<int>(f.integer("top_logprobs", 0, 0, kMaxTop));
  if (n_top > 0 && !out.format.logprobs) bad_request("top_logprobs", "'top_logprobs' needs 'logprobs': true");
  r.params.n_top = out.format.logprobs ? n_top : -1;
  out.format.tools = parse_tools(f);
  refuse_other_templates(f);
  out.format.calls = prepare_chat(f.find("messages"), out.format.tools, requested_grammar(f), model, r);
  check_length(r.prompts[0].ids.size(), model.n_ctx, "messages");
  return out;
}

Parsed parse_completion(const Json& body, const ServedModel& model) {
  const Fields f(body);
  Parsed out = parse_common(f, model);
  TextRequest& r = out.request;
  r.constraint = text_constraint(requested_grammar(f), model);
  f.refuse("suffix", "");
  const Json* prompt = f.find("prompt");
  if (prompt == nullptr) bad_request("prompt", "'prompt' is missing");
  r.prompts = prompt_inputs(*prompt, "prompt", model.tokenizer, kMaxPrompts, f.boolean("parse_special", true));
  if (r.prompts.size() * r.n > kMaxPrompts) bad_request("n", r.prompts.size() * r.n, " choices in all; at most ", kMaxPrompts, " are made at once");
  for (const PromptInput& input : r.prompts) check_length(input.ids.size(), model.n_ctx, "prompt");
  r.params.max_tokens = max_tokens(f, "max_tokens", nullptr, 16);
  const int64_t best_of = f.integer("best_of", static_cast<int64_t>(r.n), 1, kMaxChoices);
  if (static_cast<size_t>(best_of) != r.n) bad_request("best_of", "'best_of' other than 'n' is not supported");
  out.format.echo = f.boolean("echo", false);
  // Legacy: a number; some clients send true or false.
  const Json* logprobs = f.find("logprobs");
  if (logprobs != nullptr && logprobs->is_boolean()) r.params.n_top = logprobs->get<bool>() ? 1 : -1;
  else r.params.n_top = static_cast<int>(f.integer("logprobs", -1, -1, kMaxTop));
  out.format.logprobs = r.params.n_top >= 0;
  r.params.prompt_logprobs = out.format.echo && out.format.logprobs;
  if (r.params.prompt_logprobs) check_records(r);
  return out;
}

std::unique_ptr<Renderer> make_renderer(const Parsed& parsed, const ServedModel& model) {
  if (parsed.format.chat) return std::make_unique<ChatRenderer>(parsed, model);
  return std::make_unique<CompletionRenderer>(parsed, model);
}

Json model_object(const ServedModel& model) {
  const ModelInfo& info = model.engine.info();
  return {{"id", model.id}, {"object", "model"}, {"created", model.created}, {"owned_by", "duet"},
          {"meta", {{"n_vocab", info.hparams.n_vocab}, {"n_ctx", model.n_ctx}, {"n_ctx_train", info.hparams.n_ctx_train},
                    {"n_embd", info.hparams.n_embd}, {"n_params", info.n_params}, {"size", info.file_bytes}}}};
}

Json model_list(const ServedModel& model) { return {{"object", "list"}, {"data", Json::array({model_object(model)})}}; }

std::string error_body(int status, const std::string& message, const std::string& param) {
  const char* type = status == 401 ? "authentication_error" : status == 403 ? "permission_error" : status == 404 ? "not_found_error"
                     : status < 500 ? "invalid_request_error" : status == 503 ? "overloaded_error" : "server_error";
  return dump({{"error", {{"message", message}, {"type", type}, {"param", param.empty() ? Json() : Json(param)}, {"code", status == 404 && param == "model" ? Json("model_not_found") : Json()}}}});
}

}  // namespace duet::server::openai
