#include "runtime/model_cost.h"

#include <algorithm>

namespace duet {
namespace {

void add_product(Work& work, const Weight& w) {
  const uint64_t macs = uint64_t{w.rows} * w.cols;
  work.bytes += uint64_t{w.rows} * w.row_bytes;
  (w.format->act == ActFormat::f32 ? work.f32_macs : work.int8_macs) += macs;
}

Work experts_of(const Layer& layer) {
  Work work;
  for (const Expert& expert : layer.experts)
    for (const Weight* w : {&expert.gate, &expert.up, &expert.down}) add_product(work, *w);
  return work;
}

}  // namespace

ModelCost model_cost(const HParams& hparams, const Weight& token_embd, const Weight& output,
                     std::span<const Layer> layers) {
  const uint64_t n_expert = std::max<uint64_t>(hparams.n_expert, 1);
  const uint64_t n_used = hparams.n_expert > 0 ? hparams.n_expert_used : 1;
  ModelCost cost;
  cost.layers.bytes = token_embd.row_bytes;
  for (const Layer& layer : layers) {
    for (const Weight* w : {&layer.attn_q, &layer.attn_k, &layer.attn_v, &layer.attn_output}) add_product(cost.layers, *w);
    cost.layers.bytes += (layer.attn_norm.size() + layer.ffn_norm.size() + layer.router.size()) * sizeof(float);
    cost.layers.f32_macs += layer.router.size();
    const Work all = experts_of(layer);
    const uint64_t used_bytes = all.bytes * n_used / n_expert;
    const Work used{used_bytes, all.int8_macs * n_used / n_expert, all.f32_macs * n_used / n_expert};
    cost.layers.bytes += used.bytes;
    cost.layers.int8_macs += used.int8_macs;
    cost.layers.f32_macs += used.f32_macs;
    cost.unused_expert_bytes += all.bytes - used_bytes;
    cost.last_layer = used;
    for (const Weight* w : {&layer.attn_q, &layer.attn_output}) add_product(cost.last_layer, *w);
    cost.last_layer.f32_macs += layer.router.size();
    cost.last_unused_expert_bytes = all.bytes - used_bytes;
  }
  add_product(cost.output, output);
  cost.output.bytes += uint64_t{hparams.n_embd} * sizeof(float);
  return cost;
}

uint64_t attention_macs(const HParams& hparams, uint64_t n_keys) {
  if (hparams.sliding_window > 0) n_keys = std::min<uint64_t>(n_keys, hparams.sliding_window);
  return 2 * n_keys * hparams.n_layer * hparams.n_head * hparams.head_dim;
}

}  // namespace duet
