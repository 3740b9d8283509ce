#include "formats/schema.h"

#include <cmath>
#include <optional>

#include "base/error.h"
#include "base/json.h"

namespace duet {
namespace {

constexpr float kMixtralRopeBase = 1e6f;
constexpr uint32_t kMixtralExperts = 8;
constexpr uint64_t kMaxDim = uint64_t{1}
                             << 24;  // of any one dimension: vocabulary, width, context / 256

void note(const NoticeFn& notice, const std::string& text) {
  if (notice) notice(text);
}

// ---- ranges and consistency, common to both sources ---------------------------------------------

void check_range(const std::string& source, const char* what, uint64_t value, uint64_t least,
                 uint64_t most) {
  if (value < least || value > most)
    fail(ErrorKind::format, source, ": ", what, " is ", value, ", expected ", least, " to ", most);
}

// Written so that NaN fails.
void check_float(const std::string& source, const char* what, float value, float above,
                 float most) {
  if (!(value > above && value <= most))
    fail(ErrorKind::format, source, ": ", what, " is ", value, ", expected more than ", above,
         " and at most ", most);
}

void check_attention(const HParams& h, const std::string& source) {
  check_range(source, "number of heads", h.n_head, 1, 4096);
  check_range(source, "number of KV heads", h.n_head_kv, 1, h.n_head);
  if (h.n_head % h.n_head_kv != 0)
    fail(ErrorKind::format, source, ": ", h.n_head, " heads are no multiple of ", h.n_head_kv,
         " KV heads");
  check_range(source, "head size", h.head_dim, 2, 1024);
  check_range(source, "rotated dimensions", h.n_rot, 2, h.head_dim);
  if (h.head_dim % 2 != 0 || h.n_rot % 2 != 0)
    fail(ErrorKind::format, source, ": head size ", h.head_dim, " and rotated dimensions ", h.n_rot,
         " must be even");
}

void check_rope(const HParams& h, const std::string& source) {
  check_float(source, "rope base", h.rope_freq_base, 0.0f, 1e30f);
  check_float(source, "rope scale", h.rope_scale, 0.0f, 1e6f);
  const auto& l3 = h.llama3_rope;
  if (l3.factor == 0) return;
  check_float(source, "rope scaling factor", l3.factor, 0.0f, 1e6f);
  check_float(source, "rope low_freq_factor", l3.low_freq_factor, 0.0f, 1e6f);
  check_float(source, "rope high_freq_factor", l3.high_freq_factor, l3.low_freq_factor, 1e6f);
  check_range(source, "rope original context", l3.n_ctx_original, 1, kMaxDim);
}

void check_hparams(const HParams& h, const std::string& source) {
  check_range(source, "number of layers", h.n_layer, 1, 1024);
  check_range(source, "embedding size", h.n_embd, 1, kMaxDim);
  check_range(source, "feed-forward size", h.n_ff, 1, kMaxDim);
  check_range(source, "vocabulary size", h.n_vocab, 1, kMaxDim);
  check_range(source, "context length", h.n_ctx_train, 1, uint64_t{1} << 31);
  check_range(source, "number of experts", h.n_expert, 0, 256);
  if (h.n_expert > 0) check_range(source, "experts used per token", h.n_expert_used, 1, h.n_expert);
  check_float(source, "RMS norm epsilon", h.rms_eps, 0.0f, 0.1f);
  check_attention(h, source);
  check_rope(h, source);
}

uint32_t narrow(uint64_t value, const char* key, const std::string& source) {
  if (value > UINT32_MAX)
    fail(ErrorKind::format, source, ": '", key, "' is ", value, ", which is too large");
  return static_cast<uint32_t>(value);
}

uint32_t default_head_dim(const HParams& h, const std::string& source) {
  if (h.n_head == 0 || h.n_embd % h.n_head != 0)
    fail(ErrorKind::format, source, ": embedding size ", h.n_embd, " is no multiple of ", h.n_head,
         " heads");
  return h.n_embd / h.n_head;
}

void drop_window_of_experts(HParams& h, const std::string& source, const NoticeFn& notice) {
  if (h.n_expert == 0 || h.sliding_window == 0) return;
  note(notice, concat(source, ": sliding window ", h.sliding_window,
                      " ignored: Mixtral attends to the full context (an error of early files)"));
  h.sliding_window = 0;
}

// ---- GGUF
// ----------------------------------------------------------------------------------------

class GgufHParams {
 public:
  GgufHParams(const GgufFile& file, const NoticeFn& notice)
      : file_(file), source_(file.source()), notice_(notice) {}

