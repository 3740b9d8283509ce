// Small text files in which the system describes itself (/proc, /sys).
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

namespace duet {

// Contents; empty when it cannot be read.
std::string read_system_file(const std::filesystem::path& path);
// The number that a text begins with, after blanks.
std::optional<int64_t> parse_system_number(std::string_view text);
std::optional<int64_t> read_system_number(const std::filesystem::path& path);

}  // namespace duet
