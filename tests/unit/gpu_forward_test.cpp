// The forward pass on a card (a device of plain loops): logits as on the CPU.
#include <doctest/doctest.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>

#include "base/mapped_file.h"
#include "runtime/batch.h"
#include "runtime/gpu/module.h"
#include "runtime/gpu/placement.h"
#include "runtime/memory_plan.h"
#include "runtime/session_memory.h"
#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/logits.h"
#include "tests/support/random_model.h"
#include "tests/support/reference_device.h"
#include "tests/support/skip.h"

using namespace duet;
using test::all_logits;
using test::check_thrown;
using test::ReferenceDevice;
using test::some_tokens;
using test::thrown_by;

namespace {

using Mode = GpuOptions::Mode;

// Quantized products have the same bits on both sides; attention, norms and softmax round differently, and a rounded
// activation may then fall to the other side. Relative to the largest logit; random weights are worse than trained ones.
constexpr double kBound = 0.02;

test::RandomModel mixed(uint32_t n_layer = 3) {
  test::RandomModel model;
  model.hparams = test::small_mixtral_hparams(n_layer, 512);
  model.type = [](const std::string& name) {
    if (name.find("down") != std::string::npos) return DType::Q6_K;
    if (name.find("attn_v") != std::string::npos) return DType::Q8_0;
    return name.find("output.weight") != std::string::npos ? DType::F16 : DType::Q4_K;
  };
  return model;
}

test::RandomModel of_floats() {
  test::RandomModel model;
  model.hparams = test::tiny_hparams();
  return model;
}

test::RandomModel dense() {
  test::RandomModel model = mixed();
  model.hparams.n_expert = model.hparams.n_expert_used = 0;
  return model;
}

// Experts of one layer in different formats.
test::RandomModel per_expert() {
  test::RandomModel model = mixed();
  model.split_experts = true;
  model.type = [](const std::string& name) { return name.find(".3.weight") != std::string::npos ? DType::Q8_0 : name.find(".1.weight") != std::string::npos ? DType::Q6_K : DType::Q4_K; };
  return model;
}

EngineOptions on(gpu::Device& device, GpuOptions gpu = {.mode = Mode::automatic}) {
  gpu.device = &device;
  return {.n_threads = 2, .isa = {}, .notice = {}, .memory = {.n_ctx = 300, .n_batch = 64}, .gpu = gpu};
}

EngineOptions on_cpu() { return {.n_threads = 2, .isa = {}, .notice = {}}; }

double largest_difference(std::span<const float> a, std::span<const float> b) {
  REQUIRE(a.size() == b.size());
  double most = 0, scale = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    most = std::max(most, static_cast<double>(std::fabs(a[i] - b[i])));
    scale = std::max(scale, static_cast<double>(std::fabs(b[i])));
  }
  return most / scale;
}

// Of the rows: where two experts are nearly as good, rounding chooses, and such a row differs at length.
double share_off(std::span<const float> a, std::span<const float> b, size_t n_vocab) {
  REQUIRE(a.size() == b.size());
  double n_off = 0;
  for (size_t at = 0; at < a.size(); at += n_vocab) n_off += largest_difference(a.subspan(at, n_vocab), b.subspan(at, n_vocab)) > 2 * kBound ? 1 : 0;
  return n_off * static_cast<double>(n_vocab) / static_cast<double>(a.size());
}

uint64_t uploaded_bytes(const test::AnyCard& card) { return card.reference() != nullptr ? card.reference()->uploaded_bytes() : 0; }

std::vector<float> logits_of(const Engine& engine, size_t n_batch, std::span<const Token> tokens, KvType type = KvType::f16) {
  Session session = engine.new_session({.n_ctx = 300, .n_batch = static_cast<uint32_t>(n_batch), .kv_type = type});
  return all_logits(session, tokens);
}

}  // namespace

