// What looking ahead brings when experts are streamed.
//
//   bench_lookahead MODEL RAM [SECONDS [LAYERS,... [TOKENS]]]     e.g. big.gguf 16GiB 60 0,1,6 32
//
// The same tokens are decoded again and again, in windows of 4 tokens; from round to round each window has
// another number of layers to look ahead (0: none), and the windows of a round have them in turns. What is in
// memory when a window begins does not depend on that, so that windows compare in pairs, whatever the
// disk does meanwhile. The first round, which fills memory, does not count.
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <random>
#include <string>

#include "base/error.h"
#include "base/stopwatch.h"
#include "base/units.h"
#include "bench/bench_main.h"
#include "runtime/memory_plan.h"

namespace duet {
namespace {

constexpr size_t kWindow = 4;

struct Setting {
  uint32_t n_layers = 0;
  std::vector<std::vector<double>> seconds;  // [window][round]
  double tokens = 0, bytes = 0;
  StreamStats sum;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n == 0 ? 0 : (values[(n - 1) / 2] + values[n / 2]) / 2;
}

double number(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || !(value >= 0 && value <= 1e6)) fail(ErrorKind::usage, "not a number: ", text);
  return value;
}

std::vector<Setting> settings_of(std::string_view list) {
  std::vector<Setting> out;
  while (!list.empty()) {
    const size_t comma = std::min(list.find(','), list.size());
    const auto n_layers = static_cast<uint32_t>(number(list.substr(0, comma)));
    if (n_layers > kLookaheadLayers) fail(ErrorKind::usage, n_layers, " layers: at most ", kLookaheadLayers, " are looked ahead");
    out.push_back({.n_layers = n_layers, .seconds = {}, .sum = {}});
    list.remove_prefix(std::min(comma + 1, list.size()));
  }
  if (out.empty()) fail(ErrorKind::usage, "no numbers of layers");
  return out;
}

void add_use(const StreamStats& before, const StreamStats& now, Setting& s) {
  s.tokens += kWindow;
  s.bytes += static_cast<double>(now.reads.bytes - before.reads.bytes);
  s.sum.hits += now.hits - before.hits;
  s.sum.misses += now.misses - before.misses;
  s.sum.wasted_bytes += now.wasted_bytes - before.wasted_bytes;
  for (size_t i = 0; i < s.sum.guesses.size(); ++i) {
    s.sum.guesses[i].asked += now.guesses[i].asked - before.guesses[i].asked;
    s.sum.guesses[i].right += now.guesses[i].right - before.guesses[i].right;
    s.sum.guesses[i].used_bytes += now.guesses[i].used_bytes - before.guesses[i].used_bytes;
    s.sum.guesses[i].wasted_bytes += now.guesses[i].wasted_bytes - before.guesses[i].wasted_bytes;
  }
}

void print(const Setting& s, const Setting& first) {
  std::vector<double> ratios, all;
  for (size_t w = 0; w < s.seconds.size(); ++w) {
    all.insert(all.end(), s.seconds[w].begin(), s.seconds[w].end());
    if (!s.seconds[w].empty() && !first.seconds[w].empty()) ratios.push_back(median(first.seconds[w]) / median(s.seconds[w]));
  }
  std::printf("%2u layers: %.3f tok/s (median), %.3f x the first setting (median of %zu pairs); hits %.1f %%, %.3f GB/token, %.3f in vain\n", s.n_layers,
              kWindow / median(all), median(ratios), ratios.size(), 100.0 * static_cast<double>(s.sum.hits) / static_cast<double>(s.sum.hits + s.sum.misses),
              s.bytes / s.tokens / 1e9, static_cast<double>(s.sum.wasted_bytes) / s.tokens / 1e9);
  for (size_t i = 0; i < s.n_layers && i < s.sum.guesses.size(); ++i) {
    const GuessStats& g = s.sum.guesses[i];
    std::printf("    first guessed %zu ahead: %.2f a token, %.0f %% right, %.1f MB used, %.1f MB in vain\n", i + 1, static_cast<double>(g.asked) / s.tokens,
                g.asked > 0 ? 100.0 * static_cast<double>(g.right) / static_cast<double>(g.asked) : 0.0, static_cast<double>(g.used_bytes) / s.tokens / 1e6,
                static_cast<double>(g.wasted_bytes) / s.tokens / 1e6);
  }
}

void run(int argc, char** argv) {
  const double seconds = argc > 3 ? number(argv[3]) : 60;
  std::vector<Setting> settings = settings_of(argc > 4 ? argv[4] : "0,1,6");
  const size_t n_windows = std::max<size_t>(1, static_cast<size_t>(argc > 5 ? number(argv[5]) : 32) / kWindow), n_tokens = n_windows * kWindow;
  for (Setting& s : settings) s.seconds.resize(n_windows);
  MemoryOptions memory{.ram = MemoryOptions::Ram::bytes, .ram_bytes = parse_size(argv[2]), .n_ctx = static_cast<uint32_t>(n_tokens), .n_batch = 1};
  const Engine engine = Engine::open(argv[1], {.isa = {}, .notice = {}, .memory = memory});
  if (!engine.plan().streamed) fail(ErrorKind::usage, "the model fits into memory: give it less");
  std::printf("%s\n", describe(engine.plan(), engine.info().hparams).c_str());
  Session session = engine.new_session({.n_ctx = static_cast<uint32_t>(n_tokens), .n_batch = 1});
  std::mt19937 random(1);
  std::vector<Token> tokens(n_tokens);
  for (Token& token : tokens) token = static_cast<Token>(random() % engine.info().hparams.n_vocab);
  auto start = std::chrono::steady_clock::now();
  for (size_t round = 0; round < 2 || seconds_since(start) < seconds; ++round) {
    if (round == 1) start = std::chrono::steady_clock::now();
    session.truncate(0);
    for (size_t w = 0; w < n_windows; ++w) {
      Setting& s = settings[(round + w) % settings.size()];
      engine.set_lookahead(s.n_layers > 0 ? Lookahead::on : Lookahead::off, s.n_layers);
      const StreamStats before = *engine.stream_stats();
      const auto window_start = std::chrono::steady_clock::now();
      for (size_t i = 0; i < kWindow; ++i) session.append({&tokens[w * kWindow + i], 1});
      if (round == 0) continue;
      s.seconds[w].push_back(seconds_since(window_start));
      add_use(before, *engine.stream_stats(), s);
    }
  }
  for (const Setting& s : settings) print(s, settings.front());
}

}  // namespace
}  // namespace duet

int main(int argc, char** argv) {
  return duet::bench_main(argc, argv, 2, 5, "bench_lookahead MODEL RAM [SECONDS [LAYERS,... [TOKENS]]]", duet::run);
}
