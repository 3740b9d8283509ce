// Input: u16 length, that many bytes of a GGUF file with a vocabulary, text. Loading may refuse the
// vocabulary; one that is taken must encode any text without a control token and, where every byte
// can be encoded, give it back.
#include <cstdint>
#include <cstring>

#include "base/error.h"
#include "runtime/tokenizer.h"
#include "runtime/unicode.h"

namespace {

using namespace duet;

// Whether no text can get lost: all byte tokens, and a piece for the space itself.
bool is_complete(const Tokenizer& tokenizer, const std::string& kind) {
  if (kind != "llama") return false;  // byte-level vocabularies: checked by their own rule below
  constexpr char kHex[] = "0123456789ABCDEF";
  for (unsigned byte = 0; byte < 256; ++byte) {
    const char name[] = {'<', '0', 'x', kHex[byte >> 4], kHex[byte & 15], '>', '\0'};
    const auto id = tokenizer.find(name);
    if (!id || tokenizer.piece(*id) != std::string(1, static_cast<char>(byte))) return false;
  }
  const auto space = tokenizer.find("\xE2\x96\x81");
  return space && tokenizer.piece(*space) == " ";
}

void check(const Tokenizer& tokenizer, const std::string& kind, const std::string& text) {
  const std::vector<Token> ids = tokenizer.encode(text);
  TextStream stream(tokenizer, true);
  std::string streamed;
  for (const Token id : ids) {
    DUET_ASSERT(!tokenizer.is_control(id));
    streamed += stream.push(id);
  }
  streamed += stream.finish();
  const std::string decoded = tokenizer.decode(ids);
  DUET_ASSERT(streamed == decoded);
  const bool has_own_space = text.find("\xE2\x96\x81") != std::string::npos;
  if (is_complete(tokenizer, kind) && !has_own_space) DUET_ASSERT(decoded == sanitize_utf8(text));
  const Segment segments[] = {{text, true}, {text, false}, {text, false, true}};
  (void)tokenizer.encode(segments, false);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  uint16_t n_gguf = 0;
  if (size < sizeof n_gguf) return 0;
  std::memcpy(&n_gguf, data, sizeof n_gguf);
  data += sizeof n_gguf;
  size -= sizeof n_gguf;
  if (n_gguf > size) return 0;
  try {
    const GgufFile file =
        GgufFile::parse({reinterpret_cast<const std::byte*>(data), n_gguf}, "fuzz");
    const Tokenizer tokenizer = Tokenizer::load(file, {});
    check(tokenizer, *file.get_string("tokenizer.ggml.model"),
          {reinterpret_cast<const char*>(data) + n_gguf, size - n_gguf});
  } catch (const Error& e) {
    if (e.kind() == ErrorKind::internal) throw;
  }
  return 0;
}
