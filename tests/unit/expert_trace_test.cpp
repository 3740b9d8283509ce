#include "runtime/expert_trace.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <random>

#include "runtime/expert_replay.h"
#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"

using namespace duet;
using namespace duet::test;

namespace {

using Ids = std::vector<int32_t>;

// One layer, as many choices per token as n_used says.
ExpertTrace trace_of(uint32_t n_expert, uint32_t n_used, const std::vector<Ids>& chunks) {
  ExpertTrace trace{.header = {.n_expert = n_expert, .n_used = n_used, .expert_bytes = {10}, .slots = {2}}, .chunks = {}, .engine = {}};
  for (const Ids& chunk : chunks) trace.chunks.push_back({{chunk}});
  return trace;
}

ReplayCounts total(const std::vector<ReplayCounts>& counts) {
  ReplayCounts sum;
  for (const ReplayCounts& c : counts) sum += c;
  return sum;
}

std::vector<Ids> random_chunks(std::mt19937& random, size_t n_chunks, size_t max_tokens, int32_t n_expert) {
  std::vector<Ids> chunks(n_chunks);
  for (Ids& chunk : chunks)
    for (size_t n = random() % max_tokens + 1; n-- > 0;) {
      const auto first = static_cast<int32_t>(random() % static_cast<uint32_t>(n_expert));
      const auto step = static_cast<int32_t>(random() % static_cast<uint32_t>(n_expert - 1)) + 1;
      chunk.push_back(first);
      chunk.push_back((first + step) % n_expert);
    }
  return chunks;
}

// Fewest misses from chunk i on, by trying everything that may be held after it. Sets as bits.
uint64_t fewest_misses(const ExpertTrace& trace, size_t i, uint32_t slots, unsigned held) {
  if (i == trace.chunks.size()) return 0;
  unsigned needed = 0;
  for (const int32_t e : trace.chunks[i].layers[0]) needed |= 1u << e;
  const unsigned at_hand = held | needed;
  uint64_t best = UINT64_MAX;
  for (unsigned keep = at_hand;; keep = (keep - 1) & at_hand) {
    if (static_cast<uint32_t>(__builtin_popcount(keep)) == std::min<uint32_t>(slots, static_cast<uint32_t>(__builtin_popcount(at_hand))))
      best = std::min(best, fewest_misses(trace, i + 1, slots, keep));
    if (keep == 0) break;
  }
  return best + static_cast<uint64_t>(__builtin_popcount(needed & ~held));
}

}  // namespace

TEST_CASE("expert trace: what is written is read, with chunks that were broken off") {
  const TempFolder folder;
  const auto path = folder / "trace.jsonl";
  ExpertTraceWriter writer(path, {.n_expert = 8, .n_used = 2, .expert_bytes = {100, 200}, .slots = {3, 2}});
  writer.add(0, Ids{1, 2, 3, 4});
  writer.add(1, Ids{5, 6, 7, 0});
  writer.add(0, Ids{1, 2});  // cancelled behind the first layer
  writer.add(0, Ids{4, 3});
  writer.add(1, Ids{0, 7});
  writer.add(0, Ids{6, 5});
  CHECK_FALSE(std::filesystem::exists(path));
  StreamStats stats;
  stats.hits = 5;
  stats.reads.bytes = 7;
  stats.padding_bytes = 2;
  stats.wasted_bytes = 1;
  stats.misses = 6;
  writer.commit(stats);
  const ExpertTrace trace = read_expert_trace(path);
  CHECK(trace.header.n_expert == 8);
  CHECK(trace.header.n_used == 2);
  CHECK(trace.header.expert_bytes == std::vector<uint64_t>{100, 200});
  CHECK(trace.header.slots == std::vector<uint32_t>{3, 2});
  REQUIRE(trace.chunks.size() == 4);
  CHECK(trace.n_tokens(trace.chunks[0]) == 2);
  CHECK(trace.chunks[0].layers == std::vector<Ids>{{1, 2, 3, 4}, {5, 6, 7, 0}});
  CHECK(trace.chunks[1].layers == std::vector<Ids>{{1, 2}});
  CHECK(trace.chunks[2].layers == std::vector<Ids>{{4, 3}, {0, 7}});
  CHECK(trace.chunks[3].layers == std::vector<Ids>{{6, 5}});
  REQUIRE(trace.engine.has_value());
  CHECK(trace.engine->hits == 5);
  CHECK(trace.engine->disk_bytes == 7);
  CHECK(trace.engine->padding_bytes == 2);
  CHECK(trace.engine->wasted_bytes == 1);
  CHECK(trace.engine->misses == 6);
}

TEST_CASE("expert trace: nothing is left of a trace that was not committed") {
  const TempFolder folder;
  {
    ExpertTraceWriter writer(folder / "trace", {.n_expert = 2, .n_used = 1, .expert_bytes = {1}, .slots = {1}});
    writer.add(0, Ids{1});
  }
  CHECK(std::filesystem::is_empty(folder / ""));
}

