// How much a model makes the processor read and multiply: the arithmetic behind "share of the
// limit" in measurements. Counted from the weights as they are stored; keys and values are extra.
#pragma once

#include <span>

#include "runtime/engine.h"
#include "runtime/model.h"

namespace duet {

// What ModelInfo::cost holds. Experts of different formats count with their average.
ModelCost model_cost(const HParams& hparams, const Weight& token_embd, const Weight& output, std::span<const Layer> layers);

// Multiply-adds of attention itself (scores and mix, in float) of one token that sees `n_keys`
// positions (fewer with a sliding window).
uint64_t attention_macs(const HParams& hparams, uint64_t n_keys);

}  // namespace duet
