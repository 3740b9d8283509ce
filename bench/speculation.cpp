// What a step costs that evaluates proposed tokens (runtime/speculation.h), as a multiple of a plain one.
//
//   bench_speculation MODEL [THREADS [SLOTS]]     SLOTS: experts of a layer kept in memory, the rest read
//
// Steps of each length take turns, so that all see the same machine. Tokens are drawn at random, as
// after them the experts of neighbours are as independent as the model makes them.
//
// Then what the gate makes of it: a text of 12 tokens that is said again and again, word for word or with one
// token in four another, through the gated Speculator and token by token. The text is given, whatever the
// logits say.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "base/stopwatch.h"
#include "bench/bench_main.h"
#include "runtime/speculation.h"

namespace duet {
namespace {

constexpr size_t kDrafts[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16};
constexpr double kSeconds = 20;
constexpr size_t kContext = 512, kPrompt = 128;

struct Measured {
  std::vector<double> seconds;
  double median() {
    std::sort(seconds.begin(), seconds.end());
    return seconds[seconds.size() / 2];
  }
  double mean() const {
    double sum = 0;
    for (const double s : seconds) sum += s;
    return sum / static_cast<double>(seconds.size());
  }
};

double timed_step(Session& session, std::span<const Token> tokens) {
  const auto start = std::chrono::steady_clock::now();
  session.append_all_logits(tokens, [](size_t, size_t, std::span<const float>) {});
  return seconds_since(start);
}

constexpr size_t kPeriod = 12, kRepeated = 72;

std::vector<Token> repetitive_text(double share_changed, size_t n_vocab) {
  std::mt19937 random(2);
  std::vector<Token> text(kRepeated);
  for (size_t i = 0; i < text.size(); ++i) {
    const bool is_new = i < kPeriod || std::uniform_real_distribution<>()(random) < share_changed;
    text[i] = is_new ? static_cast<Token>(random() % n_vocab) : text[i % kPeriod];
  }
  return text;
}

void follow_text(const Engine& engine, Session& session, double share_changed) {
  const std::vector<Token> text = repetitive_text(share_changed, engine.info().hparams.n_vocab);
  double seconds[2] = {};
  for (const bool speculates : {false, true}) {
    session.truncate(0);
    session.append({text.data(), 1});
    Speculator speculator(engine, session, {.max_draft = speculates ? kMaxDraft : 0, .gated = true});
    size_t at = 1;
    const auto take = [&](std::span<const float>) { return ++at < text.size() ? std::optional(text[at]) : std::nullopt; };
    const auto start = std::chrono::steady_clock::now();
    while (at + 1 < text.size()) speculator.step(session, text[at], text.size() - 1 - at, take);
    seconds[speculates] = seconds_since(start);
    if (!speculates) continue;
    const SpeculationStats& stats = speculator.stats();
    std::printf("repeated text, %2.0f %% changed: %.2f x plain; %llu tokens in %llu steps, %llu proposed, %llu accepted; costs", 100 * share_changed,
                seconds[0] / seconds[1], static_cast<unsigned long long>(stats.tokens), static_cast<unsigned long long>(stats.steps),
                static_cast<unsigned long long>(stats.drafted), static_cast<unsigned long long>(stats.accepted));
    for (const SpeculationGate::Length& length : speculator.gate().lengths())
      if (length.steps > 0) std::printf(" %zu: %.2f (%llu)", length.n_draft, length.cost, static_cast<unsigned long long>(length.steps));
    std::printf("\n");
    std::fflush(stdout);
  }
}

void run(int argc, char** argv) {
  MemoryOptions memory{.n_ctx = kContext, .n_batch = kPrompt};
  if (argc > 3) memory.slots = static_cast<uint32_t>(std::atoi(argv[3]));
  const Engine engine = Engine::open(argv[1], {.n_threads = argc > 2 ? std::atoi(argv[2]) : 0, .isa = {}, .notice = {}, .memory = memory});
  Session session = engine.new_session({.n_ctx = kContext, .n_batch = kPrompt});
  std::mt19937 random(1);
  std::vector<Token> tokens(kPrompt);
  const auto draw = [&] {
    for (Token& token : tokens) token = static_cast<Token>(random() % engine.info().hparams.n_vocab);
  };
  draw();
  session.append(tokens);
  Measured measured[std::size(kDrafts)];
  double total = 0;
  for (size_t round = 0; total < kSeconds && round < 2000; ++round)
    for (size_t i = 0; i < std::size(kDrafts); ++i) {
      draw();
      const double seconds = timed_step(session, std::span(tokens).first(1 + kDrafts[i]));
      session.truncate(kPrompt);
      if (round > 0) measured[i].seconds.push_back(seconds);  // the first round warms up
      total += seconds;
    }
  std::printf("%s, %d threads, %s\nproposed   ms (median)   x plain (medians)   x plain (means)\n", engine.info().isa.c_str(), engine.info().n_threads,
              argc > 3 ? "streamed" : "all in memory");
  for (size_t i = 0; i < std::size(kDrafts); ++i)
    std::printf("%8zu %13.3f %19.2f %17.2f\n", kDrafts[i], 1e3 * measured[i].median(), measured[i].median() / measured[0].median(),
                measured[i].mean() / measured[0].mean());
  for (const double share_changed : {0.0, 0.25}) follow_text(engine, session, share_changed);
}

}  // namespace
}  // namespace duet

int main(int argc, char** argv) {
  return duet::bench_main(argc, argv, 1, 3, "bench_speculation MODEL [THREADS [SLOTS]]", duet::run);
}