TEST_CASE("logits on a card agree with the CPU's for all, some and none of the experts on it") {
  struct Case {
    const char* name;
    test::RandomModel model;
  };
  test::RandomModel window = mixed(), factors = mixed();
  window.hparams.sliding_window = 24;
  factors.rope_factors = true;
  const Case cases[] = {{"mixed", mixed()}, {"floats", of_floats()}, {"dense", dense()}, {"experts", per_expert()}, {"window", window}, {"factors", factors}};
  for (const Case& c : cases) {
    CAPTURE(std::string(c.name));
    const auto path = test::write_model(c.model, std::string("gpu_") + c.name + ".gguf");
    const Engine cpu = Engine::open(path, on_cpu());
    const auto tokens = some_tokens(90, cpu.info().hparams.n_vocab);
    const std::vector<float> want = logits_of(cpu, 64, tokens);
    for (const GpuOptions& gpu : {GpuOptions{.mode = Mode::automatic}, GpuOptions{.mode = Mode::layers, .n_layers = 1}, GpuOptions{.mode = Mode::attention}}) {
      test::AnyCard card;
      const Engine engine = Engine::open(path, on(*card.get(), gpu));
      REQUIRE(engine.card_plan() != nullptr);
      CHECK(engine.info().gpu == card.get()->info().name);
      CHECK(engine.card_plan()->first_layer == (gpu.mode == Mode::automatic ? 0 : engine.info().hparams.n_layer - gpu.n_layers));
      for (const size_t n_batch : {1u, 7u, 40u}) {
        CAPTURE(n_batch);
        const std::vector<float> got = logits_of(engine, n_batch, tokens);
        const HParams& hparams = engine.info().hparams;
        if (std::string_view(c.name) == "floats")  // nothing is rounded to 8 bits
          CHECK(largest_difference(got, want) < 1e-3);
        else
          CHECK(share_off(got, want, hparams.n_vocab) <= (hparams.n_expert > 0 ? 0.025 : 0));  // 2 rows of 90
      }
    }
  }
}

TEST_CASE("keys and values on the card in f32 and q8_0") {
  const auto path = test::write_model(mixed(), "gpu_kv.gguf");
  const Engine cpu = Engine::open(path, on_cpu());
  const auto tokens = some_tokens(60, cpu.info().hparams.n_vocab);
  for (const KvType type : {KvType::f32, KvType::q8_0}) {
    test::AnyCard card;
    EngineOptions options = on(*card.get());
    options.memory.kv_type = type;
    const Engine engine = Engine::open(path, options);
    CHECK(largest_difference(logits_of(engine, 16, tokens, type), logits_of(cpu, 16, tokens, type)) < kBound);
  }
}

TEST_CASE("a row on the card has the same bits in any batch") {
  test::AnyCard card;
  const Engine engine = Engine::open(test::write_model(mixed(), "gpu_bits.gguf"), on(*card.get(), {.mode = Mode::layers, .n_layers = 2}));
  const auto tokens = some_tokens(70, engine.info().hparams.n_vocab);
  const std::vector<float> want = logits_of(engine, 64, tokens);
  CHECK(test::same_bits(logits_of(engine, 1, tokens), want));
  CHECK(test::same_bits(logits_of(engine, 33, tokens), want));
}

