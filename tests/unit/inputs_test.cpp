// Every form that a model comes in gives the file, and so the logits, of the plain Hugging Face folder.
#include <doctest/doctest.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <map>

#include "base/mapped_file.h"
#include "converters/convert.h"
#include "converters/repack.h"
#include "runtime/engine.h"
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

constexpr uint64_t kMaxBytes = 1 << 24;
constexpr size_t kEmbd = 32, kFf = 64, kExperts = 4, kLayers = 2;

fs::path converted(const TempFolder& folder, const std::string& name, const HfFolder& model, const std::string& recipe) {
  model.write(folder / name);
  ConvertOptions options;
  options.recipe = recipe;
  options.name = "one";
  const fs::path out = folder / (name + "-" + recipe + ".gguf");
  convert(folder / name, out, options);
  return out;
}

std::vector<float> logits_of(const fs::path& file) {
  const Engine engine = Engine::open(file, with_threads(1));
  Session session = engine.new_session({.n_ctx = 32});
  std::vector<float> out = test::all_logits(session, std::vector<Token>{1, 70, 71, 100, 259, 40});
  for (const float v : out) REQUIRE(std::isfinite(v));
  return out;
}

std::string bytes_of(const fs::path& path) { return read_file(path, kMaxBytes); }

// Both folders give one file.
void check_same(const HfFolder& plain, const HfFolder& other) {
  for (const char* recipe : {"F32", "BF16", "Q4_0"}) {
    CAPTURE(std::string(recipe));
    const TempFolder folder;
    const fs::path a = converted(folder, "plain", plain, recipe), b = converted(folder, "other", other, recipe);
    CHECK(logits_of(a) == logits_of(b));
    CHECK(bytes_of(a) == bytes_of(b));
  }
}

// ---- Mistral's own form -------------------------------------------------------------------------

// Half-split rotation pairs of each head -> interleaved ones.
HfTensor interleaved(HfTensor w, size_t n_head) {
  const size_t rows = w.shape[0], cols = w.shape[1], dim = rows / n_head;
  const std::vector<float> from = w.values;
  for (size_t row = 0; row < rows; ++row) {
    const size_t head = row / dim, i = row % dim;
    const size_t source = head * dim + (i % 2 == 0 ? i / 2 : dim / 2 + i / 2);
    std::copy_n(from.data() + source * cols, cols, w.values.data() + row * cols);
  }
  return w;
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  if (const size_t at = text.find(from); at != std::string::npos) text.replace(at, from.size(), to);
  return text;
}

std::string native_name(std::string name) {
  const std::pair<const char*, const char*> names[] = {
      {"model.layers.", "layers."}, {"model.embed_tokens", "tok_embeddings"}, {"model.norm", "norm"}, {"lm_head", "output"},
      {"self_attn.q_proj", "attention.wq"}, {"self_attn.k_proj", "attention.wk"}, {"self_attn.v_proj", "attention.wv"}, {"self_attn.o_proj", "attention.wo"},
      {"input_layernorm", "attention_norm"}, {"post_attention_layernorm", "ffn_norm"}, {"block_sparse_moe", "feed_forward"},
      {"mlp.gate_proj", "feed_forward.w1"}, {"mlp.down_proj", "feed_forward.w2"}, {"mlp.up_proj", "feed_forward.w3"}};
  for (const auto& [from, to] : names) name = replaced(name, from, to);
  return name;
}

HfFolder layout_a(HfForm form = HfForm::per_expert) {
  HfFolder out = test::tiny_hf_folder(form);
  for (HfTensor& tensor : out.tensors) {
    if (tensor.name.find("q_proj") != std::string::npos) tensor = interleaved(tensor, 4);
    if (tensor.name.find("k_proj") != std::string::npos) tensor = interleaved(tensor, 2);
    tensor.name = native_name(tensor.name);
  }
  out.config = {{"dim", kEmbd}, {"n_layers", kLayers}, {"head_dim", 8}, {"hidden_dim", kFf}, {"n_heads", 4}, {"n_kv_heads", 2}, {"norm_eps", 1e-5},
                {"vocab_size", -1}, {"rope_theta", 1e6}, {"max_seq_len", 512}};
  if (form != HfForm::dense) out.config["moe"] = {{"num_experts", kExperts}, {"num_experts_per_tok", 2}};
  out.config_name = "params.json";
  out.weights_name = "consolidated.safetensors";
  return out;
}

