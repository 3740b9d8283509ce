#include <algorithm>

#include "base/error.h"
#include "runtime/memory_plan.h"

namespace duet {
namespace {

bool is_expert_kind(TensorKind kind) {
  return kind == TensorKind::ffn_gate_exps || kind == TensorKind::ffn_up_exps || kind == TensorKind::ffn_down_exps;
}

bool is_dense_ffn(TensorKind kind) { return kind == TensorKind::ffn_gate || kind == TensorKind::ffn_up || kind == TensorKind::ffn_down; }

// Collects tensor after tensor; an expert's three slices come with three tensors of its layer.
class Counter {
 public:
  explicit Counter(const HParams& hparams) : n_expert_(hparams.n_expert), n_used_(hparams.n_expert_used) {
    sizes_.hparams = hparams;
    sizes_.ffn_bytes.resize(hparams.n_layer);
    if (n_expert_ == 0) return;
    sizes_.expert_bytes.resize(hparams.n_layer);
    sizes_.expert_file_bytes.resize(hparams.n_layer);
  }

  void add_dense(const TensorSpec& spec, const Format& format, uint64_t n_bytes) {
    sizes_.dense_bytes += n_bytes;
    if (spec.kind == TensorKind::token_embd) sizes_.embd_bytes = n_bytes;
    if (spec.kind == TensorKind::ffn_gate_inp) sizes_.router_bytes += n_bytes;
    if (is_dense_ffn(spec.kind)) sizes_.ffn_bytes[static_cast<size_t>(spec.layer)] += n_bytes;
    if (spec.layer >= 0 && spec.shape.size() > 1) macs_of(format) += spec.shape[0] * spec.shape[1];
    const bool row_only = spec.kind == TensorKind::token_embd && !sizes_.hparams.tied_output;
    sizes_.bytes_per_token += row_only ? n_bytes / spec.shape[0] : n_bytes;
  }
  // One tensor of experts: all of them, and the largest.
  void add_experts(const TensorSpec& spec, const Format& format, uint64_t n_bytes, uint64_t largest) {
    const auto layer = static_cast<size_t>(spec.layer);
    macs_of(format) += n_used_ * spec.shape[1] * spec.shape[2];
    sizes_.expert_bytes[layer] += slot_part_bytes(largest);
    sizes_.expert_file_bytes[layer] += n_bytes;
    sizes_.ffn_bytes[layer] += n_bytes;
    sizes_.bytes_per_token += n_bytes / n_expert_ * n_used_;
  }
  ModelSizes finish(uint64_t file_bytes) {
    sizes_.file_bytes = file_bytes;
    return std::move(sizes_);
  }

 private:
  uint64_t& macs_of(const Format& format) { return format.act == ActFormat::f32 ? sizes_.f32_macs : sizes_.int8_macs; }

  ModelSizes sizes_;
  uint64_t n_expert_, n_used_;
};

const TensorView& find(const GgufFile& file, const std::string& name) {
  const TensorView* tensor = file.find_tensor(name);
  if (tensor == nullptr) fail(ErrorKind::format, file.source(), ": tensor '", name, "' is missing");
  return *tensor;
}

void add_experts(Counter& counter, const GgufFile& file, const TensorSpec& spec) {
  const uint64_t n_expert = spec.shape[0];
  if (const TensorView* merged = file.find_tensor(spec.gguf_name))
    return counter.add_experts(spec, *merged->format, merged->data.size(), merged->data.size() / n_expert);
  uint64_t n_bytes = 0, largest = 0;
  const Format* format = nullptr;
  for (uint64_t e = 0; e < n_expert; ++e) {
    const TensorView& one = find(file, split_expert_name(spec.kind, spec.layer, static_cast<int>(e)));
    n_bytes += one.data.size();
    largest = std::max<uint64_t>(largest, one.data.size());
    format = one.format;
  }
  counter.add_experts(spec, *format, n_bytes, largest);
}

}  // namespace

ModelSizes model_sizes(const GgufFile& file, const HParams& hparams) {
  Counter counter(hparams);
  for (const TensorSpec& spec : tensor_table(hparams)) {
    if (is_expert_kind(spec.kind)) {
      add_experts(counter, file, spec);
    } else if (!spec.optional || file.find_tensor(spec.gguf_name) != nullptr) {
      const TensorView& tensor = find(file, spec.gguf_name);
      counter.add_dense(spec, *tensor.format, tensor.data.size());
    }
  }
  return counter.finish(file.file_bytes());
}

ModelSizes model_sizes(const HParams& hparams, const std::function<const Format&(const TensorSpec&)>& format_of) {
  Counter counter(hparams);
  uint64_t total = 0;
  for (const TensorSpec& spec : tensor_table(hparams)) {
    const Format& format = format_of(spec);
    uint64_t n_bytes = row_bytes(format, spec.shape.back());
    for (size_t i = 0; i + 1 < spec.shape.size(); ++i) n_bytes *= spec.shape[i];
    total += n_bytes;
    if (is_expert_kind(spec.kind))
      counter.add_experts(spec, format, n_bytes, n_bytes / spec.shape[0]);
    else
      counter.add_dense(spec, format, n_bytes);
  }
  return counter.finish(total);
}

}  // namespace duet
