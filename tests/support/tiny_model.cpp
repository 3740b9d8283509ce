#include "tests/support/tiny_model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "base/error.h"
#include "quant/f16.h"

namespace duet::test {
namespace {

// splitmix64: the same weights on every platform.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24f; }  // [0, 1)
  // Sum of four uniforms: mean 0, variance 1, never far out.
  float normal() { return (uniform() + uniform() + uniform() + uniform() - 2.0f) * 1.7320508f; }

 private:
  uint64_t state_;
};

uint64_t hash(std::string_view text, uint64_t seed) {
  for (const char c : text) seed = (seed ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return seed;
}

std::string encode(const Format& format, const std::vector<float>& values, size_t cols,
                   Random& random) {
  std::string out(row_bytes(format, cols) * (values.size() / cols), '\0');
  if (format.encode_row != nullptr) {
    for (size_t r = 0; r < values.size() / cols; ++r)
      format.encode_row(values.data() + r * cols, out.data() + r * row_bytes(format, cols), cols,
                        nullptr);
    return out;
  }
  // Formats without an encoder (IQ4_NL, IQ4_XS) begin each block with its scale: random codes do.
  const float level = 1.0f / (100.0f * std::sqrt(static_cast<float>(cols)));
  const uint16_t d = f32_to_f16(format.block_elems == 256 ? level / 16 : level);
  for (char& c : out) c = static_cast<char>(random.next());
  for (size_t at = 0; at < out.size(); at += format.block_bytes)
    std::memcpy(out.data() + at, &d, sizeof d);
  return out;
}

bool is_norm(TensorKind kind) {
  return kind == TensorKind::attn_norm || kind == TensorKind::ffn_norm ||
         kind == TensorKind::output_norm;
}

// Weights depend on seed and merged name and position only: both expert layouts hold the same
// model.
std::vector<float> random_values(const TensorSpec& spec, uint64_t seed) {
  Random random(hash(spec.gguf_name, seed));
  size_t n = 1;
  for (const uint64_t d : spec.shape) n *= d;
  const bool norm = is_norm(spec.kind);
  const float scale = norm                                  ? 0.1f
                      : spec.kind == TensorKind::token_embd ? 1.0f
                      : spec.kind == TensorKind::output
                          ? 3.0f / std::sqrt(static_cast<float>(spec.shape.back()))
                          : 1.0f / std::sqrt(static_cast<float>(spec.shape.back()));
  std::vector<float> values(n);
  for (float& v : values) v = (norm ? 1.0f : 0.0f) + scale * random.normal();
  return values;
}

void add_matrix(GgufBuilder& out, const std::string& name, DType type,
                const std::vector<uint64_t>& shape, const std::vector<float>& values,
                uint64_t seed) {
  Random random(hash(name, seed));
  std::vector<uint64_t> ne(shape.rbegin(), shape.rend());
  out.tensors.push_back({name, ne, static_cast<uint32_t>(type),
                         encode(format_of(type), values, shape.back(), random)});
}

void add_tensor(GgufBuilder& out, const TensorSpec& spec, const TinyModelOptions& options) {
  const std::vector<float> values = random_values(spec, options.seed);
  const bool plain = spec.shape.size() == 1 || spec.kind == TensorKind::ffn_gate_inp;
  const DType type = plain ? DType::F32 : options.type;
  if (spec.shape.size() < 3 || !options.split_experts) {
    add_matrix(out, spec.gguf_name, type, spec.shape, values, options.seed);
    return;
  }
  const size_t slice = spec.shape[1] * spec.shape[2];
  for (size_t e = 0; e < spec.shape[0]; ++e) {
    const auto first = values.begin() + static_cast<std::ptrdiff_t>(e * slice);
    add_matrix(out, split_expert_name(spec.kind, spec.layer, static_cast<int>(e)), type,
               {spec.shape[1], spec.shape[2]}, {first, first + static_cast<std::ptrdiff_t>(slice)},
               options.seed);
  }
}

void add_tokenizer(GgufBuilder& out, const TinyModelOptions& options) {
  const TinyVocabulary vocabulary = tiny_vocabulary(options.n_vocab);
  out.text("tokenizer.ggml.model", "llama");
  out.texts("tokenizer.ggml.tokens", vocabulary.tokens);
  out.floats("tokenizer.ggml.scores", vocabulary.scores);
  out.ints("tokenizer.ggml.token_type", vocabulary.types);
  out.u32("tokenizer.ggml.bos_token_id", 1)
      .u32("tokenizer.ggml.eos_token_id", 2)
      .u32("tokenizer.ggml.unknown_token_id", 0);
  out.boolean("tokenizer.ggml.add_bos_token", true).boolean("tokenizer.ggml.add_eos_token", false);
  if (!options.chat_template.empty()) out.text("tokenizer.chat_template", options.chat_template);
}

}  // namespace

HParams tiny_hparams(const TinyModelOptions& options) {
  HParams h;
  h.name = "tiny";
  h.n_layer = options.n_layer;
  h.n_embd = options.n_embd;
  h.n_ff = options.n_ff;
  h.n_vocab = options.n_rows > 0 ? options.n_rows : static_cast<uint32_t>(tiny_vocabulary(options.n_vocab).tokens.size());
  h.n_ctx_train = options.n_ctx_train;
  h.n_head = options.n_head;
  h.n_head_kv = options.n_head_kv;
  h.head_dim = options.n_embd / options.n_head;
  h.n_rot = h.head_dim;
  h.n_expert = options.n_expert;
  h.n_expert_used = options.n_expert > 0 ? options.n_expert_used : 0;
  h.rope_freq_base = options.rope_freq_base;
  h.sliding_window = options.sliding_window;
  h.tied_output = options.tied_output;
  return h;
}

TinyVocabulary tiny_vocabulary(uint32_t n_vocab) {
  enum : int32_t { kNormal = 1, kUnknown = 2, kControl = 3, kUnused = 5, kByte = 6 };
  TinyVocabulary out;
  const auto add = [&](std::string token, float score, int32_t type) {
    out.tokens.push_back(std::move(token));
    out.scores.push_back(score);
    out.types.push_back(type);
  };
  add("<unk>", 0, kUnknown);
  add("<s>", 0, kControl);
  add("</s>", 0, kControl);
  for (int b = 0; b < 256; ++b) {
    std::array<char, 8> name{};
    std::snprintf(name.data(), name.size(), "<0x%02X>", b);
    add(name.data(), 0, kByte);
  }
  float rank = 0;
  for (const char* merged : {"\u2581t", "he", "\u2581a", "in", "\u2581the", "er", "on", "\u2581s",
                             "re", "an", "and", "\u2581and", "ing"})
    add(merged, -rank++, kNormal);
  add("\u2581", -rank++, kNormal);
  for (char c = 'a'; c <= 'z'; ++c) add(std::string(1, c), -rank++, kNormal);
  for (const char c : std::string_view(".,!?")) add(std::string(1, c), -rank++, kNormal);
  while (out.tokens.size() < n_vocab) add(concat("<unused", out.tokens.size(), ">"), 0, kUnused);
  return out;
}

GgufBuilder tiny_model(const TinyModelOptions& options) {
  GgufBuilder out;
  const HParams hparams = tiny_hparams(options);
  for (const GgufKeyValue& kv : hparams_metadata(hparams)) out.add(kv);
  add_tokenizer(out, options);
  for (const TensorSpec& spec : tensor_table(hparams)) add_tensor(out, spec, options);
  const auto listed = [](const std::vector<std::string>& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  std::erase_if(out.keys, [&](const auto& key) { return listed(options.omit_keys, key.name); });
  std::erase_if(out.tensors,
                [&](const auto& tensor) { return listed(options.omit_tensors, tensor.name); });
  return out;
}

std::vector<std::byte> tiny_model_bytes(const TinyModelOptions& options) {
  return tiny_model(options).build();
}

void write_tiny_model(const std::filesystem::path& path, const TinyModelOptions& options) {
  write_bytes(path, tiny_model_bytes(options));
}

}  // namespace duet::test