std::vector<float> transposed(const std::vector<float>& values, size_t rows, size_t cols) {
  std::vector<float> out(values.size());
  for (size_t r = 0; r < rows; ++r)
    for (size_t c = 0; c < cols; ++c) out[c * rows + r] = values[r * cols + c];
  return out;
}

// Stacked experts, w2 the other way round, and names of Hugging Face in params.json.
HfFolder layout_b(const char* ending) {
  HfFolder out = layout_a();
  for (size_t layer = 0; layer < kLayers; ++layer) {
    for (const char* matrix : {"w1", "w2", "w3"}) {
      HfTensor stacked{concat("layers.", layer, ".block_sparse_moe.", matrix, ending), {kExperts * kFf, kEmbd}, {}};
      for (size_t e = 0; e < kExperts; ++e) {
        const std::string name = concat("layers.", layer, ".feed_forward.experts.", e, ".", matrix, ".weight");
        std::vector<float> values = out.tensor(name).values;
        if (matrix[1] == '2') values = transposed(values, kEmbd, kFf);
        stacked.values.insert(stacked.values.end(), values.begin(), values.end());
        out.remove(name);
      }
      out.tensors.push_back(std::move(stacked));
    }
    HfTensor& gate = out.tensor(concat("layers.", layer, ".feed_forward.gate.weight"));
    gate.name = concat("layers.", layer, ".block_sparse_moe.gate.weight");
  }
  out.config = {{"hidden_size", kEmbd}, {"num_hidden_layers", kLayers}, {"intermediate_size", kFf}, {"num_attention_heads", 4}, {"num_key_value_heads", 2},
                {"rms_norm_eps", 1e-5}, {"vocab_size", 264}, {"rope_theta", 1e6}, {"max_position_embeddings", 512}, {"num_local_experts", kExperts}, {"num_experts_per_tok", 2}};
  return out;
}

TEST_CASE("inputs: Mistral's layout A") {
  check_same(test::tiny_hf_folder(), layout_a());
  check_same(test::tiny_hf_folder(HfForm::dense), layout_a(HfForm::dense));
}

TEST_CASE("inputs: a native folder that says nothing about its rope base has the one of Mistral's program") {
  const TempFolder folder;
  const auto base = [&](const char* name, const auto& change) {
    HfFolder native = layout_a(HfForm::dense);
    native.config.erase("rope_theta");
    change(native.config);
    return GgufFile::open(converted(folder, name, native, "BF16")).get_float("llama.rope.freq_base");
  };
  CHECK(base("plain", [](Json&) {}) == 1e6f);
  CHECK(base("window", [](Json& config) { config["sliding_window"] = 4096; }) == 1e4f);
}

TEST_CASE("inputs: Mistral's layout B, stacked experts with a transposed w2") {
  check_same(test::tiny_hf_folder(), layout_b(""));
  check_same(test::tiny_hf_folder(), layout_b(".weight"));
  HfFolder plain = test::tiny_hf_folder(), other = layout_b("");
  plain.f32 = other.f32 = true;
  check_same(plain, other);
}

TEST_CASE("inputs: several consolidated files; a tokenizer of version 3; both forms in one folder") {
  const TempFolder folder;
  const fs::path plain = converted(folder, "plain", test::tiny_hf_folder(), "BF16");
  HfFolder native = layout_a();
  native.write(folder / "native");
  fs::rename(folder / "native/tokenizer.model", folder / "native/tokenizer.model.v3");
  fs::remove(folder / "native/consolidated.safetensors");
  for (size_t i = 0; i < 2; ++i) {
    std::vector<HfTensor> part;
    for (size_t t = i; t < native.tensors.size(); t += 2) part.push_back(native.tensors[t]);
    test::write_text(folder / concat("native/consolidated.0", i, ".safetensors"), test::safetensors_bytes(part));
  }
  ConvertOptions options;
  options.recipe = "BF16";
  options.name = "one";
  convert(folder / "native", folder / "native.gguf", options);
  CHECK(bytes_of(plain) == bytes_of(folder / "native.gguf"));
  fs::copy(folder / "plain", folder / "native", fs::copy_options::recursive | fs::copy_options::overwrite_existing);  // both: Hugging Face's is taken
  convert(folder / "native", folder / "both.gguf", options);
  CHECK(bytes_of(plain) == bytes_of(folder / "both.gguf"));
}

