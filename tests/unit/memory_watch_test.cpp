// Memory that becomes short while experts stream: fewer are held, the output stays.
#include "runtime/memory_watch.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <thread>

#include "base/error.h"
#include "runtime/expert_replay.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/logits.h"
#include "tests/support/random_model.h"

using namespace duet;
using namespace duet::test;
using std::chrono::milliseconds;
using std::chrono::seconds;

namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20, kGiB = uint64_t{1} << 30;
constexpr uint32_t kTokens = 120;

uint32_t sum(const std::vector<uint32_t>& slots) { return std::accumulate(slots.begin(), slots.end(), 0u); }

// A machine of files, whose owner changes its mind.
struct Machine {
  TempFolder root;
  Machine() { file("proc/self/cgroup", "4:memory:/g"); }
  void file(const std::string& path, const std::string& text) const { write_text(root / path, text + "\n"); }
  void hard(uint64_t n_bytes) const { file("sys/fs/cgroup/memory/g/memory.limit_in_bytes", std::to_string(n_bytes)); }
  void soft(uint64_t n_bytes) const { file("sys/fs/cgroup/memory/g/memory.soft_limit_in_bytes", std::to_string(n_bytes)); }
  void used(uint64_t n_bytes) const { file("sys/fs/cgroup/memory/g/memory.usage_in_bytes", std::to_string(n_bytes)); }
  void waits(const char* percent) const { file("proc/pressure/memory", concat("full avg10=", percent, " avg60=0")); }
};

ModelSizes sizes_8x7b() {
  ModelSizes sizes;
  sizes.hparams.n_expert = 8;
  sizes.hparams.n_expert_used = 2;
  sizes.hparams.n_vocab = 32000;
  sizes.hparams.n_layer = 32;
  sizes.dense_bytes = kGiB;
  sizes.expert_bytes.assign(32, 100 * kMiB);
  sizes.expert_file_bytes.assign(32, 800 * kMiB);
  return sizes;
}

// 4 slots a layer: 12.5 GiB, and 1.5 GiB beside.
MemoryPlan plan_of(const ModelSizes& sizes, uint32_t slots) {
  MemoryPlan plan;
  plan.streamed = true;
  plan.dense_bytes = sizes.dense_bytes;
  plan.io_bytes = 512 * kMiB;
  plan.slots.assign(32, slots + 1);
  return with_one_slot_less(std::move(plan), sizes);  // counts them
}

struct Watch {
  Machine machine;
  ModelSizes sizes = sizes_8x7b();
  MemoryPlan plan = plan_of(sizes, 4);
  std::vector<std::string> notices;
  MemoryWatch::Clock::time_point now = MemoryWatch::Clock::now();
  std::optional<MemoryWatch> watch;

  void begin() {
    watch.emplace(sizes, plan, WatchOptions{machine.root.path(), seconds(1)}, [this](const std::string& text) { notices.push_back(text); });
  }
  std::optional<std::vector<uint32_t>> after(milliseconds passed, size_t n_tokens = 1) {
    now += passed;
    return watch->after(n_tokens, now);
  }
};

}  // namespace

TEST_CASE("memory watch: a lowered limit is answered by the slots that fit below it") {
  for (const bool soft : {false, true}) {
    CAPTURE(soft);
    Watch w;
    const auto limit = [&](uint64_t n_bytes) { soft ? w.machine.soft(n_bytes) : w.machine.hard(n_bytes); };
    limit(16 * kGiB);
    w.begin();
    CHECK_FALSE(w.after(milliseconds(2000)).has_value());
    limit(15 * kGiB);  // the plan takes 14.1
    CHECK_FALSE(w.after(milliseconds(2000)).has_value());
    CHECK(w.notices.empty());
    limit(11 * kGiB);
    CHECK_FALSE(w.after(milliseconds(900)).has_value());  // not looked at again yet
    const auto slots = w.after(milliseconds(200));
    REQUIRE(slots.has_value());
    CHECK(*std::min_element(slots->begin(), slots->end()) == 2);
    CHECK(*std::max_element(slots->begin(), slots->end()) == 3);
    const uint64_t taken = sum(*slots) * 100 * kMiB + 1536 * kMiB;
    CHECK(taken < 11 * kGiB - 128 * kMiB);
    CHECK(taken > 11 * kGiB - 450 * kMiB);
    REQUIRE(w.notices.size() == 1);
    CHECK(w.notices[0].starts_with(soft ? "soft memory limit lowered to 11.0 GiB: 2 to 3 experts" : "memory limit lowered to 11.0 GiB: 2 to 3 experts"));
    limit(20 * kGiB);  // raised: nothing comes back
    CHECK_FALSE(w.after(milliseconds(1100)).has_value());
    limit(11 * kGiB);  // and lowered to where we are already
    CHECK_FALSE(w.after(milliseconds(1100)).has_value());
    CHECK(w.notices.size() == 1);
  }
}

