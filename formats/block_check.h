// Looks at every block of a file for scales, and at every float for values, that are not finite.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "formats/gguf.h"

namespace duet {

struct BadBlocks {
  std::string tensor;
  uint64_t n_bad = 0, n_blocks = 0;
  uint64_t first = 0, first_row = 0;  // the first bad block, counted over the tensor, and its row
};

struct BlockCheck {
  uint64_t n_tensors = 0, n_blocks = 0;
  std::vector<BadBlocks> bad;  // tensors with bad blocks, in file order
};

struct BlockCheckOptions {
  int n_threads = 1;
  const std::atomic<bool>* cancel = nullptr;  // true -> Error(cancelled)
  std::function<void(uint64_t done_bytes, uint64_t total_bytes, const std::string& tensor)> progress = {};
};

BlockCheck check_blocks(const GgufFile& file, const BlockCheckOptions& options);

}  // namespace duet
