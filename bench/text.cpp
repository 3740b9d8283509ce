// What surrounds the model: opening a file, tokenizing, sampling. One thread, processor time.
//
//   bench_text MODEL.gguf TEXT ...     texts are read as one
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "base/mapped_file.h"
#include "formats/gguf.h"
#include "runtime/engine.h"
#include "runtime/sampler.h"
#include "runtime/tokenizer.h"

namespace {

using namespace duet;

double now() {
  timespec t{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Best of several runs within about a second; the first one counts only when it is the only one.
double best_seconds(const std::function<void()>& body) {
  double best = 1e30, total = 0;
  for (int i = 0; i < 9 && (i < 2 || total < 1.0); ++i) {
    const double start = now();
    body();
    const double s = now() - start;
    best = std::min(best, s);
    total += s;
  }
  return best;
}

void bench_open(const std::string& path) {
  const auto quiet = [](const std::string&) {};
  const double file = best_seconds([&] { GgufFile::open(path); });
  const GgufFile opened = GgufFile::open(path);
  const double tokenizer = best_seconds([&] { Tokenizer::load(opened, quiet); });
  std::printf("open          %8.1f ms the file, %.1f ms its tokenizer", file * 1e3, tokenizer * 1e3);
  if (!opened.tensors().empty()) {
    const double engine = best_seconds([&] { Engine::open(path, {.n_threads = 1, .isa = {}, .notice = quiet}); });
    std::printf(", %.1f ms the model", engine * 1e3);
  }
  std::printf("\n");
}

void bench_tokenizer(const std::string& path, const std::string& text) {
  const Tokenizer tokenizer = Tokenizer::load(GgufFile::open(path), {});
  const double start = now();
  std::vector<Token> ids = tokenizer.encode(text);
  const double first = now() - start, best = best_seconds([&] { ids = tokenizer.encode(text); });
  const double megabytes = static_cast<double>(text.size()) / 1e6;
  std::printf("encode        %8.1f MB/s (first time %.1f), %.2f bytes per token, vocabulary of %zu\n", megabytes / best,
              megabytes / first, static_cast<double>(text.size()) / static_cast<double>(ids.size()), tokenizer.n_vocab());
  // In pieces of a chat's size: what a call costs by itself.
  constexpr size_t kPiece = 2000;
  const double pieces = best_seconds([&] {
    for (size_t at = 0; at < text.size(); at += kPiece) tokenizer.encode(std::string_view(text).substr(at, kPiece));
  });
  std::printf("encode        %8.1f MB/s in pieces of %zu bytes\n", megabytes / pieces, kPiece);
}

void bench_sampler(size_t n_vocab) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> logits(n_vocab);
  for (float& x : logits) x = normal(random);
  struct Case {
    const char* name;
    SamplerParams params;
  };
  const auto with = [](float temperature, int32_t top_k, float top_p, float min_p, float repeat) {
    SamplerParams p;
    p.temperature = temperature, p.top_k = top_k, p.top_p = top_p, p.min_p = min_p, p.repeat_penalty = repeat;
    return p;
  };
  for (const auto& [name, params] :
       {Case{"greedy", with(0, 0, 1, 0, 1)}, Case{"default", SamplerParams{}}, Case{"top-k 40", with(0.8f, 40, 1, 0, 1)},
        Case{"top-k 1000", with(0.8f, 1000, 1, 0, 1)}, Case{"top-p 0.95", with(0.8f, 0, 0.95f, 0, 1)},
        Case{"top-p 0.5", with(0.8f, 0, 0.5f, 0, 1)}, Case{"min-p 0.05", with(0.8f, 0, 1, 0.05f, 1)},
        Case{"temperature", with(0.8f, 0, 1, 0, 1)}, Case{"penalties", with(0.8f, 40, 0.95f, 0.05f, 1.1f)}}) {
    Sampler sampler(params);
    for (Token t = 0; t < 64; ++t) sampler.accept(t * 7);
    constexpr int kRuns = 50;
    const double s = best_seconds([&] {
      for (int i = 0; i < kRuns; ++i) sampler.accept(sampler.sample(logits));
    });
    std::printf("sample        %8.3f ms, %s\n", s * 1e3 / kRuns, name);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: bench_text MODEL.gguf TEXT ...\n");
    return 2;
  }
  std::string text;
  for (int i = 2; i < argc; ++i) text += read_file(argv[i], size_t{1} << 30);
  bench_open(argv[1]);
  bench_tokenizer(argv[1], text);
  bench_sampler(32000);
}