  HParams read() {
    check_architecture();
    read_sizes();
    read_attention();
    read_rope();
    h_.rms_eps = static_cast<float>(required_float("llama.attention.layer_norm_rms_epsilon"));
    h_.tied_output = !file_.tensors().empty() && file_.find_tensor("output.weight") == nullptr;
    h_.rope_freqs = file_.find_tensor("rope_freqs.weight") != nullptr;
    drop_window_of_experts(h_, source_, notice_);
    check_hparams(h_, source_);
    return h_;
  }

 private:
  void check_architecture() {
    const std::string* arch = file_.get_string("general.architecture");
    if (arch == nullptr)
      fail(ErrorKind::format, source_, ": key 'general.architecture' is missing");
    if (*arch != "llama")
      fail(ErrorKind::unsupported, source_, ": architecture ", quote(*arch),
           " is not supported; duet runs 'llama' (Llama, Mistral, Mixtral)");
    // Biases are parts of a model that this family lacks: leaving them out would be silently wrong.
    for (const TensorView& tensor : file_.tensors())
      if (tensor.name.ends_with(".bias"))
        fail(ErrorKind::unsupported, source_, ": tensor ", quote(tensor.name),
             ": biases are not supported");
    if (const std::string* name = file_.get_string("general.name")) h_.name = *name;
  }

  std::optional<uint32_t> optional_uint(const char* key) const {
    const auto value = file_.get_uint(key);
    return value ? std::optional(narrow(*value, key, source_)) : std::nullopt;
  }
  uint32_t required_uint(const char* key) const {
    const auto value = optional_uint(key);
    if (!value) fail(ErrorKind::format, source_, ": key '", key, "' is missing");
    return *value;
  }
  double required_float(const char* key) const {
    const auto value = file_.get_float(key);
    if (!value) fail(ErrorKind::format, source_, ": key '", key, "' is missing");
    return *value;
  }

  void read_sizes() {
    h_.n_layer = required_uint("llama.block_count");
    h_.n_embd = required_uint("llama.embedding_length");
    h_.n_ff = required_uint("llama.feed_forward_length");
    h_.n_ctx_train = required_uint("llama.context_length");
    h_.n_expert = optional_uint("llama.expert_count").value_or(0);
    if (h_.n_expert > 0) h_.n_expert_used = required_uint("llama.expert_used_count");
    h_.n_vocab = read_n_vocab();
  }

  // What was stored decides over what was written about it: matrix, then key, then token list.
  uint32_t read_n_vocab() const {
    const auto stated = optional_uint("llama.vocab_size");
    const std::vector<std::string>* tokens = file_.get_strings("tokenizer.ggml.tokens");
    if (const TensorView* embd = file_.find_tensor("token_embd.weight");
        embd != nullptr && embd->shape.size() == 2) {
      const uint32_t rows = narrow(embd->shape[0], "token_embd rows", source_);
      if (stated && *stated != rows)
        note(notice_, concat(source_, ": llama.vocab_size says ", *stated, ", token_embd has ",
                             rows, " rows: using ", rows));
      return rows;
    }
    if (stated) return *stated;
    if (tokens == nullptr)
      fail(ErrorKind::format, source_,
           ": no vocabulary size: llama.vocab_size, token_embd.weight and tokenizer.ggml.tokens "
           "are missing");
    return narrow(tokens->size(), "tokenizer.ggml.tokens", source_);
  }

