// Log probabilities of the model's choice, before sampling parameters.
#pragma once

#include <span>

#include "server/generation.h"

namespace duet::server {

// Of `id` and the n_top best; equal logits: the lower id first.
TokenRecord logprob_record(std::span<const float> logits, Token id, size_t n_top);

}  // namespace duet::server
