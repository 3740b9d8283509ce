// config.json -> hyper-parameters -> GGUF metadata, tensor table, sources.
#include <algorithm>
#include <cstdint>

#include "base/error.h"
#include "base/json.h"
#include "formats/schema.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace duet;
  try {
    const Json config = parse_json({reinterpret_cast<const char*>(data), size}, "fuzz");
    HParams hparams = read_hf_config(config, "fuzz", [](const std::string&) {});
    (void)hparams_metadata(hparams);
    if (hparams.llama3_rope.factor > 0) (void)llama3_rope_freqs(hparams);
    hparams.n_layer = std::min(hparams.n_layer, 2u);  // more of the same only costs time
    for (const TensorSpec& spec : tensor_table(hparams)) {
      DUET_ASSERT(!spec.shape.empty() && spec.shape.size() <= 3);
      for (const uint64_t dim : spec.shape) DUET_ASSERT(dim > 0);
      (void)hf_sources(hparams, spec);
    }
  } catch (const Error& e) {
    if (e.kind() == ErrorKind::internal) throw;
  }
  return 0;
}
