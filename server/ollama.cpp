#include "server/ollama.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <limits>

#include "base/json.h"
#include "server/api_error.h"
#include "server/structured.h"
#include "server/text.h"

namespace duet::server::ollama {
namespace {

// RFC 3339 in UTC with microseconds.
std::string timestamp(std::chrono::system_clock::time_point time) {
  const auto us = std::chrono::duration_cast<std::chrono::microseconds>(time.time_since_epoch()).count();
  const std::time_t seconds = us / 1000000;
  std::tm utc{};
  ::gmtime_r(&seconds, &utc);
  std::array<char, 32> date{};
  std::strftime(date.data(), date.size(), "%Y-%m-%dT%H:%M:%S", &utc);
  std::array<char, 16> fraction{};
  std::snprintf(fraction.data(), fraction.size(), ".%06dZ", static_cast<int>(us % 1000000));
  return std::string(date.data()) + fraction.data();
}
std::string now() { return timestamp(std::chrono::system_clock::now()); }

int64_t nanoseconds(double seconds) { return static_cast<int64_t>(seconds * 1e9); }

std::string required_model(const Fields& f, const ServedModel& model) {
  const std::string name = f.string("model", f.string("name"));
  if (name.empty()) bad_request("model", "'model' is missing");
  model.check_name(name);
  return name;
}

// The context is the server's: asking for more than there is must not end in silent truncation.
void check_context(const Fields& options, const ServedModel& model) {
  const int64_t n_ctx = options.integer("num_ctx", 0, 0, std::numeric_limits<int32_t>::max());
  if (n_ctx > model.n_ctx)
    bad_request("options.num_ctx", "'options.num_ctx' is ", n_ctx, ", the server has a context of ", model.n_ctx, "; start it with --ctx ", n_ctx);
}

void parse_options(const Fields& f, const ServedModel& model, TextRequest& r) {
  static const Json kEmpty = Json::object();
  const Json* given = f.find("options");
  const Fields options(given != nullptr ? *given : kEmpty, "options.");
  check_context(options, model);
  r.params.sampling = sampling_params(options);
  r.params.penalize_prompt = true;
  r.params.stop = stop_strings(options);
  const int64_t n = options.integer("num_predict", -1, -2, std::numeric_limits<int32_t>::max());
  r.params.max_tokens = n < 0 ? SIZE_MAX : static_cast<size_t>(n);
  refuse_other_samplers(options);
  if (const Json* think = f.find("think"); think != nullptr && !(think->is_boolean() && !think->get<bool>()))
    bad_request("think", "'think' is not supported by this model");
  const bool logprobs = f.boolean("logprobs", false);
  const auto n_top = static_cast<int>(f.integer("top_logprobs", 0, 0, 100));
  r.params.n_top = logprobs || n_top > 0 ? n_top : -1;
  r.stream = f.boolean("stream", true);
}

// keep_alive 0: "unload", which a server of one model does not.
Json load_reply(const Fields& f, const ServedModel& model, bool chat) {
  const Json* keep = f.find("keep_alive");
  const bool unload = keep != nullptr && ((keep->is_number() && keep->get<double>() == 0) || (keep->is_string() && (*keep == "0" || *keep == "0s")));
  Json reply{{"model", model.id}, {"created_at", now()}};
  if (chat) reply["message"] = {{"role", "assistant"}, {"content", ""}};
  else reply["response"] = "";
  reply["done"] = true;
  reply["done_reason"] = unload ? "unload" : "load";
  return reply;
}

class LineRenderer : public Renderer {
 public:
  LineRenderer(const Parsed& parsed, const ServedModel& model)
      : chat_(parsed.chat), logprobs_(parsed.request->params.n_top >= 0), parts_(parsed.calls, parsed.tools.names, false), model_(model) {}

  std::string content_type() const override { return "application/x-ndjson"; }
  std::string whole(const std::vector<Choice>& choices) override {
    WholeAnswer answer = whole_answer(std::move(parts_), choices[0].text);
    Json out = last(choices[0], answer.content, choices[0].tokens);
    if (!answer.calls.empty()) out["message"]["tool_calls"] = calls_object(answer.calls);
    return dump(out);
  }
  std::string piece(size_t, const Choice& choice, const Update& update) override {
    const AnswerParts::Piece piece = parts_.push(update.text, update.finish.has_value());
    std::string out;
    if (!piece.content.empty() || (logprobs_ && !update.tokens.empty())) out = line(object(piece.content, update.tokens, false));
    add_pieces(calls_, piece.calls);
    if (update.finish && !calls_.empty()) {
      Json calls = object("", {}, false);
      calls["message"]["tool_calls"] = calls_object(calls_);
      out += line(calls);
    }
    if (update.finish) out += line(last(choice, "", {}));
    return out;
  }
  std::string end(const std::vector<Choice>&) override { return {}; }
  std::string failure(const std::string& message) override { return error_body(message) + "\n"; }

