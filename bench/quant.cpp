// Weights encoded and decoded per second and core, for every format. One thread.
//
//   bench_quant [FORMAT ...]     default: all
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "quant/format.h"

namespace {

constexpr size_t kElems = size_t{1} << 15;

// Best of several runs, in million weights per second.
double rate(const std::function<void()>& body) {
  using Clock = std::chrono::steady_clock;
  double best = 1e9;
  const auto end = Clock::now() + std::chrono::milliseconds(200);
  do {
    const auto start = Clock::now();
    body();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  } while (Clock::now() < end);
  return static_cast<double>(kElems) / best / 1e6;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> wanted(argv + 1, argv + argc);
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0f, 0.03f);
  std::vector<float> values(kElems), decoded(kElems);
  for (float& v : values) v = normal(random);
  std::printf("%-8s %12s %12s %14s   (million weights/s, one thread)\n", "format", "encode",
              "decode", "error/rms");
  for (const duet::Format& format : duet::all_formats()) {
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), format.name) == wanted.end())
      continue;
    std::vector<std::byte> blocks(duet::row_bytes(format, kElems));
    double encode = 0, error = 0, power = 0;
    if (format.encode_row != nullptr) {
      encode = rate([&] { format.encode_row(values.data(), blocks.data(), kElems, nullptr); });
    }
    const double decode = rate([&] { format.decode_row(blocks.data(), decoded.data(), kElems); });
    for (size_t i = 0; i < kElems; ++i) {
      const double diff = double{values[i]} - double{decoded[i]};
      error += diff * diff;
      power += double{values[i]} * double{values[i]};
    }
    if (format.encode_row == nullptr) {
      std::printf("%-8s %12s %12.1f %14s\n", format.name, "-", decode, "-");
    } else {
      std::printf("%-8s %12.1f %12.1f %14.6f\n", format.name, encode, decode,
                  std::sqrt(error / power));
    }
  }
}
