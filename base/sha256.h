// SHA-256. By libcrypto: it is in every distribution and uses the processor's instructions.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>

namespace duet {

using Sha256Digest = std::array<std::byte, 32>;

// Of bytes that come in pieces.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256& add(std::span<const std::byte> bytes);
  template <class T>
  Sha256& add(std::span<const T> values) {
    return add(std::as_bytes(values));
  }
  Sha256Digest finish();  // of all bytes since the last call; begins anew

 private:
  struct Context;
  void begin();

  std::unique_ptr<Context> context_;
};

std::string hex(std::span<const std::byte> bytes);  // lower case

// Hexadecimal, lower case. progress: bytes done so far. Error: io; cancelled.
std::string sha256_of(std::span<const std::byte> bytes);
std::string sha256_of(const std::filesystem::path& path, const std::function<void(uint64_t)>& progress = {},
                      const std::atomic<bool>* cancel = nullptr);

}  // namespace duet