  void read_attention() {
    h_.n_head = required_uint("llama.attention.head_count");
    h_.n_head_kv = optional_uint("llama.attention.head_count_kv").value_or(h_.n_head);
    const auto key_length = optional_uint("llama.attention.key_length");
    h_.head_dim = key_length ? *key_length : default_head_dim(h_, source_);
    const uint32_t value_length =
        optional_uint("llama.attention.value_length").value_or(h_.head_dim);
    if (value_length != h_.head_dim)
      fail(ErrorKind::unsupported, source_, ": keys of ", h_.head_dim, " and values of ",
           value_length, " elements per head; duet needs them equal");
    h_.n_rot = optional_uint("llama.rope.dimension_count").value_or(h_.head_dim);
    h_.sliding_window = optional_uint("llama.attention.sliding_window").value_or(0);
  }

  void read_rope() {
    if (const auto base = file_.get_float("llama.rope.freq_base")) {
      h_.rope_freq_base = static_cast<float>(*base);
    } else if (h_.n_expert == kMixtralExperts) {
      // Early Mixtral files lack the key; the llama default of 10000 gives fluent nonsense.
      h_.rope_freq_base = kMixtralRopeBase;
      note(notice_, concat(source_, ": llama.rope.freq_base is missing: using Mixtral's 1000000"));
    }
    const std::string* kind = file_.get_string("llama.rope.scaling.type");
    if (kind != nullptr && *kind != "none" && *kind != "linear")
      fail(ErrorKind::unsupported, source_, ": rope scaling ", quote(*kind),
           " is not supported (none, linear)");
    auto factor = file_.get_float("llama.rope.scaling.factor");
    if (!factor) factor = file_.get_float("llama.rope.scale_linear");  // name of 2023 files
    if (factor && *factor != 0 && (kind == nullptr || *kind == "linear"))
      h_.rope_scale = static_cast<float>(1.0 / *factor);
  }

  const GgufFile& file_;
  const std::string& source_;
  const NoticeFn& notice_;
  HParams h_;
};

// ---- Hugging Face config.json
// --------------------------------------------------------------------

class HfConfig {
 public:
  HfConfig(const Json& config, const std::string& source, const NoticeFn& notice)
      : config_(config), source_(source), notice_(notice) {}

  HParams read() {
    if (!config_.is_object()) fail(ErrorKind::format, source_, ": no JSON object");
    read_family();
    check_features();
    read_sizes();
    read_attention();
    read_rope();
    h_.rms_eps = static_cast<float>(
        json_get_or<double>(config_, "rms_norm_eps", mixtral() ? 1e-5 : 1e-6, source_));
    h_.tied_output = json_get_or<bool>(config_, "tie_word_embeddings", false, source_);
    drop_window_of_experts(h_, source_, notice_);
    check_hparams(h_, source_);
    return h_;
  }

 private:
  bool mixtral() const { return family_ == "MixtralForCausalLM"; }

  void read_family() {
    const auto names = config_.find("architectures");
    if (names != config_.end() && names->is_array() && !names->empty() &&
        names->front().is_string())
      family_ = names->front().get<std::string>();
    else
      family_ = family_of_type(json_get<std::string>(config_, "model_type", source_));
    if (family_ != "MixtralForCausalLM" && family_ != "MistralForCausalLM" &&
        family_ != "LlamaForCausalLM")
      fail(ErrorKind::unsupported, source_, ": architecture ", quote(family_),
           " is not supported; duet converts MixtralForCausalLM, MistralForCausalLM and "
           "LlamaForCausalLM");
  }

  static std::string family_of_type(const std::string& type) {
    if (type == "mixtral") return "MixtralForCausalLM";
    if (type == "mistral") return "MistralForCausalLM";
    if (type == "llama") return "LlamaForCausalLM";
    return type;
  }

  void check_features() {
    for (const char* key : {"attention_bias", "mlp_bias"})
      if (json_get_or<bool>(config_, key, false, source_))
        fail(ErrorKind::unsupported, source_, ": '", key, "' is true: biases are not supported");
    const auto act = json_get_or<std::string>(config_, "hidden_act", "silu", source_);
    if (act != "silu")
      fail(ErrorKind::unsupported, source_, ": hidden_act ", quote(act),
           " is not supported (silu)");
    check_quantization();
    if (json_get_or<double>(config_, "partial_rotary_factor", 1.0, source_) != 1.0)
      fail(ErrorKind::unsupported, source_,
           ": 'partial_rotary_factor' other than 1 is not supported");
  }