 private:
  static std::string line(const Json& json) { return dump(json) + "\n"; }

  Json object(const std::string& text, const std::vector<TokenRecord>& tokens, bool done) const {
    Json out{{"model", model_.id}, {"created_at", now()}};
    if (chat_) out["message"] = {{"role", "assistant"}, {"content", text}};
    else out["response"] = text;
    out["done"] = done;
    if (!logprobs_) return out;
    Json logprobs = Json::array();
    for (const TokenRecord& token : tokens) {
      Json one = entry(token.id, token.logprob);
      one["top_logprobs"] = Json::array();
      for (const auto& [id, logprob] : token.top) one["top_logprobs"].push_back(entry(id, logprob));
      logprobs.push_back(std::move(one));
    }
    if (!logprobs.empty()) out["logprobs"] = std::move(logprobs);
    return out;
  }
  static Json calls_object(const std::vector<ToolCall>& calls) {
    Json out = Json::array();
    for (const ToolCall& call : calls) out.push_back({{"id", call.id}, {"function", {{"name", call.name}, {"arguments", arguments_of(call)}}}});
    return out;
  }
  // An object in this protocol; of a call that was cut off there is none.
  static Json arguments_of(const ToolCall& call) {
    try {
      Json arguments = parse_json(call.arguments, "arguments");
      return arguments.is_object() ? arguments : Json::object();
    } catch (const Error&) {
      return Json::object();
    }
  }
  Json entry(Token id, float logprob) const { return {{"token", model_.tokenizer.piece(id, true)}, {"logprob", logprob}}; }

  Json last(const Choice& c, const std::string& text, const std::vector<TokenRecord>& tokens) const {
    const Finish& f = c.finish;
    Json out = object(text, tokens, true);
    out["done_reason"] = f.reason == FinishReason::length ? "length" : "stop";
    out["total_duration"] = nanoseconds(f.queue_s + f.prompt_s + f.decode_s);
    out["load_duration"] = nanoseconds(f.queue_s);
    out["prompt_eval_count"] = c.n_prompt;
    out["prompt_eval_duration"] = nanoseconds(f.prompt_s);
    out["eval_count"] = f.n_generated;
    out["eval_duration"] = nanoseconds(f.decode_s);
    return out;
  }

  bool chat_, logprobs_;
  AnswerParts parts_;
  std::vector<ToolCall> calls_;  // of a stream
  const ServedModel& model_;
};

// Calls and results have no ids in this protocol; templates want them. Results follow in the order of calls, or say
// the name of their tool.
class CallIds {
 public:
  Json given_to(const Json& messages) {
    Json out = messages;
    if (!out.is_array()) return out;
    for (Json& message : out) {
      if (!message.is_object()) continue;
      if (const auto calls = message.find("tool_calls"); calls != message.end() && calls->is_array())
        for (Json& call : *calls)
          if (call.is_object()) open_call(call);
      if (message.contains("role") && message["role"] == Json("tool") && !message.contains("tool_call_id")) close_call(message);
    }
    return out;
  }

 private:
  void open_call(Json& call) {
    if (!call.contains("id")) call["id"] = concat("call", n_++);
    const auto function = call.find("function");
    const bool named = function != call.end() && function->is_object() && function->contains("name");
    if (call["id"].is_string()) open_.emplace_back(named ? (*function)["name"] : Json(), call["id"].get<std::string>());
  }
  void close_call(Json& result) {
    const auto name = result.find("tool_name");
    auto call = open_.begin();
    if (name != result.end()) {
      const auto found = std::find_if(call, open_.end(), [&](const auto& c) { return c.first == *name; });
      if (found != open_.end()) call = found;
      result["name"] = *name;
    }
    result["tool_call_id"] = call == open_.end() ? concat("call", n_++) : call->second;
    if (call != open_.end()) open_.erase(call);
  }

