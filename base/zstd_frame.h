// zstd frames with a bounded output: a small file cannot unpack into all of memory.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace duet {

// One frame of `text`.
std::string zstd_compress(std::string_view text, int level = 10);

// Error(format) "source: ..." when the frame is damaged or larger than max_bytes.
std::string zstd_decompress(std::string_view frame, uint64_t max_bytes, const std::string& source);

}  // namespace duet