  // 8-bit floats with scales are read (the tensors tell their kind); integers are not.
  void check_quantization() {
    const auto q = config_.find("quantization_config");
    if (q == config_.end() || q->is_null()) return;
    const auto method = q->is_object() ? json_get_or<std::string>(*q, "quant_method", "", source_) : "";
    if (method != "fp8" && method != "fbgemm_fp8" && method != "compressed-tensors")
      fail(ErrorKind::unsupported, source_, ": the weights are quantized ('quantization_config', ", quote(method),
           "); of such, duet reads 8-bit floats (fp8, fbgemm_fp8, compressed-tensors): convert the original model");
  }

  uint32_t required(const char* key) const {
    return narrow(json_get<uint64_t>(config_, key, source_), key, source_);
  }
  uint32_t get_or(const char* key, uint32_t fallback) const {
    return narrow(json_get_or<uint64_t>(config_, key, fallback, source_), key, source_);
  }

  void read_sizes() {
    h_.n_layer = required("num_hidden_layers");
    h_.n_embd = required("hidden_size");
    h_.n_ff = required("intermediate_size");
    h_.n_vocab = required("vocab_size");
    h_.n_ctx_train = required("max_position_embeddings");
    if (!mixtral()) return;
    h_.n_expert = get_or("num_local_experts", kMixtralExperts);
    h_.n_expert_used = get_or("num_experts_per_tok", 2);
    check_range(source_, "number of experts", h_.n_expert, 1, 256);
  }

  void read_attention() {
    h_.n_head = required("num_attention_heads");
    h_.n_head_kv = get_or("num_key_value_heads", h_.n_head);
    h_.head_dim = get_or("head_dim", 0);
    if (h_.head_dim == 0) h_.head_dim = default_head_dim(h_, source_);
    h_.n_rot = h_.head_dim;
    if (family_ != "LlamaForCausalLM") h_.sliding_window = get_or("sliding_window", 0);
  }

  // transformers 5 keeps all of it in "rope_parameters"; before, the base stands at the top level
  // and the scaling in "rope_scaling".
  void read_rope() {
    const Json& modern = object_or_empty("rope_parameters");
    const Json& scaling = modern.empty() ? object_or_empty("rope_scaling") : modern;
    const double fallback = mixtral() ? double{kMixtralRopeBase} : 10000.0;
    const double top_level = json_get_or<double>(config_, "rope_theta", fallback, source_);
    h_.rope_freq_base =
        static_cast<float>(json_get_or<double>(modern, "rope_theta", top_level, source_));
    auto kind = json_get_or<std::string>(scaling, "type", "default", source_);  // older name
    kind = json_get_or<std::string>(scaling, "rope_type", kind, source_);
    if (kind == "linear") {
      h_.rope_scale = static_cast<float>(1.0 / json_get<double>(scaling, "factor", source_));
    } else if (kind == "llama3") {
      read_llama3(scaling);
    } else if (kind != "default") {
      fail(ErrorKind::unsupported, source_, ": rope scaling ", quote(kind),
           " is not supported (default, linear, llama3)");
    }
  }

  void read_llama3(const Json& scaling) {
    auto& l3 = h_.llama3_rope;
    l3.factor = static_cast<float>(json_get<double>(scaling, "factor", source_));
    l3.low_freq_factor = static_cast<float>(json_get<double>(scaling, "low_freq_factor", source_));
    l3.high_freq_factor =
        static_cast<float>(json_get<double>(scaling, "high_freq_factor", source_));
    l3.n_ctx_original =
        narrow(json_get<uint64_t>(scaling, "original_max_position_embeddings", source_),
               "original_max_position_embeddings", source_);
    check_float(source_, "rope scaling factor", l3.factor, 0.0f, 1e6f);
    h_.rope_freqs = true;
  }

  const Json& object_or_empty(const char* key) const {
    static const Json empty = Json::object();
    const auto it = config_.find(key);
    if (it == config_.end() || it->is_null()) return empty;
    if (!it->is_object()) fail(ErrorKind::format, source_, ": '", key, "' is no JSON object");
    return *it;
  }

