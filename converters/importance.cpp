#include "converters/importance.h"

#include <algorithm>

#include "base/error.h"
#include "formats/imatrix.h"

namespace duet {
namespace {

struct Gaps {
  std::vector<std::string> tensors;  // quantized without importance
  size_t n_experts = 0, n_layers = 0;  // experts without data, by their gates
};

void tell(const Gaps& gaps, const NoticeFn& notice) {
  if (!notice) return;
  if (gaps.n_experts > 0)
    notice(concat("imatrix: ", gaps.n_experts, " experts in ", gaps.n_layers,
                  " layers were never used by the calibration text: the mean of their layer serves"));
  if (gaps.tensors.empty()) return;
  std::string names;
  for (size_t i = 0; i < std::min<size_t>(gaps.tensors.size(), 3); ++i)
    names += (i > 0 ? ", " : "") + gaps.tensors[i];
  if (gaps.tensors.size() > 3) names += ", ...";
  notice(concat("imatrix: no data for ", gaps.tensors.size(),
                " tensors, quantized without: ", names));
}

void add_keys(const ConvertOptions& options, const Imatrix& imatrix,
              std::vector<GgufKeyValue>& metadata) {
  std::erase_if(metadata, [](const auto& kv) { return kv.key.starts_with("quantize.imatrix."); });
  const std::string file = std::filesystem::path(options.imatrix).filename().string();
  metadata.push_back({"quantize.imatrix.file", GgufValue::string(file)});
  if (!imatrix.datasets.empty())
    metadata.push_back({"quantize.imatrix.dataset", GgufValue::string(imatrix.datasets[0])});
  metadata.push_back({"quantize.imatrix.entries_count",
                      GgufValue::u32(static_cast<uint32_t>(imatrix.entries.size()))});
  metadata.push_back({"quantize.imatrix.chunks_count", GgufValue::u32(imatrix.n_chunks)});
}

}  // namespace

void apply_imatrix(const ConvertOptions& options, const HParams& hparams,
                   std::vector<TensorJob>& jobs, std::vector<GgufKeyValue>& metadata) {
  if (options.imatrix.empty()) return;
  const Imatrix imatrix = read_imatrix(options.imatrix);
  Gaps gaps;
  size_t n_found = 0;
  for (const TensorSpec& spec : tensor_table(hparams)) {
    const auto job = std::find_if(jobs.begin(), jobs.end(),
                                  [&](const TensorJob& j) { return j.name == spec.gguf_name; });
    if (job == jobs.end() || job->format->block_elems == 1) continue;
    auto found = find_importance(imatrix, spec, options.imatrix);
    if (!found) {
      gaps.tensors.push_back(spec.gguf_name);
      continue;
    }
    ++n_found;
    job->importance = std::move(found->weights);
    if (spec.kind != TensorKind::ffn_gate_exps || found->without_data.empty()) continue;
    gaps.n_experts += found->without_data.size();
    ++gaps.n_layers;
  }
  if (n_found == 0 && !gaps.tensors.empty())
    fail(ErrorKind::format, options.imatrix, ": has data for none of the ", gaps.tensors.size(),
         " tensors to be quantized (", gaps.tensors[0], ", ...); it was made with another model");
  tell(gaps, options.notice);
  add_keys(options, imatrix, metadata);
}

}  // namespace duet
