// Sizes and numbers as people write them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace duet {

// "12GiB", "12G", "12g" -> 12 * 1024^3; "12GB" -> 12 * 1000^3; plain digits are bytes. A fraction
// is allowed ("1.5G"). Throws Error(usage) with the accepted forms.
uint64_t parse_size(std::string_view text);

// 1536 -> "1.5 KiB".
std::string format_size(uint64_t n_bytes);

// 75.4 -> "1:15", 3725 -> "1:02:05".
std::string format_duration(double seconds);

}  // namespace duet
