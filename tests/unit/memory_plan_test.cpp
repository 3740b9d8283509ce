#include "runtime/memory_plan.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>

#include "base/units.h"
#include "converters/convert.h"
#include "converters/recipe.h"
#include "runtime/decoder.h"
#include "runtime/kv_cache.h"
#include "runtime/model.h"
#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/tiny_model.h"

using namespace duet;
using namespace duet::test;

namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30, kMiB = uint64_t{1} << 20;
constexpr uint64_t kExpert = 99'090'432;  // three slices of Q4_K of 4096 x 14336
using Ram = MemoryOptions::Ram;

HostMemory machine(uint64_t total, uint64_t available) {
  HostMemory memory;
  memory.total_bytes = total;
  memory.available_bytes = available;
  return memory;
}
HostMemory machine(uint64_t total) { return machine(total, total - kGiB); }

HostMemory limited(HostMemory memory, uint64_t limit, uint64_t used = 0, uint64_t cache = 0) {
  memory.cgroup_version = 2;
  memory.cgroup_limit_bytes = limit;
  memory.cgroup_used_bytes = used;
  memory.cgroup_cache_bytes = cache;
  return memory;
}

// 8x7B with every expert in Q4_K, dense weights of 1.14 GB: 26.5 GB.
ModelSizes mixtral_8x7b() {
  ModelSizes sizes;
  sizes.hparams = *mixtral_hparams("8x7b");
  sizes.dense_bytes = 1'140'000'000;
  sizes.expert_bytes.assign(32, kExpert);
  sizes.expert_file_bytes.assign(32, 8 * kExpert);
  sizes.file_bytes = sizes.dense_bytes + 256 * kExpert;
  return sizes;
}

MemoryOptions ram(uint64_t n_bytes) {
  MemoryOptions options;
  options.ram = Ram::bytes;
  options.ram_bytes = n_bytes;
  return options;
}

MemoryPlan plan(uint64_t n_bytes, const ModelSizes& sizes = mixtral_8x7b()) {
  return plan_memory(sizes, ram(n_bytes), 2, machine(64 * kGiB));
}

uint32_t sum(const std::vector<uint32_t>& slots) { return std::accumulate(slots.begin(), slots.end(), 0u); }
uint32_t least(const std::vector<uint32_t>& slots) { return *std::min_element(slots.begin(), slots.end()); }
uint32_t most(const std::vector<uint32_t>& slots) { return *std::max_element(slots.begin(), slots.end()); }

void check_adds_up(const MemoryPlan& p) {
  CHECK(p.total_bytes == p.program_bytes + p.dense_bytes + p.kv_bytes + p.scratch_bytes + p.io_bytes + p.expert_bytes);
  if (p.budget_bytes > 0) CHECK(p.total_bytes <= p.budget_bytes);
  CHECK(p.program_bytes >= 96 * kMiB);
  CHECK(p.n_batch >= 1);
  CHECK(p.n_batch <= p.n_ctx);
}

// The budget at which `n` slots in all just fit, from a plan with few and no room to spare.
uint64_t budget_for(uint32_t n_slots, const MemoryOptions& options = ram(0)) {
  MemoryOptions fixed = options;
  fixed.slots = 0;
  fixed.ram = Ram::all;
  const MemoryPlan none = plan_memory(mixtral_8x7b(), fixed, 2, machine(64 * kGiB));
  const uint64_t used = none.total_bytes - none.program_bytes + n_slots * kExpert;
  const uint64_t program = none.program_bytes - (none.total_bytes - none.program_bytes) / 512 - 1;
  return program + (used + 511) / 512 * 513;
}

}  // namespace

