#include "runtime/speed_estimate.h"

#include <doctest/doctest.h>

#include "runtime/model_cost.h"

using namespace duet;

namespace {

constexpr double kExpert = 100e6;  // bytes

// 32 layers of 8 experts, dense weights of 1 GB.
ModelSizes sizes_8x7b() {
  ModelSizes sizes;
  sizes.hparams = *mixtral_hparams("8x7b");
  sizes.dense_bytes = 1'000'000'000;
  sizes.expert_bytes.assign(32, 100'000'000);
  sizes.expert_file_bytes.assign(32, 800'000'000);
  sizes.bytes_per_token = 1'000'000'000 + 64 * 100'000'000ull;
  sizes.int8_macs = 12'000'000'000;
  return sizes;
}

MemoryPlan streamed(uint32_t slots, uint32_t n_batch = 1024) {
  MemoryPlan plan;
  plan.streamed = true;
  plan.slots.assign(32, slots);
  plan.resident_share = slots / 8.0;
  plan.n_batch = n_batch;
  return plan;
}

MachineRates rates(double disk) {
  return {.disk_bytes_per_s = disk, .read_bytes_per_s = 20e9 / 0.85, .int8_macs_per_s = 1e12 / 0.55, .f32_macs_per_s = 1e11 / 0.55};
}

}  // namespace

TEST_CASE("speed estimate: resident decode is bound by memory") {
  MemoryPlan plan;
  plan.n_batch = 512;
  const SpeedEstimate s = estimate_speed(sizes_8x7b(), plan, rates(1e9));
  CHECK(s.hit_rate == 1.0);
  CHECK(s.disk_bytes_per_token == 0);
  CHECK(s.t_io_s == 0);
  CHECK(s.t_demand_s == doctest::Approx(7.4 / 20));
  CHECK(s.decode_tok_s == doctest::Approx(20 / 7.4));
  CHECK(s.prefill_read_s == 0);
  const double attention = static_cast<double>(attention_macs(sizes_8x7b().hparams, 256));
  const HParams h = sizes_8x7b().hparams;
  // Of 511 tokens the last layer has keys and values alone; the rates are with the share of the peak that is reckoned with.
  const double left_out = 511 * ((6.0 * h.n_ff + 2.0 * 4096) * h.n_embd / 1e12 + attention / 32 / 1e11);
  CHECK(s.prefill_compute_s == doctest::Approx(512 * (0.012 + attention / 1e11) - left_out));
  CHECK(s.prefill_tok_s == doctest::Approx(512 / s.prefill_compute_s));
}

TEST_CASE("speed estimate: decode from disk by the table of hit rates") {
  const struct { uint32_t slots; double hit; } rows[] = {{0, 0}, {1, 0.17}, {2, 0.31}, {4, 0.54}, {7, 0.89}, {8, 1}};
  for (const auto& row : rows) {
    CAPTURE(row.slots);
    const SpeedEstimate s = estimate_speed(sizes_8x7b(), streamed(row.slots), rates(1e9));
    CHECK(s.hit_rate == doctest::Approx(row.hit));
    CHECK(s.disk_bytes_per_token == doctest::Approx(64 * kExpert * (1 - row.hit)));
    CHECK(s.t_io_s == doctest::Approx(6.4 * (1 - row.hit)));
    CHECK(s.t_mem_s == doctest::Approx((7.4 + 6.4 * (1 - row.hit)) / 20));
    CHECK(s.t_perfect_s == std::max(s.t_io_s, s.t_mem_s));
    CHECK(s.t_demand_s >= s.t_perfect_s);
    CHECK(s.t_demand_s <= s.t_io_s + s.t_mem_s + 32 * 0.00105);
    CHECK(s.decode_tok_s == doctest::Approx(1 / s.t_demand_s));
  }
}

TEST_CASE("speed estimate: misses hide the time of hits") {
  // Half of the choices hit: two miss with 1/4 (200 ms), one with 1/2 (100 ms), none with 1/4 (10 ms
  // of memory), and one piece of 1 MiB is waited for; then 1/32 of the dense weights.
  ModelSizes sizes = sizes_8x7b();
  sizes.hparams.n_expert = 16;
  sizes.expert_file_bytes.assign(32, 1'600'000'000);
  MemoryPlan plan = streamed(8);
  const SpeedEstimate s = estimate_speed(sizes, plan, rates(1e9));
  const double piece = 1048576e-9;
  CHECK(s.t_demand_s == doctest::Approx(1.0 / 20 + 32 * (0.25 * (0.2 + piece) + 0.5 * (0.1 + piece) + 0.25 * 0.01)));
}

TEST_CASE("speed estimate: a chunk reads the rest of the file once, while it computes") {
  const double rest = (31 + 2.0 / 8) * 0.8 * 0.5;  // of the last layer the last token's experts
  const SpeedEstimate slow = estimate_speed(sizes_8x7b(), streamed(4), rates(1e9));
  CHECK(slow.prefill_read_s == doctest::Approx(rest));
  const double compute = slow.prefill_compute_s;
  CHECK(slow.prefill_tok_s == doctest::Approx(1024 / std::max(rest, compute)));
  const SpeedEstimate fast = estimate_speed(sizes_8x7b(), streamed(4), rates(100e9));
  CHECK(fast.prefill_tok_s == doctest::Approx(1024 / compute));
}

TEST_CASE("speed estimate: other numbers of experts hit by chance") {
  HParams hparams;
  hparams.n_expert = 16;
  hparams.n_expert_used = 4;
  CHECK(expected_hit_rate(hparams, 4) == 0.25);
  CHECK(expected_hit_rate(hparams, 16) == 1.0);
}
