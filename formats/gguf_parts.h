// Inside formats/gguf only: one parsed file, before parts are joined.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "formats/gguf.h"

namespace duet {

struct GgufPart {
  uint32_t version = 0;
  uint64_t alignment = 0;
  std::vector<GgufKeyValue> metadata;
  std::vector<TensorView> tensors;  // views into the bytes given
};

// Validates everything (architecture.md, "untrusted files"). Error(format) with the byte offset,
// Error(unsupported) for versions, byte order and tensor types duet cannot read.
GgufPart read_gguf_part(std::span<const std::byte> bytes, const std::string& source);

const char* gguf_type_name(GgufType type);  // "u32"

}  // namespace duet
