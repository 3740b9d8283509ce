// Prompt lookup, the gate on simulated costs, and that speculation changes nothing but the time.
#include "runtime/speculation.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <stdexcept>

#include "base/error.h"
#include "tests/support/logits.h"
#include "tests/support/random_model.h"

using namespace duet;
using test::RandomModel;
using test::some_tokens;

namespace {

// ---- prompt lookup -----------------------------------------------------------------------------

std::vector<Token> random_text(size_t n, Token n_vocab, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<Token> text(n);
  for (Token& token : text) token = static_cast<Token>(random() % static_cast<uint32_t>(n_vocab));
  return text;
}

bool alike(std::span<const Token> text, size_t end_a, size_t end_b, size_t n) {
  return n <= end_a && n <= end_b && std::equal(text.begin() + static_cast<ptrdiff_t>(end_a - n), text.begin() + static_cast<ptrdiff_t>(end_a), text.begin() + static_cast<ptrdiff_t>(end_b - n));
}

// Of the end of the text with an end further ahead, at most `most`.
size_t longest_match(std::span<const Token> text, size_t most) {
  for (size_t n = most; n >= 2; --n)
    for (size_t end = n; end < text.size(); ++end)
      if (alike(text, end, text.size(), n)) return n;
  return 0;
}

// Whether the last n tokens stood somewhere before and were followed by `draft` there.
bool stood_before(std::span<const Token> text, size_t n, const std::vector<Token>& draft) {
  for (size_t end = n; end < text.size(); ++end) {
    const size_t n_there = std::min(draft.size(), text.size() - end);
    if (alike(text, end, text.size(), n) && std::equal(draft.begin(), draft.begin() + static_cast<ptrdiff_t>(n_there), text.begin() + static_cast<ptrdiff_t>(end))) return true;
  }
  return false;
}

// ---- gate --------------------------------------------------------------------------------------

// A text where the next token of a match is right with a probability, on a machine where a step with
// k proposed tokens takes cost(k) plain steps.
struct World {
  double right_in_copy = 0.95, right_elsewhere = 0.3;
  size_t copy = 0, elsewhere = 100;  // tokens of each in turn
  std::vector<double> cost;          // [kMaxDraft + 1], cost[0] == 1
  double noise = 0.2;                // share of a step's time
};

// 1 + a for the first token, less for each further one down to b.
std::vector<double> costs(double a, double b) {
  std::vector<double> cost{1};
  for (size_t k = 1; k <= kMaxDraft; ++k) cost.push_back(cost.back() + std::max(b, a * std::pow(0.85, static_cast<double>(k - 1))));
  return cost;
}

class Simulation {
 public:
  explicit Simulation(uint32_t seed, size_t max_draft = kMaxDraft) : gate_(max_draft), random_(seed) {}

  // Time of n tokens in plain steps per token, without the noise that the gate sees.
  double run(const World& world, size_t n) {
    const size_t begin = tokens_;
    double time = 0;
    while (tokens_ - begin < n) {
      const size_t period = world.copy + world.elsewhere;
      const bool in_copy = tokens_ % period >= world.elsewhere;
      const size_t match = in_copy ? std::max<size_t>(run_ + 2, 4) : run_ + 2;
      const double right = in_copy ? world.right_in_copy : world.right_elsewhere;
      const size_t n_draft = gate_.choose(match, kMaxDraft);
      size_t n_right = 0;
      while (n_right < std::max<size_t>(n_draft, 1) && uniform() < right) ++n_right;
      const double noise = (1 + world.noise * (2 * uniform() - 1)) * (uniform() < 0.005 ? 8 : 1);
      gate_.record({match, n_draft, n_right, 0.01 * world.cost[n_draft] * noise});
      time += world.cost[n_draft];
      tokens_ += n_draft == 0 ? 1 : 1 + n_right;
      run_ = n_right == std::max<size_t>(n_draft, 1) ? run_ + n_right : 0;
      n_drafted_ += n_draft;
    }
    return time / static_cast<double>(tokens_ - begin);
  }

  size_t n_drafted() const { return n_drafted_; }

 private:
  double uniform() { return static_cast<double>(random_()) / 4294967296.0; }

