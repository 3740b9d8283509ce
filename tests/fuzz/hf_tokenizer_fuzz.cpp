// tokenizer.json (text that begins with '{') or tokenizer.model (anything else) -> GGUF keys.
#include <cstdint>
#include <span>

#include "base/error.h"
#include "base/json.h"
#include "converters/hf_tokenizer.h"
#include "converters/sp_model.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace duet;
  constexpr size_t kVocab = 4096;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    if (text.starts_with('{')) {
      const Vocab vocab = json_vocab(parse_json(text, "fuzz"), "fuzz", kVocab, nullptr);
      DUET_ASSERT(vocab.types.size() == vocab.tokens.size() &&
                  vocab.scores.size() == vocab.tokens.size());
      (void)vocab_metadata(vocab);
    } else {
      const SpModel model =
          parse_sp_model(std::as_bytes(std::span(text.data(), text.size())), "fuzz");
      DUET_ASSERT(!model.pieces.empty());
    }
  } catch (const Error& e) {
    if (e.kind() == ErrorKind::internal) throw;
  }
  return 0;
}
