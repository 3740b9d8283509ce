#include "runtime/model.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "base/error.h"

namespace duet {
namespace {

std::string shape_text(std::span<const uint64_t> shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += concat(i ? ", " : "", shape[i]);
  return out + "]";
}

bool is_float(const Format& format) {
  return format.dtype == DType::F32 || format.dtype == DType::F16 || format.dtype == DType::BF16;
}

bool is_expert_kind(TensorKind kind) {
  return kind == TensorKind::ffn_gate_exps || kind == TensorKind::ffn_up_exps || kind == TensorKind::ffn_down_exps;
}

// Tensors of old files that hold nothing a computation needs.
bool is_ignorable(std::string_view name) { return name.ends_with("attn_rot_embd.weight"); }

// `index`-th matrix of a tensor [n, rows, cols] or [rows, cols].
Weight matrix_of(const TensorView& view, size_t rows, size_t index = 0) {
  Weight w{.format = view.format, .rows = rows, .cols = view.cols(), .data = nullptr,
           .row_bytes = row_bytes(*view.format, view.cols())};
  w.data = view.data.data() + index * rows * w.row_bytes;
  return w;
}

std::vector<float> decoded(const TensorView& view) {
  std::vector<float> out(view.n_elems());
  view.format->decode_row(view.data.data(), out.data(), out.size());
  return out;
}

Weight& expert_field(Expert& expert, TensorKind kind) {
  if (kind == TensorKind::ffn_gate || kind == TensorKind::ffn_gate_exps) return expert.gate;
  if (kind == TensorKind::ffn_up || kind == TensorKind::ffn_up_exps) return expert.up;
  return expert.down;
}

}  // namespace

class ModelBinder {
 public:
  ModelBinder(const GgufFile& file, const HParams& hparams) : model_(file, hparams) {
    model_.layers_.resize(hparams.n_layer);
    for (Layer& layer : model_.layers_) layer.experts.resize(std::max<uint32_t>(hparams.n_expert, 1));
  }

  Model run() {
    if (model_.file_.tensors().empty())
      fail(ErrorKind::format, model_.file_.source(), ": has no tensors, only a vocabulary; it cannot be run");
    for (const TensorSpec& spec : tensor_table(model_.hparams_)) bind(spec);
    if (model_.output_.format == nullptr) model_.output_ = model_.token_embd_;
    for (const TensorView& tensor : model_.file_.tensors()) check_known(tensor.name);
    return std::move(model_);
  }

 private:
  void bind(const TensorSpec& spec) {
    if (is_expert_kind(spec.kind) && model_.file_.find_tensor(spec.gguf_name) == nullptr) return bind_split(spec);
    const TensorView* view = find(spec.gguf_name, spec.shape, spec.optional);
    if (view != nullptr) place(spec, *view);
  }

  void place(const TensorSpec& spec, const TensorView& view) {
    Layer* layer = spec.layer >= 0 ? &model_.layers_[static_cast<size_t>(spec.layer)] : nullptr;
    switch (spec.kind) {
      case TensorKind::token_embd: model_.token_embd_ = matrix_of(view, view.rows()); break;
      case TensorKind::output: model_.output_ = matrix_of(view, view.rows()); break;
      case TensorKind::output_norm: model_.output_norm_ = floats(view); break;
      case TensorKind::rope_freqs: model_.rope_factors_ = floats(view); break;
      case TensorKind::attn_norm: layer->attn_norm = floats(view); break;
      case TensorKind::ffn_norm: layer->ffn_norm = floats(view); break;
      case TensorKind::attn_q: layer->attn_q = matrix_of(view, view.rows()); break;
      case TensorKind::attn_k: layer->attn_k = matrix_of(view, view.rows()); break;
      case TensorKind::attn_v: layer->attn_v = matrix_of(view, view.rows()); break;
      case TensorKind::attn_output: layer->attn_output = matrix_of(view, view.rows()); break;
      case TensorKind::ffn_gate_inp: layer->router = decoded(view); break;
      case TensorKind::ffn_gate:
      case TensorKind::ffn_up:
      case TensorKind::ffn_down: expert_field(layer->experts[0], spec.kind) = matrix_of(view, view.rows()); break;
      case TensorKind::ffn_gate_exps:
      case TensorKind::ffn_up_exps:
      case TensorKind::ffn_down_exps:
        for (size_t e = 0; e < layer->experts.size(); ++e)
          expert_field(layer->experts[e], spec.kind) = matrix_of(view, spec.shape[1], e);
    }
  }

