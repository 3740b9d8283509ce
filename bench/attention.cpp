// Speed of the attention kernel: bench_attention [--threads N] [--isa NAME] [--kv f16|f32|q8_0]
// [--heads N] [--kv-heads N] [--dim N] [--keys N]
//
// Prefill: the last tile of tokens of a long prompt, in GMAC/s and as a share of a register-only
// loop of FP32 multiply-adds of the same run (whole products: scores and mixed values). Decode: one
// token at a depth, in GB/s of keys and values read and as a share of a load-and-add loop over the same
// memory just before.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "base/host.h"
#include "base/parallel.h"
#include "runtime/kv_cache.h"

namespace {

using namespace duet;

struct Options {
  std::vector<int> threads;
  std::string isa, kv;
  uint32_t n_head = 32, n_head_kv = 8, head_dim = 128;
  std::vector<size_t> n_keys = {512, 2048, 16384, 32768};
};

constexpr std::pair<KvType, const char*> kTypes[] = {{KvType::f16, "f16"}, {KvType::f32, "f32"}, {KvType::q8_0, "q8_0"}};
constexpr size_t kSpan = 2048, kTileRows = 96;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Best of a few runs, within about half a second.
template <class Run>
double best_seconds(const Run& run) {
  double best = 1e30, total = 0;
  for (int i = 0; i < 9 && (i < 3 || total < 0.5); ++i) {
    const double start = seconds();
    run();
    const double s = seconds() - start;
    best = std::min(best, s);
    total += s;
  }
  return best;
}

double fma_peak(const KernelTable& kernels) {
  double peak = 0;
  for (int i = 0; i < 5; ++i) {
    const double start = seconds();
    const uint64_t macs = kernels.peak.f32_macs(2'000'000);
    peak = std::max(peak, static_cast<double>(macs) / (seconds() - start));
  }
  return peak;
}

struct Problem {
  const KernelTable& kernels;
  HParams hparams;
  KvType type;
  size_t n_keys;
  KvCache cache;
  std::vector<float> queries;  // of a tile of tokens

  Problem(const KernelTable& table, const Options& options, KvType kv_type, size_t n)
      : kernels(table), hparams(make(options)), type(kv_type), n_keys(n), cache(hparams, n, kv_type), queries(kTileRows * options.n_head * options.head_dim) {
    uint32_t state = 1;
    const auto random = [&](float& x) { x = static_cast<float>(static_cast<int32_t>(state = state * 1664525u + 1013904223u)) * 0x1p-31f; };
    std::vector<float> k(size_t{options.n_head_kv} * options.head_dim), v(k.size());
    std::for_each(k.begin(), k.end(), random);
    std::for_each(v.begin(), v.end(), random);
    std::for_each(queries.begin(), queries.end(), random);
    for (size_t pos = 0; pos < n; ++pos) cache.store(kernels, 0, pos, k.data(), v.data());
  }
  static HParams make(const Options& o) {
    HParams h;
    h.n_layer = 1;
    h.n_head = o.n_head;
    h.n_head_kv = o.n_head_kv;
    h.head_dim = o.head_dim;
    return h;
  }
  size_t group() const { return hparams.n_head / hparams.n_head_kv; }

