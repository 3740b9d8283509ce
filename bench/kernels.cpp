// Speed of the matmul kernels: bench_kernels [--threads N] [--isa NAME] [--format NAME] [--gemm]
// [--cpu-time] [--kib N] [--tokens N] [--cols N]
//
// For each format, table and number of tokens: weights read per second (GB/s) and multiply-adds
// per second (GMAC/s) on weights larger than the L3 cache, or of N KiB. Numbers of tokens: some, or --tokens. --gemm compares oneDNN with the kernels
// for float weights, for the threshold in runtime/kernels/onednn_gemm.h. --cpu-time counts
// processor time per thread instead of the clock's: on a machine that others use too.
#include "runtime/kernels/kernels.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <vector>

#include "base/host.h"
#include "base/parallel.h"
#include "quant/format.h"
#include "runtime/kernels/onednn_gemm.h"

namespace {

using namespace duet;

struct Options {
  std::vector<int> threads;
  std::string isa, format;
  std::vector<size_t> token_counts;  // empty: some
  size_t cols = 4096;
  size_t weight_bytes = size_t{128} << 20;  // several times a 32 MiB L3 share
  bool gemm = false;
  bool cpu_time = false;
};

std::vector<size_t> counts_of(const Options& options, std::vector<size_t> usual) {
  return options.token_counts.empty() ? usual : options.token_counts;
}

struct Matrix {
  const Format& format;
  size_t cols, n_rows;
  std::vector<std::byte> bytes;

