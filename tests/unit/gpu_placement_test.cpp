// What goes to a card: tables by hand.
#include <doctest/doctest.h>

#include "base/units.h"
#include "runtime/gpu/placement.h"
#include "runtime/speed_estimate.h"
#include "tests/support/errors.h"
#include "tests/support/reference_device.h"

using namespace duet;
using duet::gpu::CardPlan;
using test::check_thrown;
using test::thrown_by;

namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20, kGiB = uint64_t{1} << 30;
using Mode = GpuOptions::Mode;

// 8x7B in 4 bits: 32 layers of experts of 768 MiB.
ModelSizes mixtral() {
  ModelSizes sizes;
  HParams& h = sizes.hparams;
  h.n_layer = 32;
  h.n_embd = 4096;
  h.n_ff = 14336;
  h.n_vocab = 32000;
  h.n_ctx_train = 32768;
  h.n_head = 32;
  h.n_head_kv = 8;
  h.head_dim = h.n_rot = 128;
  h.n_expert = 8;
  h.n_expert_used = 2;
  sizes.dense_bytes = 1100 * kMiB;
  sizes.embd_bytes = 70 * kMiB;
  sizes.router_bytes = 4 * kMiB;
  sizes.ffn_bytes.assign(32, 768 * kMiB);
  sizes.expert_file_bytes = sizes.ffn_bytes;
  sizes.expert_bytes.assign(32, 97 * kMiB);
  sizes.bytes_per_token = 1030 * kMiB + 32 * 192 * kMiB;
  return sizes;
}

ModelSizes dense_model() {
  ModelSizes sizes = mixtral();
  sizes.hparams.n_expert = sizes.hparams.n_expert_used = 0;
  sizes.ffn_bytes.assign(32, 96 * kMiB);
  sizes.dense_bytes = 1100 * kMiB + 32 * 96 * kMiB;
  sizes.bytes_per_token = sizes.dense_bytes - sizes.embd_bytes;
  sizes.router_bytes = 0;
  sizes.expert_bytes.clear();
  sizes.expert_file_bytes.clear();
  return sizes;
}

CardPlan plan(const ModelSizes& sizes, GpuOptions options, const gpu::Card& card = {}, gpu::ChunkSizes chunk = {4096, 512, 1, KvType::f16}) {
  return gpu::plan_card(sizes, options, chunk, card);
}

}  // namespace

TEST_CASE("a card of 22 GiB takes attention and then as many last layers as fit") {
  const ModelSizes sizes = mixtral();
  const CardPlan p = plan(sizes, {.mode = Mode::automatic, .vram_bytes = 22 * kGiB});
  CHECK(p.budget_reason == "--vram 22.0 GiB");
  CHECK(p.context_bytes == 512 * kMiB);
  CHECK(p.kv_bytes == uint64_t{4096} * 32 * 8 * 128 * 2 * 2);
  CHECK(p.weight_bytes >= 1030 * kMiB);
  CHECK(p.weight_bytes <= 1032 * kMiB);
  CHECK(p.scratch_bytes > 100 * kMiB);
  CHECK(p.scratch_bytes < 300 * kMiB);
  const uint32_t n = p.n_layer - p.first_layer;
  CHECK(n == 26);
  CHECK(p.expert_bytes == n * (768 * kMiB + 24 * 256));
  CHECK(p.total_bytes() <= 22 * kGiB);
  CHECK(p.total_bytes() + p.expert_bytes / n > 22 * kGiB);
  CHECK(describe(p, sizes.hparams).find("experts of layers 6 to 31: ") != std::string::npos);
}

TEST_CASE("what fits whole is on the card whole, and nothing but attention where that was asked for") {
  const ModelSizes sizes = mixtral();
  const CardPlan all = plan(sizes, {.mode = Mode::automatic, .vram_bytes = 40 * kGiB});
  CHECK(all.first_layer == 0);
  CHECK(describe(all, sizes.hparams).starts_with("all layers: "));
  const CardPlan attention = plan(sizes, {.mode = Mode::attention, .vram_bytes = 40 * kGiB});
  CHECK(attention.first_layer == 32);
  CHECK(attention.expert_bytes == 0);
  CHECK(attention.total_bytes() < 3 * kGiB);
  const CardPlan four = plan(sizes, {.mode = Mode::layers, .n_layers = 4, .vram_bytes = 40 * kGiB});
  CHECK(four.first_layer == 28);
}

