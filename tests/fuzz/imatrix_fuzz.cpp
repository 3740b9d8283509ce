// Bytes of an importance matrix, GGUF or legacy -> reader, and a look-up of every entry.
#include <cstdint>
#include <vector>

#include "base/error.h"
#include "formats/imatrix.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace duet;
  const std::vector<uint8_t> bytes(data, data + size);
  try {
    const Imatrix imatrix = parse_imatrix(std::as_bytes(std::span(bytes)), "fuzz");
    for (const auto& [name, entry] : imatrix.entries) {
      const uint64_t n = entry.n_matrices(), cols = entry.sums.size() / n;
      const TensorSpec spec{.kind = TensorKind::ffn_up_exps, .layer = 0, .gguf_name = name, .shape = {n, 3, cols}};
      if (cols == 0) continue;
      const auto found = find_importance(imatrix, spec, "fuzz");
      if (found) DUET_ASSERT(found->weights.size() == n * cols && found->without_data.size() < n);
    }
  } catch (const Error& e) {
    if (e.kind() == ErrorKind::internal) throw;
  }
  return 0;
}
