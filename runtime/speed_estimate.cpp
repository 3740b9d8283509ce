#include "runtime/speed_estimate.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "runtime/model_cost.h"

namespace duet {
namespace {

constexpr double kReachedOfRead = 0.85, kReachedOfPeak = 0.55;
// Of a card's memory rate, unverified; and what a layer costs whose rows go to the CPU and back.
constexpr double kReachedOfCard = 0.75, kHandOverSeconds = 40e-6;

double as_double(uint64_t n) { return static_cast<double>(n); }


// P(k of n miss).
double binomial(uint32_t n, uint32_t k, double miss) {
  double p = std::pow(miss, k) * std::pow(1 - miss, n - k);
  for (uint32_t i = 0; i < k; ++i) p *= static_cast<double>(n - i) / (i + 1);
  return p;
}

// Time of the chosen experts of a layer, each of n_bytes; computation waits for the first piece.
double experts_time(const HParams& hparams, double n_bytes, double hit_rate, const MachineRates& rates) {
  const uint32_t n_used = hparams.n_expert_used;
  double time = 0;
  for (uint32_t n_missed = 0; n_missed <= n_used; ++n_missed) {
    const double disk = (n_missed * n_bytes + (n_missed > 0 ? as_double(kReadBytes) : 0)) / rates.disk_bytes_per_s;
    const double memory = n_used * n_bytes / (rates.read_bytes_per_s * kReachedOfRead);
    time += binomial(n_used, n_missed, 1 - hit_rate) * std::max(disk, memory);
  }
  return time;
}

uint64_t used_of(const HParams& hparams, uint64_t n_bytes) { return hparams.n_expert > 0 ? n_bytes / hparams.n_expert * hparams.n_expert_used : n_bytes; }

// Experts that a prompt reads: all; of the last layer a token's, but where a card leaves no token out.
double prompt_experts_bytes(const ModelSizes& sizes, size_t n_layer, bool on_card) {
  double sum = 0;
  for (size_t layer = 0; layer < n_layer; ++layer) {
    const uint64_t all = sizes.expert_file_bytes[layer];
    sum += as_double(layer + 1 == n_layer && !on_card ? used_of(sizes.hparams, all) : all);
  }
  return sum;
}

double ffn_macs(const HParams& h) { return 3.0 * h.n_embd * h.n_ff * (h.n_expert > 0 ? h.n_expert_used : 1); }

// Multiply-adds of the last layer but for its keys and values, which a prompt's last token alone needs.
double last_layer_macs(const HParams& h) { return ffn_macs(h) + 2.0 * h.n_embd * h.n_head * h.head_dim; }

// Weights of a token that the CPU reads.
double cpu_bytes(const ModelSizes& sizes, const CardShare* card) {
  if (card == nullptr) return as_double(sizes.bytes_per_token);
  double sum = 0;
  for (size_t layer = 0; layer < card->first_layer; ++layer) sum += as_double(used_of(sizes.hparams, sizes.ffn_bytes[layer]));
  return sum;
}

void estimate_decode(SpeedEstimate& out, const ModelSizes& sizes, const MemoryPlan& plan, const MachineRates& rates, const CardShare* card) {
  const HParams& hparams = sizes.hparams;
  const double memory = rates.read_bytes_per_s * kReachedOfRead;
  double used = 0, layers_time = 0;
  for (size_t layer = 0; plan.streamed && layer < plan.slots.size(); ++layer) {
    const double one = as_double(sizes.expert_file_bytes[layer]) / hparams.n_expert;
    const double hit_rate = expected_hit_rate(hparams, plan.slots[layer]);
    used += one * hparams.n_expert_used;
    out.disk_bytes_per_token += one * hparams.n_expert_used * (1 - hit_rate);
    layers_time += experts_time(hparams, one, hit_rate, rates);
  }
  if (used > 0) out.hit_rate = 1 - out.disk_bytes_per_token / used;
  out.t_io_s = plan.streamed ? out.disk_bytes_per_token / rates.disk_bytes_per_s : 0;
  const double of_cpu = cpu_bytes(sizes, card);
  if (card != nullptr) {
    out.card_bytes_per_token = as_double(sizes.bytes_per_token) - of_cpu;
    out.t_card_s = out.card_bytes_per_token / (card->bytes_per_s * kReachedOfCard) + card->first_layer * kHandOverSeconds;
  }
  out.t_mem_s = (of_cpu + out.disk_bytes_per_token) / memory;
  out.t_perfect_s = std::max(out.t_io_s, out.t_mem_s) + out.t_card_s;
  out.t_demand_s = std::max(out.t_perfect_s, (of_cpu - used) / memory + layers_time + out.t_card_s);
  out.decode_tok_s = 1 / out.t_demand_s;
}

void estimate_prefill(SpeedEstimate& out, const ModelSizes& sizes, const MemoryPlan& plan, const MachineRates& rates, const CardShare* card) {
  const double n = plan.n_batch;
  const HParams& h = sizes.hparams;
  if (plan.streamed) out.prefill_read_s = prompt_experts_bytes(sizes, plan.slots.size(), card != nullptr) * (1 - plan.resident_share) / rates.disk_bytes_per_s;
  const double product_rate = sizes.int8_macs > sizes.f32_macs ? rates.int8_macs_per_s : rates.f32_macs_per_s;
  if (card != nullptr) {
    out.prefill_compute_s = n * card->first_layer * ffn_macs(h) / product_rate / kReachedOfPeak;
    const double seconds = std::max(out.prefill_read_s, out.prefill_compute_s);
    out.prefill_tok_s = seconds > 0 ? n / seconds : 0;
    return;
  }
  const double attention = as_double(attention_macs(h, plan.n_batch / 2)), left_out = (n - 1) / n;  // of the last layer
  const double of_token = as_double(sizes.int8_macs) / rates.int8_macs_per_s + as_double(sizes.f32_macs) / rates.f32_macs_per_s - left_out * last_layer_macs(h) / product_rate +
                          attention * (1 - left_out / h.n_layer) / rates.f32_macs_per_s;
  out.prefill_compute_s = n * of_token / kReachedOfPeak;
  out.prefill_tok_s = n / std::max(out.prefill_read_s, out.prefill_compute_s);
}

}  // namespace

double expected_hit_rate(const HParams& hparams, uint32_t slots) {
  constexpr std::array kMixtral = {0.0, 0.17, 0.31, 0.42, 0.54, 0.66, 0.77, 0.89, 1.0};
  if (hparams.n_expert == 8 && hparams.n_expert_used == 2) return kMixtral[std::min<size_t>(slots, 8)];
  return std::min(1.0, static_cast<double>(slots) / hparams.n_expert);
}

SpeedEstimate estimate_speed(const ModelSizes& sizes, const MemoryPlan& plan, const MachineRates& rates, const CardShare* card) {
  SpeedEstimate out;
  estimate_decode(out, sizes, plan, rates, card);
  estimate_prefill(out, sizes, plan, rates, card);
  return out;
}

}  // namespace duet
