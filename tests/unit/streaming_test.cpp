// Streamed experts give the logits of resident ones, byte for byte.
#include <doctest/doctest.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <iterator>

#include "base/error.h"
#include "runtime/engine.h"
#include "runtime/expert_replay.h"
#include "runtime/memory_plan.h"
#include "tests/support/errors.h"
#include "tests/support/logits.h"
#include "tests/support/random_model.h"

using namespace duet;
using test::RandomModel;
using test::same_bits;
using test::some_tokens;

namespace {

HParams mixtral_hparams() { return test::small_mixtral_hparams(3, 512); }

// Down projections of another type in one layer, as recipes mix them: buffers of two sizes.
RandomModel mixed_model(bool split_experts) {
  return {.hparams = mixtral_hparams(), .split_experts = split_experts, .type = [](const std::string& name) {
            if (name.find("blk.1.ffn_down") != name.npos || name == "output.weight") return DType::Q6_K;
            return DType::Q4_K;
          }};
}

constexpr size_t kTokens = 70;  // in batches of 32: long, long, short

std::vector<float> all_logits(const Engine& engine, uint32_t n_batch, std::span<const Token> tokens) {
  Session session = engine.new_session({.n_ctx = kTokens, .n_batch = n_batch});
  return test::all_logits(session, tokens);
}

Engine open(const std::filesystem::path& path, uint32_t slots, int n_threads = 2, const StreamOptions& stream = {}) {
  MemoryOptions memory{.n_ctx = kTokens, .n_batch = kTokens};
  memory.slots = slots;
  return Engine::open(path, {.n_threads = n_threads, .isa = {}, .notice = {}, .memory = memory, .stream = stream});
}

struct Way {
  ReadBackend backend;
  int n_threads;
  Lookahead lookahead;
};
constexpr Way kWays[] = {{ReadBackend::automatic, 2, Lookahead::on},
                         {ReadBackend::automatic, 1, Lookahead::off},
                         {ReadBackend::pread, 1, Lookahead::on},
                         {ReadBackend::pread, 2, Lookahead::off},
                         {ReadBackend::buffered, 2, Lookahead::on}};

GuessStats all_guesses(const StreamStats& stats) {
  GuessStats sum;
  for (const GuessStats& g : stats.guesses) {
    sum.asked += g.asked;
    sum.right += g.right;
    sum.used_bytes += g.used_bytes;
    sum.wasted_bytes += g.wasted_bytes;
  }
  return sum;
}

// Every byte read is accounted for.
void check_accounts(const Engine& engine, const ExpertTrace* trace = nullptr) {
  const StreamStats s = *engine.stream_stats();
  const auto& expert_bytes = engine.info().expert_bytes;
  if (trace != nullptr) {
    ReplayCounts sum;
    for (const ReplayCounts& counts : replay_engine(*trace, trace->header.slots)) sum += counts;
    CHECK(s.reads.bytes == sum.bytes + s.padding_bytes + s.wasted_bytes);
  } else if (std::equal(expert_bytes.begin() + 1, expert_bytes.end(), expert_bytes.begin())) {
    CHECK(s.reads.bytes == s.misses * expert_bytes[0] + s.padding_bytes + s.wasted_bytes);
  }
  CHECK(s.wasted_bytes <= s.speculative_bytes);
  CHECK(s.speculative_bytes <= s.reads.bytes);
  const GuessStats guesses = all_guesses(s);
  CHECK(guesses.right <= guesses.asked);
  CHECK(guesses.used_bytes + guesses.wasted_bytes <= s.speculative_bytes);
  CHECK(guesses.wasted_bytes <= s.wasted_bytes);
}

void check_equal(const RandomModel& model, std::initializer_list<uint32_t> all_slots,
                 std::initializer_list<uint32_t> batches = {1, 7, 32, static_cast<uint32_t>(kTokens)}) {
  const auto path = test::write_model(model, "stream.gguf");
  const auto tokens = some_tokens(kTokens, model.hparams.n_vocab);
  for (const uint32_t n_batch : batches) {
    const auto want = all_logits(Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}}), n_batch, tokens);
    for (const Way& way : kWays)
      for (const uint32_t slots : all_slots) {
        CAPTURE(n_batch);
        CAPTURE(slots);
        CAPTURE(static_cast<int>(way.backend));
        CAPTURE(static_cast<int>(way.lookahead));
        const Engine engine = open(path, slots, way.n_threads, {.backend = way.backend, .piece_bytes = 16384, .lookahead = way.lookahead});
        REQUIRE(engine.plan().streamed);
        CHECK(same_bits(all_logits(engine, n_batch, tokens), want));
        if (n_batch == 7) CHECK(same_bits(all_logits(engine, n_batch, tokens), want));  // again, with what is in memory now
        const StreamStats stats = *engine.stream_stats();
        CHECK(stats.misses > 0);
        if (n_batch == 1 && slots < 7) CHECK((all_guesses(stats).asked > 0) == (way.lookahead == Lookahead::on));
        if (n_batch == 1 && way.lookahead == Lookahead::off) CHECK(stats.speculative_bytes == 0);
        check_accounts(engine);
      }
  }
}

}  // namespace

