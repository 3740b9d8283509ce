// Conversion of hand-made Hugging Face folders and of GGUF files.
#include "converters/convert.h"

#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <fstream>
#include <limits>

#include "base/mapped_file.h"
#include "converters/quantize.h"
#include "converters/source.h"
#include "quant/f16.h"
#include "tests/support/errors.h"
#include "tests/support/hf_folder.h"
#include "tests/support/skip.h"
#include "tests/support/tiny_model.h"

namespace duet {
namespace {

namespace fs = std::filesystem;
using test::HfForm;
using test::TempFolder;

ConvertOptions with_recipe(const std::string& recipe) {
  ConvertOptions options;
  options.recipe = recipe;
  options.n_threads = 2;
  return options;
}

GgufFile converted(const TempFolder& folder, const test::HfFolder& model,
                   const ConvertOptions& options) {
  model.write(folder / "hf");
  convert(folder / "hf", folder / "out.gguf", options);
  return GgufFile::open(folder / "out.gguf");
}

std::vector<float> values_of(const TensorView& tensor) {
  std::vector<float> out(tensor.n_elems());
  tensor.format->decode_row(tensor.data.data(), out.data(), out.size());
  return out;
}

const TensorView& tensor_of(const GgufFile& file, const std::string& name) {
  const TensorView* tensor = file.find_tensor(name);
  REQUIRE_MESSAGE(tensor != nullptr, name);
  return *tensor;
}

// reshape(n_head, 2, head_dim / 2, cols).swapaxes(1, 2), spelled out.
std::vector<float> rope_permuted(const test::HfTensor& w, size_t n_head) {
  const size_t rows = w.shape[0], cols = w.shape[1], half = rows / n_head / 2;
  std::vector<float> out;
  for (size_t head = 0; head < n_head; ++head)
    for (size_t i = 0; i < half; ++i)
      for (size_t part = 0; part < 2; ++part) {
        const float* row = w.values.data() + ((head * 2 + part) * half + i) * cols;
        out.insert(out.end(), row, row + cols);
      }
  return out;
}

std::string hf_layer(size_t layer, const char* rest) {
  return concat("model.layers.", layer, ".", rest, ".weight");
}
std::string gguf_layer(size_t layer, const char* rest) {
  return concat("blk.", layer, ".", rest, ".weight");
}

void check_attention(const GgufFile& file, test::HfFolder& hf, size_t layer) {
  const auto same = [&](const char* gguf, const char* name) {
    CHECK(values_of(tensor_of(file, gguf_layer(layer, gguf))) ==
          hf.tensor(hf_layer(layer, name)).values);
  };
  same("attn_norm", "input_layernorm");
  same("attn_v", "self_attn.v_proj");
  same("attn_output", "self_attn.o_proj");
  same("ffn_norm", "post_attention_layernorm");
  CHECK(values_of(tensor_of(file, gguf_layer(layer, "attn_q"))) ==
        rope_permuted(hf.tensor(hf_layer(layer, "self_attn.q_proj")), 4));
  CHECK(values_of(tensor_of(file, gguf_layer(layer, "attn_k"))) ==
        rope_permuted(hf.tensor(hf_layer(layer, "self_attn.k_proj")), 2));
}

// w1 = gate, w2 = down, w3 = up, stacked by expert.
void check_experts(const GgufFile& file, test::HfFolder& hf, size_t layer) {
  const std::pair<const char*, const char*> matrices[] = {
      {"ffn_gate_exps", "w1"}, {"ffn_down_exps", "w2"}, {"ffn_up_exps", "w3"}};
  for (const auto& [gguf, letter] : matrices) {
    std::vector<float> stacked;
    for (size_t e = 0; e < 4; ++e) {
      const auto& values = hf.tensor(concat("model.layers.", layer, ".block_sparse_moe.experts.", e,
                                            ".", letter, ".weight"))
                               .values;
      stacked.insert(stacked.end(), values.begin(), values.end());
    }
    CHECK(values_of(tensor_of(file, gguf_layer(layer, gguf))) == stacked);
  }
  CHECK(values_of(tensor_of(file, gguf_layer(layer, "ffn_gate_inp"))) ==
        hf.tensor(hf_layer(layer, "block_sparse_moe.gate")).values);
}

TEST_CASE("3f-1 rope layout: q and k rows are interleaved, every tensor lands where it belongs") {
  TempFolder folder;
  test::HfFolder hf = test::tiny_hf_folder();
  hf.n_shards = 3;
  const GgufFile file = converted(folder, hf, with_recipe("F32"));
  CHECK(file.tensors().size() == 3 + 2 * 10);
  for (size_t layer = 0; layer < 2; ++layer) {
    check_attention(file, hf, layer);
    check_experts(file, hf, layer);
  }
  CHECK(values_of(tensor_of(file, "token_embd.weight")) ==
        hf.tensor("model.embed_tokens.weight").values);
  CHECK(values_of(tensor_of(file, "output.weight")) == hf.tensor("lm_head.weight").values);
  CHECK(values_of(tensor_of(file, "output_norm.weight")) == hf.tensor("model.norm.weight").values);
  CHECK(*file.get_string("general.architecture") == "llama");
  CHECK(*file.get_string("general.name") == "hf");
  CHECK(file.get_uint("general.file_type") == 0);
  CHECK(file.get_uint("general.quantization_version") == 2);
  CHECK(file.get_uint("llama.expert_count") == 4);
  CHECK(file.get_float("llama.rope.freq_base") == doctest::Approx(1e6));
}

TEST_CASE("convert: fused expert tensors give the same file as one tensor per expert") {
  TempFolder a, b;
  test::HfFolder fused = test::tiny_hf_folder(HfForm::fused);
  converted(a, test::tiny_hf_folder(), with_recipe("BF16"));
  converted(b, fused, with_recipe("BF16"));
  CHECK(read_file(a / "out.gguf", 1 << 22) == read_file(b / "out.gguf", 1 << 22));
}

TEST_CASE("convert: a dense folder") {
  TempFolder folder;
  test::HfFolder hf = test::tiny_hf_folder(HfForm::dense);
  const GgufFile file = converted(folder, hf, with_recipe("F32"));
  CHECK(file.find("llama.expert_count") == nullptr);
  for (size_t layer = 0; layer < 2; ++layer) {
    check_attention(file, hf, layer);
    CHECK(values_of(tensor_of(file, gguf_layer(layer, "ffn_gate"))) ==
          hf.tensor(hf_layer(layer, "mlp.gate_proj")).values);
    CHECK(values_of(tensor_of(file, gguf_layer(layer, "ffn_up"))) ==
          hf.tensor(hf_layer(layer, "mlp.up_proj")).values);
    CHECK(values_of(tensor_of(file, gguf_layer(layer, "ffn_down"))) ==
          hf.tensor(hf_layer(layer, "mlp.down_proj")).values);
  }
}

TEST_CASE("convert: BF16 to BF16 is a copy, norms and router are F32 in every recipe") {
  TempFolder folder;
  test::HfFolder hf = test::tiny_hf_folder();
  const GgufFile file = converted(folder, hf, with_recipe("BF16"));
  check_experts(file, hf, 1);  // bfloat16 values survive exactly
  CHECK(tensor_of(file, "blk.0.attn_v.weight").format->dtype == DType::BF16);
  CHECK(tensor_of(file, "blk.0.ffn_gate_inp.weight").format->dtype == DType::F32);
  CHECK(tensor_of(file, "blk.0.attn_norm.weight").format->dtype == DType::F32);
}

TEST_CASE("convert: F16 rounds each value, quantized recipes follow the table of types") {
  TempFolder a, b;
  test::HfFolder hf = test::tiny_hf_folder();
  hf.f32 = true;
  const GgufFile half = converted(a, hf, with_recipe("F16"));
  std::vector<float> expected = hf.tensor("lm_head.weight").values;
  for (float& v : expected) v = f16_to_f32(f32_to_f16(v));
  CHECK(values_of(tensor_of(half, "output.weight")) == expected);
  const GgufFile q8 = converted(b, hf, with_recipe("Q8_0"));
  CHECK(q8.get_uint("general.file_type") == 7);
  const std::vector<float> decoded = values_of(tensor_of(q8, "blk.0.ffn_up_exps.weight"));
  const auto& source = hf.tensor("model.layers.0.block_sparse_moe.experts.0.w3.weight").values;
  for (size_t i = 0; i < source.size(); ++i) CHECK(std::abs(decoded[i] - source[i]) < 0.006f);
}

TEST_CASE("convert: the plan is what is written, on any number of threads") {
  TempFolder folder;
  test::tiny_hf_folder().write(folder / "hf");
  ConvertOptions options = with_recipe("Q4_K_M");
  const ConvertPlan plan = plan_convert(folder / "hf", options);
  convert(folder / "hf", folder / "two.gguf", options);
  options.n_threads = 1;
  convert(folder / "hf", folder / "one.gguf", options);
  CHECK(read_file(folder / "one.gguf", 1 << 22) == read_file(folder / "two.gguf", 1 << 22));
  const GgufFile file = GgufFile::open(folder / "one.gguf");
  REQUIRE(file.tensors().size() == plan.tensors.size());
  uint64_t bytes = 0;
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    CHECK(file.tensors()[i].name == plan.tensors[i].name);
    CHECK(file.tensors()[i].format == plan.tensors[i].format);
    CHECK(file.tensors()[i].shape == plan.tensors[i].shape);
    CHECK(file.tensors()[i].data.size() == plan.tensors[i].n_bytes);
    bytes += plan.tensors[i].n_bytes;
  }
  CHECK(plan.output_bytes == bytes);
}

TEST_CASE("convert: tied embeddings leave output.weight out, also when lm_head is in the folder") {
  TempFolder folder;
  test::HfFolder hf = test::tiny_hf_folder();
  hf.config["tie_word_embeddings"] = true;
  const GgufFile file = converted(folder, hf, with_recipe("F32"));
  CHECK(file.find_tensor("output.weight") == nullptr);
  CHECK(file.find_tensor("token_embd.weight") != nullptr);
}

TEST_CASE("convert: known extras are ignored") {
  TempFolder folder;
  test::HfFolder hf = test::tiny_hf_folder();
  hf.tensors.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", {4}, {1, 1, 1, 1}});
  CHECK(converted(folder, hf, with_recipe("F32")).find_tensor("output.weight") != nullptr);
}

TEST_CASE("convert: Llama-3 rope scaling becomes rope_freqs.weight") {
  TempFolder folder;
  test::HfFolder hf = test::tiny_hf_folder(HfForm::dense);
  hf.config["rope_theta"] = 10000.0;
  hf.config["rope_scaling"] = {{"rope_type", "llama3"},
                               {"factor", 8.0},
                               {"low_freq_factor", 1.0},
                               {"high_freq_factor", 4.0},
                               {"original_max_position_embeddings", 256}};
  const std::vector<float> factors =
      values_of(tensor_of(converted(folder, hf, with_recipe("F32")), "rope_freqs.weight"));
  REQUIRE(factors.size() == 4);
  // Wavelengths 6.28, 62.8, 628, 6283 against the bounds 256 / 4 and 256 / 1.
  CHECK(factors[0] == 1.0f);
  CHECK(factors[1] == 1.0f);
  CHECK(factors[2] == 8.0f);
  CHECK(factors[3] == 8.0f);
}

TEST_CASE("convert: --vocab-only needs no weights") {
  TempFolder folder;
  test::tiny_hf_folder().write(folder / "hf");
  fs::remove(folder / "hf/model.safetensors");
  ConvertOptions options;
  options.vocab_only = true;
  options.name = "words";
  convert(folder / "hf", folder / "vocab.gguf", options);
  const GgufFile file = GgufFile::open(folder / "vocab.gguf");
  CHECK(file.tensors().empty());
  CHECK(file.get_strings("tokenizer.ggml.tokens")->size() == 264);
  CHECK(*file.get_string("general.name") == "words");
  CHECK(plan_convert(folder / "hf", options).tensors.empty());
}

// ---- broken folders
// --------------------------------------------------------------------------------

struct BrokenFolder {
  const char* name;
  void (*damage)(test::HfFolder&);
  ErrorKind kind;
  const char* message;
};

const BrokenFolder kBrokenFolders[] = {
    {"missing tensor", [](auto& f) { f.remove("model.layers.1.self_attn.v_proj.weight"); },
     ErrorKind::format, "'model.layers.1.self_attn.v_proj.weight' is missing"},
    {"missing expert",
     [](auto& f) { f.remove("model.layers.1.block_sparse_moe.experts.3.w2.weight"); },
     ErrorKind::format, "'model.layers.1.block_sparse_moe.experts.3.w2.weight' is missing"},
    {"missing head", [](auto& f) { f.remove("lm_head.weight"); }, ErrorKind::format,
     "'lm_head.weight' is missing"},
    {"wrong shape",
     [](auto& f) {
       std::swap(f.tensor("lm_head.weight").shape[0], f.tensor("lm_head.weight").shape[1]);
     },
     ErrorKind::format, "'lm_head.weight': shape [32, 264], config.json asks for [264, 32]"},
    {"flat matrix", [](auto& f) { f.tensor("lm_head.weight").shape = {264 * 32}; },
     ErrorKind::format, "shape [8448]"},
    {"extra tensor",
     [](auto& f) {
       f.tensors.push_back({"model.layers.2.mystery.weight", {2}, {1, 1}});
     },
     ErrorKind::format, "'model.layers.2.mystery.weight' [2] belongs to no part"},
    {"more layers than config", [](auto& f) { f.config["num_hidden_layers"] = 1; },
     ErrorKind::format, "belongs to no part"},
    {"NaN",
     [](auto& f) {
       f.tensor("model.layers.0.self_attn.o_proj.weight").values[70] =
           std::numeric_limits<float>::quiet_NaN();
     },
     ErrorKind::format, "'model.layers.0.self_attn.o_proj.weight', row 2: a value is not finite"},
    {"infinity in an expert",
     [](auto& f) {
       f.tensor("model.layers.1.block_sparse_moe.experts.2.w1.weight").values[0] =
           std::numeric_limits<float>::infinity();
     },
     ErrorKind::format, "experts.2.w1.weight', row 0"},
    {"no tokenizer", [](auto& f) { f.tokenizer_model.clear(); }, ErrorKind::format, "no tokenizer"},
    {"vocabulary too large", [](auto& f) { f.config["vocab_size"] = 200; }, ErrorKind::format,
     "262 tokens, config.json says vocab_size 200"},
    {"unknown architecture",
     [](auto& f) {
       f.config["model_type"] = "gpt_neox";
       f.config["architectures"] = {"GPTNeoXForCausalLM"};
     },
     ErrorKind::unsupported, "GPTNeoX"},
    {"config without layers", [](auto& f) { f.config.erase("num_hidden_layers"); },
     ErrorKind::format, "num_hidden_layers"},
    {"damaged tokenizer", [](auto& f) { f.tokenizer_model.resize(100); }, ErrorKind::format,
     "tokenizer.model"},
};

TEST_CASE("convert: values too large for a type, or not finite where types are chosen for a size, are refused") {
  const auto thrown = [](float value, const ConvertOptions& options) {
    TempFolder folder;
    test::HfFolder source = test::tiny_hf_folder();
    source.f32 = true;
    for (float& v : source.tensor("model.layers.0.self_attn.o_proj.weight").values) v = value;
    source.write(folder / "hf");
    const auto error = test::thrown_by([&] { convert(folder / "hf", folder / "out.gguf", options); });
    CHECK(fs::exists(folder / "out.gguf") == error.message.empty());
    return error;
  };
  ConvertOptions options;
  options.recipe = "F16";
  test::check_thrown(thrown(1e5f, options), ErrorKind::format, "row 0: a value is too large for F16");
  options.recipe = "BF16";
  CHECK(thrown(1e5f, options).message.empty());
  ConvertOptions of_size;
  of_size.target_bpw = 12;
  test::check_thrown(thrown(std::numeric_limits<float>::infinity(), of_size), ErrorKind::format, "not finite");
}

TEST_CASE("convert: broken folders are refused by name, nothing is left behind") {
  for (const BrokenFolder& broken : kBrokenFolders) {
    CAPTURE(std::string(broken.name));
    TempFolder folder;
    test::HfFolder hf = test::tiny_hf_folder();
    broken.damage(hf);
    hf.write(folder / "hf");
    fs::create_directory(folder / "out");
    for (const char* recipe : {"BF16", "Q4_K_M"}) {
      const auto thrown = test::thrown_by(
          [&] { convert(folder / "hf", folder / "out/model.gguf", with_recipe(recipe)); });
      test::check_thrown(thrown, broken.kind, broken.message);
      CHECK(fs::is_empty(folder / "out"));
    }
  }
}

TEST_CASE("convert: missing files are named") {
  TempFolder folder;
  test::HfFolder hf = test::tiny_hf_folder();
  hf.n_shards = 2;
  hf.write(folder / "hf");
  const auto attempt = [&](const fs::path& from) {
    return test::thrown_by([&] { convert(from, folder / "o.gguf", with_recipe("BF16")); });
  };
  test::check_thrown(attempt(folder / "nowhere"), ErrorKind::io, "no such folder");
  test::check_thrown(attempt(folder / "hf/config.json"), ErrorKind::io,
                     "is a file, expected a folder");
  fs::remove(folder / "hf/model-00002-of-00002.safetensors");
  test::check_thrown(attempt(folder / "hf"), ErrorKind::io, "model-00002-of-00002.safetensors");
  fs::remove(folder / "hf/config.json");
  test::check_thrown(attempt(folder / "hf"), ErrorKind::io, "no config.json");
  test::write_text(folder / "hf/params.json", "{}");
  test::check_thrown(attempt(folder / "hf"), ErrorKind::io, "no consolidated*.safetensors");
}

TEST_CASE("convert: an existing output is kept unless it may be replaced") {
  TempFolder folder;
  test::tiny_hf_folder().write(folder / "hf");
  test::write_text(folder / "out.gguf", "precious");
  ConvertOptions options = with_recipe("BF16");
  test::check_thrown(test::thrown_by([&] { convert(folder / "hf", folder / "out.gguf", options); }),
                     ErrorKind::io, "--force");
  CHECK(read_file(folder / "out.gguf", 100) == "precious");
  options.overwrite = true;
  convert(folder / "hf", folder / "out.gguf", options);
  CHECK(GgufFile::open(folder / "out.gguf").tensors().size() == 23);
}

TEST_CASE("convert: a read-only folder is Error(io)") {
  if (::geteuid() == 0) DUET_SKIP("root writes to read-only folders");
  TempFolder folder;
  test::tiny_hf_folder().write(folder / "hf");
  fs::create_directory(folder / "locked");
  ::chmod((folder / "locked").c_str(), 0500);
  test::check_thrown(test::thrown_by([&] {
                       convert(folder / "hf", folder / "locked/o.gguf", with_recipe("BF16"));
                     }),
                     ErrorKind::io, "cannot write");
  ::chmod((folder / "locked").c_str(), 0700);
}

TEST_CASE("convert: a full disk is Error(io)") {
  std::error_code no_device;
  if (!fs::exists("/dev/full", no_device)) DUET_SKIP("no /dev/full");
  TempFolder folder;
  test::tiny_hf_folder().write(folder / "hf");
  test::check_thrown(
      test::thrown_by([&] { convert(folder / "hf", "/dev/full/o.gguf", with_recipe("BF16")); }),
      ErrorKind::io, "/dev/full");
  test::check_thrown(
      test::thrown_by(
          [&] { convert(folder / "hf", folder / "no/such/folder/o.gguf", with_recipe("BF16")); }),
      ErrorKind::io, "cannot write");
}

TEST_CASE("convert: a raised cancel flag leaves nothing behind") {
  TempFolder folder;
  test::tiny_hf_folder().write(folder / "hf");
  fs::create_directory(folder / "out");
  std::atomic<bool> cancel{false};
  ConvertOptions options = with_recipe("Q8_0");
  options.cancel = &cancel;
  size_t n_calls = 0;
  options.progress = [&](const ConvertProgress& p) {
    if (++n_calls == 5) cancel = true;
    CHECK(p.done_bytes <= p.total_bytes);
    CHECK(p.n_tensors == 23);
  };
  test::check_thrown(
      test::thrown_by([&] { convert(folder / "hf", folder / "out/o.gguf", options); }),
      ErrorKind::cancelled, "interrupted");
  CHECK(n_calls == 5);
  CHECK(fs::is_empty(folder / "out"));
}

TEST_CASE("convert: progress reaches the total and names every tensor once in order") {
  TempFolder folder;
  test::tiny_hf_folder().write(folder / "hf");
  ConvertOptions options = with_recipe("BF16");
  ConvertProgress last;
  std::vector<std::string> names;
  options.progress = [&](const ConvertProgress& p) {
    CHECK(p.done_bytes > last.done_bytes);
    if (names.empty() || names.back() != p.tensor) names.push_back(p.tensor);
    last = p;
  };
  convert(folder / "hf", folder / "o.gguf", options);
  CHECK(last.done_bytes == last.total_bytes);
  CHECK(last.tensor_index == 22);
  CHECK(names.size() == 23);
}

// ---- GGUF -> GGUF
// ----------------------------------------------------------------------------------

// A 2-layer model, 256 wide so that the K formats fit.
test::TinyModelOptions wide_model(DType type, bool split_experts) {
  test::TinyModelOptions options;
  options.n_embd = 256;
  options.n_ff = 256;
  options.n_expert = 8;
  options.type = type;
  options.split_experts = split_experts;
  return options;
}

TEST_CASE("quantize: the old per-expert layout is merged, values and metadata are kept") {
  TempFolder folder;
  test::GgufBuilder builder = test::tiny_model(wide_model(DType::Q8_0, true));
  builder.text("custom.note", "kept").u32("general.file_type", 99).u32("general.alignment", 32);
  test::write_bytes(folder / "old.gguf", builder.build());
  quantize(folder / "old.gguf", folder / "new.gguf", with_recipe("F32"));
  const GgufFile old_file = GgufFile::open(folder / "old.gguf"),
                 new_file = GgufFile::open(folder / "new.gguf");
  std::vector<float> stacked;
  for (int e = 0; e < 8; ++e) {
    const auto values = values_of(tensor_of(old_file, concat("blk.1.ffn_down.", e, ".weight")));
    stacked.insert(stacked.end(), values.begin(), values.end());
  }
  const TensorView& merged = tensor_of(new_file, "blk.1.ffn_down_exps.weight");
  CHECK(merged.shape == std::vector<uint64_t>{8, 256, 256});
  CHECK(values_of(merged) == stacked);
  CHECK(new_file.find_tensor("blk.1.ffn_down.0.weight") == nullptr);
  CHECK(*new_file.get_string("custom.note") == "kept");
  CHECK(new_file.get_uint("general.file_type") == 0);
  CHECK(*new_file.get_strings("tokenizer.ggml.tokens") ==
        *old_file.get_strings("tokenizer.ggml.tokens"));
}

TEST_CASE("quantize: tensors that keep their type are copied bit for bit") {
  TempFolder folder;
  test::write_tiny_model(folder / "in.gguf", wide_model(DType::Q4_K, false));
  quantize(folder / "in.gguf", folder / "out.gguf", with_recipe("Q4_K_S"));
  const GgufFile in = GgufFile::open(folder / "in.gguf"), out = GgufFile::open(folder / "out.gguf");
  const TensorView &a = tensor_of(in, "blk.0.ffn_up_exps.weight"),
                   &b = tensor_of(out, "blk.0.ffn_up_exps.weight");
  REQUIRE(b.format->dtype == DType::Q4_K);
  CHECK(std::equal(a.data.begin(), a.data.end(), b.data.begin(), b.data.end()));
  CHECK(tensor_of(out, "blk.0.attn_k.weight").format->dtype == DType::Q8_0);
  CHECK(tensor_of(out, "output.weight").format->dtype == DType::Q6_K);
}

TEST_CASE("quantize: blocks of random bytes unpack to F32 bit by bit") {
  for (const DType type : {DType::Q2_K, DType::Q4_K, DType::Q6_K, DType::IQ4_XS, DType::Q5_1}) {
    TempFolder folder;
    test::GgufBuilder builder = test::tiny_model(wide_model(type, false));
    for (auto& tensor : builder.tensors) {
      if (tensor.name != "blk.0.attn_q.weight") continue;
      uint64_t state = 7;
      for (char& c : tensor.data)
        c = static_cast<char>((state = state * 6364136223846793005u + 1442695040888963407u) >> 56);
    }
    test::write_bytes(folder / "in.gguf", builder.build());
    quantize(folder / "in.gguf", folder / "out.gguf", with_recipe("F32"));
    const GgufFile in = GgufFile::open(folder / "in.gguf"),
                   out = GgufFile::open(folder / "out.gguf");
    const std::vector<float> expected = values_of(tensor_of(in, "blk.0.attn_q.weight"));
    const auto got = tensor_of(out, "blk.0.attn_q.weight").data;
    const auto want = std::as_bytes(std::span(expected));
    CHECK(std::equal(want.begin(), want.end(), got.begin(), got.end()));  // NaNs too
  }
}

TEST_CASE("quantize: incomplete files and non-finite values are refused") {
  TempFolder folder;
  test::TinyModelOptions options = wide_model(DType::F32, true);
  options.omit_tensors = {"blk.1.ffn_up.5.weight"};
  test::write_tiny_model(folder / "a.gguf", options);
  const auto attempt = [&](const char* recipe) {
    return test::thrown_by(
        [&] { quantize(folder / "a.gguf", folder / "o.gguf", with_recipe(recipe)); });
  };
  test::check_thrown(attempt("Q4_K_M"), ErrorKind::format, "blk.1.ffn_up.5.weight");
  test::GgufBuilder builder = test::tiny_model(wide_model(DType::F32, false));
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::memcpy(builder.tensors.back().data.data(), &nan, sizeof nan);
  test::write_bytes(folder / "a.gguf", builder.build());
  for (const char* recipe : {"Q2_K", "F16", "BF16"}) test::check_thrown(attempt(recipe), ErrorKind::format, "not finite");
  CHECK(!fs::exists(folder / "o.gguf"));
}

TEST_CASE("quantize: values too large for F16 are refused") {
  TempFolder folder;
  for (const DType type : {DType::F32, DType::BF16}) {
    test::GgufBuilder builder = test::tiny_model(wide_model(type, false));
    for (auto& tensor : builder.tensors) {
      if (tensor.name != "blk.1.attn_v.weight") continue;
      const float large = 1e5f;
      format_of(type).encode_row(&large, tensor.data.data(), 1, nullptr);
    }
    test::write_bytes(folder / "a.gguf", builder.build());
    const auto thrown = test::thrown_by([&] { quantize(folder / "a.gguf", folder / "o.gguf", with_recipe("F16")); });
    test::check_thrown(thrown, ErrorKind::format, "tensor 'blk.1.attn_v.weight', row 0: a value is too large for F16");
    CHECK(!fs::exists(folder / "o.gguf"));
  }
}

// As types for a size are chosen: after the file was opened.
TEST_CASE("quantize: values are judged by the type that is written") {
  TempFolder folder;
  test::GgufBuilder builder = test::tiny_model(wide_model(DType::Q4_K, false));
  for (auto& tensor : builder.tensors)
    if (tensor.name == "blk.1.attn_q.weight") tensor.data.replace(0, 2, test::raw(uint16_t{0x7c00}));
  test::write_bytes(folder / "a.gguf", builder.build());
  for (const DType type : {DType::Q4_K, DType::F32, DType::Q8_0}) {
    ConversionSource source = open_gguf(folder / "a.gguf", with_recipe("Q4_K_S"));
    for (TensorJob& job : source.jobs)
      if (job.name == "blk.1.attn_q.weight") job.format = &format_of(type);
    const auto error = test::thrown_by([&] { write_gguf(folder / "o.gguf", source.metadata, source.jobs, source.identity, with_recipe("Q4_K_S")); });
    if (type == DType::Q8_0) test::check_thrown(error, ErrorKind::format, "blk.1.attn_q.weight', row 0: a value is not finite");
    else CHECK(error.message == "");
  }
}

TEST_CASE("quantize: a tensor outside the model is copied with a notice") {
  TempFolder folder;
  test::GgufBuilder builder = test::tiny_model(wide_model(DType::F32, false));
  builder.zeros("vision.patch.weight", {32, 2});
  test::write_bytes(folder / "in.gguf", builder.build());
  ConvertOptions options = with_recipe("Q8_0");
  std::string notices;
  options.notice = [&](const std::string& text) { notices += text; };
  quantize(folder / "in.gguf", folder / "out.gguf", options);
  CHECK(tensor_of(GgufFile::open(folder / "out.gguf"), "vision.patch.weight").format->dtype ==
        DType::F32);
  CHECK(notices.find("vision.patch.weight") != std::string::npos);
}

}  // namespace
}  // namespace duet