  // The last n_tokens tokens: as many calls as the runtime makes, over threads by KV head and span.
  void run(int n_threads, size_t n_tokens, std::vector<std::vector<float>>& scratch) const {
    const size_t n_spans = (n_keys + kSpan - 1) / kSpan, n_rows = n_tokens * group();
    scratch.resize(static_cast<size_t>(n_threads));
    const size_t n_tasks = n_spans * hparams.n_head_kv;
    parallel_tasks(n_threads, n_tasks, [&](size_t worker, size_t task) {
      auto& own = scratch[worker];
      own.resize(attention_scratch_floats(n_rows, hparams.head_dim) + n_rows * attention_row_floats(hparams.head_dim) + 16);
      float* begin = own.data() + (16 - reinterpret_cast<uintptr_t>(own.data()) / 4 % 16) % 16;
      const size_t head = task / n_spans, span = task % n_spans;
      kernels.attention({.kv = cache.view(0, head), .q = queries.data() + head * group() * hparams.head_dim,
                           .q_stride = size_t{hparams.n_head} * hparams.head_dim, .n_tokens = n_tokens, .group = group(),
                           .head_dim = hparams.head_dim, .first = n_keys - n_tokens, .window = 0, .key_begin = span * kSpan,
                           .key_end = (span + 1) * kSpan, .scale = 0.1f, .scratch = begin,
                           .out = begin + attention_scratch_floats(n_rows, hparams.head_dim)});
    });
  }
};

// Bytes per second of a plain load-and-add loop over the same memory, as many threads.
double read_speed(const Problem& p, int n_threads) {
  const auto* data = p.cache.view(0, 0).keys;
  const size_t piece = p.cache.size_bytes() / static_cast<size_t>(n_threads) / 512 * 512;
  std::vector<uint64_t> sums(static_cast<size_t>(n_threads));
  const double s = best_seconds([&] {
    parallel_for(n_threads, sums.size(), 1, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) sums[i] += p.kernels.peak.read_sum(data + i * piece, piece);
    });
  });
  return static_cast<double>(piece) * n_threads / s;
}

void bench(const KernelTable& kernels, const Options& options, int n_threads) {
  const double peak = fma_peak(kernels);
  std::printf("%s, %d threads: %.1f GMAC/s of FP32 per thread by registers alone\n", kernels.isa, n_threads, peak * 1e-9);
  std::vector<std::vector<float>> scratch;
  for (const auto& [type, name] : kTypes) {
    if (!options.kv.empty() && options.kv != name) continue;
    for (const size_t n_keys : options.n_keys) {
      const Problem p(kernels, options, type, n_keys);
      const size_t n_tokens = kTileRows / p.group();
      const double macs = 2.0 * static_cast<double>(n_tokens * options.n_head * options.head_dim) * (static_cast<double>(n_keys) - 0.5 * static_cast<double>(n_tokens));
      const double many = best_seconds([&] { p.run(n_threads, n_tokens, scratch); });
      const double read = read_speed(p, n_threads), one = best_seconds([&] { p.run(n_threads, 1, scratch); });
      std::printf("  %-4s %6zu keys  prefill %6.1f GMAC/s", name, n_keys, macs / many * 1e-9);
      if (peak > 0) std::printf(" (%2.0f %%)", 100 * macs / many / (peak * n_threads));
      const double speed = static_cast<double>(p.cache.size_bytes()) / one;
      std::printf("  decode %6.2f GB/s of %6.2f (%2.0f %%), %6.1f GMAC/s\n", speed * 1e-9, read * 1e-9, 100 * speed / read,
                  2e-9 * static_cast<double>(size_t{options.n_head} * options.head_dim * n_keys) / one);
      std::fflush(stdout);
    }
  }
}

int usage() {
  std::fprintf(stderr, "usage: bench_attention [--threads N] [--isa NAME] [--kv f16|f32|q8_0] [--heads N] [--kv-heads N] [--dim N] [--keys N]\n");
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i], value = argv[i + 1];
    const auto number = [&] { return static_cast<uint32_t>(std::max(1, std::atoi(value.c_str()))); };
    if (flag == "--threads") options.threads = {static_cast<int>(number())};
    else if (flag == "--isa") options.isa = value;
    else if (flag == "--kv") options.kv = value;
    else if (flag == "--heads") options.n_head = number();
    else if (flag == "--kv-heads") options.n_head_kv = number();
    else if (flag == "--dim") options.head_dim = number();
    else if (flag == "--keys") options.n_keys = {std::max<size_t>(number(), kTileRows)};
    else return usage();
  }
  if (argc % 2 == 0 || options.n_head % options.n_head_kv != 0 || options.n_head > kTileRows) return usage();
  if (options.threads.empty()) {
    options.threads = {1};
    if (const int all = read_host_cores().usable(); all > 1) options.threads.push_back(all);
  }
  for (const KernelTable* kernels : usable_kernels()) {
    if (options.isa.empty() ? std::string(kernels->isa) == "scalar" : options.isa != kernels->isa) continue;
    for (const int n_threads : options.threads) bench(*kernels, options, n_threads);
  }
  return 0;
}