TEST_CASE("streaming: logits equal resident ones, merged experts") { check_equal(mixed_model(false), {0, 1, 2, 3, 7}); }
TEST_CASE("streaming: logits equal resident ones, per-expert tensors") { check_equal(mixed_model(true), {1, 2, 8}); }

// The last layer's experts are read for the last token of a prompt only, and what follows a chunk is read ahead.
TEST_CASE("streaming: prompts in chunks, of which one token's logits are wanted") {
  const RandomModel model = mixed_model(false);
  const auto path = test::write_model(model, "stream.gguf");
  const auto tokens = some_tokens(kTokens, model.hparams.n_vocab);
  for (const uint32_t n_batch : {7u, 32u, 40u, static_cast<uint32_t>(kTokens)})
    for (const uint32_t slots : {0u, 2u, 7u}) {
      CAPTURE(n_batch);
      CAPTURE(slots);
      const auto last_logits = [&](const Engine& engine, RoutingFn routing) {
        Session session = engine.new_session({.n_ctx = 2 * kTokens, .n_batch = n_batch, .routing = std::move(routing)});
        session.append(tokens);
        session.append(tokens);  // with what is in memory now
        return std::vector<float>(session.logits().begin(), session.logits().end());
      };
      const auto want = last_logits(Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}}), {});
      const Engine engine = open(path, slots, 2, {.backend = ReadBackend::automatic, .piece_bytes = 16384, .lookahead = Lookahead::off});
      const auto trace_path = path.parent_path() / "trace.jsonl";
      ExpertTraceWriter writer(trace_path, trace_header(engine));
      CHECK(same_bits(last_logits(engine, trace_routing(writer, engine)), want));
      writer.commit(engine.stream_stats());
      const ExpertTrace trace = read_expert_trace(trace_path);
      check_accounts(engine, &trace);
      if (n_batch != 32) CHECK(engine.stream_stats()->wasted_bytes == 0);  // 32 tokens leave an expert out, which had been read ahead
      const size_t n_layer = model.hparams.n_layer;
      for (size_t i = 0; i < trace.chunks.size(); ++i) {
        const bool ends = (i + 1) % (trace.chunks.size() / 2) == 0;
        CHECK(trace.chunks[i].layers.size() == n_layer - !ends);
        if (ends) CHECK(trace.chunks[i].layers.back().size() == model.hparams.n_expert_used);
      }
    }
}

// Token after token, so that most of the guesses come from far away; the depth changes between tokens too.
TEST_CASE("streaming: guesses for several layers, experts of two sizes") {
  constexpr uint32_t kLayers = 8;
  constexpr size_t kSteps = 30;
  constexpr ReadBackend kBackends[] = {ReadBackend::automatic, ReadBackend::pread, ReadBackend::buffered};
  constexpr uint32_t kReaches[] = {2, kLookaheadLayers}, kSlots[] = {0, 1, 2, 3, 6};
  RandomModel model = mixed_model(false);
  model.hparams = test::small_mixtral_hparams(kLayers, 256);
  model.type = [](const std::string& name) {
    const bool large = name.find("blk.1.ffn_down") != name.npos || name.find("blk.4.ffn_down") != name.npos || name == "output.weight";
    return large ? DType::Q6_K : DType::Q4_K;
  };
  const auto path = test::write_model(model, "stream.gguf");
  const auto tokens = some_tokens(kSteps, model.hparams.n_vocab);
  const auto want = all_logits(Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}}), 1, tokens);
  // Any two of backend, reach and slots meet.
  for (size_t b = 0; b < std::size(kBackends); ++b)
    for (size_t i = 0; i < std::size(kSlots); ++i) {
      const ReadBackend backend = kBackends[b];
      const uint32_t reach = kReaches[(b + i) % 2], slots = kSlots[i];
      CAPTURE(static_cast<int>(backend));
      CAPTURE(reach);
      CAPTURE(slots);
      const Engine engine = open(path, slots, 2, {.backend = backend, .piece_bytes = 16384, .lookahead = Lookahead::on, .lookahead_layers = reach});
      const auto trace_path = path.parent_path() / "trace.jsonl";
      ExpertTraceWriter writer(trace_path, trace_header(engine));
      Session session = engine.new_session({.n_ctx = kTokens, .n_batch = 1, .routing = trace_routing(writer, engine)});
      std::vector<float> got;
      for (size_t t = 0; t < kSteps; ++t) {
        if (t == kSteps / 2) engine.set_lookahead(Lookahead::off, 0);
        if (t == kSteps / 2 + 5) engine.set_lookahead(Lookahead::automatic, reach);
        session.append({&tokens[t], 1});
        got.insert(got.end(), session.logits().begin(), session.logits().end());
      }
      CHECK(same_bits(got, want));
      writer.commit(engine.stream_stats());
      const ExpertTrace trace = read_expert_trace(trace_path);
      check_accounts(engine, &trace);
      const auto guesses = engine.stream_stats()->guesses;
      if (slots >= 2) CHECK(guesses[1].asked > 0);
      for (size_t ahead = reach; ahead < guesses.size(); ++ahead) CHECK(guesses[ahead].asked == 0);
    }
}