TEST_CASE("sequences of a batch on the card: truncated, copied, saved, loaded") {
  test::AnyCard card;
  EngineOptions options = on(*card.get(), {.mode = Mode::layers, .n_layers = 2});
  options.memory.n_sequences = 4;
  options.memory.n_ctx = 600;
  const Engine engine = Engine::open(test::write_model(mixed(), "gpu_batch.gguf"), options);
  const uint32_t n_vocab = engine.info().hparams.n_vocab;
  const auto tokens = some_tokens(300, n_vocab);
  std::vector<float> want;
  {
    Session session = engine.new_session({.n_ctx = 600});
    session.append(tokens);
    want.assign(session.logits().begin(), session.logits().end());
  }
  for (const KvType type : {KvType::f16, KvType::q8_0}) {
    Batch batch(engine, {.n_ctx = 600, .n_batch = 64, .n_sequences = 3, .kv_type = type});
    Sequence a = batch.new_sequence(), b = batch.new_sequence(), c = batch.new_sequence();
    for (size_t done = 0; done < 280; done += 28) {
      const Batch::Part parts[] = {{&a, {tokens.data() + done, 28}}};
      batch.evaluate(parts);
    }
    b.copy_prefix(a, 270);
    for (size_t layer = 0; layer < a.n_layer(); ++layer)
      for (const auto& [block, n] : {std::pair<size_t, size_t>{0, 256}, {1, 24}}) {
        std::vector<std::byte> kept(a.block_bytes(n));
        a.save(layer, block, n, kept);
        c.load(layer, block, n, kept);
      }
    c.continue_with({tokens.data(), 280});
    a.truncate(265);
    const Batch::Part rest[] = {{&b, {tokens.data() + 270, 20}}, {&c, {tokens.data() + 280, 20}}, {&a, {tokens.data() + 265, 15}}};
    batch.evaluate(rest);
    const Batch::Part last[] = {{&a, {tokens.data() + 280, 20}}, {&b, {tokens.data() + 290, 10}}};
    const auto of_c = batch.logits(std::vector<size_t>{39});
    const std::vector<float> logits_c(of_c.begin(), of_c.end());
    batch.evaluate(last);
    const auto rows = batch.logits(std::vector<size_t>{19, 29});
    CHECK(std::equal(rows.begin(), rows.begin() + n_vocab, logits_c.begin()));
    CHECK(std::equal(rows.begin() + n_vocab, rows.end(), logits_c.begin()));
    if (type == KvType::f16) CHECK(largest_difference(logits_c, want) < kBound);
    CHECK(batch.hidden(19).size() == engine.info().hparams.n_embd);
    CHECK(batch.fingerprint() != Batch(Engine::open(test::write_model(mixed(), "gpu_batch.gguf"), on_cpu()), {.n_ctx = 600, .n_sequences = 3, .kv_type = type}).fingerprint());
  }
}

TEST_CASE("experts chosen on the card are told and counted as the CPU's are") {
  const auto path = test::write_model(mixed(), "gpu_uses.gguf");
  const auto uses = [&](const Engine& engine, std::vector<int>& layers) {
    Session session = engine.new_session({.n_ctx = 300, .routing = [&](int layer, std::span<const int32_t> chosen) {
                                            CHECK(chosen.size() == 40);
                                            layers.push_back(layer);
                                          }});
    session.append_all_logits(some_tokens(20, engine.info().hparams.n_vocab), [](size_t, size_t, std::span<const float>) {});
    return std::vector<uint64_t>(session.expert_uses().begin(), session.expert_uses().end());
  };
  std::vector<int> layers_cpu, layers_card;
  const auto want = uses(Engine::open(path, on_cpu()), layers_cpu);
  for (const uint32_t n : {0u, 1u, 3u}) {
    test::AnyCard card;
    layers_card.clear();
    CHECK(uses(Engine::open(path, on(*card.get(), {.mode = Mode::layers, .n_layers = n})), layers_card) == want);
    CHECK(layers_card == layers_cpu);
  }
}

TEST_CASE("experts that the card has no room for stream from the file") {
  const auto path = test::write_model(mixed(6), "gpu_streamed.gguf");
  ReferenceDevice device, whole;
  EngineOptions options = on(device, {.mode = Mode::layers, .n_layers = 2});
  options.memory.slots = 3;
  const Engine engine = Engine::open(path, options);
  REQUIRE(engine.plan().streamed);
  CHECK(engine.plan().slots.size() == 4);
  const auto tokens = some_tokens(80, engine.info().hparams.n_vocab);
  const std::vector<float> want = logits_of(Engine::open(path, on(whole, {.mode = Mode::layers, .n_layers = 2})), 64, tokens);
  for (const size_t n_batch : {1u, 40u, 64u}) CHECK(test::same_bits(logits_of(engine, n_batch, tokens), want));
  CHECK(engine.stream_stats()->slots == std::vector<uint32_t>{3, 3, 3, 3, 8, 8});
  CHECK(engine.resident_experts().size() == 48);
}