  const Json& config_;
  const std::string& source_;
  const NoticeFn& notice_;
  std::string family_;
  HParams h_;
};

}  // namespace

HParams read_hparams(const GgufFile& file, const NoticeFn& notice) {
  return GgufHParams(file, notice).read();
}

HParams read_hf_config(const Json& config, const std::string& source, const NoticeFn& notice) {
  return HfConfig(config, source, notice).read();
}

std::optional<HParams> mixtral_hparams(std::string_view size) {
  HParams h;
  if (size == "8x7b") {
    h.n_layer = 32;
    h.n_embd = 4096;
    h.n_ff = 14336;
    h.n_head = 32;
    h.n_ctx_train = 32768;
  } else if (size == "8x22b") {
    h.n_layer = 56;
    h.n_embd = 6144;
    h.n_ff = 16384;
    h.n_head = 48;
    h.n_ctx_train = 65536;
  } else {
    return std::nullopt;
  }
  h.name = std::string("Mixtral ").append(size);
  h.n_vocab = 32000;
  h.n_head_kv = 8;
  h.head_dim = h.n_rot = 128;
  h.n_expert = kMixtralExperts;
  h.n_expert_used = 2;
  h.rope_freq_base = kMixtralRopeBase;
  return h;
}

std::vector<GgufKeyValue> hparams_metadata(const HParams& h) {
  std::vector<GgufKeyValue> out;
  const auto u32 = [&](const char* key, uint32_t v) { out.push_back({key, GgufValue::u32(v)}); };
  const auto f32 = [&](const char* key, float v) { out.push_back({key, GgufValue::f32(v)}); };
  out.push_back({"general.architecture", GgufValue::string(h.arch)});
  if (!h.name.empty()) out.push_back({"general.name", GgufValue::string(h.name)});
  u32("general.quantization_version", 2);
  u32("llama.block_count", h.n_layer);
  u32("llama.context_length", h.n_ctx_train);
  u32("llama.embedding_length", h.n_embd);
  u32("llama.feed_forward_length", h.n_ff);
  u32("llama.attention.head_count", h.n_head);
  u32("llama.attention.head_count_kv", h.n_head_kv);
  u32("llama.attention.key_length", h.head_dim);
  u32("llama.attention.value_length", h.head_dim);
  f32("llama.attention.layer_norm_rms_epsilon", h.rms_eps);
  if (h.sliding_window > 0) u32("llama.attention.sliding_window", h.sliding_window);
  u32("llama.rope.dimension_count", h.n_rot);
  f32("llama.rope.freq_base", h.rope_freq_base);
  if (h.rope_scale != 1.0f) {
    out.push_back({"llama.rope.scaling.type", GgufValue::string("linear")});
    f32("llama.rope.scaling.factor", 1.0f / h.rope_scale);
  }
  u32("llama.vocab_size", h.n_vocab);
  if (h.n_expert > 0) {
    u32("llama.expert_count", h.n_expert);
    u32("llama.expert_used_count", h.n_expert_used);
  }
  return out;
}

std::vector<float> llama3_rope_freqs(const HParams& h) {
  DUET_ASSERT(h.llama3_rope.factor > 0);
  constexpr double kTau = 6.283185307179586;
  const auto& l3 = h.llama3_rope;
  std::vector<float> out(h.n_rot / 2);
  for (size_t i = 0; i < out.size(); ++i) {
    const double frequency =
        std::pow(double{h.rope_freq_base}, -2.0 * static_cast<double>(i) / h.n_rot);
    const double turns = l3.n_ctx_original * frequency / kTau;  // within the original context
    // Weight of the unscaled frequency: 0 below low_freq_factor turns, 1 above high_freq_factor.
    const double ramp =
        (turns - l3.low_freq_factor) / (double{l3.high_freq_factor} - l3.low_freq_factor);
    const double unscaled = std::min(std::max(ramp, 0.0), 1.0);
    out[i] = static_cast<float>(1.0 / ((1.0 - unscaled) / l3.factor + unscaled));
  }
  return out;
}

}  // namespace duet