  SpeculationGate gate_;
  std::mt19937 random_;
  size_t tokens_ = 0, run_ = 0, n_drafted_ = 0;
};

// ---- speculation -------------------------------------------------------------------------------

RandomModel experts_model() {
  return {.hparams = test::small_mixtral_hparams(2, 512), .type = [](const std::string& name) {
            return name.find("ffn_down") != name.npos || name == "output.weight" ? DType::Q6_K : DType::Q4_K;
          }};
}

Engine open(const std::filesystem::path& path, std::optional<uint32_t> slots = {}, uint32_t n_ctx = 256) {
  MemoryOptions memory{.n_ctx = n_ctx, .n_batch = 64};
  memory.slots = slots;
  return Engine::open(path, {.n_threads = 2, .isa = {}, .notice = {}, .memory = memory});
}

struct Answer {
  std::vector<Token> ids;
  std::vector<Token> session;  // its tokens at the end
  SpeculationStats stats;
};

struct Task {
  std::vector<Token> prompt;
  SamplerParams sampling;
  size_t n = 120;
  Token stop = -1;  // ends the answer, not part of it
  uint32_t n_ctx = 256;
};

Answer answer(const Engine& engine, const Task& task, const SpeculationOptions& options) {
  Session session = engine.new_session({.n_ctx = task.n_ctx, .n_batch = 64});
  Sampler sampler(task.sampling);
  Speculator speculator(engine, session, options);
  Answer out;
  const auto take = [&](std::span<const float> logits) -> std::optional<Token> {
    const Token token = sampler.sample(logits);
    if (token == task.stop) return std::nullopt;
    sampler.accept(token);
    out.ids.push_back(token);
    return out.ids.size() == task.n ? std::nullopt : std::optional(token);
  };
  session.sync(task.prompt);
  for (const Token token : task.prompt) sampler.accept(token);
  std::optional<Token> next = take(session.logits());
  while (next && session.tokens().size() < session.n_ctx()) {
    const size_t before = session.tokens().size(), limit = task.n - out.ids.size();
    const size_t n = speculator.step(session, *next, limit, [&](std::span<const float> logits) { return next = take(logits); });
    CHECK(n <= limit);
    REQUIRE(session.tokens().size() == before + n);
  }
  out.session.assign(session.tokens().begin(), session.tokens().end());
  out.stats = speculator.stats();
  return out;
}

// With and without speculation the same; gives what was proposed in all.
SpeculationStats check_same(const Engine& engine, const Task& task) {
  const Answer plain = answer(engine, task, {});
  CHECK(plain.stats.drafted == 0);
  SpeculationStats all;
  for (const SpeculationOptions& options : {SpeculationOptions{1, false}, {3, false}, {8, false}, {16, false}, {16, true}}) {
    CAPTURE(options.max_draft);
    CAPTURE(options.gated);
    const Answer got = answer(engine, task, options);
    CHECK(got.ids == plain.ids);
    CHECK(got.session == plain.session);
    CHECK(got.stats.tokens == plain.stats.tokens);
    CHECK(got.stats.steps == got.stats.tokens - got.stats.accepted);
    all.drafted += got.stats.drafted;
    all.accepted += got.stats.accepted;
  }
  return all;
}

// A text with a passage twice, the second time begun.
std::vector<Token> copying_prompt(Token n_vocab) {
  std::vector<Token> prompt = random_text(40, n_vocab, 3);
  prompt.insert(prompt.end(), prompt.begin() + 10, prompt.begin() + 16);
  return prompt;
}

const SamplerParams kGreedy{.temperature = 0};
SamplerParams sampled(uint64_t seed, float temperature = 0.6f) { return {.temperature = temperature, .top_k = 8, .seed = seed}; }

}  // namespace

TEST_CASE("speculation: lookup finds the longest end that stood before, and what followed it") {
  for (const Token n_vocab : {2, 5, 40}) {
    CAPTURE(n_vocab);
    const auto text = random_text(400, n_vocab, static_cast<uint32_t>(n_vocab));
    PromptLookup lookup(65536);  // so large that n-grams do not overwrite each other
    std::vector<Token> draft;
    size_t n_matches = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      lookup.push(text[i]);
      const std::span<const Token> so_far(text.data(), i + 1);
      const size_t match = lookup.match_length();
      CHECK(std::min(match, PromptLookup::kLongestGram) == longest_match(so_far, PromptLookup::kLongestGram));
      lookup.propose(7, draft);
      if (match == 0) {
        CHECK(draft.empty());
        continue;
      }
      ++n_matches;
      REQUIRE(draft.size() == 7);
      CHECK(stood_before(so_far, match, draft));
    }
    CHECK(n_matches > 0);
  }
}