// As on a cold start, where each page that goes to the card is a major fault.
TEST_CASE("weights that were read for the card are no sign of short memory") {
  ReferenceDevice device;
  std::vector<std::string> notices;
  EngineOptions options = on(device, {.mode = Mode::layers, .n_layers = 2});
  options.memory.slots = 3;
  options.notice = [&](const std::string& line) { notices.push_back(line); };
  options.watch.faults = [&] { return device.uploaded_bytes() / 100; };
  const Engine engine = Engine::open(test::write_model(mixed(6), "gpu_cold.gguf"), options);
  REQUIRE(engine.plan().streamed);
  REQUIRE(device.uploaded_bytes() / 100 > 100 * 64);
  const auto tokens = some_tokens(64, engine.info().hparams.n_vocab);
  Session session = engine.new_session({.n_ctx = 200, .n_batch = 64});
  session.append(tokens);
  CHECK(notices.empty());
  CHECK(engine.stream_stats()->slots == std::vector<uint32_t>{3, 3, 3, 3, 8, 8});
}

namespace {

// Pages of a file that the system's page cache holds.
size_t cached_pages(const std::filesystem::path& path) {
  const FileDescriptor file(::open(path.c_str(), O_RDONLY));
  const size_t n_bytes = std::filesystem::file_size(path), page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  void* const map = ::mmap(nullptr, n_bytes, PROT_READ, MAP_SHARED, file.get(), 0);
  std::vector<unsigned char> held((n_bytes + page - 1) / page);
  const bool told = map != MAP_FAILED && ::mincore(map, n_bytes, held.data()) == 0;
  if (map != MAP_FAILED) ::munmap(map, n_bytes);
  return told ? static_cast<size_t>(std::count_if(held.begin(), held.end(), [](unsigned char c) { return (c & 1) != 0; })) : held.size();
}

struct CountingDevice : ReferenceDevice {
  std::filesystem::path path;
  size_t first_pages = 0, last_pages = 0;
  void upload_beside(int slot, void* dst, const void* src, size_t n_bytes) override {
    ReferenceDevice::upload_beside(slot, dst, src, n_bytes);
    last_pages = cached_pages(path);
    if (first_pages == 0) first_pages = last_pages;  // what came with norms and routers, up to 8 MiB around each
  }
};

}  // namespace

TEST_CASE("where experts stream, what goes to the card does not pile up in the page cache") {
  test::RandomModel model;
  model.hparams = test::small_mixtral_hparams(2, 1024);
  CountingDevice device;
  device.path = test::write_model(model, "gpu_cached.gguf");
  {
    const FileDescriptor file(::open(device.path.c_str(), O_RDONLY));
    static_cast<void>(::fsync(file.get()));  // only clean pages are dropped
  }
  drop_from_cache(device.path);
  if (cached_pages(device.path) * 10 > std::filesystem::file_size(device.path) / 4096) DUET_SKIP("this file system keeps its files in memory");
  EngineOptions options = on(device, {.mode = Mode::layers, .n_layers = 1});
  options.memory.slots = 3;
  const Engine engine = Engine::open(device.path, options);
  REQUIRE(engine.plan().streamed);
  REQUIRE(device.first_pages > 0);
  CHECK(device.last_pages < device.first_pages + engine.card_plan()->expert_bytes / 4096 / 4);
}

