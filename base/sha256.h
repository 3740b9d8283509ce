// SHA-256 of files. By libcrypto: it is in every distribution and uses the processor's instructions.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>

namespace duet {

// Hexadecimal, lower case. progress: bytes done so far. Error: io; cancelled.
std::string sha256_of(const std::filesystem::path& path, const std::function<void(uint64_t)>& progress = {},
                      const std::atomic<bool>* cancel = nullptr);

}  // namespace duet
