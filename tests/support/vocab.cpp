#include "tests/support/vocab.h"

#include <algorithm>

namespace duet::test {
namespace {

constexpr char kHex[] = "0123456789ABCDEF";

std::string byte_piece(size_t byte) {
  return {'<', '0', 'x', kHex[byte >> 4], kHex[byte & 15], '>'};
}

std::string gpt2_char(size_t byte) {
  const auto printable = [](size_t b) {
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  };
  size_t cp = byte;
  if (!printable(byte)) {
    cp = 256;
    for (size_t b = 0; b < byte; ++b) cp += !printable(b);
  }
  if (cp < 0x80) return {static_cast<char>(cp)};
  return {static_cast<char>(0xC0 | cp >> 6), static_cast<char>(0x80 | (cp & 0x3F))};
}

}  // namespace

std::vector<VocabEntry> small_spm_vocab() {
  std::vector<VocabEntry> out = {{"<unk>", 0, TokenType::unknown},
                                 {"<s>", 0, TokenType::control},
                                 {"</s>", 0, TokenType::control}};
  for (size_t byte = 0; byte < 256; ++byte) out.push_back({byte_piece(byte), 0, TokenType::byte});
  out.push_back({"▁", -50});
  for (char c = 'a'; c <= 'z'; ++c) out.push_back({std::string(1, c), -100});
  float score = 0;
  for (const char* piece : {"▁t", "he", "▁the", "ab", "bc", "abc", "▁▁", "▁a", "aa", "[", "]", "<",
                            ">", "/", "s>", "I"})
    out.push_back({piece, score -= 1});
  return out;
}

GgufBuilder spm_file(const std::vector<VocabEntry>& entries) {
  std::vector<std::string> pieces;
  std::vector<float> scores;
  std::vector<int32_t> types;
  for (const VocabEntry& entry : entries) {
    pieces.push_back(entry.piece);
    scores.push_back(entry.score);
    types.push_back(static_cast<int32_t>(entry.type));
  }
  GgufBuilder out;
  out.text("tokenizer.ggml.model", "llama").texts("tokenizer.ggml.tokens", pieces);
  out.floats("tokenizer.ggml.scores", scores).ints("tokenizer.ggml.token_type", types);
  out.u32("tokenizer.ggml.bos_token_id", 1)
      .u32("tokenizer.ggml.eos_token_id", 2)
      .u32("tokenizer.ggml.unknown_token_id", 0);
  return out;
}

GgufBuilder mistral_v3_file(TokenType marker_type) {
  std::vector<VocabEntry> entries = small_spm_vocab();
  std::vector<VocabEntry> markers;
  for (const char* name : {"[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]",
                           "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"})
    markers.push_back({name, 0, marker_type});
  entries.insert(entries.begin() + 3, markers.begin(), markers.end());
  while (entries.size() < 32768)
    entries.push_back({"filler" + std::to_string(entries.size()), -1e9f});
  return spm_file(entries);
}

GgufBuilder gpt2_file(const std::string& pre, const std::vector<std::string>& merges) {
  std::vector<std::string> pieces = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"};
  std::vector<int32_t> types(3, 3);
  for (size_t byte = 0; byte < 256; ++byte) pieces.push_back(gpt2_char(byte));
  for (std::string merge : merges) {
    std::erase(merge, ' ');
    pieces.push_back(merge);
  }
  types.resize(pieces.size(), 1);
  GgufBuilder out;
  out.text("tokenizer.ggml.model", "gpt2")
      .texts("tokenizer.ggml.tokens", pieces)
      .texts("tokenizer.ggml.merges", merges);
  out.ints("tokenizer.ggml.token_type", types).u32("tokenizer.ggml.eos_token_id", 0);
  if (!pre.empty()) out.text("tokenizer.ggml.pre", pre);
  return out;
}

GgufBuilder changed_spm_file(const GgufFile& file,
                             const std::vector<std::pair<size_t, TokenType>>& types,
                             const std::vector<VocabEntry>& more) {
  const auto& pieces = *file.get_strings("tokenizer.ggml.tokens");
  const auto& scores = std::get<std::vector<double>>(file.find("tokenizer.ggml.scores")->data);
  const auto& kinds = std::get<std::vector<int64_t>>(file.find("tokenizer.ggml.token_type")->data);
  std::vector<VocabEntry> entries;
  for (size_t i = 0; i < pieces.size(); ++i)
    entries.push_back({pieces[i], static_cast<float>(scores[i]), static_cast<TokenType>(kinds[i])});
  for (const auto& [id, type] : types) entries.at(id).type = type;
  entries.insert(entries.end(), more.begin(), more.end());
  return spm_file(entries);
}

bool LoadedTokenizer::noticed(std::string_view part) const {
  return std::any_of(notices.begin(), notices.end(), [&](const std::string& notice) {
    return notice.find(part) != std::string::npos && notice.find('\n') == std::string::npos;
  });
}

LoadedTokenizer load_tokenizer(const GgufBuilder& file) {
  std::vector<std::string> notices;
  const std::vector<std::byte> bytes = file.build();
  const GgufFile parsed = GgufFile::parse(bytes, "test.gguf");
  Tokenizer tokenizer =
      Tokenizer::load(parsed, [&](const std::string& notice) { notices.push_back(notice); });
  return {std::move(tokenizer), std::move(notices)};
}

}  // namespace duet::test