TEST_CASE("a budget below the floor, or below the layers asked for, is refused with one that would do") {
  const ModelSizes sizes = mixtral();
  for (const GpuOptions& asked : {GpuOptions{.mode = Mode::automatic, .vram_bytes = kGiB}, GpuOptions{.mode = Mode::layers, .n_layers = 20, .vram_bytes = 8 * kGiB}}) {
    const test::Thrown thrown = thrown_by([&] { plan(sizes, asked); });
    check_thrown(thrown, ErrorKind::memory, "MiB would do");
    const size_t at = thrown.message.find("too small: --vram ") + 18;
    const uint64_t enough = parse_size(thrown.message.substr(at, thrown.message.find(' ', at) - at));
    GpuOptions more = asked;
    more.vram_bytes = enough;
    CHECK_NOTHROW(plan(sizes, more));
    more.vram_bytes = enough - 2 * kMiB;
    CHECK(thrown_by([&] { plan(sizes, more); }).kind == ErrorKind::memory);
  }
  check_thrown(thrown_by([&] { plan(sizes, {.mode = Mode::layers, .n_layers = 33, .vram_bytes = 40 * kGiB}); }), ErrorKind::usage, "the model has 32 layers");
}

TEST_CASE("without --vram the budget is what is free, less a reserve; never more than is free") {
  test::ReferenceDevice device(24 * kGiB);
  const ModelSizes sizes = mixtral();
  const CardPlan p = plan(sizes, {.mode = Mode::automatic}, gpu::card_of(device));
  CHECK(p.budget_bytes == 24 * kGiB - 512 * kMiB);
  CHECK(p.context_bytes == 0);
  CHECK(p.budget_reason == "free memory 24.0 GiB, 512.0 MiB left");
  const CardPlan asked_more = plan(sizes, {.mode = Mode::automatic, .vram_bytes = 48 * kGiB}, gpu::card_of(device));
  CHECK(asked_more.budget_bytes == p.budget_bytes);
  CHECK(asked_more.budget_reason.find("less than --vram 48.0 GiB") != std::string::npos);
  check_thrown(thrown_by([&] { plan(sizes, {.mode = Mode::attention}); }), ErrorKind::usage, "--vram");
}

TEST_CASE("dense models: attention first, then the feed-forward parts of the last layers") {
  const ModelSizes sizes = dense_model();
  const CardPlan p = plan(sizes, {.mode = Mode::automatic, .vram_bytes = 3 * kGiB});
  CHECK(p.weight_bytes < 1040 * kMiB);
  CHECK(p.first_layer > 0);
  CHECK(p.first_layer < 32);
  CHECK(p.total_bytes() <= 3 * kGiB);
  CHECK(describe(p, sizes.hparams).find("feed-forward parts of layers ") != std::string::npos);
  CHECK(sizes_beside(sizes, p).expert_bytes.empty());
}

TEST_CASE("longer contexts, more sequences and wider keys leave room for fewer layers") {
  const ModelSizes sizes = mixtral();
  const GpuOptions options{.mode = Mode::automatic, .vram_bytes = 22 * kGiB};
  const auto layers = [&](gpu::ChunkSizes chunk) { return 32 - plan(sizes, options, {}, chunk).first_layer; };
  const uint32_t base = layers({4096, 512, 1, KvType::f16});
  CHECK(layers({32768, 512, 1, KvType::f16}) + 4 <= base);
  CHECK(layers({4096, 512, 8, KvType::f16}) + 4 <= base);
  CHECK(layers({32768, 512, 1, KvType::q8_0}) > layers({32768, 512, 1, KvType::f16}));
  CHECK(layers({4096, 4096, 1, KvType::f16}) < base);
  ModelSizes odd = sizes;
  odd.hparams.head_dim = 80;
  check_thrown(thrown_by([&] { plan(odd, options, {}, {4096, 512, 1, KvType::q8_0}); }), ErrorKind::unsupported, "multiple of 32");
}