TEST_CASE("memory pinned for experts on their way is taken from the host's budget once") {
  const test::TempFolder root;
  struct Pinning : ReferenceDevice {
    const test::TempFolder* root = nullptr;
    uint64_t available = uint64_t{8} << 30;
    void tell() const { test::write_text(*root / "proc/meminfo", concat("MemTotal: ", 16 << 20, " kB\nMemAvailable: ", available >> 10, " kB\n")); }
    void* allocate_host(size_t n_bytes) override {
      available -= n_bytes;
      tell();
      return ReferenceDevice::allocate_host(n_bytes);
    }
  } device;
  device.root = &root;
  std::filesystem::create_directories(root / "proc");
  device.tell();
  EngineOptions options = on(device, {.mode = Mode::layers, .n_layers = 1});
  options.memory.n_batch = 160;
  options.watch.root = root.path();
  const Engine engine = Engine::open(test::write_model(mixed(), "gpu_pinned.gguf"), options);
  REQUIRE(engine.card_plan()->transit_bytes > 0);
  REQUIRE(device.available < uint64_t{8} << 30);
  CHECK(engine.plan().budget_bytes == uint64_t{8} << 30);
}

TEST_CASE("slots are no obstacle where the card has all layers") {
  const auto path = test::write_model(mixed(), "gpu_slots.gguf");
  ReferenceDevice device, other;
  EngineOptions options = on(device);
  options.memory.slots = 2;
  const Engine engine = Engine::open(path, options);
  CHECK(!engine.plan().streamed);
  CHECK(engine.card_plan()->first_layer == 0);
  const auto tokens = some_tokens(20, engine.info().hparams.n_vocab);
  CHECK(test::same_bits(logits_of(engine, 16, tokens), logits_of(Engine::open(path, on(other)), 16, tokens)));
}

TEST_CASE("long chunks have the CPU's experts copied through the card") {
  for (const auto& [name, model] : {std::pair{"gpu_transit.gguf", mixed()}, {"gpu_transit_dense.gguf", dense()}, {"gpu_transit_each.gguf", per_expert()}}) {
    const auto path = test::write_model(model, name);
    const Engine cpu = Engine::open(path, on_cpu());
    const auto tokens = some_tokens(300, cpu.info().hparams.n_vocab);
    test::AnyCard card;
    EngineOptions options = on(*card.get(), {.mode = Mode::layers, .n_layers = 1});
    options.memory.n_batch = 160;
    const Engine engine = Engine::open(path, options);
    REQUIRE(engine.card_plan()->transit_bytes > 0);
    const size_t n_vocab = engine.info().hparams.n_vocab;
    CHECK(engine.info().exact_batch == std::min(cpu.info().exact_batch, gpu::kTransitTokens - 1));
    const uint64_t rows_bytes = tokens.size() * engine.info().hparams.n_embd * sizeof(float), before = uploaded_bytes(card);
    const std::vector<float> want = logits_of(cpu, 160, tokens), through = logits_of(engine, 160, tokens);
    if (card.reference() != nullptr) CHECK(uploaded_bytes(card) - before > 2 * rows_bytes + engine.card_plan()->transit_bytes / 2);
    const std::vector<float> beside = logits_of(engine, 100, tokens);
    CHECK(share_off(through, want, n_vocab) < 0.04);
    CHECK(share_off(beside, want, n_vocab) < 0.04);
    CHECK(share_off(through, beside, n_vocab) < 0.04);
  }
}

// Of two layers of experts for the card it takes one: the larger experts of the other come through, and fit.
TEST_CASE("out of memory while placing: room for experts on their way is that of the larger ones") {
  test::RandomModel model = mixed();
  model.type = [](const std::string& name) { return name.find("blk.1.ffn") != std::string::npos ? DType::Q8_0 : DType::Q4_K; };
  const auto path = test::write_model(model, "gpu_oom_transit.gguf");
  const auto open = [&](ReferenceDevice& device, std::vector<std::string>& notices) {
    EngineOptions options = on(device, {.mode = Mode::layers, .n_layers = 2});
    options.memory.n_batch = 160;
    options.notice = [&](const std::string& line) { notices.push_back(line); };
    return Engine::open(path, options);
  };
  std::vector<std::string> none, notices;
  ReferenceDevice roomy, device(uint64_t{1} << 30);
  const gpu::CardPlan planned = *open(roomy, none).card_plan();
  CHECK(none.empty());
  device.set_hidden_use((uint64_t{1} << 30) - planned.total_bytes() + planned.expert_bytes / 4);
  const Engine engine = open(device, notices);
  CHECK(engine.card_plan()->first_layer == 2);
  CHECK(engine.card_plan()->transit_bytes > planned.transit_bytes * 3 / 2);
  REQUIRE(notices.size() == 1);
  const auto tokens = some_tokens(300, engine.info().hparams.n_vocab);
  CHECK(share_off(logits_of(engine, 160, tokens), logits_of(Engine::open(path, on_cpu()), 160, tokens), engine.info().hparams.n_vocab) < 0.04);
}