TEST_CASE("memory plan: 8x7B in 4, 8, 12 and 16 GiB") {
  struct Row {
    uint64_t gib;
    uint32_t least_sum, most_sum;
  };
  // Slots of 99.1 MB after dense 1.14 GB, keys and values 0.54 GB, staging 0.3 GB, program 0.13 GB
  // and at most a tenth for scratch.
  for (const Row& row : {Row{4, 15, 23}, Row{8, 54, 66}, Row{12, 93, 109}, Row{16, 136, 152}}) {
    const MemoryPlan p = plan(row.gib * kGiB);
    CAPTURE(row.gib);
    CAPTURE(describe(p, mixtral_8x7b().hparams));
    check_adds_up(p);
    CHECK(p.streamed);
    CHECK(p.n_staging == 3);
    CHECK(p.n_ctx == 4096);
    CHECK(p.kv_bytes == 4096ull * 32 * 8 * 2 * 128 * 2);
    CHECK(p.budget_bytes == row.gib * kGiB);
    CHECK(p.n_batch >= 512);
    CHECK(p.scratch_bytes <= std::max(p.budget_bytes / 10, Decoder::bytes_needed(mixtral_8x7b().hparams, 2, 4096, 512)));
    CHECK(sum(p.slots) >= row.least_sum);
    CHECK(sum(p.slots) <= row.most_sum);
    CHECK(p.expert_bytes == sum(p.slots) * kExpert);
    CHECK(p.resident_share == doctest::Approx(sum(p.slots) / 256.0));
    CHECK(p.budget_bytes - p.total_bytes < kExpert + kMiB);  // nothing left lying
    if (sum(p.slots) >= 64) CHECK(most(p.slots) - least(p.slots) <= 1);
  }
}

TEST_CASE("memory plan: exactly what is needed, and one byte less") {
  MemoryOptions options = ram(0);
  options.n_batch = 512;
  for (const uint32_t n : {64u, 65u, 95u, 96u, 100u, 160u, 250u}) {
    CAPTURE(n);
    options.ram_bytes = budget_for(n, options);
    const MemoryPlan enough = plan_memory(mixtral_8x7b(), options, 2, machine(64 * kGiB));
    check_adds_up(enough);
    CHECK(sum(enough.slots) == n);
    CHECK(least(enough.slots) == n / 32);
    CHECK(most(enough.slots) == (n + 31) / 32);
    options.ram_bytes -= kMiB;
    const MemoryPlan less = plan_memory(mixtral_8x7b(), options, 2, machine(64 * kGiB));
    check_adds_up(less);
    CHECK(sum(less.slots) == (n == 64 ? 62 + 1 : n - 1));
  }
}

TEST_CASE("memory plan: one slot more goes to layers spread over the model") {
  MemoryOptions options = ram(0);
  options.n_batch = 512;
  options.ram_bytes = budget_for(96 + 8, options);
  const MemoryPlan p = plan_memory(mixtral_8x7b(), options, 2, machine(64 * kGiB));
  for (size_t quarter = 0; quarter < 4; ++quarter) {
    const auto first = p.slots.begin() + static_cast<ptrdiff_t>(8 * quarter);
    CHECK(std::accumulate(first, first + 8, 0u) >= 24 + 1);
    CHECK(std::accumulate(first, first + 8, 0u) <= 24 + 3);
  }
}

TEST_CASE("memory plan: below one a layer some layers get one, spread over the model, the others none") {
  MemoryOptions options = ram(0);
  options.n_batch = 512;
  for (const uint32_t n : {1u, 2u, 17u, 32u, 63u}) {
    CAPTURE(n);
    options.ram_bytes = budget_for(n, options);
    const MemoryPlan p = plan_memory(mixtral_8x7b(), options, 2, machine(64 * kGiB));
    check_adds_up(p);
    CHECK(most(p.slots) == (n + 31) / 32);
    CHECK(least(p.slots) == n / 32);
    CHECK(std::accumulate(p.slots.begin(), p.slots.begin() + 16, 0u) >= n / 2 - std::min(n / 2, 2u));
    CHECK(std::accumulate(p.slots.begin(), p.slots.begin() + 16, 0u) <= n / 2 + 2);
    CHECK(sum(p.slots) == n);
  }
}

