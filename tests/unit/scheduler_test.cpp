// The scheduler: streams that run together are those that run alone, clients may leave, nothing stays.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <thread>

#include "server/logprobs.h"
#include "server/scheduler.h"
#include "tests/support/logits.h"
#include "tests/support/tiny_model.h"

using namespace duet;
using namespace duet::server;

namespace {

using namespace std::chrono_literals;

Engine open_tiny(const char* name) {
  const std::filesystem::path path = std::filesystem::path(DUET_TEST_DIR) / name;
  test::write_tiny_model(path, {.n_head_kv = 2, .type = DType::Q8_0});
  Engine engine = Engine::open(path, {.n_threads = 2, .isa = {}, .notice = {}});
  std::filesystem::remove(path);
  return engine;
}

GenerationParams params_of(size_t n, uint64_t seed, float temperature) {
  GenerationParams params;
  params.max_tokens = n;
  params.sampling.temperature = temperature;
  params.sampling.seed = seed;
  params.ignore_eos = true;
  return params;
}

std::vector<Token> alone(const Engine& engine, const std::vector<Token>& prompt, const GenerationParams& params) {
  Session session = engine.new_session({.n_ctx = 256});
  session.append(prompt);
  Sampler sampler(params.sampling);
  std::vector<Token> out;
  while (out.size() < params.max_tokens) {
    out.push_back(sampler.sample(session.logits()));
    sampler.accept(out.back());
    session.append({&out.back(), 1});
  }
  return out;
}

struct Result {
  std::vector<Token> tokens;
  std::string text;
  size_t n_cached = 0;
  Finish finish;
};

Result run(Scheduler& scheduler, const std::vector<Token>& prompt, const GenerationParams& params) {
  Inbox inbox;
  std::vector<std::unique_ptr<Job>> jobs;
  jobs.push_back(std::make_unique<Job>(inbox, prompt, params));
  const Ticket ticket(scheduler, {jobs[0].get()});
  Result out;
  if (!ticket.queued()) return out;
  for (;;) {
    if (!Job::wait_any(inbox, jobs, 10s)) return out;
    const Update update = jobs[0]->take();
    out.text += update.text;
    out.n_cached = update.n_cached;
    for (const TokenRecord& token : update.tokens) out.tokens.push_back(token.id);
    if (update.finish) {
      out.finish = *update.finish;
      return out;
    }
  }
}

std::vector<Token> prompt_of(size_t i, uint32_t n_vocab) {
  auto prompt = test::some_tokens(10 + 17 * i, n_vocab);
  prompt[0] = static_cast<Token>(5 + i);
  return prompt;
}

}  // namespace

TEST_CASE("streams that run together are those that run alone, more of them than fit at once") {
  const Engine engine = open_tiny("scheduler.gguf");
  Metrics metrics;
  Scheduler scheduler(engine, {.n_parallel = 3, .n_ctx = 256, .n_batch = 32}, metrics);
  constexpr size_t kStreams = 8;
  std::vector<Result> results(kStreams);
  std::vector<std::thread> clients;
  const auto params = [](size_t i) { return params_of(20 + i, i, i % 2 == 0 ? 0.0f : 1.0f); };
  for (size_t i = 0; i < kStreams; ++i)
    clients.emplace_back([&, i] { results[i] = run(scheduler, prompt_of(i, engine.info().hparams.n_vocab), params(i)); });
  for (std::thread& client : clients) client.join();
  for (size_t i = 0; i < kStreams; ++i) {
    CAPTURE(i);
    CHECK(results[i].finish.reason == FinishReason::length);
    CHECK(results[i].tokens == alone(engine, prompt_of(i, engine.info().hparams.n_vocab), params(i)));
  }
  CHECK(scheduler.status().running.empty());
  CHECK(metrics.requests == kStreams);
  CHECK(metrics.steps < 8 * 28);  // they did share batches
}