TEST_CASE("where the host's memory cannot be pinned no experts pass through the card, and a line says so") {
  std::vector<std::string> notices;
  ReferenceDevice device;
  EngineOptions options = on(device, {.mode = Mode::layers, .n_layers = 1});
  options.memory.n_batch = 160;
  options.notice = [&](const std::string& line) { notices.push_back(line); };
  const auto path = test::write_model(mixed(), "gpu_unpinned.gguf");
  REQUIRE(Engine::open(path, options).card_plan()->transit_bytes > 0);
  CHECK(notices.empty());
  device.refuse_pinned(1);
  const Engine engine = Engine::open(path, options);
  CHECK(engine.card_plan()->transit_bytes == 0);
  CHECK(engine.info().exact_batch == Engine::open(path, on_cpu()).info().exact_batch);
  REQUIRE(notices.size() == 1);
  CHECK(notices[0].starts_with("Reference card: out of memory: "));
  const auto tokens = some_tokens(140, engine.info().hparams.n_vocab);
  CHECK(test::same_bits(logits_of(engine, 140, tokens), logits_of(engine, 50, tokens)));
}

TEST_CASE("out of memory while placing: fewer layers, and a line that says so") {
  const auto path = test::write_model(mixed(), "gpu_oom.gguf");
  std::vector<std::string> notices;
  ReferenceDevice roomy;
  const Engine all = Engine::open(path, on(roomy));
  ReferenceDevice device(uint64_t{1} << 30);
  device.set_hidden_use((uint64_t{1} << 30) - all.card_plan()->total_bytes() + all.card_plan()->expert_bytes / 2);
  EngineOptions options = on(device);
  options.notice = [&](const std::string& line) { notices.push_back(line); };
  const Engine engine = Engine::open(path, options);
  REQUIRE(engine.card_plan() != nullptr);
  CHECK(engine.card_plan()->first_layer == 2);
  REQUIRE(notices.size() == 1);
  CHECK(notices[0] == "Reference card: out of memory: experts of 1 layers are on the card instead of 3");
  const auto tokens = some_tokens(30, engine.info().hparams.n_vocab);
  CHECK(largest_difference(logits_of(engine, 16, tokens), logits_of(all, 16, tokens)) < kBound);
}

TEST_CASE("out of memory while placing all layers: those that come back to the CPU pass through the card where there is room") {
  const auto path = test::write_model(mixed(), "gpu_oom_all.gguf");
  for (const bool has_room : {true, false}) {
    CAPTURE(has_room);
    std::vector<std::string> notices;
    ReferenceDevice roomy, device(uint64_t{1} << 30);
    EngineOptions options = on(roomy);
    options.memory.n_batch = 160;
    const gpu::CardPlan planned = *Engine::open(path, options).card_plan();
    REQUIRE(planned.first_layer == 0);
    REQUIRE(planned.transit_bytes == 0);
    const uint64_t missing = has_room ? planned.expert_bytes / 2 : planned.expert_bytes * 2 / 3 - 4096;
    device.set_hidden_use((uint64_t{1} << 30) - planned.total_bytes() + missing);
    options.gpu.device = &device;
    options.notice = [&](const std::string& line) { notices.push_back(line); };
    const Engine engine = Engine::open(path, options);
    CHECK(engine.card_plan()->first_layer == 2);
    CHECK((engine.card_plan()->transit_bytes > 0) == has_room);
    REQUIRE(notices.size() == (has_room ? 1 : 2));
    if (!has_room) CHECK(notices[1].find("long prompts do not have the CPU's experts copied") != std::string::npos);
    if (!has_room) continue;
    const auto tokens = some_tokens(300, engine.info().hparams.n_vocab);
    CHECK(share_off(logits_of(engine, 160, tokens), logits_of(Engine::open(path, on_cpu()), 160, tokens), engine.info().hparams.n_vocab) < 0.04);
  }
}