  Matrix(const Format& f, size_t n_cols, size_t total_bytes)
      : format(f), cols(n_cols), n_rows(total_bytes / row_bytes(f, cols)) {
    bytes.resize(n_rows * row_bytes(f, cols));
    uint64_t state = 1;
    for (std::byte& b : bytes) {  // any bits will do: NaN costs nothing extra
      state = state * 6364136223846793005u + 1442695040888963407u;
      b = static_cast<std::byte>(state >> 56);
    }
  }
};

std::vector<std::byte> random_activations(const Format& format, const KernelTable& kernels,
                                          size_t cols, size_t n_tokens) {
  const size_t stride = act_row_bytes(format.act, cols);
  std::vector<std::byte> out(n_tokens * stride);
  std::vector<float> row(cols);
  for (size_t t = 0; t < n_tokens; ++t) {
    for (size_t i = 0; i < cols; ++i)
      row[i] = static_cast<float>((i * 7919 + t * 104729) % 2001) * 1e-3f - 1.0f;
    std::byte* dst = out.data() + t * stride;
    if (format.act == ActFormat::f32) std::memcpy(dst, row.data(), stride);
    if (format.act == ActFormat::act32) kernels.quantize_act32(row.data(), dst, cols);
    if (format.act == ActFormat::act256) kernels.quantize_act256(row.data(), dst, cols);
  }
  return out;
}

double now(const Options& options, int n_threads) {
  using Clock = std::chrono::steady_clock;
  if (!options.cpu_time)
    return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
  return static_cast<double>(std::clock()) / CLOCKS_PER_SEC / n_threads;
}

// Seconds of one run: the best of a few measurements of at least a millisecond, within about a
// second.
template <class Run>
double best_seconds(const Options& options, int n_threads, Run run) {
  const auto seconds_of = [&](int n) {
    const double start = now(options, n_threads);
    for (int i = 0; i < n; ++i) run();
    return now(options, n_threads) - start;
  };
  const int n = 1 + static_cast<int>(1e-3 / std::max(seconds_of(1), 1e-7));
  double best = 1e30, total = 0.0;
  for (int i = 0; i < 5 && (i < 2 || total < 0.6); ++i) {
    const double s = seconds_of(n);
    best = std::min(best, s / n);
    total += s;
  }
  return best;
}

MatmulArgs problem(const Matrix& m, size_t n_rows, const std::vector<std::byte>& x, size_t n_tokens,
                   float* y) {
  return {.w = m.bytes.data(),
          .w_stride = row_bytes(m.format, m.cols),
          .n_rows = n_rows,
          .cols = m.cols,
          .x = x.data(),
          .x_stride = act_row_bytes(m.format.act, m.cols),
          .n_tokens = n_tokens,
          .y = y,
          .y_stride = n_rows};
}

// Rows split over the threads as the runtime does.
void run_kernel(const KernelTable& kernels, DType dtype, const MatmulArgs& args, int n_threads) {
  parallel_for(n_threads, args.n_rows, 64, [&](size_t begin, size_t end) {
    MatmulArgs part = args;
    part.w += begin * args.w_stride;
    part.y += begin;
    part.n_rows = end - begin;
    kernels.matmul[static_cast<size_t>(dtype)](part);
  });
}

void report(const Matrix& m, const char* what, int n_threads, size_t n_rows, size_t n_tokens,
            double seconds) {
  const double bytes = static_cast<double>(n_rows * row_bytes(m.format, m.cols));
  const double macs = static_cast<double>(n_rows * m.cols) * static_cast<double>(n_tokens);
  std::printf("%-7s %-7s threads %d  tokens %4zu  %7.2f GB/s  %8.2f GMAC/s\n", m.format.name, what,
              n_threads, n_tokens, bytes / seconds * 1e-9, macs / seconds * 1e-9);
  std::fflush(stdout);
}

void bench_format(const Format& format, const Options& options) {
  const Matrix m(format, options.cols, options.weight_bytes);
  for (const KernelTable* kernels : usable_kernels()) {
    if (!options.isa.empty() && options.isa != kernels->isa) continue;
    for (int n_threads : options.threads) {
      for (size_t n_tokens : counts_of(options, {1, 2, 3, 4, 6, 8, 16, 64, 512})) {
        // Fewer rows for many tokens: still above the L2 cache, and done within a second.
        const size_t share = std::string(kernels->isa) == "scalar" ? 32 * n_tokens : n_tokens;
        const size_t n_rows =
            std::min(m.n_rows, std::max<size_t>(m.n_rows / std::max<size_t>(share / 8, 1), 256));
        const std::vector<std::byte> x = random_activations(format, *kernels, m.cols, n_tokens);
        std::vector<float> y(n_rows * n_tokens);
        const MatmulArgs args = problem(m, n_rows, x, n_tokens, y.data());
        const double s = best_seconds(options, n_threads,
                                      [&] { run_kernel(*kernels, format.dtype, args, n_threads); });
        report(m, kernels->isa, n_threads, n_rows, n_tokens, s);
      }
    }
  }
}

void bench_gemm(const Format& format, const Options& options) {
  const Matrix m(format, options.cols, size_t{64} << 20);
  const KernelTable& kernels = select_kernels(options.isa);
  std::vector<float> panel(gemm_panel_floats(m.cols));
  for (int n_threads : options.threads) {
    set_library_threads(n_threads);
    for (size_t n_tokens : counts_of(options, {4, 8, 16, 24, 32, 48, 64, 128, 512})) {
      const size_t n_rows = std::min<size_t>(m.n_rows, 4096);
      const std::vector<std::byte> x = random_activations(format, kernels, m.cols, n_tokens);
      std::vector<float> y(n_rows * n_tokens);
      const MatmulArgs args = problem(m, n_rows, x, n_tokens, y.data());
      report(m, kernels.isa, n_threads, n_rows, n_tokens, best_seconds(options, n_threads, [&] {
               run_kernel(kernels, format.dtype, args, n_threads);
             }));
      report(m, "onednn", n_threads, n_rows, n_tokens, best_seconds(options, n_threads, [&] {
               try_gemm(kernels, format.dtype, args, n_threads, panel);
             }));
    }
  }
}

int usage() {
  std::fprintf(
      stderr,
      "usage: bench_kernels [--threads N] [--isa NAME] [--format NAME] [--gemm] [--cpu-time] "
      "[--kib N] [--tokens N] [--cols N]\n");
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--gemm")
      options.gemm = true;
    else if (arg == "--cpu-time")
      options.cpu_time = true;
    else if (i + 1 == argc)
      return usage();
    else if (arg == "--threads")
      options.threads = {std::atoi(argv[++i])};
    else if (arg == "--kib")
      options.weight_bytes = static_cast<size_t>(std::atoi(argv[++i])) << 10;
    else if (arg == "--cols")
      options.cols = static_cast<size_t>(std::atoi(argv[++i]));
    else if (arg == "--isa")
      options.isa = argv[++i];
    else if (arg == "--tokens")
      options.token_counts = {static_cast<size_t>(std::atoi(argv[++i]))};
    else if (arg == "--format")
      options.format = argv[++i];
    else
      return usage();
  }
  if (options.cols == 0 || options.cols % 256 != 0 || options.token_counts == std::vector<size_t>{0}) return usage();
  if (options.threads.empty()) {
    options.threads = {1};
    if (const int all = read_host_cores().usable(); all > 1) options.threads.push_back(all);
  }
  for (const Format& format : all_formats()) {
    if (!options.format.empty() && options.format != format.name) continue;
    if (!options.gemm)
      bench_format(format, options);
    else if (format.act == ActFormat::f32)
      bench_gemm(format, options);
  }
  return 0;
}
