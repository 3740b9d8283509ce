#include "formats/block_check.h"

#include <algorithm>

#include "base/error.h"
#include "base/parallel.h"

namespace duet {
namespace {

constexpr uint64_t kGrainBytes = uint64_t{1} << 18;

// Bad blocks of [begin, end), and the first of them (end: none).
struct Found {
  uint64_t n = 0, first = 0;
};
Found look(const TensorView& tensor, uint64_t begin, uint64_t end) {
  const Format& format = *tensor.format;
  const std::byte* data = tensor.data.data();
  Found found{0, end};
  if (format.scales_finite(data + begin * format.block_bytes, (end - begin) * format.block_elems)) return found;
  for (uint64_t i = begin; i < end; ++i) {
    if (format.scales_finite(data + i * format.block_bytes, format.block_elems)) continue;
    if (found.n++ == 0) found.first = i;
  }
  return found;
}

BadBlocks look_at(const TensorView& tensor, int n_threads) {
  const Format& format = *tensor.format;
  const uint64_t n_blocks = tensor.n_elems() / format.block_elems, step = std::max<uint64_t>(1, kGrainBytes / format.block_bytes);
  std::vector<Found> pieces((n_blocks + step - 1) / step);
  parallel_for(n_threads, pieces.size(), 1, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) pieces[i] = look(tensor, i * step, std::min(n_blocks, (i + 1) * step));
  });
  BadBlocks out{tensor.name, 0, n_blocks, 0, 0};
  for (const Found& piece : pieces) {
    if (piece.n > 0 && out.n_bad == 0) out.first = piece.first;
    out.n_bad += piece.n;
  }
  out.first_row = out.first / (tensor.cols() / format.block_elems);
  return out;
}

}  // namespace

BlockCheck check_blocks(const GgufFile& file, const BlockCheckOptions& options) {
  BlockCheck out;
  uint64_t total = 0, done = 0;
  for (const TensorView& tensor : file.tensors()) total += tensor.data.size();
  for (const TensorView& tensor : file.tensors()) {
    if (options.cancel != nullptr && options.cancel->load()) fail(ErrorKind::cancelled, "interrupted");
    BadBlocks found = look_at(tensor, options.n_threads);
    out.n_blocks += found.n_blocks;
    ++out.n_tensors;
    if (found.n_bad > 0) out.bad.push_back(std::move(found));
    file.drop(tensor);
    done += tensor.data.size();
    if (options.progress) options.progress(done, total, tensor.name);
  }
  return out;
}

}  // namespace duet
