// Adapters: merged by the converter and applied at run time, against sums made by hand.
#include <doctest/doctest.h>

#include <cmath>
#include <functional>

#include "converters/convert.h"
#include "formats/lora.h"
#include "runtime/engine.h"
#include "runtime/memory_plan.h"
#include "tests/support/close.h"
#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/hf_folder.h"
#include "tests/support/logits.h"

namespace duet {
namespace {

namespace fs = std::filesystem;
using test::HfFolder;
using test::HfForm;
using test::HfTensor;
using test::TempFolder;
using test::with_threads;

constexpr uint64_t kEmbd = 32, kFf = 64, kExperts = 4, kRank = 3;

HfTensor random_tensor(const std::string& name, std::vector<uint64_t> shape, test::Rng& rng) {
  HfTensor out{name, std::move(shape), {}};
  out.values.resize(out.shape[0] * out.shape[1]);
  for (float& v : out.values) v = std::round(rng.symmetric() * 16) / 32;  // exact in bfloat16
  return out;
}

// w += scale * b a, for rows [first, first + n) of w.
void add_product(float* w, const HfTensor& a, const HfTensor& b, double scale, uint64_t n_rows) {
  const uint64_t cols = a.shape[1], rank = a.shape[0];
  for (uint64_t row = 0; row < n_rows; ++row)
    for (uint64_t c = 0; c < cols; ++c) {
      double sum = 0;
      for (uint64_t r = 0; r < rank; ++r) sum += double{b.values[row * rank + r]} * double{a.values[r * cols + c]};
      w[row * cols + c] += static_cast<float>(scale * sum);
    }
}

struct Adapter {
  Json config = {{"peft_type", "LORA"}, {"r", kRank}, {"lora_alpha", 6}, {"use_rslora", false}, {"bias", "none"}, {"target_modules", {"q_proj"}}};
  std::vector<HfTensor> tensors;

  // A pair for a module, and what it makes of the matrix.
  void add(const std::string& module, uint64_t rows, uint64_t cols, test::Rng& rng) {
    tensors.push_back(random_tensor("base_model.model." + module + ".lora_A.weight", {kRank, cols}, rng));
    tensors.push_back(random_tensor("base_model.model." + module + ".lora_B.weight", {rows, kRank}, rng));
  }
  const HfTensor& a() const { return tensors[tensors.size() - 2]; }
  const HfTensor& b() const { return tensors.back(); }
  void write(const fs::path& folder) const {
    test::write_text(folder / "adapter_config.json", config.dump());
    test::write_text(folder / "adapter_model.safetensors", test::safetensors_bytes(tensors, true));
  }
};

bool is_adapted(const HfTensor& w) { return w.shape.size() == 2 && w.name != "model.embed_tokens.weight"; }

// An adapter for every kind of matrix, and the folder with it merged.
struct Case {
  HfFolder plain = test::tiny_hf_folder(), merged = plain;
  Adapter adapter;