  // blk.L.ffn_gate.E.weight: one tensor per expert, as files had them until spring 2024.
  void bind_split(const TensorSpec& spec) {
    Layer& layer = model_.layers_[static_cast<size_t>(spec.layer)];
    const std::vector<uint64_t> shape(spec.shape.begin() + 1, spec.shape.end());
    if (model_.file_.find_tensor(split_expert_name(spec.kind, spec.layer, 0)) == nullptr) missing(spec.gguf_name);
    for (size_t e = 0; e < layer.experts.size(); ++e) {
      const TensorView* view = find(split_expert_name(spec.kind, spec.layer, static_cast<int>(e)), shape, false);
      expert_field(layer.experts[e], spec.kind) = matrix_of(*view, view->rows());
    }
    model_.split_experts_ = true;
  }

  const TensorView* find(const std::string& name, const std::vector<uint64_t>& shape, bool optional) {
    const TensorView* view = model_.file_.find_tensor(name);
    if (view == nullptr && optional) return nullptr;
    if (view == nullptr) missing(name);
    if (view->shape != shape)
      fail(ErrorKind::format, model_.file_.source(), ": tensor '", name, "' has shape ", shape_text(view->shape),
           ", expected ", shape_text(shape), "; the file contradicts its own metadata");
    bound_.insert(view->name);
    return view;
  }

  [[noreturn]] void missing(const std::string& name) const {
    fail(ErrorKind::format, model_.file_.source(), ": tensor '", name,
         "' is missing; the file is incomplete: convert or download it again");
  }

  // Norms and factors are small and precise everywhere; a quantized one is a sign of a broken file.
  std::vector<float> floats(const TensorView& view) const {
    if (!is_float(*view.format))
      fail(ErrorKind::format, model_.file_.source(), ": tensor '", view.name, "' is ", view.format->name,
           ", expected F32, F16 or BF16");
    return decoded(view);
  }

  void check_known(const std::string& name) const {
    if (bound_.contains(name) || is_ignorable(name)) return;
    fail(ErrorKind::unsupported, model_.file_.source(), ": tensor '", name, "' has no place in a ",
         model_.hparams_.n_expert > 0 ? "Mixtral" : "Llama or Mistral",
         " model as duet computes it; the file is of a variant that is not supported");
  }

  Model model_;
  std::unordered_set<std::string_view> bound_;  // names live in the file
};

Model Model::bind(const GgufFile& file, const HParams& hparams) { return ModelBinder(file, hparams).run(); }

std::string Model::layout() const {
  if (hparams_.n_expert == 0) return "dense";
  return split_experts_ ? "per-expert" : "merged experts";
}

std::string Model::types() const {
  std::array<uint64_t, kDTypeSlots> expert_bytes{}, other_bytes{};
  for (const TensorView& tensor : file_.tensors()) {
    const bool expert = tensor.name.find(".ffn_") != std::string::npos && tensor.shape.size() > 1 &&
                        tensor.name.find("ffn_gate_inp") == std::string::npos;
    auto& bytes = expert && hparams_.n_expert > 0 ? expert_bytes : other_bytes;
    bytes[static_cast<size_t>(tensor.format->dtype)] += tensor.data.size();
  }
  std::string out;
  const auto list = [&out](const std::array<uint64_t, kDTypeSlots>& bytes, const char* suffix) {
    std::vector<std::pair<uint64_t, const char*>> found;
    for (const Format& format : all_formats())
      if (const uint64_t n = bytes[static_cast<size_t>(format.dtype)]; n > 0) found.emplace_back(n, format.name);
    std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    for (const auto& entry : found) out += concat(out.empty() ? "" : ", ", entry.second, suffix);
  };
  list(expert_bytes, " (experts)");
  list(other_bytes, "");
  return out;
}

uint64_t Model::n_params() const {
  uint64_t n = 0;
  for (const TensorView& tensor : file_.tensors()) n += tensor.n_elems();
  return n;
}

}  // namespace duet
