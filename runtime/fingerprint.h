// Which model it is, whatever its files are called.
#pragma once

#include <string>
#include <string_view>

#include "formats/gguf.h"

namespace duet {

// SHA-256 of the parts' headers as they are in the files, a piece of every tensor, and of `more`. Models whose files
// look alike (a fine-tuned one under the name of the old) differ in nearly all weights. Not for parse(). Error(io).
std::string fingerprint_of(const GgufFile& file, std::string_view more);

}  // namespace duet