TEST_CASE("streaming: float experts") {
  check_equal({.hparams = mixtral_hparams(), .type = [](const std::string&) { return DType::F32; }}, {2}, {7, kTokens});
}

TEST_CASE("streaming: hits and misses are counted, with all slots an expert is read once") {
  const RandomModel model = mixed_model(false);
  const auto path = test::write_model(model, "stream.gguf");
  const Engine engine = open(path, 8, 2, {.lookahead = Lookahead::off});
  const auto tokens = some_tokens(kTokens, model.hparams.n_vocab);
  const auto run = [&] { all_logits(engine, 10, tokens); };  // too few tokens at once to read ahead
  run();
  const StreamStats first = *engine.stream_stats();
  CHECK(first.misses > 0);
  CHECK(first.misses <= 3 * 8);
  run();
  const StreamStats second = *engine.stream_stats();
  CHECK(second.misses == first.misses);
  CHECK(second.hits == 2 * first.hits + first.misses);
  CHECK(second.reads.bytes == first.reads.bytes);
}

TEST_CASE("streaming: the replay of a trace counts what the engine counted, chunk by chunk") {
  const RandomModel model = mixed_model(false);
  const auto path = test::write_model(model, "stream.gguf");
  const auto tokens = some_tokens(kTokens, model.hparams.n_vocab);
  for (const uint32_t slots : {0u, 1u, 2u, 3u, 7u}) {
    CAPTURE(slots);
    const Engine engine = open(path, slots, 2, {.piece_bytes = 16384, .lookahead = slots % 2 == 0 ? Lookahead::off : Lookahead::on});
    const auto trace_path = path.parent_path() / "trace.jsonl";
    ExpertTraceWriter writer(trace_path, trace_header(engine));
    std::atomic<bool> cancel{false};
    bool cancel_at_1 = false;
    Session session = engine.new_session({.n_ctx = kTokens, .n_batch = 7, .cancel = &cancel, .routing = [&](int layer, std::span<const int32_t> experts) {
      writer.add(layer, experts);
      if (cancel_at_1 && layer == 1) cancel = true;
    }});
    std::vector<uint64_t> misses;  // after each call
    const auto append = [&](size_t first, size_t n) {
      session.append({&tokens[first], n});
      misses.push_back(engine.stream_stats()->misses);
    };
    append(0, 17);  // chunks of 7, 7, 3
    for (size_t i = 17; i < 30; ++i) append(i, 1);
    cancel_at_1 = true;
    CHECK_THROWS_AS(append(30, 5), Error);
    cancel = cancel_at_1 = false;
    append(30, 5);
    session.truncate(20);
    append(20, 1);
    writer.commit(engine.stream_stats());

    const ExpertTrace trace = read_expert_trace(trace_path);
    CHECK(trace.header.expert_bytes == engine.info().expert_bytes);
    CHECK(trace.header.slots == std::vector<uint32_t>(3, slots));
    REQUIRE(trace.chunks.size() == 3 + 13 + 1 + 1 + 1);
    CHECK(trace.chunks[16].layers.size() == 2);
    const auto counts = replay_engine(trace, trace.header.slots);
    ReplayCounts sum;
    for (size_t i = 0, call = 0; i < counts.size(); ++i) {
      sum += counts[i];
      if (i < 2 || i == 16) continue;
      CHECK(sum.misses == misses[call++]);
    }
    CHECK(sum.hits == engine.stream_stats()->hits);
    CHECK(sum.misses == engine.stream_stats()->misses);
    CHECK(trace.engine->hits == sum.hits);
    CHECK(trace.engine->misses == sum.misses);
    check_accounts(engine, &trace);
  }
}

