// Bytes of a reference of predictions -> reader, all rows.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/error.h"
#include "formats/logits_reference.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace duet;
  const std::vector<uint8_t> bytes(data, data + size);
  try {
    LogitsReferenceReader reader = LogitsReferenceReader::parse(std::as_bytes(std::span(bytes)), "fuzz");
    DUET_ASSERT(reader.header().tokens.size() == uint64_t{reader.header().n_chunks} * reader.header().n_ctx);
    ReferenceRows rows;
    for (uint64_t left = reader.header().n_rows(); left > 0;) {
      const auto n = static_cast<size_t>(std::min<uint64_t>(left, 7));
      reader.read(n, 1, rows);
      for (const uint32_t top : rows.top) DUET_ASSERT(top < reader.header().n_vocab);
      left -= n;
    }
  } catch (const Error& e) {
    if (e.kind() == ErrorKind::internal) throw;
  }
  return 0;
}