TEST_CASE("a second turn evaluates only what is new, also after another client spoke") {
  const Engine engine = open_tiny("turns.gguf");
  const uint32_t n_vocab = engine.info().hparams.n_vocab;
  Metrics metrics;
  Scheduler scheduler(engine, {.n_parallel = 2, .n_ctx = 256}, metrics);
  std::vector<Token> turn = prompt_of(6, n_vocab);
  const auto params = params_of(5, 1, 0);
  const Result first = run(scheduler, turn, params);
  CHECK(first.n_cached == 0);
  run(scheduler, prompt_of(3, n_vocab), params);
  turn.insert(turn.end(), first.tokens.begin(), first.tokens.end());
  turn.push_back(7);
  const Result second = run(scheduler, turn, params);
  CHECK(second.n_cached == turn.size() - 2);  // all that was evaluated: not the last token generated
  CHECK(second.tokens == alone(engine, turn, params));
  const Result again = run(scheduler, prompt_of(6, n_vocab), params);
  CHECK(again.tokens == first.tokens);
}

TEST_CASE("a long prompt goes on while others come, and short ones do not wait for its end") {
  const Engine engine = open_tiny("prompts.gguf");
  const uint32_t n_vocab = engine.info().hparams.n_vocab;
  Metrics metrics;
  Scheduler scheduler(engine, {.n_parallel = 5, .n_ctx = 8192, .n_batch = 32}, metrics);
  Inbox inbox;
  Job forever(inbox, prompt_of(0, n_vocab), params_of(SIZE_MAX, 0, 0));
  const Ticket ticket(scheduler, {&forever});
  REQUIRE(ticket.queued());
  std::atomic<bool> is_done{false};
  std::vector<std::thread> others;
  for (Token i = 0; i < 3; ++i)
    others.emplace_back([&, i] {
      for (Token k = 0; !is_done; ++k) {
        auto prompt = test::some_tokens(60, n_vocab);
        prompt[0] = 3 + i;
        prompt[1] = 3 + k % 90;
        CHECK(run(scheduler, prompt, params_of(1, 0, 0)).finish.n_generated == 1);
      }
    });
  constexpr size_t kLong = 2000;
  uint64_t least = std::numeric_limits<uint64_t>::max();  // of three: this thread may be late to see an end
  for (const Token first : {90, 91, 92}) {
    auto prompt = test::some_tokens(kLong, n_vocab);
    prompt[0] = first;
    const uint64_t before = metrics.steps;
    CHECK(run(scheduler, prompt, params_of(1, 0, 0)).finish.n_generated == 1);
    least = std::min<uint64_t>(least, metrics.steps - before);
  }
  CHECK(least <= kLong / 15 + 20);                    // half of each batch was its own
  CHECK(metrics.prompt_tokens > 3 * kLong + 5 * 60);  // the rest of them was the others'
  is_done = true;
  for (std::thread& other : others) other.join();
}

TEST_CASE("a client that leaves makes room at once") {
  const Engine engine = open_tiny("leave.gguf");
  Metrics metrics;
  Scheduler scheduler(engine, {.n_parallel = 1, .max_queue = 1, .n_ctx = 8192}, metrics);
  const auto prompt = prompt_of(0, engine.info().hparams.n_vocab);
  Inbox inbox;
  Job forever(inbox, prompt, params_of(SIZE_MAX, 0, 0)), waiting(inbox, prompt, params_of(3, 0, 0)), refused(inbox, prompt, params_of(3, 0, 0));
  auto first = std::make_unique<Ticket>(scheduler, std::vector<Job*>{&forever});
  REQUIRE(first->queued());
  while (scheduler.status().running.empty()) std::this_thread::sleep_for(1ms);
  const Ticket second(scheduler, {&waiting});
  CHECK(second.queued());
  const Ticket third(scheduler, {&refused});
  CHECK(!third.queued());
  first.reset();
  CHECK(run(scheduler, prompt, params_of(2, 0, 0)).finish.n_generated == 2);
  CHECK(metrics.refused == 1);
}

