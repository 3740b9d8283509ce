// Files that nobody but their owner may read, and that may be lost when the power fails.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace duet {

// The parts, one after the other, appear under the path when they are complete, with mode 0600: by way of
// "PATH.tmpPID" and a rename. Error(io), and nothing is left behind.
void write_private_file(const std::filesystem::path& path, std::span<const std::string_view> parts);

// The first n bytes of a regular file, or all of a shorter one. Error(io).
std::string read_beginning(const std::filesystem::path& path, size_t n);

}  // namespace duet