TEST_CASE("memory watch: an automatic budget restores its reserve when others take it, one asked for does not") {
  for (const bool automatic : {true, false}) {
    CAPTURE(automatic);
    Watch w;
    const auto available = [&](uint64_t n_mib) { w.machine.file("proc/meminfo", concat("MemTotal: ", 24 * 1024 * 1024, " kB\nMemAvailable: ", n_mib * 1024, " kB")); };
    if (automatic) w.plan.reserve_bytes = 1536 * kMiB;
    available(1500);
    w.begin();
    available(800);
    CHECK_FALSE(w.after(milliseconds(1100)).has_value());
    available(700);
    const auto slots = w.after(milliseconds(1100));
    CHECK(slots.has_value() == automatic);
    if (!automatic) continue;
    const uint32_t given = 32 * 4 - sum(*slots);
    CHECK(given >= 9);  // 836 MiB
    CHECK(given <= 10);
    REQUIRE(w.notices.size() == 1);
    CHECK(w.notices[0].starts_with("available memory has fallen to 700.0 MiB: 3 to 4 experts"));
    available(1500);
    CHECK_FALSE(w.after(milliseconds(1100)).has_value());
  }
}

TEST_CASE("memory watch: a soft limit that was there from the beginning is no news") {
  Watch w;
  w.machine.soft(kGiB);
  w.begin();
  CHECK_FALSE(w.after(milliseconds(5000)).has_value());
}

TEST_CASE("memory watch: what others in the group use counts, what is ours does not") {
  Watch w;
  w.machine.hard(20 * kGiB);
  w.machine.file("proc/self/statm", concat(5000 * 256 * 1024, " ", 14 * 256 * 1024, " 0 1 0 1 0"));  // ours: 14 GiB
  w.machine.used(14 * kGiB);
  w.begin();
  w.machine.hard(19 * kGiB);
  CHECK_FALSE(w.after(milliseconds(1100)).has_value());
  w.machine.hard(18 * kGiB);
  w.machine.used(18 * kGiB);
  const auto slots = w.after(milliseconds(1100));  // 14 less 288 MiB are left for us
  REQUIRE(slots.has_value());
  CHECK(*std::min_element(slots->begin(), slots->end()) == 3);
}

TEST_CASE("memory watch: a limit below the floor takes all slots and is told") {
  Watch w;
  w.machine.hard(16 * kGiB);
  w.begin();
  w.machine.hard(kGiB);
  const auto slots = w.after(milliseconds(1100));
  REQUIRE(slots.has_value());
  CHECK(sum(*slots) == 0);
  REQUIRE(w.notices.size() == 2);
  CHECK(w.notices[1].find("still takes 1.6 GiB") != std::string::npos);
  w.machine.hard(kGiB / 2);
  CHECK_FALSE(w.after(milliseconds(1100)).has_value());
  CHECK(w.notices.size() == 3);
}

TEST_CASE("memory watch: one slot less each time the system waits for memory") {
  Watch w;
  w.machine.waits("50");
  w.begin();
  CHECK_FALSE(w.after(milliseconds(5000), 64).has_value());
  for (uint32_t left = 3;; --left) {
    const auto slots = w.after(milliseconds(11000), 64);
    REQUIRE(slots.has_value());
    CHECK(*slots == std::vector<uint32_t>(32, left));
    CHECK(w.notices.back().find("50 % of the time waiting for it") != std::string::npos);
    if (left == 0) break;
    CHECK_FALSE(w.after(milliseconds(11000), 63).has_value());
  }
  CHECK_FALSE(w.after(milliseconds(11000), 64).has_value());
  CHECK(w.notices.size() == 5);
  CHECK(w.notices.back().find("no experts are held") != std::string::npos);
  CHECK_FALSE(w.after(milliseconds(11000), 64).has_value());
  CHECK(w.notices.size() == 5);
}