TEST_CASE("memory plan: the floor, and what would do is said below it") {
  const auto refused = [](const MemoryOptions& options) {
    return thrown_by([&] { plan_memory(mixtral_8x7b(), options, 2, machine(64 * kGiB)); });
  };
  check_thrown(refused(ram(kGiB)), ErrorKind::memory, "the budget of 1.0 GiB (--ram 1.0 GiB) is too small");
  check_thrown(refused(ram(0)), ErrorKind::memory, "MiB would do");
  for (MemoryOptions options : {ram(kGiB), ram(1500 * kMiB)}) {
    const std::string message = refused(options).message;
    const size_t end = message.find("MiB would do");
    REQUIRE(end != std::string::npos);
    const size_t begin = message.rfind(' ', end) + 1;
    options.ram_bytes = std::stoull(message.substr(begin, end - begin)) * kMiB;
    const MemoryPlan p = plan_memory(mixtral_8x7b(), options, 2, machine(64 * kGiB));
    check_adds_up(p);
    CHECK(sum(p.slots) == 0);
    CHECK(p.resident_share == 0);
    CHECK(p.n_staging == 2);
    CHECK(p.n_batch == 512);
    options.ram_bytes -= kMiB;
    check_thrown(refused(options), ErrorKind::memory, "is too small");
  }
}

TEST_CASE("memory plan: resident from the byte that is enough") {
  MemoryOptions options;
  options.ram = Ram::all;
  const MemoryPlan all = plan_memory(mixtral_8x7b(), options, 2, machine(8 * kGiB));
  check_adds_up(all);
  CHECK_FALSE(all.streamed);
  CHECK(all.budget_bytes == 0);
  CHECK(all.slots.empty());
  CHECK(all.n_batch == 512);
  CHECK(all.resident_share == 1.0);
  CHECK(all.expert_bytes == 256 * kExpert);
  CHECK(all.io_bytes == 0);

  CHECK_FALSE(plan(all.total_bytes).streamed);
  const MemoryPlan less = plan(all.total_bytes - 1);
  CHECK(less.streamed);
  CHECK(sum(less.slots) >= 240);
  CHECK(less.n_batch == 4096);
}

TEST_CASE("memory plan: automatic leaves the machine room and streams what nearly fits") {
  const MemoryOptions automatic;
  // 26.5 GB and 0.8 GB more are 25.4 GiB: within nine tenths of 29 GiB, not of 28.
  CHECK_FALSE(plan_memory(mixtral_8x7b(), automatic, 2, machine(32 * kGiB)).streamed);
  CHECK_FALSE(plan_memory(mixtral_8x7b(), automatic, 2, machine(29 * kGiB)).streamed);
  const MemoryPlan nearly = plan_memory(mixtral_8x7b(), automatic, 2, machine(28 * kGiB));
  CHECK(nearly.streamed);
  CHECK(least(nearly.slots) == 7);

  const MemoryPlan p = plan_memory(mixtral_8x7b(), automatic, 2, machine(24 * kGiB));
  check_adds_up(p);
  CHECK(p.budget_bytes == 21 * kGiB + 512 * kMiB);
  CHECK(p.budget_reason == "available memory 23.0 GiB, 1.5 GiB left to the system");
  CHECK(p.reserve_bytes == 1536 * kMiB);
  CHECK(least(p.slots) == 6);
  CHECK(plan_memory(mixtral_8x7b(), automatic, 2, machine(24 * kGiB, 0)).budget_bytes == 21 * kGiB);  // an old kernel
  CHECK(plan_memory(mixtral_8x7b(), automatic, 2, machine(8 * kGiB)).budget_bytes == 6 * kGiB);
  CHECK(plan_memory(mixtral_8x7b(), automatic, 2, machine(40 * kGiB)).streamed == false);
}