TEST_CASE("speculation: a repetition is proposed beyond the end of the text") {
  PromptLookup lookup(64);
  for (int i = 0; i < 3; ++i)
    for (const Token token : {7, 8, 9}) lookup.push(token);
  CHECK(lookup.match_length() == 6);
  std::vector<Token> draft;
  lookup.propose(8, draft);
  CHECK(draft == std::vector<Token>{7, 8, 9, 7, 8, 9, 7, 8});
}

TEST_CASE("speculation: a small index forgets but never invents") {
  const auto text = random_text(20000, 60, 9);
  PromptLookup lookup(8);  // 128 entries
  std::vector<Token> draft;
  for (size_t i = 0; i < text.size(); ++i) {
    lookup.push(text[i]);
    if (i % 500 != 499 || lookup.match_length() == 0) continue;
    lookup.propose(3, draft);
    CHECK(stood_before({text.data(), i + 1}, lookup.match_length(), draft));
  }
}

TEST_CASE("speculation: the gate loses next to nothing where proposals do not pay") {
  for (const double right : {0.0, 0.1, 0.3, 0.5, 0.6})
    for (const auto& cost : {costs(0.77, 0.35), costs(1.0, 1.0), costs(0.9, 0.5), costs(3.0, 2.0)})
      for (const uint32_t seed : {1u, 2u, 3u}) {
        CAPTURE(right);
        CAPTURE(cost[1]);
        CAPTURE(seed);
        CHECK(Simulation(seed).run({.right_elsewhere = right, .cost = cost}, 4000) < 1.03);
      }
}

TEST_CASE("speculation: the gate finds the gain of copies, with costs as of experts read from disk") {
  // 4 slots of 8 experts: 1, 1.77, 2.36, 2.83, 3.19 ... for 1 to 5 tokens.
  const auto cost = costs(0.77, 0.1);
  for (const uint32_t seed : {1u, 2u, 3u}) {
    CAPTURE(seed);
    const double all = Simulation(seed).run({.right_elsewhere = 0.97, .cost = cost}, 4000);
    CHECK(all < 0.5);
    const double some = Simulation(seed).run({.right_in_copy = 0.97, .right_elsewhere = 0.2, .copy = 100, .elsewhere = 100, .cost = cost}, 8000);
    CHECK(some < 0.92);
  }
}

TEST_CASE("speculation: the gate finds small gains and cheap batches") {
  for (const uint32_t seed : {1u, 2u, 3u}) {
    CAPTURE(seed);
    CHECK(Simulation(seed).run({.right_elsewhere = 0.6, .cost = costs(0.1, 0.05)}, 4000) < 0.66);
    CHECK(Simulation(seed).run({.right_elsewhere = 0.8, .cost = costs(0.4, 0.4)}, 4000) < 0.82);
  }
}

TEST_CASE("speculation: the gate closes when costs rise and opens when they fall") {
  Simulation simulation(4);
  const World cheap{.right_elsewhere = 0.9, .cost = costs(0.2, 0.1)}, dear{.right_elsewhere = 0.9, .cost = costs(2.0, 1.5)};
  CHECK(simulation.run(cheap, 2000) < 0.5);
  CHECK(simulation.run(dear, 4000) < 1.06);
  CHECK(simulation.run(dear, 4000) < 1.03);
  simulation.run(cheap, 1000);
  CHECK(simulation.run(cheap, 2000) < 0.5);
}

TEST_CASE("speculation: the gate proposes nothing without a match, room or a plain step to compare with") {
  SpeculationGate gate(8);
  CHECK(gate.choose(10, 8) == 0);
  for (int i = 0; i < 10; ++i) gate.record({10, 0, 1, 0.01});
  CHECK(gate.choose(0, 8) == 0);
  CHECK(gate.choose(10, 0) == 0);
  CHECK(gate.choose(10, 8) == 1);  // larger ones only when it is known what smaller ones cost
  for (int i = 0; i < 2; ++i) gate.record({10, 1, 1, 0.011});
  CHECK(gate.choose(10, 8) == 2);
  for (int i = 0; i < 2; ++i) gate.record({10, 2, 2, 0.012});
  CHECK(gate.choose(10, 3) == 2);
  CHECK(gate.choose(10, 8) == 4);
  CHECK(SpeculationGate(0).choose(10, 8) == 0);
}

