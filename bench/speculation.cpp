// What a step costs that evaluates proposed tokens (runtime/speculation.h), as a multiple of a plain one.
//
//   bench_speculation MODEL [THREADS [SLOTS]]     SLOTS: experts of a layer kept in memory, the rest read
//
// Steps of each length take turns, so that all see the same machine. Tokens are drawn at random, as
// after them the experts of neighbours are as independent as the model makes them.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "base/error.h"
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
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
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
}

}  // namespace
}  // namespace duet

int main(int argc, char** argv) {
  if (argc < 2 || argc > 4) {
    std::fprintf(stderr, "usage: bench_speculation MODEL [THREADS [SLOTS]]\n");
    return 2;
  }
  try {
    duet::run(argc, argv);
  } catch (const duet::Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
}
