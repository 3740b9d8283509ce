// How fast a model will be under a memory plan, from rates of the machine: for `duet plan`, before
// anything is loaded.
#pragma once

#include <cstdint>

#include "runtime/memory_plan.h"

namespace duet {

struct MachineRates {
  double disk_bytes_per_s = 0;  // of the reader that streams
  double read_bytes_per_s = 0;  // of memory, by all threads
  double int8_macs_per_s = 0, f32_macs_per_s = 0;  // in registers
};

// Share of the choices of a layer that find their expert in one of its `slots`, with the policy of
// ExpertPolicy. Expected of Mixtral 8x7B: a model of consecutive tokens fitted to Table 5 of the
// Mixtral paper (arXiv 2401.04088), to be replaced by recorded routing. Other numbers of experts:
// as if every choice were as likely, slots / n_expert.
double expected_hit_rate(const HParams& hparams, uint32_t slots);

// What a card computes: all but the experts (of a dense model: the feed-forward parts) of layers before first_layer.
struct CardShare {
  uint32_t first_layer = 0;
  double bytes_per_s = 0;  // of its memory
};

struct SpeedEstimate {
  // ---- decode, one token, context still short
  double hit_rate = 1;                      // of all choices
  double disk_bytes_per_token = 0;
  double t_io_s = 0, t_mem_s = 0;           // reading from disk; from memory, what came from disk written there too
  double t_perfect_s = 0, t_demand_s = 0;   // perfect look-ahead; reads begin when the router has chosen
  double card_bytes_per_token = 0, t_card_s = 0;  // read by a card; the times above then hold it
  double decode_tok_s = 0;                  // 1 / t_demand_s
  // ---- prefill, one whole chunk; of a card's share nothing is known: with one, at most, or 0 when it does all
  double prefill_read_s = 0, prefill_compute_s = 0, prefill_tok_s = 0;
};

//   T_io      = missed bytes / disk rate
//   T_mem     = (weights of a token + missed bytes) / memory rate
//   T_perfect = max(T_io, T_mem)
//   T_demand  = sum over layers of dense / memory rate + E[max(missed / disk, (hit + missed) / memory)]
//               + E[one piece / disk when something is missed]; choices miss independently
//   prefill   = max(expert bytes not in memory / disk rate, multiply-adds / rate), overlapped
//   with a card: + its weights of a token / its memory rate, one after the other
// Memory and arithmetic rates count with the shares that kernels reach of them (docs/measurements.md).
SpeedEstimate estimate_speed(const ModelSizes& sizes, const MemoryPlan& plan, const MachineRates& rates, const CardShare* card = nullptr);

}  // namespace duet
