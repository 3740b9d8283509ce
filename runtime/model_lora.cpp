// Adapters applied while a model runs.
#include <algorithm>

#include "base/error.h"
#include "runtime/model.h"

namespace duet {
namespace {

// Of all adapters of a matrix together: their products stay small beside the rest of the working memory.
constexpr size_t kMaxRank = 1024;

// Null: that of the router, which is held as floats.
Weight* weight_of(Layer& layer, const LoraPart& part) {
  const auto expert = [&]() -> Expert& { return layer.experts.at(static_cast<size_t>(std::max(part.expert, 0))); };
  switch (part.kind) {
    case TensorKind::attn_q:
      return &layer.attn_q;
    case TensorKind::attn_k:
      return &layer.attn_k;
    case TensorKind::attn_v:
      return &layer.attn_v;
    case TensorKind::attn_output:
      return &layer.attn_output;
    case TensorKind::ffn_gate:
    case TensorKind::ffn_gate_exps:
      return &expert().gate;
    case TensorKind::ffn_up:
    case TensorKind::ffn_up_exps:
      return &expert().up;
    case TensorKind::ffn_down:
    case TensorKind::ffn_down_exps:
      return &expert().down;
    default:
      return nullptr;
  }
}

// Appends the columns of `b`.
void widen(LowRank& to, const LoraPart& part) {
  const size_t n_rows = part.b.size() / part.rank, rank = to.rank + part.rank;
  if (rank > kMaxRank) fail(ErrorKind::unsupported, "adapters of ranks that sum to ", rank, "; at most ", kMaxRank);
  std::vector<float> b;
  b.reserve(n_rows * rank);
  for (size_t row = 0; row < n_rows; ++row) {
    b.insert(b.end(), to.b.begin() + static_cast<ptrdiff_t>(row * to.rank), to.b.begin() + static_cast<ptrdiff_t>((row + 1) * to.rank));
    b.insert(b.end(), part.b.begin() + static_cast<ptrdiff_t>(row * part.rank), part.b.begin() + static_cast<ptrdiff_t>((row + 1) * part.rank));
  }
  to.a.insert(to.a.end(), part.a.begin(), part.a.end());
  to.b = std::move(b);
  to.rank = rank;
}

void add_to_router(std::vector<float>& router, const LoraPart& part, size_t cols) {
  for (size_t i = 0; i < router.size(); ++i)
    for (size_t r = 0; r < part.rank; ++r) router[i] += part.b[i / cols * part.rank + r] * part.a[r * cols + i % cols];
}

}  // namespace

void Model::apply(const LoraChoice& choice) {
  for (const LoraPart& part : read_lora(choice, hparams_).parts) {
    Weight* weight = part.kind == TensorKind::output ? &output_ : weight_of(layers_.at(static_cast<size_t>(std::max(part.layer, 0))), part);
    if (weight == nullptr) {
      add_to_router(layers_[static_cast<size_t>(part.layer)].router, part, hparams_.n_embd);
      continue;
    }
    auto owner = std::find_if(low_ranks_.begin(), low_ranks_.end(), [&](const auto& p) { return p.get() == weight->low_rank; });
    if (owner == low_ranks_.end()) {
      low_ranks_.push_back(std::make_unique<LowRank>());
      owner = low_ranks_.end() - 1;
      weight->low_rank = owner->get();
    }
    widen(**owner, part);
  }
}

uint64_t Model::lora_bytes() const {
  uint64_t n_floats = 0;
  for (const auto& low : low_ranks_) n_floats += low->a.size() + low->b.size();
  return n_floats * sizeof(float);
}

}  // namespace duet