TEST_CASE("inputs: native folders that cannot be converted are refused by name") {
  const auto refused = [](const std::function<void(HfFolder&)>& damage, const std::function<void(const fs::path&)>& then, ErrorKind kind, const char* words) {
    const TempFolder folder;
    HfFolder native = layout_a();
    damage(native);
    native.write(folder / "native");
    then(folder / "native");
    test::check_thrown(test::thrown_by([&] { convert(folder / "native", folder / "out.gguf", {}); }), kind, words);
    CHECK(!fs::exists(folder / "out.gguf"));
  };
  const auto nothing = [](const fs::path&) {};
  refused([](HfFolder& f) { f.weights_name = "consolidated.00.pt"; }, nothing, ErrorKind::unsupported, "consolidated.00.pt), which can run programs");
  refused([](HfFolder& f) { f.config["vision_encoder"] = {{"hidden_size", 1}}; }, nothing, ErrorKind::unsupported, "'vision_encoder'");
  refused([](HfFolder& f) { f.remove("layers.1.attention.wq.weight"); }, nothing, ErrorKind::format, "'layers.1.attention.wq.weight' is missing");
  refused([](HfFolder& f) { f.config.erase("n_layers"); }, nothing, ErrorKind::format, "num_hidden_layers");
  refused([](HfFolder&) {}, [](const fs::path& f) { fs::rename(f / "tokenizer.model", f / "tekken.json"); }, ErrorKind::unsupported, "tekken.json");
  refused([](HfFolder&) {}, [](const fs::path& f) { fs::copy_file(f / "consolidated.safetensors", f / "consolidated.1.safetensors"); }, ErrorKind::format, "two files hold tensor");
}

// ---- 8-bit floats -------------------------------------------------------------------------------

float float8(uint8_t bits) {
  const int exponent = bits >> 3 & 15;
  const double fraction = (bits & 7) / 8.0, magnitude = exponent == 0 ? fraction * std::pow(2.0, -6) : (1 + fraction) * std::pow(2.0, exponent - 7);
  return static_cast<float>(bits & 128 ? -magnitude : magnitude);
}

enum class Scales { tensor, row, column_of_rows, block };

// Replaces the values by random 8-bit floats times random scales and adds those to the folder of 8-bit ones.
void make_float8(HfTensor& plain, HfTensor& stored, std::vector<HfTensor>& more, Scales kind, size_t block, test::Rng& rng) {
  const size_t cols = plain.shape.back(), rows = plain.values.size() / cols, matrix_rows = plain.shape[plain.shape.size() - 2];
  const size_t down = kind == Scales::tensor ? 1 : kind == Scales::block ? (matrix_rows + block - 1) / block : matrix_rows;
  const size_t across = kind == Scales::block ? (cols + block - 1) / block : 1, n_matrices = rows / matrix_rows;
  HfTensor scales{plain.name + (kind == Scales::block ? "_scale_inv" : "_scale"), {}, {}};
  if (plain.shape.size() == 3) scales.shape.push_back(n_matrices);
  if (kind == Scales::tensor && plain.shape.size() == 2) scales.shape = {1};
  if (kind != Scales::tensor) scales.shape.push_back(down);
  if (kind == Scales::block) scales.shape.push_back(across);
  if (kind == Scales::column_of_rows) scales.shape.push_back(1);
  for (size_t i = 0; i < n_matrices * down * across; ++i) scales.values.push_back(std::exp2(std::round(rng.symmetric() * 3) - 6));
  for (size_t i = 0; i < plain.values.size(); ++i) {
    auto bits = static_cast<uint8_t>(static_cast<int>((rng.symmetric() + 1) * 127.9f));
    if ((bits & 0x7f) == 0x7f) bits = 0;
    stored.bytes += static_cast<char>(bits);
    const size_t row = i / cols, matrix = row / matrix_rows, r = row % matrix_rows;
    const size_t at = (matrix * down + (kind == Scales::tensor ? 0 : kind == Scales::block ? r / block : r)) * across + (kind == Scales::block ? i % cols / block : 0);
    plain.values[i] = float8(bits) * scales.values[at];
  }
  stored.dtype = "F8_E4M3";
  stored.values.clear();
  more.push_back(std::move(scales));
}

