// One parsed GGUF file, before parts are joined, and how parts are named.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "formats/gguf.h"

namespace duet {

// What a file name says: "x-00002-of-00005.gguf" -> prefix "x", part 2 of 5; else count 0.
struct GgufPartName {
  std::string prefix;
  uint64_t number = 0, count = 0;
};
GgufPartName parse_part_name(const std::string& file_name);
// Error(usage) when a whole file of this name would be taken for a part of a set.
void check_whole_name(const std::filesystem::path& path);

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