TEST_CASE("streaming: the bytes of one expert are those in the file") {
  const HParams h = mixtral_hparams();
  const auto path = test::write_model(mixed_model(true), "stream.gguf");
  const uint64_t q4 = uint64_t{h.n_ff} * h.n_embd / 256 * 144, q6 = uint64_t{h.n_ff} * h.n_embd / 256 * 210;
  CHECK(open(path, 2).info().expert_bytes == std::vector<uint64_t>{3 * q4, 2 * q4 + q6, 3 * q4});
}

TEST_CASE("streaming: a failed read is an error, and the session goes on where it stood") {
  const RandomModel model = mixed_model(false);
  const auto path = test::write_model(model, "stream.gguf");
  const auto tokens = some_tokens(kTokens, model.hparams.n_vocab);
  const auto want = all_logits(Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}}), 1, tokens);
  for (const int error : {EIO, ENODATA}) {
    std::atomic<bool> armed{false};
    StreamOptions stream{.lookahead = Lookahead::off};
    stream.fault = [&](uint64_t, size_t) { return armed.exchange(false) ? error : 0; };
    const Engine engine = open(path, 2, 2, stream);
    Session session = engine.new_session({.n_ctx = kTokens, .n_batch = 1});
    std::vector<float> got;
    const auto append = [&](size_t i) {
      session.append({&tokens[i], 1});
      got.insert(got.end(), session.logits().begin(), session.logits().end());
    };
    for (size_t i = 0; i < 20; ++i) append(i);
    armed = true;
    size_t n_failed = 0;
    for (size_t i = 20; i < kTokens;) {
      try {
        append(i);
        ++i;
      } catch (const Error& e) {
        CHECK(e.kind() == ErrorKind::io);
        CHECK(std::string(e.what()).find("expert") != std::string::npos);
        ++n_failed;
      }
    }
    CHECK(n_failed == 1);
    CHECK(same_bits(got, want));
  }
}

TEST_CASE("streaming: reads that fail while looking ahead cost at most the token they were needed for") {
  const RandomModel model = mixed_model(false);
  const auto path = test::write_model(model, "stream.gguf");
  const auto tokens = some_tokens(kTokens, model.hparams.n_vocab);
  const auto want = all_logits(Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}}), 1, tokens);
  for (const uint32_t slots : {1u, 2u, 3u}) {
    CAPTURE(slots);
    std::atomic<uint64_t> n_reads{0};
    StreamOptions stream{.piece_bytes = 16384, .lookahead = Lookahead::on};
    stream.fault = [&](uint64_t attempt, size_t) { return attempt > 0 && ++n_reads % 211 == 0 ? EIO : 0; };
    const Engine engine = open(path, slots, 2, stream);
    Session session = engine.new_session({.n_ctx = kTokens, .n_batch = 1});
    std::vector<float> got;
    size_t n_failed = 0;
    for (size_t i = 0; i < kTokens && n_failed < 1000;) {
      try {
        session.append({&tokens[i], 1});
        got.insert(got.end(), session.logits().begin(), session.logits().end());
        ++i;
      } catch (const Error& e) {
        CHECK(e.kind() == ErrorKind::io);
        ++n_failed;
      }
    }
    CHECK(n_failed > 0);
    CHECK(all_guesses(*engine.stream_stats()).asked > 0);
    CHECK(same_bits(got, want));
  }
}

TEST_CASE("streaming: cancelled in the middle, then continued") {
  const RandomModel model = mixed_model(false);
  const auto path = test::write_model(model, "stream.gguf");
  const auto tokens = some_tokens(kTokens, model.hparams.n_vocab);
  const auto want = all_logits(Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}}), 1, tokens);
  std::atomic<bool> cancel{false};
  StreamOptions stream{.piece_bytes = 16384, .lookahead = Lookahead::on};
  std::atomic<uint64_t> n_reads{0};
  stream.fault = [&](uint64_t, size_t) {
    if (++n_reads % 301 == 0) cancel = true;
    return 0;
  };
  const Engine engine = open(path, 2, 2, stream);
  Session session = engine.new_session({.n_ctx = kTokens, .n_batch = 1, .cancel = &cancel});
  std::vector<float> got;
  size_t n_cancelled = 0;
  for (size_t i = 0; i < kTokens;) {
    try {
      session.append({&tokens[i], 1});
      got.insert(got.end(), session.logits().begin(), session.logits().end());
      ++i;
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::cancelled);
      cancel = false;
      ++n_cancelled;
    }
  }
  CHECK(n_cancelled > 0);
  CHECK(same_bits(got, want));
  CHECK(all_guesses(*engine.stream_stats()).right > 0);
}