bool is_projection(const HfTensor& tensor) { return tensor.shape.size() > 1 && (tensor.name.find("proj") != std::string::npos || tensor.name.find("experts") != std::string::npos); }

void check_float8(HfForm form, Scales kind) {
  HfFolder plain = test::tiny_hf_folder(form), stored = plain;
  plain.f32 = stored.f32 = true;
  stored.config["quantization_config"] = {{"quant_method", "fp8"}};
  test::Rng rng(7);
  std::vector<HfTensor> more;
  for (size_t i = 0; i < plain.tensors.size(); ++i)
    if (is_projection(plain.tensors[i])) make_float8(plain.tensors[i], stored.tensors[i], more, kind, 128, rng);
  REQUIRE(more.size() > 10);
  stored.tensors.insert(stored.tensors.end(), more.begin(), more.end());
  stored.tensors.push_back({"model.layers.0.self_attn.q_proj.input_scale", {1}, {1}});
  check_same(plain, stored);
}

TEST_CASE("inputs: 8-bit floats with a scale per tensor, row or block") {
  for (const HfForm form : {HfForm::per_expert, HfForm::fused})
    for (const Scales kind : {Scales::tensor, Scales::row, Scales::column_of_rows, Scales::block}) check_float8(form, kind);
}

TEST_CASE("inputs: blocks of 128 x 128 scales, also cut ones") {
  const TempFolder folder;
  HfFolder plain = test::tiny_hf_folder(HfForm::dense), stored = plain;
  plain.config["intermediate_size"] = stored.config["intermediate_size"] = 300;
  plain.config["hidden_size"] = stored.config["hidden_size"] = 160;
  plain.config["head_dim"] = stored.config["head_dim"] = 8;
  test::Rng rng(3);
  std::vector<HfTensor> more;
  const std::pair<const char*, std::vector<uint64_t>> shapes[] = {{"q_proj", {32, 160}}, {"k_proj", {16, 160}}, {"v_proj", {16, 160}}, {"o_proj", {160, 32}}, {"gate_proj", {300, 160}},
                                                                  {"up_proj", {300, 160}}, {"down_proj", {160, 300}}, {"embed", {264, 160}}, {"lm_head", {264, 160}}, {"norm", {160}}};
  for (size_t i = 0; i < plain.tensors.size(); ++i) {
    HfTensor& w = plain.tensors[i];
    for (const auto& [part, shape] : shapes)
      if (w.name.find(part) != std::string::npos) w.shape = shape;
    uint64_t n = 1;
    for (const uint64_t d : w.shape) n *= d;
    w.values.resize(n);
    for (float& v : w.values) v = 0.25f * std::round(rng.symmetric() * 4);
    stored.tensors[i] = w;
    if (is_projection(w)) make_float8(w, stored.tensors[i], more, Scales::block, 128, rng);
  }
  stored.tensors.insert(stored.tensors.end(), more.begin(), more.end());
  plain.f32 = stored.f32 = true;
  CHECK(bytes_of(converted(folder, "plain", plain, "F32")) == bytes_of(converted(folder, "stored", stored, "F32")));
}

TEST_CASE("inputs: 8-bit floats without scales, with misfitting ones, and NaN are refused by name") {
  const auto refused = [](const std::function<void(HfFolder&, HfTensor&)>& damage, const char* words) {
    const TempFolder folder;
    HfFolder stored = test::tiny_hf_folder();
    HfTensor& w = stored.tensor("model.layers.0.self_attn.v_proj.weight");
    w.dtype = "F8_E4M3";
    w.bytes = std::string(w.values.size(), 8);
    damage(stored, w);
    stored.write(folder / "hf");
    test::check_thrown(test::thrown_by([&] { convert(folder / "hf", folder / "out.gguf", {}); }), ErrorKind::format, words);
  };
  refused([](HfFolder&, HfTensor&) {}, "'model.layers.0.self_attn.v_proj.weight_scale'");
  refused([](HfFolder& f, HfTensor& w) { f.tensors.push_back({w.name + "_scale", {5}, {1, 1, 1, 1, 1}}); }, "has 5 scales");
  refused([](HfFolder& f, HfTensor& w) {
    w.bytes[40] = 0x7f;
    f.tensors.push_back({w.name + "_scale", {1}, {1}});
  }, "v_proj.weight', row 1: a value is not finite");
}