TEST_CASE("weights that cannot be sent: the CPU with a notice, an error where the card was asked for") {
  const auto path = test::write_model(mixed(), "gpu_unsent.gguf");
  for (const bool streams : {false, true}) {
    ReferenceDevice device;
    std::vector<std::string> notices;
    EngineOptions options = on(device);
    if (streams) options.memory.slots = 3;
    options.notice = [&](const std::string& line) { notices.push_back(line); };
    device.refuse_pinned(1);
    const Engine engine = Engine::open(path, options);
    CHECK(engine.card_plan() == nullptr);
    CHECK(engine.info().gpu == "");
    CHECK(engine.plan().streamed == streams);
    CHECK(device.used_bytes() == 0);
    REQUIRE(notices.size() == 1);
    CHECK(notices[0].starts_with("Reference card is not used: Reference card: 16.0 MiB of the host's memory cannot be pinned"));
    const auto tokens = some_tokens(20, engine.info().hparams.n_vocab);
    CHECK(test::same_bits(logits_of(engine, 16, tokens), logits_of(Engine::open(path, on_cpu()), 16, tokens)));
  }
  ReferenceDevice device;
  device.refuse_pinned(1);
  check_thrown(thrown_by([&] { Engine::open(path, on(device, {.mode = Mode::attention})); }), ErrorKind::memory, "cannot be pinned");
}

TEST_CASE("a session on a card evaluates longer batches in pieces of what the card takes") {
  test::RandomModel model = of_floats();
  model.hparams.n_expert_used = model.hparams.n_expert;
  ReferenceDevice device;
  const Engine engine = Engine::open(test::write_model(model, "gpu_pieces.gguf"), on(device));
  REQUIRE(engine.card_plan() != nullptr);
  const uint32_t most = gpu::largest_batch(engine.info().hparams);
  CHECK(most == 65536);
  CHECK(session_size(engine, 80000, 70000, 1, KvType::f16, [](const std::string&) {}).n_batch == most);
}

TEST_CASE("a card too small for anything: the CPU with a notice, an error where it was asked for") {
  const auto path = test::write_model(mixed(), "gpu_small.gguf");
  ReferenceDevice device(1 << 20);
  std::vector<std::string> notices;
  EngineOptions options = on(device);
  options.notice = [&](const std::string& line) { notices.push_back(line); };
  const Engine engine = Engine::open(path, options);
  CHECK(engine.card_plan() == nullptr);
  CHECK(engine.info().gpu_bytes == 0);
  REQUIRE(notices.size() == 1);
  CHECK(notices[0].starts_with("Reference card is not used: "));
  check_thrown(thrown_by([&] { Engine::open(path, on(device, {.mode = Mode::attention})); }), ErrorKind::memory, "MiB would do");
  check_thrown(thrown_by([&] { Engine::open(path, on(device, {.mode = Mode::automatic, .vram_bytes = 1 << 20})); }), ErrorKind::memory, "MiB would do");
  CHECK(device.used_bytes() == 0);
}

TEST_CASE("a failing card ends a step with one clear error, and every one after it") {
  ReferenceDevice device;
  const Engine engine = Engine::open(test::write_model(mixed(), "gpu_fails.gguf"), on(device));
  const auto tokens = some_tokens(12, engine.info().hparams.n_vocab);
  Session session = engine.new_session({.n_ctx = 300});
  session.append({tokens.data(), 4});
  device.fail_after(20, "an illegal memory access was encountered");
  for (int i = 0; i < 2; ++i)
    check_thrown(thrown_by([&] { session.append({tokens.data() + 4, 8}); }), ErrorKind::io, "Reference card: an illegal memory access was encountered");
  CHECK(session.tokens().size() == 4);
}