TEST_CASE("the CPU's memory plan is that of the layers left to it") {
  const ModelSizes sizes = mixtral();
  const CardPlan p = plan(sizes, {.mode = Mode::automatic, .vram_bytes = 22 * kGiB});
  const ModelSizes beside = sizes_beside(sizes, p);
  CHECK(beside.expert_bytes.size() == 6);
  CHECK(p.transit_bytes == 2 * 97 * kMiB);
  CHECK(beside.dense_bytes >= 70 * kMiB + p.transit_bytes);  // the table of embeddings, what is on its way, norms and routers
  CHECK(beside.dense_bytes <= 76 * kMiB + p.transit_bytes);
  const MemoryOptions options = options_beside({.ram = MemoryOptions::Ram::bytes, .ram_bytes = 4 * kGiB, .n_batch = 700, .n_sequences = 8}, p);
  CHECK(options.n_sequences == 0);
  CHECK(options.n_batch == 512);
  const MemoryPlan memory = plan_memory(beside, options, 2, {});
  CHECK(memory.streamed);
  CHECK(memory.kv_bytes == 0);
  CHECK(memory.slots.size() == 6);
  CHECK(memory.slots[0] >= 2);  // with all 32 layers there would be none
}

TEST_CASE("where experts stream beside the card, a batch that nobody asked for is the one that streaming takes") {
  const ModelSizes sizes = mixtral();
  const MemoryOptions small{.ram = MemoryOptions::Ram::bytes, .ram_bytes = 6 * kGiB};
  const auto planned = [&](const GpuOptions& gpu, const MemoryOptions& options) { return gpu::plan_card(sizes, gpu, options, {}, 2, {}); };
  const GpuOptions automatic{.mode = Mode::automatic, .vram_bytes = 12 * kGiB};
  CardPlan p = planned(automatic, small);
  CHECK(p.sizes.n_batch > 2048);
  CHECK(p.scratch_bytes <= p.budget_bytes / 10);
  CHECK(p.total_bytes() <= p.budget_bytes);
  const MemoryPlan beside = gpu::plan_beside(sizes, small, p, 2, {});
  CHECK(beside.streamed);
  CHECK(beside.n_batch == p.sizes.n_batch);
  CHECK(beside.scratch_bytes <= 6 * kGiB / 10);
  // As before: what is in memory, a batch that was asked for, and a card or layers that leave no room.
  CHECK(planned(automatic, {.ram = MemoryOptions::Ram::all}).sizes.n_batch == 512);
  CHECK(planned({.mode = Mode::automatic, .vram_bytes = 40 * kGiB}, small).sizes.n_batch == 512);
  MemoryOptions asked = small;
  asked.n_batch = 256;
  CHECK(planned(automatic, asked).sizes.n_batch == 256);
  CHECK(planned({.mode = Mode::automatic, .vram_bytes = 2 * kGiB}, small).sizes.n_batch == 512);
  const uint32_t most = p.n_layer - plan(sizes, automatic).first_layer;
  const CardPlan layers = planned({.mode = Mode::layers, .n_layers = most, .vram_bytes = 12 * kGiB}, small);
  CHECK(layers.sizes.n_batch == 512);
  CHECK(layers.first_layer == layers.n_layer - most);
}

TEST_CASE("a host's memory that does not do is refused as without the look for a larger batch") {
  const ModelSizes sizes = mixtral();
  const MemoryOptions tiny{.ram = MemoryOptions::Ram::bytes, .ram_bytes = 100 * kMiB};
  CardPlan p = gpu::plan_card(sizes, {.mode = Mode::automatic, .vram_bytes = 12 * kGiB}, tiny, {}, 2, {});
  CHECK(p.sizes.n_batch == 512);
  check_thrown(thrown_by([&] { gpu::plan_beside(sizes, tiny, p, 2, {}); }), ErrorKind::memory, "MiB would do");
}

TEST_CASE("routers count on the card as the floats that they are there") {
  const ModelSizes floats = mixtral();
  ModelSizes halves = floats;
  halves.router_bytes /= 2;
  halves.dense_bytes -= halves.router_bytes;
  CHECK(gpu::dense_bytes_on_card(halves) == gpu::dense_bytes_on_card(floats));
  const HParams& h = floats.hparams;
  const ModelSizes counted = model_sizes(h, [](const TensorSpec& spec) -> const Format& { return format_of(spec.kind == TensorKind::ffn_gate_inp ? DType::F16 : DType::F32); });
  CHECK(counted.router_bytes == uint64_t{h.n_layer} * h.n_expert * h.n_embd * 2);
}