TEST_CASE("memory plan: what others use lowers automatic, not what was asked for") {
  const HostMemory busy = machine(32 * kGiB, 13 * kGiB);
  const MemoryPlan p = plan_memory(mixtral_8x7b(), {}, 2, busy);
  check_adds_up(p);
  CHECK(p.streamed);
  CHECK(p.budget_bytes == 11 * kGiB);
  CHECK(p.budget_reason == "available memory 13.0 GiB, 2.0 GiB left to the system");
  const MemoryPlan asked = plan_memory(mixtral_8x7b(), ram(20 * kGiB), 2, busy);
  CHECK(asked.budget_bytes == 20 * kGiB);
  CHECK(asked.reserve_bytes == 0);
  // Not above the machine or the cgroup, however much is asked for.
  CHECK(plan_memory(mixtral_8x7b(), ram(64 * kGiB), 2, machine(24 * kGiB)).budget_bytes == 24 * kGiB);
  const MemoryPlan held = plan_memory(mixtral_8x7b(), ram(64 * kGiB), 2, limited(machine(64 * kGiB), 12 * kGiB));
  CHECK(held.budget_bytes == 12 * kGiB);
  CHECK(held.budget_reason == "cgroup limit 12.0 GiB");
  CHECK_FALSE(plan_memory(mixtral_8x7b(), {}, 2, HostMemory{}).streamed);  // nothing known: as without limit
}

TEST_CASE("memory plan: a cgroup's limit is the process's own") {
  const HostMemory host = machine(64 * kGiB);
  const MemoryPlan p = plan_memory(mixtral_8x7b(), {}, 2, limited(host, 16 * kGiB));
  check_adds_up(p);
  CHECK(p.budget_bytes == 16 * kGiB - 256 * kMiB);
  CHECK(p.budget_reason == "cgroup limit 16.0 GiB");
  CHECK(plan_memory(mixtral_8x7b(), {}, 2, limited(host, 4 * kGiB)).budget_bytes == 4 * kGiB - 128 * kMiB);
  // Of 9 GiB in use there, 8 are page cache.
  CHECK(plan_memory(mixtral_8x7b(), {}, 2, limited(host, 16 * kGiB, 9 * kGiB, 8 * kGiB)).budget_bytes == 15 * kGiB - 256 * kMiB);
  // Nine tenths of 29 GiB hold 25.4 GiB, unless others in the group take them.
  CHECK_FALSE(plan_memory(mixtral_8x7b(), {}, 2, limited(host, 29 * kGiB)).streamed);
  CHECK(plan_memory(mixtral_8x7b(), {}, 2, limited(host, 29 * kGiB, 6 * kGiB, kGiB)).streamed);
  // Limits above the machine do not count.
  CHECK(plan_memory(mixtral_8x7b(), {}, 2, limited(machine(24 * kGiB), 100 * kGiB)).budget_bytes == 21 * kGiB + 512 * kMiB);
}

TEST_CASE("memory plan: batch") {
  MemoryOptions options = ram(12 * kGiB);
  options.n_ctx = 100;
  MemoryPlan p = plan_memory(mixtral_8x7b(), options, 2, machine(64 * kGiB));
  CHECK(p.n_ctx == 100);
  CHECK(p.n_batch == 100);
  options.n_ctx = 8192;
  options.n_batch = 6000;
  p = plan_memory(mixtral_8x7b(), options, 2, machine(64 * kGiB));
  CHECK(p.n_batch == 6000);
  CHECK(p.scratch_bytes == Decoder::bytes_needed(mixtral_8x7b().hparams, 2, 8192, 6000));
  options.n_batch = 0;
  options.ram_bytes = 20 * kGiB;
  p = plan_memory(mixtral_8x7b(), options, 2, machine(64 * kGiB));
  CHECK(p.n_batch == 4096);
  options.ram_bytes = 3 * kGiB;  // a chunk of 4096 tokens would take more than a tenth
  options.n_ctx = 4096;
  p = plan_memory(mixtral_8x7b(), options, 2, machine(64 * kGiB));
  check_adds_up(p);
  CHECK(p.n_batch < 4096);
  CHECK(p.n_batch >= 512);
  options.kv_type = KvType::q8_0;
  CHECK(plan_memory(mixtral_8x7b(), options, 2, machine(64 * kGiB)).kv_bytes < p.kv_bytes);
}