// ---- the other forms ----------------------------------------------------------------------------

TEST_CASE("inputs: fused names of transformers 5 give the logits of one tensor per expert") { check_same(test::tiny_hf_folder(), test::tiny_hf_folder(HfForm::fused)); }

TEST_CASE("inputs: rope_parameters of transformers 5 and shards") {
  HfFolder other = test::tiny_hf_folder();
  other.config.erase("rope_theta");
  other.config["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 1e6}};
  other.n_shards = 4;
  check_same(test::tiny_hf_folder(), other);
}

TEST_CASE("inputs: tied embeddings give the logits of a head that is a copy of them") {
  const TempFolder folder;
  HfFolder plain = test::tiny_hf_folder(), tied = plain;
  plain.tensor("lm_head.weight").values = plain.tensor("model.embed_tokens.weight").values;
  tied.remove("lm_head.weight");
  tied.config["tie_word_embeddings"] = true;
  CHECK(logits_of(converted(folder, "plain", plain, "F32")) == logits_of(converted(folder, "tied", tied, "F32")));
}

TEST_CASE("inputs: added tokens of a fine-tune with two more rows") {
  const TempFolder folder;
  HfFolder plain = test::tiny_hf_folder(), tuned = plain;
  tuned.config["vocab_size"] = 266;
  for (const char* name : {"model.embed_tokens.weight", "lm_head.weight"}) {
    HfTensor& w = tuned.tensor(name);
    w.shape[0] = 266;
    w.values.resize(266 * kEmbd, 0.5f);
  }
  tuned.files.emplace_back("added_tokens.json", R"({"<|im_end|>": 264, "<|im_start|>": 265})");
  const fs::path file = converted(folder, "tuned", tuned, "F32");
  const std::vector<float> a = logits_of(converted(folder, "plain", plain, "F32")), b = logits_of(file);
  for (size_t i = 0; i < a.size(); ++i) REQUIRE(a[i] == b[i / 264 * 266 + i % 264]);
  CHECK((*GgufFile::open(file).get_strings("tokenizer.ggml.tokens"))[265] == "<|im_start|>");
}

TEST_CASE("inputs: only tokenizer.json") {
  const TempFolder folder;
  HfFolder plain = test::tiny_hf_folder(), json = plain;
  Json vocab = Json::object();
  Json added = Json::array();
  const char* kHex = "0123456789ABCDEF";
  const char* special[] = {"<unk>", "<s>", "</s>"};
  for (size_t i = 0; i < 3; ++i) {
    vocab[special[i]] = i;
    added.push_back({{"id", i}, {"content", special[i]}, {"special", true}});
  }
  for (size_t b = 0; b < 256; ++b) vocab[std::string("<0x") + kHex[b / 16] + kHex[b % 16] + ">"] = b + 3;
  const char* pieces[] = {"a", "b", "ab"};
  for (size_t i = 0; i < 3; ++i) vocab[pieces[i]] = 259 + i;
  json.tokenizer_model.clear();
  json.files.emplace_back("tokenizer.json", Json{{"added_tokens", added},
                                                 {"normalizer", {{"type", "Sequence"}, {"normalizers", {{{"type", "Prepend"}, {"prepend", "▁"}}, {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}}}}}},
                                                 {"model", {{"type", "BPE"}, {"byte_fallback", true}, {"unk_token", "<unk>"}, {"fuse_unk", true}, {"vocab", vocab}, {"merges", {"a b"}}}}}
                                                .dump());
  const fs::path a = converted(folder, "plain", plain, "F32"), b = converted(folder, "json", json, "F32");
  CHECK(logits_of(a) == logits_of(b));
  const Engine from = Engine::open(a, with_threads(1)), to = Engine::open(b, with_threads(1));
  const Segment text{"abba cab"};
  CHECK(from.tokenizer().encode({&text, 1}, true) == to.tokenizer().encode({&text, 1}, true));
}