TEST_CASE("a card takes batches that its grids hold, and as many sequences as were chosen for it") {
  HParams h = mixtral().hparams;
  const MemoryOptions options{.n_ctx = 1 << 20, .n_batch = 1 << 16, .n_sequences = 3};
  CHECK(gpu::chunk_sizes(h, options, {}).n_batch == 1 << 16);
  CHECK(gpu::chunk_sizes(h, options, {}).n_sequences == 3);
  CHECK(gpu::chunk_sizes(h, options, {.n_sequences = 2}).n_sequences == 2);
  h.n_expert = 64;
  h.n_expert_used = 8;
  const uint32_t n_batch = gpu::chunk_sizes(h, options, {}).n_batch;
  CHECK(n_batch == 1 << 15);
  CHECK(n_batch * h.n_expert_used / 8 + h.n_expert <= 65535);
}

TEST_CASE("with all layers on the card nothing streams, whatever slots were asked for") {
  const ModelSizes sizes = mixtral();
  const CardPlan p = plan(sizes, {.mode = Mode::automatic, .vram_bytes = 40 * kGiB});
  MemoryOptions options{.ram = MemoryOptions::Ram::bytes, .ram_bytes = kGiB, .slots = 2};
  const MemoryPlan memory = plan_memory(sizes_beside(sizes, p), options_beside(options, p), 2, {});
  CHECK(!memory.streamed);
  CHECK(memory.expert_bytes == 0);
  options.ram_bytes = 100 * kMiB;
  check_thrown(thrown_by([&] { plan_memory(sizes_beside(sizes, p), options_beside(options, p), 2, {}); }), ErrorKind::memory, "nothing is left to stream beside the card");
}

TEST_CASE("a dense model leaves the CPU the feed-forward parts that the card has no room for") {
  const ModelSizes sizes = dense_model();
  const CardPlan p = plan(sizes, {.mode = Mode::layers, .n_layers = 30, .vram_bytes = 8 * kGiB});
  const uint64_t dense_bytes = sizes_beside(sizes, p).dense_bytes, expected = (70 + 2 * 96) * kMiB + p.transit_bytes;
  CHECK(dense_bytes >= expected);
  CHECK(dense_bytes <= expected + 2 * kMiB);
}

TEST_CASE("the CPU goes on alone where nobody asked for the card or a size of it") {
  const Error small(ErrorKind::memory, ""), strange(ErrorKind::unsupported, ""), broken(ErrorKind::io, "");
  CHECK(gpu::may_go_without({.mode = Mode::automatic}, small));
  CHECK(gpu::may_go_without({.mode = Mode::automatic, .vram_bytes = kGiB}, strange));
  CHECK(!gpu::may_go_without({.mode = Mode::automatic, .vram_bytes = kGiB}, small));
  CHECK(!gpu::may_go_without({.mode = Mode::automatic}, broken));
  CHECK(!gpu::may_go_without({.mode = Mode::attention}, small));
  CHECK(!gpu::may_go_without({.mode = Mode::layers, .n_layers = 1}, strange));
}

TEST_CASE("the speed with a card: its bytes at its rate, the CPU's at the CPU's") {
  const ModelSizes sizes = mixtral();
  const MachineRates rates{.disk_bytes_per_s = 1e9, .read_bytes_per_s = 40e9, .int8_macs_per_s = 1e12, .f32_macs_per_s = 2e11};
  MemoryPlan memory;
  memory.n_batch = 512;
  const SpeedEstimate cpu = estimate_speed(sizes, memory, rates);
  double before = cpu.decode_tok_s;
  for (const uint32_t first : {32u, 6u, 0u}) {
    const CardShare card{first, 936e9};
    const SpeedEstimate s = estimate_speed(sizes, memory, rates, &card);
    const double of_cpu = first * 192.0 * kMiB;
    CHECK(s.card_bytes_per_token == doctest::Approx(static_cast<double>(sizes.bytes_per_token) - of_cpu));
    CHECK(s.t_mem_s == doctest::Approx(of_cpu / (40e9 * 0.85)));
    CHECK(1 / s.decode_tok_s == doctest::Approx(s.t_card_s + s.t_mem_s));
    CHECK(s.decode_tok_s > before);
    before = s.decode_tok_s;
    CHECK((s.prefill_tok_s > 0) == (first > 0));
  }
  CHECK(before > 80);
}
