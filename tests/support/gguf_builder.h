// GGUF bytes put together by hand, independent of GgufWriter: valid files for tests in memory, and,
// because every field can be set to anything, broken ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/gguf.h"

namespace duet::test {

struct GgufBuilder {
  struct Key {
    std::string name;
    uint32_t type;
    std::string bytes;  // as stored after the type
  };
  struct Tensor {
    std::string name;
    std::vector<uint64_t> ne;  // as stored: innermost dimension first
    uint32_t type;
    std::string data;
    std::optional<uint64_t> offset = {};  // instead of the right one
    std::optional<uint32_t> n_dims = {};  // instead of ne.size()
  };

  std::string magic = "GGUF";
  uint32_t version = 3;
  std::optional<uint64_t> n_tensors, n_keys;  // instead of the right counts
  uint64_t alignment = 32;                    // of the layout; the key is the caller's
  std::vector<Key> keys;
  std::vector<Tensor> tensors;

  GgufBuilder& u8(std::string name, uint8_t v);
  GgufBuilder& u16(std::string name, uint16_t v);
  GgufBuilder& u32(std::string name, uint32_t v);
  GgufBuilder& f32(std::string name, float v);
  GgufBuilder& boolean(std::string name, bool v);
  GgufBuilder& text(std::string name, std::string_view v);
  GgufBuilder& texts(std::string name, const std::vector<std::string>& v);
  GgufBuilder& floats(std::string name, const std::vector<float>& v);
  GgufBuilder& ints(std::string name, const std::vector<int32_t>& v);
  GgufBuilder& add(const GgufKeyValue& kv);  // u32, f32, bool and string only
  // An F32 tensor of zeros.
  GgufBuilder& zeros(std::string name, std::vector<uint64_t> ne);

  Key& key(std::string_view name);  // must exist
  std::vector<std::byte> build() const;
};

// The little-endian bytes of one number; a string with its length.
template <class T>
std::string raw(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}
std::string raw_string(std::string_view text);

void write_bytes(const std::filesystem::path& path, std::span<const std::byte> bytes);
void write_text(const std::filesystem::path& path, std::string_view text);

// A fresh empty folder under the build's test folder, removed at the end.
class TempFolder {
 public:
  TempFolder();
  ~TempFolder();
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(std::string_view name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

}  // namespace duet::test