TEST_CASE("memory plan: slots that were asked for") {
  MemoryOptions options;
  for (const uint32_t n : {0u, 1u, 3u, 8u, 20u}) {
    options.slots = n;
    options.ram = Ram::all;
    const MemoryPlan p = plan_memory(mixtral_8x7b(), options, 2, machine(8 * kGiB));
    check_adds_up(p);
    CHECK(p.streamed);
    CHECK(p.budget_bytes == 0);
    CHECK(p.slots == std::vector<uint32_t>(32, std::min(n, 8u)));
    CHECK(p.n_staging == 3);
  }
  options.ram = Ram::automatic;
  check_thrown(thrown_by([&] { plan_memory(mixtral_8x7b(), options, 2, machine(16 * kGiB)); }), ErrorKind::memory,
               "slots 23.6 GiB");
}

TEST_CASE("memory plan: layers of different sizes") {
  ModelSizes sizes = mixtral_8x7b();
  for (size_t layer = 0; layer < 32; layer += 2) {  // down projections in Q6_K
    sizes.expert_bytes[layer] = 114'233'344;
    sizes.expert_file_bytes[layer] = 8 * 114'233'344ull;
  }
  for (uint64_t gib = 3; gib <= 26; ++gib) {
    const MemoryPlan p = plan(gib * kGiB, sizes);
    CAPTURE(gib);
    check_adds_up(p);
    CHECK(p.streamed);
    uint64_t held = 0;
    for (size_t layer = 0; layer < 32; ++layer) held += p.slots[layer] * sizes.expert_bytes[layer];
    CHECK(p.expert_bytes == held);
    CHECK(p.io_bytes >= 3 * 114'233'344ull);
    if (least(p.slots) >= 2 && most(p.slots) < 8) CHECK(most(p.slots) - least(p.slots) <= 1);
    if (sum(p.slots) < 256) CHECK(p.budget_bytes - p.total_bytes < 115'000'000);
  }
}

TEST_CASE("memory plan: 8x22B") {
  const HParams hparams = *mixtral_hparams("8x22b");
  const ModelSizes sizes = model_sizes(hparams, [](const TensorSpec& spec) -> const Format& {
    return format_of(spec.shape.size() < 2 ? DType::F32 : DType::Q4_K);
  });
  CHECK(sizes.expert_file_bytes[0] == 8 * 169'869'312ull);
  CHECK(sizes.expert_bytes[55] == 169'869'312ull + 3 * 4096);
  const MemoryPlan small = plan(16 * kGiB, sizes);
  check_adds_up(small);
  CHECK(most(small.slots) - least(small.slots) <= 1);
  CHECK(sum(small.slots) > 50);
  CHECK(sum(small.slots) < 75);
  const MemoryPlan large = plan(40 * kGiB, sizes);
  check_adds_up(large);
  CHECK(least(large.slots) == 3);
  CHECK(plan_memory(sizes, {}, 2, machine(96 * kGiB)).streamed == false);
  CHECK(plan_memory(sizes, {}, 2, machine(64 * kGiB)).streamed);
}

TEST_CASE("memory plan: a dense model fits or is refused") {
  HParams hparams = *mixtral_hparams("8x7b");
  hparams.n_expert = hparams.n_expert_used = 0;
  const ModelSizes sizes = model_sizes(hparams, [](const TensorSpec&) -> const Format& { return format_of(DType::F16); });
  CHECK(sizes.expert_bytes.empty());
  CHECK(sizes.dense_bytes == sizes.file_bytes);
  CHECK(sizes.bytes_per_token < sizes.dense_bytes);
  CHECK_FALSE(plan(24 * kGiB, sizes).streamed);
  check_thrown(thrown_by([&] { plan(8 * kGiB, sizes); }), ErrorKind::memory, "cannot be streamed");
  MemoryOptions options;
  options.slots = 2;
  check_thrown(thrown_by([&] { plan_memory(sizes, options, 2, machine(64 * kGiB)); }), ErrorKind::memory, "has none");
  options.slots.reset();
  options.ram = Ram::all;
  CHECK_FALSE(plan_memory(sizes, options, 2, machine(8 * kGiB)).streamed);
}

