// What a batch costs, as a multiple of one token: n tokens that follow each other in one sequence (prompts,
// speculation), and n sequences with a token each (a server's clients); logits of all of them.
//
//   bench_batch MODEL [THREADS [SECONDS [DEPTH [LENGTHS]]]]     DEPTH: tokens that every sequence holds already
//                                                               LENGTHS: 1,8,32 (the first is the unit)
//
// Lengths take turns, so that all see the same machine. Tokens are drawn at random: the experts of
// neighbours are as independent as the model makes them.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "base/error.h"
#include "runtime/batch.h"

namespace duet {
namespace {

constexpr size_t kMost = 64;
enum Shape { one_sequence, many_sequences, kShapes };

struct Bench {
  Bench(const Engine& e, size_t d)
      : engine(e), depth(d), batch(e, {.n_ctx = static_cast<uint32_t>(depth + kMost), .n_batch = kMost, .n_sequences = kMost}) {
    for (size_t i = 0; i < kMost; ++i) {
      sequences.push_back(batch.new_sequence());
      for (size_t done = 0; done < depth; done += std::min(kMost, depth - done)) {
        draw();
        const Batch::Part part{&sequences[i], std::span(tokens).first(std::min(kMost, depth - done))};
        batch.evaluate({&part, 1});
      }
    }
  }
  void draw() {
    for (Token& token : tokens) token = static_cast<Token>(random() % engine.info().hparams.n_vocab);
  }
  double seconds(Shape shape, size_t n) {
    draw();
    std::vector<Batch::Part> parts;
    std::vector<size_t> rows(n);
    for (size_t i = 0; i < n; ++i) rows[i] = i;
    if (shape == one_sequence) parts.push_back({&sequences[0], std::span(tokens).first(n)});
    else
      for (size_t i = 0; i < n; ++i) parts.push_back({&sequences[i], std::span(tokens).subspan(i, 1)});
    const auto start = std::chrono::steady_clock::now();
    batch.evaluate(parts);
    batch.logits(rows);
    const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    for (const Batch::Part& part : parts) part.sequence->truncate(depth);
    return s;
  }

  const Engine& engine;
  size_t depth;
  Batch batch;
  std::vector<Sequence> sequences;
  std::vector<Token> tokens = std::vector<Token>(kMost);
  std::mt19937 random{1};
};

double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<ptrdiff_t>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

std::vector<size_t> read_lengths(const std::string& list) {
  std::vector<size_t> out;
  std::istringstream in(list);
  for (std::string item; std::getline(in, item, ',');) out.push_back(std::clamp<size_t>(std::strtoul(item.c_str(), nullptr, 10), 1, kMost));
  if (out.empty()) fail(ErrorKind::usage, "LENGTHS: none");
  return out;
}

void run(int argc, char** argv) {
  const double limit = argc > 3 ? std::atof(argv[3]) : 20;
  const auto depth = static_cast<size_t>(argc > 4 ? std::atoi(argv[4]) : 16);
  const std::vector<size_t> lengths = read_lengths(argc > 5 ? argv[5] : "1,2,3,4,5,6,8,12,16,24,32,48,64");
  const MemoryOptions memory{.n_ctx = static_cast<uint32_t>(depth + kMost), .n_batch = kMost, .n_sequences = kMost};
  const Engine engine = Engine::open(argv[1], {.n_threads = argc > 2 ? std::atoi(argv[2]) : 0, .isa = {}, .notice = {}, .memory = memory});
  Bench bench(engine, depth);
  std::vector<std::array<std::vector<double>, kShapes>> measured(lengths.size());
  double total = 0;
  for (size_t round = 0; round < 2 || total < limit; ++round)
    for (size_t i = 0; i < lengths.size(); ++i)
      for (const Shape shape : {one_sequence, many_sequences}) {
        const double s = bench.seconds(shape, lengths[i]);
        total += s;
        if (round > 0) measured[i][shape].push_back(s);  // the first round warms up
      }
  std::vector<double> one = measured[0][0];
  one.insert(one.end(), measured[0][1].begin(), measured[0][1].end());
  const double unit = median(one);
  std::printf("%s, %d threads, %zu rounds\n       of one sequence     of as many sequences\ntokens    ms  x one        ms  x one  tok/s gain\n",
              engine.info().isa.c_str(), engine.info().n_threads, measured[0][0].size());
  for (size_t i = 0; i < lengths.size(); ++i) {
    const double a = median(measured[i][one_sequence]), b = median(measured[i][many_sequences]);
    std::printf("%6zu %7.2f %5.2f  %8.2f %6.2f %7.2f\n", lengths[i], 1e3 * a, a / unit, 1e3 * b, b / unit, static_cast<double>(lengths[i]) * unit / (b * static_cast<double>(lengths[0])));
  }
}

}  // namespace
}  // namespace duet

int main(int argc, char** argv) {
  if (argc < 2 || argc > 6) {
    std::fprintf(stderr, "usage: bench_batch MODEL [THREADS [SECONDS [DEPTH [LENGTHS]]]]\n");
    return 2;
  }
  try {
    duet::run(argc, argv);
  } catch (const duet::Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
}