  explicit Case(double scale) {
    plain.f32 = merged.f32 = true;
    test::Rng rng(11);
    for (HfTensor& w : merged.tensors) {
      if (!is_adapted(w)) continue;
      adapter.add(w.name.substr(0, w.name.rfind(".weight")), w.shape[0], w.shape[1], rng);
      add_product(w.values.data(), adapter.a(), adapter.b(), scale, w.shape[0]);
    }
  }
};

fs::path converted(const TempFolder& folder, const std::string& name, const HfFolder& model, const std::string& recipe, const std::vector<LoraChoice>& loras = {}) {
  if (!fs::exists(folder / name)) model.write(folder / name);
  ConvertOptions options;
  options.recipe = recipe;
  options.overwrite = true;
  options.loras = loras;
  const fs::path out = folder / (name + ".gguf");
  convert(folder / name, out, options);
  return out;
}

EngineOptions streamed(uint32_t n_slots, const std::vector<LoraChoice>& loras) {
  EngineOptions options = with_threads(2, loras);
  options.memory.slots = n_slots;
  return options;
}

EngineOptions scalar(const std::vector<LoraChoice>& loras) {
  EngineOptions options = with_threads(2, loras);
  options.isa = "scalar";
  return options;
}

std::vector<float> logits_of(const fs::path& file, const EngineOptions& options = with_threads(2), uint32_t n_batch = 8) {
  const Engine engine = Engine::open(file, options);
  Session session = engine.new_session({.n_ctx = 64, .n_batch = n_batch, .kv_type = KvType::f32});  // half precision would round small differences up
  std::vector<Token> ids;
  for (int i = 0; i < 12; ++i) ids.push_back(1 + i * 13 % 250);
  return test::all_logits(session, ids);
}

// Largest difference over the largest magnitude.
double distance(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(a.size() == b.size());
  double most = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    REQUIRE(std::isfinite(a[i]));
    most = std::max(most, std::fabs(double{a[i]} - double{b[i]}));
    size = std::max(size, std::fabs(double{a[i]}));
  }
  return most / size;
}

std::vector<float> values_of(const TensorView& tensor) {
  std::vector<float> out(tensor.n_elems());
  tensor.format->decode_row(tensor.data.data(), out.data(), out.size());
  return out;
}

void check_tensors(const fs::path& expected, const fs::path& got) {
  const GgufFile a = GgufFile::open(expected), b = GgufFile::open(got);
  for (const TensorView& tensor : a.tensors()) {
    CAPTURE(tensor.name);
    CHECK(distance(values_of(tensor), values_of(*b.find_tensor(tensor.name))) < 1e-6);
  }
}

TEST_CASE("lora: merged by the converter, applied at run time, and merged by hand agree") {
  const TempFolder folder;
  const Case c(6.0 / kRank);
  c.adapter.write(folder / "adapter");
  const std::vector<LoraChoice> loras = {{folder / "adapter", 1}};
  const fs::path plain = converted(folder, "plain", c.plain, "F32"), by_hand = converted(folder, "by-hand", c.merged, "F32"), merged = converted(folder, "merged", c.plain, "F32", loras);
  check_tensors(by_hand, merged);
  const std::vector<float> expected = logits_of(by_hand);
  CHECK(distance(expected, logits_of(merged)) < 1e-5);
  CHECK(distance(expected, logits_of(plain)) > 0.1);
  CHECK(distance(expected, logits_of(plain, with_threads(2, loras))) < 1e-4);
  CHECK(distance(expected, logits_of(plain, streamed(1, loras))) < 1e-4);  // experts streamed
  CHECK(distance(expected, logits_of(plain, scalar(loras))) < 1e-4);
}

TEST_CASE("lora: the square root of the rank, patterns, strength, several adapters, a GGUF file as source") {
  const TempFolder folder;
  Case c(2 * 6.0 / std::sqrt(double{kRank}));
  c.adapter.config["use_rslora"] = true;
  c.adapter.config["lora_alpha"] = 5;
  c.adapter.config["alpha_pattern"] = {{"layers\\.\\d+\\..*", 6}, {"lm_head", 6}};
  c.adapter.write(folder / "adapter");
  const fs::path by_hand = converted(folder, "by-hand", c.merged, "F32");
  check_tensors(by_hand, converted(folder, "merged", c.plain, "F32", {{folder / "adapter", 2}}));
  const fs::path plain = converted(folder, "plain", c.plain, "F32");
  ConvertOptions options;
  options.recipe = "F32";
  options.loras = {{folder / "adapter", 1.5}, {folder / "adapter", 0.5}};
  quantize(plain, folder / "quantized.gguf", options);
  check_tensors(by_hand, folder / "quantized.gguf");
  CHECK(distance(logits_of(by_hand), logits_of(plain, with_threads(2, options.loras))) < 1e-4);
}

// On weights that are multiplied as integers: nothing but the adapter's own products is added.
TEST_CASE("lora: applied to a quantized model") {
  const TempFolder folder;
  Case c(6.0 / kRank);
  for (HfTensor& w : c.plain.tensors)  // smaller ones: rounding is then not magnified from layer to layer
    for (float& v : w.values)
      if (is_adapted(w)) v *= 0.1f;
  c.adapter.write(folder / "adapter");
  const std::vector<LoraChoice> loras = {{folder / "adapter", 1}};
  const fs::path quantized = converted(folder, "plain", c.plain, "Q8_0");
  ConvertOptions options;
  options.recipe = "F32";
  quantize(quantized, folder / "floats.gguf", options);
  options.loras = loras;
  quantize(quantized, folder / "merged.gguf", options);
  // What 8-bit activations alone change.
  const double noise = distance(logits_of(folder / "floats.gguf"), logits_of(quantized));
  const std::vector<float> expected = logits_of(folder / "merged.gguf");
  CHECK(noise < 0.1);
  CHECK(distance(expected, logits_of(quantized, with_threads(2, loras))) < 2 * noise);
  CHECK(distance(expected, logits_of(quantized)) > 4 * noise);
  CHECK(logits_of(quantized, with_threads(1, loras)) == logits_of(quantized, with_threads(3, loras)));
  CHECK(logits_of(quantized, with_threads(2, loras)) == logits_of(quantized, streamed(0, loras)));
  for (const uint32_t n_batch : {1u, 3u, 12u}) CHECK(logits_of(quantized, with_threads(2, loras), n_batch) == logits_of(quantized, with_threads(2, loras)));
}

TEST_CASE("lora: the memory plan counts it with the dense weights, of whatever matrix it is") {
  const TempFolder folder;
  const Case c(1);
  c.adapter.write(folder / "adapter");
  const fs::path file = converted(folder, "plain", c.plain, "Q8_0");
  uint64_t n_bytes = 0;
  for (const HfTensor& tensor : c.adapter.tensors)
    if (tensor.name.find("block_sparse_moe.gate.") == std::string::npos) n_bytes += 4 * tensor.values.size();  // the router's is added to it
  const std::vector<LoraChoice> once = {{folder / "adapter", 1}}, twice = {{folder / "adapter", 1}, {folder / "adapter", 0.5}};
  const uint64_t plain = Engine::open(file, with_threads(1)).plan().dense_bytes;
  CHECK(n_bytes > 10'000);
  CHECK(Engine::open(file, with_threads(1, once)).plan().dense_bytes == plain + n_bytes);
  CHECK(Engine::open(file, with_threads(1, twice)).plan().dense_bytes == plain + 2 * n_bytes);
  CHECK(Engine::open(file, streamed(1, once)).plan().dense_bytes == plain + n_bytes);
}

// peft's ParamWrapper: row e * rank + r of A, column r * E + e of B; down outside, gate and up inside.
TEST_CASE("lora: fused experts of transformers 5") {
  const TempFolder folder;
  HfFolder plain = test::tiny_hf_folder(HfForm::fused), merged = plain;
  plain.f32 = merged.f32 = true;
  Adapter adapter;
  adapter.config["target_parameters"] = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"};
  test::Rng rng(5);
  for (int layer = 0; layer < 2; ++layer)
    for (const bool gate_up : {true, false}) {
      const uint64_t rows = gate_up ? 2 * kFf : kEmbd, cols = gate_up ? kEmbd : kFf;
      const std::string module = concat("base_model.model.model.layers.", layer, ".mlp.experts.", gate_up ? "base_layer." : "");
      const HfTensor a = random_tensor(module + "lora_A.weight", {kExperts * kRank, cols}, rng), b = random_tensor(module + "lora_B.weight", {rows, kExperts * kRank}, rng);
      HfTensor& w = merged.tensor(concat("model.layers.", layer, ".mlp.experts.", gate_up ? "gate_up_proj" : "down_proj"));
      for (uint64_t e = 0; e < kExperts; ++e)
        for (uint64_t row = 0; row < rows; ++row)
          for (uint64_t col = 0; col < cols; ++col)
            for (uint64_t r = 0; r < kRank; ++r)
              w.values[(e * rows + row) * cols + col] += 2 * b.values[row * kRank * kExperts + r * kExperts + e] * a.values[(e * kRank + r) * cols + col];
      adapter.tensors.push_back(a);
      adapter.tensors.push_back(b);
    }
  adapter.write(folder / "adapter");
  const std::vector<LoraChoice> loras = {{folder / "adapter", 1}};
  const fs::path by_hand = converted(folder, "by-hand", merged, "F32");
  check_tensors(by_hand, converted(folder, "merged", plain, "F32", loras));
  CHECK(distance(logits_of(by_hand), logits_of(converted(folder, "plain", plain, "F32"), with_threads(2, loras))) < 1e-4);
}

TEST_CASE("lora: what cannot be applied is refused by name") {
  const auto refused = [](const std::function<void(Adapter&)>& damage, ErrorKind kind, const char* words) {
    const TempFolder folder;
    Adapter adapter;
    test::Rng rng(1);
    adapter.add("model.layers.0.self_attn.q_proj", 32, kEmbd, rng);
    damage(adapter);
    adapter.write(folder / "adapter");
    const HfFolder model = test::tiny_hf_folder();
    model.write(folder / "hf");
    ConvertOptions options;
    options.recipe = "F32";
    convert(folder / "hf", folder / "plain.gguf", options);
    options.loras = {{folder / "adapter", 1}};
    test::check_thrown(test::thrown_by([&] { convert(folder / "hf", folder / "out.gguf", options); }), kind, words);
    test::check_thrown(test::thrown_by([&] { Engine::open(folder / "plain.gguf", with_threads(1, options.loras)); }), kind, words);
  };
  const auto add = [](Adapter& adapter, const char* name, std::vector<uint64_t> shape) {
    test::Rng rng(2);
    adapter.tensors.push_back(random_tensor(name, std::move(shape), rng));
  };
  const auto option = [](const char* key, Json value) { return [=](Adapter& adapter) { adapter.config[key] = value; }; };
  refused(option("use_dora", true), ErrorKind::unsupported, "'use_dora'");
  refused(option("bias", "all"), ErrorKind::unsupported, "'bias'");
  refused(option("peft_type", "IA3"), ErrorKind::unsupported, "IA3");
  for (const char* init : {"pissa", "pissa_niter_16", "olora", "corda"}) refused(option("init_lora_weights", init), ErrorKind::unsupported, "'init_lora_weights'");
  refused(option("layer_replication", Json::array({Json::array({0, 4}), Json::array({2, 6})})), ErrorKind::unsupported, "'layer_replication'");
  refused(option("lora_alpha", nullptr), ErrorKind::format, "lora_alpha");
  refused([&](Adapter& a) { add(a, "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", {1, 32}); }, ErrorKind::unsupported, "q_proj.lora_magnitude_vector");
  refused([&](Adapter& a) { add(a, "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", {3, 32}); }, ErrorKind::format, "only one of lora_A and lora_B");
  refused([](Adapter& a) { for (HfTensor& t : a.tensors) t.name = "base_model.model.model.layers.7.self_attn.q_proj" + t.name.substr(t.name.find(".lora_")); }, ErrorKind::unsupported, "'model.layers.7.self_attn.q_proj' is no matrix of this model");
  refused([](Adapter& a) { a.tensors[0].shape = {2, 48}; }, ErrorKind::format, "lora_A [2, 48]");
  refused([](Adapter& a) { a.tensors.clear(); }, ErrorKind::format, "the adapter is empty");
  const TempFolder folder;
  test::write_text(folder / "a/adapter_config.json", "{}");
  test::write_text(folder / "a/adapter_model.bin", "");
  test::check_thrown(test::thrown_by([&] { read_lora({folder / "a", 1}, HParams{}); }), ErrorKind::unsupported, "pickle");
  test::check_thrown(test::thrown_by([&] { read_lora({folder / "b", 1}, HParams{}); }), ErrorKind::io, "no such folder");
}

TEST_CASE("lora: FOLDER=STRENGTH") {
  CHECK(parse_lora("a/b").strength == 1);
  CHECK(parse_lora("a/b=0.25").strength == 0.25);
  CHECK(parse_lora("a/b=0.25").folder == "a/b");
  test::check_thrown(test::thrown_by([] { parse_lora("a=strong"); }), ErrorKind::usage, "FOLDER=NUMBER");
}

}  // namespace
}  // namespace duet
