#include "tests/support/gguf_builder.h"

#include <unistd.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include "base/error.h"

namespace duet::test {
namespace {

enum : uint32_t {
  kU8 = 0,
  kU16 = 2,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9
};

template <class T>
std::string raw_array(uint32_t type, const std::vector<T>& items) {
  std::string out = raw(type) + raw(uint64_t{items.size()});
  for (const T& item : items) {
    if constexpr (std::is_same_v<T, std::string>)
      out += raw_string(item);
    else
      out += raw(item);
  }
  return out;
}

void pad(std::string& out, uint64_t alignment) {
  while (out.size() % alignment != 0) out += '\0';
}

}  // namespace

std::string raw_string(std::string_view text) {
  return raw(uint64_t{text.size()}) + std::string(text);
}

GgufBuilder& GgufBuilder::u8(std::string name, uint8_t v) {
  keys.push_back({std::move(name), kU8, raw(v)});
  return *this;
}
GgufBuilder& GgufBuilder::u16(std::string name, uint16_t v) {
  keys.push_back({std::move(name), kU16, raw(v)});
  return *this;
}
GgufBuilder& GgufBuilder::u32(std::string name, uint32_t v) {
  keys.push_back({std::move(name), kU32, raw(v)});
  return *this;
}
GgufBuilder& GgufBuilder::f32(std::string name, float v) {
  keys.push_back({std::move(name), kF32, raw(v)});
  return *this;
}
GgufBuilder& GgufBuilder::boolean(std::string name, bool v) {
  keys.push_back({std::move(name), kBool, raw(static_cast<uint8_t>(v))});
  return *this;
}
GgufBuilder& GgufBuilder::text(std::string name, std::string_view v) {
  keys.push_back({std::move(name), kString, raw_string(v)});
  return *this;
}
GgufBuilder& GgufBuilder::texts(std::string name, const std::vector<std::string>& v) {
  keys.push_back({std::move(name), kArray, raw_array(kString, v)});
  return *this;
}
GgufBuilder& GgufBuilder::floats(std::string name, const std::vector<float>& v) {
  keys.push_back({std::move(name), kArray, raw_array(kF32, v)});
  return *this;
}
GgufBuilder& GgufBuilder::ints(std::string name, const std::vector<int32_t>& v) {
  keys.push_back({std::move(name), kArray, raw_array(kI32, v)});
  return *this;
}

GgufBuilder& GgufBuilder::add(const GgufKeyValue& kv) {
  const auto& data = kv.value.data;
  if (kv.value.type == GgufType::u32)
    return u32(kv.key, static_cast<uint32_t>(std::get<uint64_t>(data)));
  if (kv.value.type == GgufType::f32)
    return f32(kv.key, static_cast<float>(std::get<double>(data)));
  if (kv.value.type == GgufType::boolean) return boolean(kv.key, std::get<bool>(data));
  if (kv.value.type == GgufType::string) return text(kv.key, std::get<std::string>(data));
  throw std::logic_error("GgufBuilder::add: " + kv.key + " is of a type not offered here");
}

GgufBuilder& GgufBuilder::zeros(std::string name, std::vector<uint64_t> ne) {
  uint64_t n = 1;
  for (const uint64_t d : ne) n *= d;
  tensors.push_back({std::move(name), std::move(ne), 0, std::string(n * 4, '\0')});
  return *this;
}

GgufBuilder::Key& GgufBuilder::key(std::string_view name) {
  for (Key& k : keys)
    if (k.name == name) return k;
  throw std::logic_error("GgufBuilder: no key " + std::string(name));
}

std::vector<std::byte> GgufBuilder::build() const {
  std::string out = magic + raw(version) + raw(n_tensors.value_or(tensors.size())) +
                    raw(n_keys.value_or(keys.size()));
  for (const Key& k : keys) out += raw_string(k.name) + raw(k.type) + k.bytes;
  std::string data;
  for (const Tensor& t : tensors) {
    pad(data, alignment);
    out += raw_string(t.name) + raw(t.n_dims.value_or(static_cast<uint32_t>(t.ne.size())));
    for (const uint64_t d : t.ne) out += raw(d);
    out += raw(t.type) + raw(t.offset.value_or(data.size()));
    data += t.data;
  }
  pad(out, alignment);
  pad(data, alignment);
  out += data;
  std::vector<std::byte> bytes(out.size());
  std::memcpy(bytes.data(), out.data(), out.size());
  return bytes;
}

void write_bytes(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  write_text(path, {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
}

void write_text(const std::filesystem::path& path, std::string_view text) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream out(path, std::ios::binary);
  out.write(text.data(), static_cast<std::streamsize>(text.size()));
  if (!out.flush()) throw std::runtime_error("cannot write " + path.string());
}

TempFolder::TempFolder() {
  static std::atomic<int> counter{0};
  path_ = std::filesystem::path(DUET_TEST_DIR) / concat("tmp-", ::getpid(), "-", counter++);
  std::filesystem::create_directories(path_);
}

TempFolder::~TempFolder() {
  std::error_code ec;
  std::filesystem::remove_all(path_, ec);
}

}  // namespace duet::test
