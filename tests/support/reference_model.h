// A second, deliberately naive forward pass in double precision: plain loops over decoded tensors,
// the whole sequence at once, no cache. Written from the model's definition, it shares no code with
// runtime/, so that agreement means something.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "formats/gguf.h"
#include "formats/schema.h"
#include "runtime/tokenizer.h"

namespace duet::test {

using Matrix = std::vector<std::vector<double>>;  // [rows][cols]

// Told of every row that a matrix multiplies: merged GGUF name, expert (-1: none), the row, router weight.
using ReferenceWatch = std::function<void(const std::string& tensor, int expert, const std::vector<double>& row, double weight)>;

// Logits of every position, [n_tokens][n_vocab].
Matrix reference_logits(const GgufFile& file, const HParams& hparams, std::span<const Token> tokens,
                        const ReferenceWatch& watch = {});

}  // namespace duet::test