TEST_CASE("memory watch: what loading faulted and waited is no sign of short memory, a limit lowered meanwhile is") {
  Watch w;
  uint64_t faults = 1000;
  w.machine.hard(16 * kGiB);
  w.watch.emplace(w.sizes, w.plan, WatchOptions{.root = w.machine.root.path(), .interval = seconds(1), .faults = [&] { return faults; }},
                  [&w](const std::string& text) { w.notices.push_back(text); });
  faults += 1'000'000;
  w.machine.waits("90");
  w.now += seconds(30);
  w.watch->begin(w.now);
  CHECK_FALSE(w.after(seconds(2), 64).has_value());
  CHECK(w.notices.empty());
  w.machine.waits("0");
  faults += 1'000'000;
  REQUIRE(w.after(seconds(2), 64).has_value());
  CHECK(w.notices[0].starts_with("memory is short (15625 major faults a token"));

  Watch lowered;
  lowered.machine.hard(16 * kGiB);
  lowered.begin();
  lowered.machine.hard(11 * kGiB);
  lowered.watch->begin(lowered.now);
  CHECK(lowered.after(seconds(2)).has_value());
}

TEST_CASE("streaming: the limit is lowered while running, the logits and the trace stay true") {
  const HParams h = small_mixtral_hparams(3, 256);
  const auto path = write_model({.hparams = h, .type = [](const std::string&) { return DType::Q4_K; }}, "watch.gguf");
  const auto tokens = some_tokens(kTokens, h.n_vocab);
  Session resident = Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}}).new_session({.n_ctx = kTokens, .n_batch = 1});
  const auto want = all_logits(resident, tokens);

  const Machine machine;
  machine.hard(kGiB);
  std::vector<std::string> notices;
  MemoryOptions memory{.n_ctx = kTokens, .n_batch = kTokens};
  memory.slots = 6;
  const Engine engine = Engine::open(path, {.n_threads = 2, .isa = {}, .notice = [&](const std::string& text) { notices.push_back(text); },
                                            .memory = memory, .watch = {.root = machine.root.path(), .interval = milliseconds(0)}});
  const auto trace_path = path.parent_path() / "watch.jsonl";
  ExpertTraceWriter writer(trace_path, trace_header(engine));
  Session session = engine.new_session({.n_ctx = kTokens, .n_batch = 1, .routing = trace_routing(writer, engine)});
  const MemoryPlan& plan = engine.plan();
  const uint64_t slot = plan.expert_bytes / 18;
  std::vector<float> got;
  std::vector<std::vector<uint32_t>> held;
  for (size_t i = 0; i < kTokens; ++i) {
    if (i == 30) machine.soft(plan.total_bytes + 128 * kMiB - 5 * slot);
    if (i == 40) machine.hard(plan.total_bytes + 128 * kMiB - 9 * slot);
    if (i == 70) machine.hard(kMiB);
    session.append({&tokens[i], 1});
    got.insert(got.end(), session.logits().begin(), session.logits().end());
    if (i == 29 || i == 30 || i == 40 || i == 70) held.push_back(engine.stream_stats()->slots);
  }
  CHECK(same_bits(got, want));
  CHECK(sum(held[0]) == 18);
  CHECK(sum(held[1]) == 13);
  CHECK(sum(held[2]) == 9);
  CHECK(sum(held[3]) == 0);
  CHECK(notices.size() == 4);

  writer.commit(engine.stream_stats());
  ExpertTrace trace = read_expert_trace(trace_path);
  CHECK(trace.chunks[30].slots.empty());
  CHECK(trace.chunks[31].slots == held[1]);
  CHECK(trace.chunks[41].slots == held[2]);
  CHECK(trace.chunks[71].slots == held[3]);
  ReplayCounts replayed, best;
  for (const ReplayCounts& counts : replay_engine(trace, trace.header.slots)) replayed += counts;
  CHECK(replayed.hits == engine.stream_stats()->hits);
  CHECK(replayed.misses == engine.stream_stats()->misses);
  for (const ReplayCounts& counts : replay_belady(trace, trace.header.slots)) best += counts;
  CHECK(best.misses <= replayed.misses);
  ExpertTrace as_if = trace;
  for (ExpertTrace::Chunk& chunk : as_if.chunks) chunk.slots.clear();
  ReplayCounts kept;
  for (const ReplayCounts& counts : replay_engine(as_if, trace.header.slots)) kept += counts;
  CHECK(kept.misses < replayed.misses);

  // A long prompt, and a session of its own, after all slots are gone.
  Session other = engine.new_session({.n_ctx = kTokens, .n_batch = kTokens});
  Session same = Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}}).new_session({.n_ctx = kTokens, .n_batch = kTokens});
  CHECK(same_bits(all_logits(other, tokens), all_logits(same, tokens)));
}