TEST_CASE("memory plan: sizes of files, both layouts, equal those of the recipe") {
  TempFolder folder;
  SyntheticOptions options;
  options.shape = "tiny";
  options.type = "Q4_K";
  make_synthetic(folder / "merged.gguf", options);
  options.split_experts = true;
  make_synthetic(folder / "split.gguf", options);
  for (const char* name : {"merged.gguf", "split.gguf"}) {
    const GgufFile file = GgufFile::open(folder / name);
    const HParams hparams = read_hparams(file, {});
    const ModelSizes sizes = model_sizes(file, hparams);
    const uint64_t slice = 256 * 512 / 256 * 144;
    CHECK(sizes.expert_file_bytes == std::vector<uint64_t>(4, 3 * 8 * slice));
    CHECK(sizes.expert_bytes == std::vector<uint64_t>(4, 3 * ((slice + 4095) / 4096 * 4096 + 4096)));
    uint64_t all = 0;
    for (const TensorView& tensor : file.tensors()) all += tensor.data.size();
    CHECK(sizes.dense_bytes == all - 4 * 3 * 8 * slice);
    CHECK(sizes.file_bytes == file.file_bytes());
    const uint64_t embedding = file.find_tensor("token_embd.weight")->data.size();
    CHECK(sizes.bytes_per_token == sizes.dense_bytes - embedding + embedding / hparams.n_vocab + 4 * 3 * 2 * slice);
    const ModelSizes known = model_sizes(hparams, [&](const TensorSpec& spec) -> const Format& {
      const TensorView* tensor = file.find_tensor(spec.gguf_name);
      return tensor != nullptr ? *tensor->format : format_of(DType::Q4_K);
    });
    CHECK(known.dense_bytes == sizes.dense_bytes);
    CHECK(known.expert_bytes == sizes.expert_bytes);
    CHECK(known.bytes_per_token == sizes.bytes_per_token);
    CHECK(sizes.int8_macs == 4 * (2 * 256 * 256 + 2 * 64 * 256 + 2 * 3 * 256 * 512));
    CHECK(sizes.f32_macs == 4 * 8 * 256);  // the router
  }
}

TEST_CASE("memory plan: Q4_K_M of 8x7B is 28.4 GB, with larger experts in half of the layers") {
  const HParams hparams = *mixtral_hparams("8x7b");
  const ModelSizes sizes = model_sizes(hparams, [&](const TensorSpec& spec) -> const Format& {
    return recipe_format(find_recipe("Q4_K_M"), hparams, spec);
  });
  CHECK(static_cast<double>(sizes.file_bytes) == doctest::Approx(28.4e9).epsilon(0.005));
  CHECK(std::count(sizes.expert_bytes.begin(), sizes.expert_bytes.end(), kExpert + 3 * 4096) == 16);
  CHECK(*std::max_element(sizes.expert_bytes.begin(), sizes.expert_bytes.end()) == 114'229'248 + 3 * 4096);
  CHECK(sizes.bytes_per_token > 7'500'000'000);
}

TEST_CASE("memory plan: a line of text") {
  const HParams hparams = mixtral_8x7b().hparams;
  const std::string streamed = describe(plan(12 * kGiB), hparams);
  CHECK(streamed.find("streamed, ") == 0);
  CHECK(streamed.find("budget 12.0 GiB, --ram 12.0 GiB") != std::string::npos);
  CHECK(streamed.find("of 8 per layer") != std::string::npos);
  const std::string resident = describe(plan(40 * kGiB), hparams);
  CHECK(resident.find("resident, ") == 0);
  CHECK(resident.find("experts 23.6 GiB") != std::string::npos);
}
