// Writes the seeds of the binary corpora: make_fuzz_corpus FOLDER (tests/fuzz/corpus). Seeds of
// text formats are kept as written by hand; inputs named crash-* were found by the fuzzer and
// fixed.
#include <cstdio>
#include <filesystem>

#include "formats/logits_reference.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/tiny_model.h"
#include "tests/support/vocab.h"

namespace {

using namespace duet;
using namespace duet::test;

void write_gguf(const std::filesystem::path& folder) {
  const TinyModelOptions small{
      .n_layer = 1, .n_expert = 2, .n_embd = 8, .n_ff = 8, .n_head = 2, .n_head_kv = 1};
  GgufBuilder model = tiny_model(small);
  for (const char* key : {"tokens", "scores", "token_type"})
    std::erase_if(model.keys,
                  [&](const auto& k) { return k.name == std::string("tokenizer.ggml.") + key; });
  model.texts("tokenizer.ggml.tokens", {"<unk>", "<s>", "</s>"})
      .floats("tokenizer.ggml.scores", {0, 0, 0});
  model.ints("tokenizer.ggml.token_type", {2, 3, 3});
  std::erase_if(model.tensors, [](const auto& t) {
    return t.name == "token_embd.weight" || t.name == "output.weight";
  });
  write_bytes(folder / "seed-mixtral", model.build());

  GgufBuilder kinds;
  kinds.u8("u8", 1)
      .u16("u16", 2)
      .u32("u32", 3)
      .f32("f32", 4)
      .boolean("bool", true)
      .text("text", "t");
  kinds.texts("texts", {"a", ""})
      .floats("floats", {1})
      .ints("ints", {-1})
      .u32("general.alignment", 8);
  kinds.keys.push_back({"i8", 1, raw(int8_t{-1})});
  kinds.keys.push_back({"f64", 12, raw(1.0)});
  kinds.keys.push_back({"u64", 10, raw(uint64_t{1})});
  kinds.keys.push_back({"bools", 9, raw(7u) + raw(uint64_t{1}) + '\1'});
  kinds.alignment = 8;
  write_bytes(folder / "seed-kinds", kinds.build());

  GgufBuilder formats;
  formats.version = 2;
  for (const Format& format : all_formats())
    formats.tensors.push_back({format.name,
                               {format.block_elems, 1},
                               static_cast<uint32_t>(format.dtype),
                               std::string(format.block_bytes, '\x2a')});
  write_bytes(folder / "seed-formats", formats.build());
}

void write_safetensors(const std::filesystem::path& folder) {
  const auto file = [&](const char* name, std::string header, size_t n_data) {
    while (header.size() % 8 != 0) header += ' ';
    write_text(folder / name, raw(uint64_t{header.size()}) + header + std::string(n_data, '\x2a'));
  };
  file(
      "seed-two",
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,1],"data_offsets":[8,12]},)"
      R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
      12);
  file("seed-scalar", R"({"s":{"dtype":"F16","shape":[],"data_offsets":[0,2]}})", 2);
  file("seed-integers", R"({"s":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}})", 8);
  file("seed-empty", "{}", 0);
}

void write_imatrix(const std::filesystem::path& folder) {
  const std::string values = raw(1.0f) + raw(2.0f) + raw(3.0f) + raw(4.0f);
  GgufBuilder file;
  file.text("general.type", "imatrix").texts("imatrix.datasets", {"a.txt"});
  file.u32("imatrix.chunk_count", 2).u32("imatrix.chunk_size", 512);
  file.tensors.push_back({"blk.0.ffn_up_exps.weight.in_sum2", {2, 2}, 0, values});
  file.tensors.push_back({"blk.0.ffn_up_exps.weight.counts", {1, 2}, 0, raw(1.0f) + raw(0.0f)});
  write_bytes(folder / "seed-gguf", file.build());
  const std::string name = "blk.0.ffn_up.0.weight";
  const std::string entry = raw(static_cast<int>(name.size())) + name + raw(3) + raw(4) + values;
  write_text(folder / "seed-legacy", raw(1) + entry + raw(7) + raw(1) + "t");
}

void write_logits_reference(const std::filesystem::path& folder) {
  const LogitsReferenceHeader header{"m", 3, 6, 4, std::vector<int32_t>(24, 2)};  // 8 rows
  LogitsReferenceWriter writer(folder / "seed-small", header);
  for (size_t i = 0; i < header.n_rows(); ++i) {
    const float logits[3] = {0, static_cast<float>(i), -50};
    const int32_t target = 1;
    writer.add(logits, {&target, 1}, 1);
  }
  writer.finish();
}

void write_tokenizer(const std::filesystem::path& folder) {
  const auto seed = [&](const char* name, const GgufBuilder& vocabulary, const std::string& text) {
    const std::vector<std::byte> bytes = vocabulary.build();
    const std::string gguf(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    write_text(folder / name, raw(static_cast<uint16_t>(gguf.size())) + gguf + text);
  };
  std::vector<VocabEntry> entries = small_spm_vocab();
  seed("seed-spm", spm_file(entries), "the abc </s> <0x0A>\n  \xFF日 aa");
  entries.push_back({"<tool>", 0, TokenType::user_defined});
  entries.push_back({"abcabc", -0.5f, TokenType::unused});
  seed("seed-spm-types", spm_file(entries).boolean("tokenizer.ggml.add_space_prefix", false),
       "abcabc<tool>the");
  for (const char* pre : {"gpt-2", "llama-bpe", "tekken", "default"})
    seed((std::string("seed-") + pre).c_str(), gpt2_file(pre, {"h e", "l l", "he ll", "Ġ w"}),
         "hello w <|im_end|> I'm 1234\r\n\xC0 Ab");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return std::fputs("usage: make_fuzz_corpus FOLDER\n", stderr), 2;
  write_gguf(std::filesystem::path(argv[1]) / "gguf");
  write_safetensors(std::filesystem::path(argv[1]) / "safetensors");
  write_tokenizer(std::filesystem::path(argv[1]) / "tokenizer");
  write_imatrix(std::filesystem::path(argv[1]) / "imatrix");
  write_logits_reference(std::filesystem::path(argv[1]) / "logits_reference");
  return 0;
}