TEST_CASE("an interruption between layers leaves a session on the card that goes on") {
  ReferenceDevice device;
  const Engine engine = Engine::open(test::write_model(mixed(), "gpu_cancel.gguf"), on(device));
  const auto tokens = some_tokens(12, engine.info().hparams.n_vocab);
  std::atomic<bool> cancel{true};
  Session session = engine.new_session({.n_ctx = 300, .cancel = &cancel});
  check_thrown(thrown_by([&] { session.append(tokens); }), ErrorKind::cancelled, "interrupted");
  cancel = false;
  session.append(tokens);
  const std::vector<float> want = logits_of(engine, 64, tokens);
  CHECK(std::equal(session.logits().begin(), session.logits().end(), want.end() - engine.info().hparams.n_vocab));
}

TEST_CASE("observers are refused while a card computes") {
  const auto path = test::write_model(mixed(), "gpu_observed.gguf");
  ReferenceDevice device;
  for (const GpuOptions& gpu : {GpuOptions{.mode = Mode::automatic}, GpuOptions{.mode = Mode::attention}}) {
    const Engine engine = Engine::open(path, on(device, gpu));
    REQUIRE(engine.card_plan() != nullptr);
    check_thrown(thrown_by([&] { engine.new_session({.n_ctx = 64, .products = [](const ProductInput&) {}}); }), ErrorKind::unsupported, "open the model with --gpu off");
  }
}

TEST_CASE("sessions beyond what the card was planned for are refused, and leave it as it was") {
  const auto path = test::write_model(mixed(), "gpu_more.gguf");
  for (const GpuOptions& gpu : {GpuOptions{.mode = Mode::automatic}, GpuOptions{.mode = Mode::layers, .n_layers = 0}}) {
    ReferenceDevice device(12 << 20);
    EngineOptions options = on(device, gpu);
    options.memory.n_ctx = 256;
    const Engine engine = Engine::open(path, options);
    REQUIRE(engine.card_plan() != nullptr);
    Session first = engine.new_session({.n_ctx = 256});
    const uint64_t used = device.used_bytes();
    check_thrown(thrown_by([&] { engine.new_session({.n_ctx = 16384}); }), ErrorKind::memory, "open the model with the larger context");
    CHECK(device.used_bytes() == used);
    first.append(some_tokens(4, 97));
  }
}

TEST_CASE("modules: none, not a library, not a module") {
  CHECK(gpu::find_device({"/nowhere/a.so"}).reason == "/nowhere/a.so: no such module");
  CHECK(gpu::find_device({"/nowhere/a.so", "/nowhere/b.so"}).reason.find("DUET_CUDA") != std::string::npos);
  CHECK(gpu::find_device({DUET_SOURCE_DIR "/README.md"}).reason.find("cannot be loaded") != std::string::npos);
  CHECK(gpu::find_device({"/lib/x86_64-linux-gnu/libz.so.1", "/lib64/ld-linux-x86-64.so.2", "/nowhere"}).device == nullptr);
  CHECK(gpu::find_device({}).reason.find('\n') == std::string::npos);
}

TEST_CASE("modules: one that is there and does not work is told from a machine without a card") {
  CHECK(gpu::find_device({DUET_SOURCE_DIR "/README.md"}).is_broken);
  CHECK(!gpu::find_device({"/nowhere/a.so"}).is_broken);
  CHECK(!gpu::find_device({"/nowhere/a.so", "/nowhere/b.so"}).is_broken);
  CHECK(!gpu::find_device({DUET_GPU_EMULATED}).is_broken);
  ::setenv("DUET_EMULATED_GPU_BYTES", "0", 1);
  const gpu::FoundDevice none = gpu::find_device({DUET_GPU_EMULATED});
  ::unsetenv("DUET_EMULATED_GPU_BYTES");
  CHECK(none.device == nullptr);
  CHECK(none.reason == gpu::kNoDevice);
  CHECK(!none.is_broken);
}