  std::vector<std::pair<Json, std::string>> open_;  // calls without a result: name, id
  size_t n_ = 0;
};

void refuse_media(const Json& messages) {
  if (!messages.is_array()) return;
  for (size_t i = 0; i < messages.size(); ++i) {
    if (!messages[i].is_object()) continue;
    const Fields message(messages[i], concat("messages[", i, "]."));
    for (const char* name : {"images", "audio"}) message.refuse(name, "this model reads text only");
  }
}

std::string parameter_size(uint64_t n) {
  std::array<char, 32> text{};
  if (n >= 1000000000) std::snprintf(text.data(), text.size(), "%.1fB", static_cast<double>(n) / 1e9);
  else std::snprintf(text.data(), text.size(), "%.1fM", static_cast<double>(n) / 1e6);
  return text.data();
}

Json details(const ServedModel& model) {
  const ModelInfo& info = model.engine.info();
  return {{"parent_model", ""}, {"format", "gguf"}, {"family", "llama"}, {"families", Json::array({"llama"})},
          {"parameter_size", parameter_size(info.n_params)}, {"quantization_level", info.types.substr(0, info.types.find(' '))}};
}

Json entry(const ServedModel& model) {
  // No file is hashed for this: what tells models apart is name and size.
  std::array<char, 65> digest{};
  std::snprintf(digest.data(), digest.size(), "%032llx%032llx", static_cast<unsigned long long>(std::hash<std::string>{}(model.file_name)),
                static_cast<unsigned long long>(model.engine.info().file_bytes));
  return {{"name", model.id}, {"model", model.id}, {"modified_at", timestamp(std::chrono::system_clock::from_time_t(model.created))},
          {"size", model.engine.info().file_bytes}, {"digest", digest.data()}, {"details", details(model)}};
}

}  // namespace

Parsed parse_chat(const Json& body, const ServedModel& model) {
  const Fields f(body);
  required_model(f, model);
  Parsed out;
  out.chat = true;
  const Json* messages = f.find("messages");
  if (messages == nullptr || (messages->is_array() && messages->empty())) {
    out.reply = load_reply(f, model, true);
    return out;
  }
  TextRequest r;
  parse_options(f, model, r);
  out.tools = parse_ollama_tools(f);
  refuse_media(*messages);
  const Json with_ids = CallIds().given_to(*messages);
  out.calls = prepare_chat(&with_ids, out.tools, ollama_format_grammar(f), model, r);
  check_length(r.prompts[0].ids.size(), model.n_ctx, "messages");
  out.request = std::move(r);
  return out;
}

Parsed parse_generate(const Json& body, const ServedModel& model) {
  const Fields f(body);
  required_model(f, model);
  Parsed out;
  const std::string prompt = f.string("prompt");
  if (prompt.empty()) {
    out.reply = load_reply(f, model, false);
    return out;
  }
  for (const char* name : {"suffix", "images", "template", "context"}) f.refuse(name, "");
  TextRequest r;
  parse_options(f, model, r);
  r.constraint = text_constraint(ollama_format_grammar(f), model);
  if (f.boolean("raw", false) || !model.chat) {
    r.prompts = prompt_inputs(Json(prompt), "prompt", model.tokenizer, 1, f.boolean("parse_special", true));
    if (const std::string system = f.string("system"); !system.empty() && !f.boolean("raw", false)) bad_request("system", "'system': this model has no chat template");
  } else {
    Json messages = Json::array();
    if (const std::string system = f.string("system"); !system.empty()) messages.push_back({{"role", "system"}, {"content", system}});
    messages.push_back({{"role", "user"}, {"content", prompt}});
    r.prompts = {chat_prompt(&messages, Json(), model)};
    r.params.is_answer = true;
  }
  check_length(r.prompts[0].ids.size(), model.n_ctx, "prompt");
  out.request = std::move(r);
  return out;
}

std::unique_ptr<Renderer> make_renderer(const Parsed& parsed, const ServedModel& model) { return std::make_unique<LineRenderer>(parsed, model); }

Json tags(const ServedModel& model) { return {{"models", Json::array({entry(model)})}}; }

Json running(const ServedModel& model) {
  Json one = entry(model);
  one.erase("modified_at");
  one["expires_at"] = timestamp(std::chrono::system_clock::now() + std::chrono::hours(24 * 365));
  one["size_vram"] = model.engine.info().gpu_bytes;
  one["context_length"] = model.n_ctx;
  return {{"models", Json::array({std::move(one)})}};
}

Json show(const Json& body, const ServedModel& model) {
  required_model(Fields(body), model);
  const HParams& h = model.engine.info().hparams;
  Json info{{"general.architecture", "llama"}, {"general.name", h.name}, {"general.parameter_count", model.engine.info().n_params},
            {"llama.context_length", h.n_ctx_train}, {"llama.embedding_length", h.n_embd}, {"llama.block_count", h.n_layer},
            {"llama.attention.head_count", h.n_head}, {"llama.attention.head_count_kv", h.n_head_kv}, {"llama.feed_forward_length", h.n_ff},
            {"llama.expert_count", h.n_expert}, {"llama.expert_used_count", h.n_expert_used}, {"llama.vocab_size", h.n_vocab}};
  return {{"modelfile", concat("FROM ", model.file_name, "\n")},
          {"parameters", concat("num_ctx                        ", model.n_ctx)},
          {"template", model.chat ? "{{ .System }} {{ .Prompt }}" : "{{ .Prompt }}"},
          {"details", details(model)},
          {"model_info", std::move(info)},
          {"modified_at", timestamp(std::chrono::system_clock::from_time_t(model.created))},
          {"capabilities", model.chat ? Json::array({"completion", "tools"}) : Json::array({"completion"})}};
}

std::string error_body(const std::string& message) { return dump({{"error", message}}); }

}  // namespace duet::server::ollama
