// How large sessions may be: sizes resolved, memory checked before anything is allocated.
#pragma once

#include "runtime/engine.h"

namespace duet {

struct SessionSize {
  uint32_t n_ctx, n_batch;
};

// Of n_sequences sequences of n_ctx positions each that share the scratch of one batch; zeros stand
// for the engine's plan. Error(memory) when they clearly do not fit.
SessionSize session_size(const Engine& engine, uint32_t n_ctx, uint32_t n_batch, uint32_t n_sequences, KvType type, const NoticeFn& notice);

}  // namespace duet