TEST_CASE("expert trace: damaged files are refused with their line") {
  const TempFolder folder;
  const auto refused = [&](const std::string& text, const std::string& words) {
    write_text(folder / "t", text);
    check_thrown(thrown_by([&] { read_expert_trace(folder / "t"); }), ErrorKind::format, words);
  };
  const std::string header = R"({"expert_bytes":[9],"n_expert":4,"n_used":2,"slots":[2]})" "\n";
  refused("", "empty");
  refused("{}\n", "line 1");
  refused(R"({"expert_bytes":[9],"n_expert":4,"n_used":5,"slots":[2]})", "do not fit");
  refused(R"({"expert_bytes":[9],"n_expert":4294967297,"n_used":1,"slots":[2]})", "'n_expert' is 4294967297");
  refused(R"({"expert_bytes":[9],"n_expert":4,"n_used":2,"slots":[5]})", "5 slots for 4 experts");
  refused(header + R"({"layers":[[1,4]]})", "line 2: expert 4 of 4");
  refused(header + R"({"layers":[[1,-1]]})", "line 2");
  refused(header + R"({"layers":[[1]]})", "1 choices");
  refused(header + R"({"layers":[[]]})", "0 choices");
  refused(header + R"({"layers":[]})", "expected 1 to 1 layers");
  refused(header + R"({"layers":[[1,2],[1,2]]})", "expected 1 to 1 layers");
  refused(header + R"({"hits":1})", "misses");
  refused(header + "{\"hits\":1,\"misses\":2,\"disk_bytes\":3,\"padding_bytes\":4,\"wasted_bytes\":5}\n{\"layers\":[[1,2]]}", "line 3: follows the end");
  refused(R"({"expert_bytes":[9,9],"n_expert":4,"n_used":2,"slots":[2,2]})" "\n" R"({"layers":[[1,2],[1,2,0,1]]})", "a layer of more tokens than the first");
  refused(header + R"({"slots":[2,2]})", "line 2: slots of 2 layers, not 1");
  refused(header + R"({"slots":[-1]})", "line 2");
  refused(header + "{\"slots\":[1]}\n{\"slots\":[2]}", "line 3: layer 0 gets 2 slots, more than its 1");
  check_thrown(thrown_by([&] { read_expert_trace(folder / "absent"); }), ErrorKind::io, "absent");
}

TEST_CASE("expert replay: LRU, LFU and Belady on a sequence done by hand, two slots") {
  const ExpertTrace trace = trace_of(4, 1, {{0}, {0}, {1}, {2}, {0}, {1}});
  const ReplayCounts lru = total(replay_lru(trace, {2}));       // m h m m(0 out) m(1 out) m(2 out)
  const ReplayCounts lfu = total(replay_lfu(trace, {2}));       // m h m m(2 is not kept: 1 is as frequent, lower) h h
  const ReplayCounts belady = total(replay_belady(trace, {2})); // m h m m(2 is not kept) h h
  CHECK(lru.hits == 1);
  CHECK(lru.misses == 5);
  CHECK(lru.bytes == 50);
  CHECK(lfu.hits == 3);
  CHECK(belady.hits == 3);
  CHECK(belady.misses == 3);
  CHECK(total(replay_belady(trace, {2}, {{0, 1}})).misses == 1);
  CHECK(total(replay_lru(trace, {0})).hits == 0);
  CHECK(total(replay_belady(trace, {4})).misses == 3);
}

TEST_CASE("expert replay: token by token the engine's policy is LRU, with two slots or more") {
  std::mt19937 random(1);
  const ExpertTrace trace = trace_of(8, 2, random_chunks(random, 500, 1, 8));
  for (uint32_t slots = 2; slots <= 8; ++slots) {
    const auto lru = replay_lru(trace, {slots}), engine = replay_engine(trace, {slots});
    for (size_t i = 0; i < engine.size(); ++i) REQUIRE(engine[i].hits == lru[i].hits);
    CHECK(total(engine).bytes == 10 * total(engine).misses);
  }
}

TEST_CASE("expert replay: Belady misses as little as possible, chunks of several tokens included") {
  std::mt19937 random(2);
  for (int round = 0; round < 30; ++round) {
    const ExpertTrace trace = trace_of(4, 2, random_chunks(random, 7, 2, 4));
    for (uint32_t slots = 0; slots <= 4; ++slots) {
      CAPTURE(slots);
      CHECK(total(replay_belady(trace, {slots})).misses == fewest_misses(trace, 0, slots, 0));
      if (slots >= 1) CHECK(total(replay_belady(trace, {slots}, {{3}})).misses == fewest_misses(trace, 0, slots, 1u << 3));
    }
  }
}

TEST_CASE("expert replay: chunks that were broken off count for the layers they passed") {
  ExpertTrace trace{.header = {.n_expert = 4, .n_used = 1, .expert_bytes = {1, 100}, .slots = {2, 2}}, .chunks = {}, .engine = {}};
  trace.chunks = {{{{0}, {1}}}, {{{2}}}, {{{0}, {1}}}};
  for (const auto& counts : {replay_engine(trace, {2, 2}), replay_lru(trace, {2, 2}), replay_belady(trace, {2, 2})}) {
    CHECK(counts[0].bytes == 101);
    CHECK(counts[1].bytes == 1);
    CHECK(counts[2].hits == 2);
  }
}
