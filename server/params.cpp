#include "server/params.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>

#include "base/json.h"
#include "server/api_error.h"

namespace duet::server {
namespace {

constexpr size_t kMaxStops = 16, kMaxStopBytes = 1024, kMaxBiases = 4096;

uint64_t random_seed() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

Token checked_token(int64_t id, const char* field, size_t n_vocab) {
  if (id < 0 || static_cast<uint64_t>(id) >= n_vocab)
    bad_request(field, "'", field, "': token id ", id, " is outside this model's vocabulary of ", n_vocab,
                "; were the ids made by another model's tokenizer?");
  return static_cast<Token>(id);
}

float bias_value(const Json& value) {
  if (value.is_boolean() && !value.get<bool>()) return -std::numeric_limits<float>::infinity();
  if (!value.is_number()) bad_request("logit_bias", "'logit_bias': a bias must be a number");
  return std::clamp(value.get<float>(), -1e6f, 1e6f);
}

Token bias_id(const std::string& key, size_t n_vocab) {
  const bool digits = !key.empty() && key.size() < 10 && std::all_of(key.begin(), key.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (!digits) bad_request("logit_bias", "'logit_bias': ", quote(key), " is no token id");
  return checked_token(std::stol(key), "logit_bias", n_vocab);
}

// Names of llama-server and the letters it takes for them.
struct SamplerName {
  std::string_view name;
  char letter;
  int place;  // in the order in which they are applied; 0: has been refused if it would do anything
};
constexpr SamplerName kSamplers[] = {{"penalties", 'e', 1}, {"top_k", 'k', 2}, {"top_p", 'p', 3}, {"min_p", 'm', 4}, {"temperature", 't', 5},
                                     {"dry", 'd', 0}, {"top_n_sigma", 's', 0}, {"typ_p", 'y', 0}, {"typical_p", 'y', 0}, {"xtc", 'x', 0}};

const SamplerName& sampler_of(std::string_view text) {
  for (const SamplerName& sampler : kSamplers)
    if (text == sampler.name || text == std::string_view(&sampler.letter, 1)) return sampler;
  bad_request("samplers", "'samplers': there is no sampler ", quote(text), "; known are penalties, top_k, top_p, min_p and temperature");
}

// Those that are not in llama-server's list "samplers" do nothing. Their order is fixed.
void keep_samplers(const Fields& f, SamplerParams& p) {
  const Json* list = f.find("samplers");
  if (list == nullptr) return;
  std::vector<std::string> names;
  if (list->is_string())
    for (const char c : list->get_ref<const std::string&>()) names.emplace_back(1, c);
  else names = f.strings("samplers", 64);
  std::array<bool, 6> has{};
  int last = 0;
  for (const std::string& name : names) {
    const int place = sampler_of(name).place;
    if (place == 0) continue;
    if (place <= last) bad_request("samplers", "'samplers': only the order penalties, top_k, top_p, min_p, temperature is supported; ", quote(name), " stands too late");
    has[static_cast<size_t>(place)] = true;
    last = place;
  }
  if (!has[1]) {
    p.repeat_penalty = 1;
    p.presence_penalty = p.frequency_penalty = 0;
  }
  if (!has[2]) p.top_k = 0;
  if (!has[3]) p.top_p = 1;
  if (!has[4]) p.min_p = 0;
  if (!has[5]) p.temperature = 1;
}

PromptInput text_input(const Json& text, const Tokenizer& tokenizer, bool parse_special) {
  PromptInput input{text.get<std::string>(), {}};
  const Segment segment{input.text, parse_special};
  input.ids = tokenizer.encode({&segment, 1}, tokenizer.add_bos());
  return input;
}

}  // namespace

Fields::Fields(const Json& object, std::string path) : object_(object), path_(std::move(path)) {
  if (!object.is_object()) bad_request(path_, path_.empty() ? "the request" : path_, " must be a JSON object");
}

const Json* Fields::find(const char* field) const {
  const auto it = object_.find(field);
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

std::string Fields::string(const char* field, const std::string& fallback) const {
  const Json* value = find(field);
  if (value == nullptr) return fallback;
  if (!value->is_string()) bad_request(name(field), "'", name(field), "' must be a string");
  return value->get<std::string>();
}

bool Fields::boolean(const char* field, bool fallback) const {
  const Json* value = find(field);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) bad_request(name(field), "'", name(field), "' must be true or false");
  return value->get<bool>();
}

double Fields::number(const char* field, double fallback, double least, double most) const {
  const Json* value = find(field);
  if (value == nullptr) return fallback;
  if (!value->is_number()) bad_request(name(field), "'", name(field), "' must be a number");
  const double number = value->get<double>();
  if (!(number >= least && number <= most)) bad_request(name(field), "'", name(field), "' is ", number, "; it must be from ", least, " to ", most);
  return number;
}

int64_t Fields::integer(const char* field, int64_t fallback, int64_t least, int64_t most) const {
  const Json* value = find(field);
  if (value == nullptr) return fallback;
  // Some clients send 5.0.
  const double number = value->is_number() ? value->get<double>() : 0.5;
  if (number != std::floor(number)) bad_request(name(field), "'", name(field), "' must be an integer");
  if (!(number >= static_cast<double>(least) && number <= static_cast<double>(most)))
    bad_request(name(field), "'", name(field), "' is ", value->dump(), "; it must be from ", least, " to ", most);
  return value->is_number_integer() ? value->get<int64_t>() : static_cast<int64_t>(number);
}

std::vector<std::string> Fields::strings(const char* field, size_t most) const {
  const Json* value = find(field);
  if (value == nullptr) return {};
  if (value->is_string()) return {value->get<std::string>()};
  if (!value->is_array()) bad_request(name(field), "'", name(field), "' must be a string or an array of strings");
  if (value->size() > most) bad_request(name(field), "'", name(field), "' has ", value->size(), " entries; at most ", most, " are taken");
  std::vector<std::string> out;
  for (const Json& entry : *value) {
    if (!entry.is_string()) bad_request(name(field), "'", name(field), "' must hold strings only");
    out.push_back(entry.get<std::string>());
  }
  return out;
}

void Fields::refuse(const char* field, const char* why) const {
  const Json* value = find(field);
  if (value == nullptr || *value == Json(false) || *value == Json("") || (value->is_structured() && value->empty())) return;
  bad_request(name(field), "'", name(field), "' is not supported", why[0] != '\0' ? ": " : "", why);
}

Json parse_body(std::string_view body) {
  try {
    Json json = parse_json(body, "request body", {.max_bytes = size_t{32} << 20, .max_depth = 64});
    if (!json.is_object()) bad_request("", "the request body must be a JSON object");
    return json;
  } catch (const Error& e) {
    bad_request("", e.what());
  }
}

SamplerParams sampling_params(const Fields& f) {
  constexpr double kHuge = 1e4;
  constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
  const SamplerParams d;
  SamplerParams p;
  p.temperature = static_cast<float>(f.number("temperature", double{d.temperature}, 0, 100));
  p.top_k = static_cast<int32_t>(f.integer("top_k", d.top_k, -1, kMaxInt));
  p.top_p = static_cast<float>(f.number("top_p", double{d.top_p}, 0, 1));
  p.min_p = static_cast<float>(f.number("min_p", double{d.min_p}, 0, 1));
  p.repeat_penalty = static_cast<float>(f.number("repeat_penalty", f.number("repetition_penalty", 1, 0.01, kHuge), 0.01, kHuge));
  p.presence_penalty = static_cast<float>(f.number("presence_penalty", 0, -kHuge, kHuge));
  p.frequency_penalty = static_cast<float>(f.number("frequency_penalty", 0, -kHuge, kHuge));
  p.penalty_last_n = static_cast<int32_t>(f.integer("repeat_last_n", d.penalty_last_n, -1, kMaxInt));
  keep_samplers(f, p);
  const int64_t seed = f.integer("seed", -1, std::numeric_limits<int64_t>::min() / 2, std::numeric_limits<int64_t>::max() / 2);
  // -1: llama-server's and Ollama's word for random; it is kept in 32 bits, and sent as such.
  const bool is_random = seed == -1 || seed == std::numeric_limits<uint32_t>::max();
  p.seed = is_random ? random_seed() : static_cast<uint64_t>(seed);
  check_sampling(p);
  return p;
}

void check_sampling(const SamplerParams& params) {
  try {
    const Sampler sampler(params);
  } catch (const Error& e) {
    bad_request("", e.what());
  }
}

void refuse_other_samplers(const Fields& fields) {
  const auto is_number = [&](const char* name, const auto& good) {
    const Json* value = fields.find(name);
    return value == nullptr || (value->is_number() && good(value->get<double>()));
  };
  for (const char* name : {"mirostat", "top_a", "xtc_probability", "dry_multiplier", "dynatemp_range", "epsilon_cutoff", "eta_cutoff", "top_n_sigma",
                           "smoothing_factor", "min_tokens", "min_keep", "n_keep", "t_max_predict_ms"})
    if (!is_number(name, [](double x) { return x <= 0; })) fields.refuse(name, "");
  for (const char* name : {"typical_p", "tfs_z", "length_penalty"})
    if (!is_number(name, [](double x) { return x == 1; })) fields.refuse(name, "");
  for (const char* name : {"guided_regex", "guided_whitespace_pattern", "use_beam_search", "allowed_token_ids", "bad_words", "stop_token_ids", "grammar_lazy", "grammar_triggers"})
    fields.refuse(name, "");
}

void refuse_other_templates(const Fields& fields) {
  fields.refuse("chat_template", "the server's own is used; start it with --template NAME for another");
  fields.refuse("continue_final_message", "say \"prefix\": true in the last message instead");
  if (!fields.boolean("add_generation_prompt", true)) bad_request("add_generation_prompt", "'add_generation_prompt': false is not supported: an answer follows");
}

std::vector<std::string> stop_strings(const Fields& fields) {
  std::vector<std::string> stops = fields.strings("stop", kMaxStops);
  std::erase(stops, "");
  for (const std::string& stop : stops)
    if (stop.size() > kMaxStopBytes) bad_request(fields.name("stop"), "'", fields.name("stop"), "': a stop string has ", stop.size(), " bytes; at most ", kMaxStopBytes);
  return stops;
}

std::vector<std::pair<Token, float>> logit_bias(const Fields& fields, const Tokenizer& tokenizer) {
  const Json* value = fields.find("logit_bias");
  if (value == nullptr) return {};
  if (!value->is_structured() || value->size() > kMaxBiases) bad_request("logit_bias", "'logit_bias' must be an object of at most ", kMaxBiases, " entries");
  std::vector<std::pair<Token, float>> out;
  if (value->is_object()) {
    for (const auto& [key, bias] : value->items()) out.emplace_back(bias_id(key, tokenizer.n_vocab()), bias_value(bias));
    return out;
  }
  for (const Json& pair : *value) {
    if (!pair.is_array() || pair.size() != 2) bad_request("logit_bias", "'logit_bias': an array must hold pairs [token, bias]");
    if (pair[0].is_number_integer()) out.emplace_back(checked_token(pair[0].get<int64_t>(), "logit_bias", tokenizer.n_vocab()), bias_value(pair[1]));
    else if (pair[0].is_string())
      for (const Token id : tokenizer.encode(pair[0].get<std::string>())) out.emplace_back(id, bias_value(pair[1]));
    else bad_request("logit_bias", "'logit_bias': a token is an id or a text");
  }
  return out;
}

PromptInput id_input(const Json& ids, const char* field, const Tokenizer& tokenizer) {
  PromptInput input{};
  for (const Json& id : ids) {
    if (!id.is_number_integer()) bad_request(field, "'", field, "': lists of token ids must hold integers only");
    input.ids.push_back(checked_token(id.get<int64_t>(), field, tokenizer.n_vocab()));
  }
  input.text = tokenizer.decode(input.ids);
  return input;
}

std::vector<PromptInput> prompt_inputs(const Json& prompt, const char* field, const Tokenizer& tokenizer, size_t most, bool parse_special) {
  if (prompt.is_string()) return {text_input(prompt, tokenizer, parse_special)};
  if (!prompt.is_array() || prompt.empty()) bad_request(field, "'", field, "' must be a text, a list of texts, token ids, or a list of lists of token ids");
  if (prompt[0].is_number()) return {id_input(prompt, field, tokenizer)};
  if (prompt.size() > most) bad_request(field, "'", field, "' has ", prompt.size(), " entries; at most ", most, " are taken at once");
  std::vector<PromptInput> out;
  for (const Json& one : prompt) {
    if (one.is_string()) out.push_back(text_input(one, tokenizer, parse_special));
    else if (one.is_array()) out.push_back(id_input(one, field, tokenizer));
    else bad_request(field, "'", field, "' must hold texts or lists of token ids");
  }
  return out;
}

void check_length(size_t n_prompt, size_t n_ctx, const char* field) {
  if (n_prompt == 0) bad_request(field, "'", field, "' is empty: nothing to evaluate");
  if (n_prompt > n_ctx)
    bad_request(field, "'", field, "' has ", n_prompt, " tokens, the context has ", n_ctx, " positions; shorten it or start the server with a larger --ctx");
}

}  // namespace duet::server
