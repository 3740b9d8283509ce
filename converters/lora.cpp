#include "converters/lora.h"

#include <map>
#include <memory>
#include <tuple>

namespace duet {
namespace {

// Those of one tensor, by expert (-1: of the only matrix).
using Parts = std::multimap<int, LoraPart>;

// row += b a, for a row of b.
void add_product(const LoraPart& part, uint64_t row, uint64_t cols, float* values) {
  for (size_t r = 0; r < part.rank; ++r) {
    const float weight = part.b[row * part.rank + r];
    const float* a = part.a.data() + r * cols;
    for (uint64_t c = 0; c < cols; ++c) values[c] += weight * a[c];
  }
}

void add_to(TensorJob& job, const std::shared_ptr<const Parts>& parts) {
  const uint64_t cols = job.shape.back(), rows = job.shape[job.shape.size() - 2];
  const bool experts = job.shape.size() == 3;
  uint64_t first = 0;
  for (RowRun& run : job.runs) {
    run.add = [=](uint64_t row, float* values) {
      const uint64_t at = first + row;
      const auto [begin, end] = parts->equal_range(experts ? static_cast<int>(at / rows) : -1);
      for (auto it = begin; it != end; ++it) add_product(it->second, at % rows, cols, values);
    };
    first += run.rows();
  }
}

}  // namespace

void apply_loras(const ConvertOptions& options, ConversionSource& source) {
  std::map<std::pair<TensorKind, int>, std::shared_ptr<Parts>> by_tensor;
  for (const LoraChoice& choice : options.loras) {
    LoraAdapter adapter = read_lora(choice, source.hparams);
    source.identity += adapter.identity;
    for (LoraPart& part : adapter.parts) {
      auto& parts = by_tensor[{part.kind, part.layer}];
      if (parts == nullptr) parts = std::make_shared<Parts>();
      parts->emplace(part.expert, std::move(part));
    }
  }
  std::map<std::string, std::shared_ptr<const Parts>> by_name;
  for (const auto& [place, parts] : by_tensor) by_name[tensor_name(place.first, place.second)] = parts;
  for (TensorJob& job : source.jobs)
    if (const auto it = by_name.find(job.name); it != by_name.end()) {
      add_to(job, it->second);
      job.must_be_finite = true;
    }
}

}  // namespace duet
