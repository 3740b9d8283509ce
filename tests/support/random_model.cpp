#include "tests/support/random_model.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace duet::test {
namespace {

struct Planned {
  std::string name;               // in the file
  std::vector<std::string> seeds; // one value stream per slice along the first dimension of experts
  std::vector<uint64_t> shape;
  DType type;
};

bool is_matrix(TensorKind kind) {
  return kind != TensorKind::attn_norm && kind != TensorKind::ffn_norm && kind != TensorKind::output_norm &&
         kind != TensorKind::rope_freqs && kind != TensorKind::ffn_gate_inp;
}
bool is_experts(TensorKind kind) {
  return kind == TensorKind::ffn_gate_exps || kind == TensorKind::ffn_up_exps || kind == TensorKind::ffn_down_exps;
}

// Uniform in [-1, 1), the same for the same (seed, stream) everywhere.
class Noise {
 public:
  Noise(uint64_t seed, const std::string& stream) : state_(seed * 0x9e3779b97f4a7c15u) {
    for (const char c : stream) state_ = (state_ ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  }
  double next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-52 - 1.0;
  }

 private:
  uint64_t state_;
};

std::vector<Planned> plan(const RandomModel& model) {
  std::vector<Planned> out;
  if (!model.keep_tensors) return out;
  for (const TensorSpec& spec : tensor_table(model.hparams)) {
    if (spec.kind == TensorKind::output && model.hparams.tied_output) continue;
    const size_t n_expert = is_experts(spec.kind) ? spec.shape[0] : 0;
    std::vector<std::string> seeds;
    for (size_t e = 0; e < n_expert; ++e) seeds.push_back(split_expert_name(spec.kind, spec.layer, static_cast<int>(e)));
    if (n_expert == 0) seeds = {spec.gguf_name};
    if (n_expert == 0 || !model.split_experts) {
      const DType type = is_matrix(spec.kind) ? model.type(spec.gguf_name) : model.small_type;
      out.push_back({spec.gguf_name, seeds, spec.shape, type});
      continue;
    }
    for (const std::string& name : seeds) out.push_back({name, {name}, {spec.shape[1], spec.shape[2]}, model.type(name)});
  }
  if (model.rope_factors) out.push_back({"rope_freqs.weight", {"rope_freqs"}, {model.hparams.n_rot / 2}, DType::F32});
  for (const auto& [name, shape] : model.extra) out.push_back({name, {name}, shape, DType::F32});
  std::erase_if(out, [&](const Planned& p) { return std::count(model.omit.begin(), model.omit.end(), p.name) > 0; });
  if (model.damage)
    for (Planned& p : out) model.damage(p.name, p.shape, p.type);
  return out;
}

std::vector<std::byte> payload(const RandomModel& model, const Planned& tensor) {
  uint64_t n = 1;
  for (const uint64_t d : tensor.shape) n *= d;
  const uint64_t cols = tensor.shape.back(), slice = n / tensor.seeds.size();
  const bool matrix = tensor.shape.size() > 1;
  std::vector<float> values(n);
  for (size_t s = 0; s < tensor.seeds.size(); ++s) {
    Noise noise(model.seed, tensor.seeds[s]);
    const double scale = matrix ? 2.0 / std::sqrt(static_cast<double>(cols)) : 0.2;
    for (size_t i = 0; i < slice; ++i)
      values[s * slice + i] = static_cast<float>(scale * noise.next() + (matrix ? 0.0 : 1.0));
  }
  const Format& format = format_of(tensor.type);
  std::vector<std::byte> bytes(row_bytes(format, n));
  format.encode_row(values.data(), bytes.data(), n, nullptr);
  return bytes;
}

}  // namespace

HParams tiny_hparams() {
  HParams h;
  h.name = "tiny";
  h.n_layer = 2;
  h.n_embd = 64;
  h.n_ff = 96;
  h.n_vocab = 97;
  h.n_ctx_train = 256;
  h.n_head = 4;
  h.n_head_kv = 2;
  h.head_dim = h.n_rot = 16;
  h.n_expert = 4;
  h.n_expert_used = 2;
  h.rope_freq_base = 10000.0f;
  return h;
}

HParams small_mixtral_hparams(uint32_t n_layer, uint32_t n_ff) {
  HParams h = tiny_hparams();
  h.n_layer = n_layer;
  h.n_embd = 256;
  h.n_ff = n_ff;
  h.head_dim = h.n_rot = 64;
  h.n_expert = 8;
  return h;
}

namespace {

// A folder of this process: tests that run at the same time may use the same names.
struct ProcessFolder {
  std::filesystem::path path = std::filesystem::path(DUET_TEST_DIR) / ("models-" + std::to_string(::getpid()));

  ProcessFolder() { std::filesystem::create_directories(path); }
  ~ProcessFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
};

}  // namespace

std::filesystem::path write_model(const RandomModel& model, const std::string& file_name) {
  static const ProcessFolder folder;
  const std::filesystem::path path = folder.path / file_name;
  const std::vector<Planned> tensors = plan(model);
  GgufWriter writer(path);
  for (GgufKeyValue& kv : hparams_metadata(model.hparams)) writer.set(kv.key, kv.value);
  for (const Planned& t : tensors) writer.add_tensor(t.name, format_of(t.type), t.shape);
  writer.begin();
  for (const Planned& t : tensors) writer.write(payload(model, t));
  writer.finish();
  return path;
}

}  // namespace duet::test