TEST_CASE("what one job alone cannot do ends that job alone") {
  const Engine engine = open_tiny("alone.gguf");
  Metrics metrics;
  Scheduler scheduler(engine, {.n_parallel = 3, .n_ctx = 256, .n_batch = 32}, metrics);
  const auto prompt = prompt_of(0, engine.info().hparams.n_vocab);
  Inbox inbox;
  std::vector<std::unique_ptr<Job>> jobs;
  jobs.push_back(std::make_unique<Job>(inbox, prompt, params_of(200, 0, 0)));
  const Ticket ticket(scheduler, {jobs[0].get()});
  GenerationParams biased = params_of(2, 0, 0);
  biased.logit_bias = {{1000000, 5.0f}};
  CHECK(run(scheduler, {5, 900000}, params_of(2, 0, 0)).finish.reason == FinishReason::refused);
  CHECK(run(scheduler, {5, -1}, params_of(2, 0, 0)).finish.reason == FinishReason::refused);
  CHECK(run(scheduler, std::vector<Token>(300, 5), params_of(2, 0, 0)).finish.reason == FinishReason::refused);
  CHECK(run(scheduler, {}, params_of(2, 0, 0)).finish.reason == FinishReason::refused);
  const Result refused = run(scheduler, prompt, biased);
  CHECK(refused.finish.reason == FinishReason::refused);
  CHECK(refused.finish.error.find("token id 1000000 is outside the vocabulary") != std::string::npos);
  Update update;
  while (!update.finish && Job::wait_any(inbox, jobs, 10s)) update = jobs[0]->take();
  REQUIRE(update.finish);
  CHECK(update.finish->reason == FinishReason::length);
  CHECK(update.finish->n_generated == 200);
}

TEST_CASE("rows that only pad the matrices are never chosen") {
  const test::TempFolder folder;
  test::write_bytes(folder / "padded.gguf", test::tiny_model({.n_rows = 2000}).build());
  const Engine engine = Engine::open(folder / "padded.gguf", {.n_threads = 1, .isa = {}, .notice = {}});
  Metrics metrics;
  Scheduler scheduler(engine, {.n_parallel = 1, .n_ctx = 256}, metrics);
  GenerationParams params = params_of(50, 1, 2.0f);
  params.n_top = 5;
  const Result result = run(scheduler, prompt_of(0, 300), params);
  CHECK(result.finish.reason == FinishReason::length);
  CHECK(result.tokens.size() == 50);
  for (const Token token : result.tokens) CHECK(static_cast<size_t>(token) < engine.tokenizer().n_vocab());
}

TEST_CASE("stopping the scheduler ends all streams") {
  const Engine engine = open_tiny("stop.gguf");
  Metrics metrics;
  Scheduler scheduler(engine, {.n_parallel = 1, .n_ctx = 8192}, metrics);
  const auto prompt = prompt_of(0, engine.info().hparams.n_vocab);
  std::vector<Result> results(2);
  std::thread a([&] { results[0] = run(scheduler, prompt, params_of(8000, 0, 0)); }), b([&] { results[1] = run(scheduler, prompt, params_of(8000, 0, 0)); });
  while (scheduler.status().running.empty() || scheduler.status().n_waiting == 0) std::this_thread::sleep_for(1ms);
  scheduler.stop();
  a.join();
  b.join();
  for (const Result& result : results) CHECK(result.finish.reason == FinishReason::cancelled);
  CHECK(!run(scheduler, prompt, params_of(1, 0, 0)).finish.n_generated);
}

TEST_CASE("log probabilities are those of the softmax, best first") {
  const float logits[] = {0, 1, 3, 1};
  const TokenRecord record = logprob_record(logits, 1, 3);
  const double sum = 1 + 2 * std::exp(1.0) + std::exp(3.0);
  CHECK(double{record.logprob} == doctest::Approx(1 - std::log(sum)));
  REQUIRE(record.top.size() == 3);
  CHECK(record.top[0].first == 2);
  CHECK(record.top[1].first == 1);
  CHECK(record.top[2].first == 3);
}