TEST_CASE("inputs: parts of a split file, joined again, and merged experts give the same logits") {
  const TempFolder folder;
  const fs::path whole = converted(folder, "plain", test::tiny_hf_folder(), "Q4_0");
  ConvertOptions options;
  options.split_max_bytes = 20000;
  repack(whole, folder / "cut.gguf", options);
  size_t n = 0;
  for (const auto& entry : fs::directory_iterator(folder.path())) n += entry.path().filename().string().starts_with("cut-");
  REQUIRE(n > 2);
  merge_parts(part_path(folder / "cut.gguf", 1, n), folder / "joined.gguf", {});
  CHECK(logits_of(whole) == logits_of(part_path(folder / "cut.gguf", 0, n)));
  CHECK(logits_of(whole) == logits_of(folder / "joined.gguf"));
}

TEST_CASE("inputs: a set cut off keeps the old one, and goes on only with the same options") {
  const TempFolder folder;
  const fs::path whole = converted(folder, "plain", test::tiny_hf_folder(), "Q4_0"), out = folder / "cut.gguf";
  const auto files = [&] {
    std::map<std::string, std::string> found;
    for (const auto& entry : fs::directory_iterator(folder.path()))
      if (entry.path().filename().string().starts_with("cut")) found[entry.path().filename().string()] = bytes_of(entry.path());
    return found;
  };
  ConvertOptions options;
  options.split_max_bytes = 20000;
  repack(whole, out, options);
  const auto set = files();
  REQUIRE(set.size() > 2);
  std::atomic<bool> cancel = false;
  ConvertOptions cut_off = options;
  cut_off.overwrite = true;
  cut_off.cancel = &cancel;
  cut_off.progress = [&](const ConvertProgress& p) { cancel = p.done_bytes == p.total_bytes; };
  const auto run = [&](const ConvertOptions& as) { return test::thrown_by([&] { repack(whole, out, as); }); };
  test::check_thrown(run(cut_off), ErrorKind::cancelled, "");
  CHECK(files() == set);
  cancel = false;
  test::check_thrown(test::thrown_by([&] { repack(part_path(out, 0, set.size()), out, cut_off); }), ErrorKind::cancelled, "");
  CHECK(files() == set);  // though it was the source
  cut_off.resume = true;
  cancel = false;
  test::check_thrown(run(cut_off), ErrorKind::cancelled, "");
  const auto unfinished = files();
  CHECK(unfinished.size() == 3 * set.size());
  for (const auto& [name, bytes] : set) CHECK(unfinished.at(name) == bytes);
  // Another number of files, and one.
  for (const uint64_t split : {uint64_t{40000}, uint64_t{0}}) {
    ConvertOptions other = options;
    other.resume = true;
    other.split_max_bytes = split;
    test::check_thrown(run(other), ErrorKind::usage, "was begun with other options");
    CHECK(files() == unfinished);
  }
  ConvertOptions again = options;
  again.resume = again.overwrite = true;
  repack(whole, out, again);
  CHECK(files() == set);
  // Begun anew in one file: of the unfinished set nothing is left.
  cancel = false;
  test::check_thrown(run(cut_off), ErrorKind::cancelled, "");
  ConvertOptions one;
  one.overwrite = true;
  repack(whole, out, one);
  CHECK(files().size() == set.size() + 1);
}

TEST_CASE("inputs: a folder of pickles is refused with the safe way to go on") {
  const TempFolder folder;
  HfFolder model = test::tiny_hf_folder();
  model.weights_name = "pytorch_model.bin";
  model.write(folder / "hf");
  test::check_thrown(test::thrown_by([&] { convert(folder / "hf", folder / "out.gguf", {}); }), ErrorKind::unsupported, "torch.load(FILE, weights_only=True)");
  test::check_thrown(test::thrown_by([&] { convert(folder / "hf/pytorch_model.bin", folder / "out.gguf", {}); }), ErrorKind::unsupported, "a PyTorch pickle");
}

}  // namespace
}  // namespace duet