TEST_CASE("speculation: greedy and sampled answers are those of plain decoding, resident and streamed") {
  const RandomModel model = experts_model();
  const auto path = test::write_model(model, "speculation.gguf");
  for (const std::optional<uint32_t> slots : {std::optional<uint32_t>{}, std::optional<uint32_t>{2}}) {
    const Engine engine = open(path, slots);
    CAPTURE(engine.info().exact_batch);
    const auto prompt = copying_prompt(static_cast<Token>(model.hparams.n_vocab));
    SpeculationStats all = check_same(engine, {prompt, kGreedy});
    CHECK(all.accepted > 0);
    for (const uint64_t seed : {1u, 2u, 3u})
      for (const float temperature : {0.1f, 1.0f}) {
        const SpeculationStats some = check_same(engine, {prompt, sampled(seed, temperature), 60});
        all.drafted += some.drafted;
        all.accepted += some.accepted;
      }
    CHECK(all.drafted > all.accepted);
  }
}

TEST_CASE("speculation: penalties see the same history") {
  const RandomModel model = experts_model();
  const Engine engine = open(test::write_model(model, "speculation.gguf"));
  SpeculationStats all;
  for (const uint64_t seed : {0u, 1u, 2u}) {
    SamplerParams sampling = sampled(seed, seed == 0 ? 0.0f : 0.3f);
    sampling.repeat_penalty = 1.05f;
    sampling.frequency_penalty = 0.02f;
    sampling.presence_penalty = 0.05f;
    const SpeculationStats some = check_same(engine, {copying_prompt(static_cast<Token>(model.hparams.n_vocab)), sampling});
    all.drafted += some.drafted;
    all.accepted += some.accepted;
  }
  CHECK(all.drafted > 0);
}

TEST_CASE("speculation: an answer ends at the same token inside an accepted run: length, stop token, context") {
  const RandomModel model = experts_model();
  const Engine engine = open(test::write_model(model, "speculation.gguf"));
  const auto prompt = copying_prompt(static_cast<Token>(model.hparams.n_vocab));
  for (size_t n = 1; n < 60; n += 3) check_same(engine, {prompt, kGreedy, n});
  for (uint32_t n_ctx = 47; n_ctx < 110; n_ctx += 5) {
    const Task task{prompt, kGreedy, 1000, -1, n_ctx};
    check_same(engine, task);
    CHECK(answer(engine, task, {16, false}).session.size() == n_ctx);
  }
  const Answer whole = answer(engine, {prompt, sampled(5, 0.8f), 100}, {});
  for (size_t i = 10; i < 100; i += 6) check_same(engine, {prompt, sampled(5, 0.8f), 100, whole.ids[i]});
}

TEST_CASE("speculation: beyond a span of attention, with several threads") {
  const RandomModel model = experts_model();
  const Engine engine = open(test::write_model(model, "speculation.gguf"), {}, 2300);
  std::vector<Token> prompt = some_tokens(2040, model.hparams.n_vocab);
  const SpeculationStats all = check_same(engine, {prompt, sampled(1, 0.1f), 60, -1, 2300});
  CHECK(all.drafted > 0);
}

TEST_CASE("speculation: float weights allow few tokens at once, with the same bits") {
  for (const DType dtype : {DType::F32, DType::F16, DType::BF16}) {
    RandomModel model = experts_model();
    model.type = [=](const std::string&) { return dtype; };
    const Engine engine = open(test::write_model(model, "speculation-float.gguf"));
    CHECK(engine.info().exact_batch == 3);
    const auto prompt = copying_prompt(static_cast<Token>(model.hparams.n_vocab));
    Session session = engine.new_session({.n_ctx = 64});
    CHECK(Speculator(engine, session, {16, false}).max_draft() == 2);
    SpeculationStats all = check_same(engine, {prompt, kGreedy});
    all.accepted += check_same(engine, {prompt, sampled(1, 0.1f)}).accepted;
    CHECK(all.accepted > 0);
  }
}

TEST_CASE("speculation: an exception leaves the sequence without proposals") {
  const RandomModel model = experts_model();
  const Engine engine = open(test::write_model(model, "speculation.gguf"));
  const std::vector<Token> prompt{5, 6, 7, 8, 5, 6, 7};
  Session session = engine.new_session({.n_ctx = 64, .n_batch = 64});
  Speculator speculator(engine, session, {8, false});
  session.sync(prompt);
  CHECK_THROWS_AS(speculator.step(session, 8, 20, [](std::span<const float>) -> std::optional<Token> { throw std::runtime_error("x"); }), std::runtime_error);
  CHECK(session.tokens().size() == 8);
  CHECK(session.tokens().back() == 8);
  CHECK_THROWS_AS(Speculator(engine, session, {kMaxDraft + 1, false}), Error);
}
