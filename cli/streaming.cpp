#include "cli/streaming.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "base/pressure.h"
#include "runtime/memory_plan.h"

namespace duet::cli {

StreamUse stream_use(const StreamStats& before, const StreamStats& now, double n_tokens, double seconds, int n_threads) {
  const auto hits = static_cast<double>(now.hits - before.hits), misses = static_cast<double>(now.misses - before.misses);
  const auto bytes = static_cast<double>(now.reads.bytes - before.reads.bytes);
  const double waited = static_cast<double>(now.wait_ns - before.wait_ns) * 1e-9;
  double guesses = 0, good = 0;
  for (size_t i = 0; i < now.guesses.size(); ++i) {
    guesses += static_cast<double>(now.guesses[i].asked - before.guesses[i].asked);
    good += static_cast<double>(now.guesses[i].right - before.guesses[i].right);
  }
  return {.hit_rate = hits + misses > 0 ? hits / (hits + misses) : 1.0,
          .disk_bytes = bytes / n_tokens,
          .disk_bytes_per_s = bytes / seconds,
          .wait_share = waited / n_threads / seconds,
          .backend = now.backend,
          .read_bytes = now.reads.bytes - before.reads.bytes,
          .padding_bytes = now.padding_bytes - before.padding_bytes,
          .speculative_bytes = now.speculative_bytes - before.speculative_bytes,
          .wasted_bytes = now.wasted_bytes - before.wasted_bytes,
          .good_guesses = guesses > 0 ? std::optional(good / guesses) : std::nullopt};
}

namespace {

std::string disk_text(const StreamUse& use) {
  return concat(" | disk ", fixed(use.disk_bytes_per_s / 1e9, 2), " GB/s, ", fixed(100 * use.wait_share, 0), " % of time");
}

}  // namespace

StreamLine::StreamLine(const Engine& engine) : engine_(engine) {
  older_ = read(0);
  newer_ = older_;
}

StreamLine::Reading StreamLine::read(size_t n_tokens) const {
  return {StatusLine::Clock::now(), n_tokens, engine_.stream_stats().value_or(StreamStats{}), major_faults()};
}

void StreamLine::prompt(int layer) {
  if (engine_.plan().streamed && line_.due()) draw(layer, 0);
}

void StreamLine::decoded(size_t n_tokens) {
  if (line_.due()) draw(-1, n_tokens);
}

// layer: of the prompt, or -1.
void StreamLine::draw(int layer, size_t n_tokens) {
  const Reading now = read(n_tokens);
  const double seconds = std::chrono::duration<double>(now.time - older_.time).count();
  if (layer >= 0) {
    const StreamUse use = stream_use(older_.stats, now.stats, 1, seconds, engine_.info().n_threads);
    line_.draw(concat("prompt: layer ", layer + 1, " of ", engine_.info().hparams.n_layer, disk_text(use)));
  } else if (const std::string text = decode_text(now, seconds); !text.empty()) {
    line_.draw(text);
  } else {
    line_.clear();
  }
  if (now.time - newer_.time < std::chrono::seconds(2)) return;
  older_ = std::exchange(newer_, now);
}

// As much as 80 columns hold.
std::string StreamLine::decode_text(const Reading& now, double seconds) const {
  const size_t n_tokens = now.n_tokens - std::min(older_.n_tokens, now.n_tokens);
  const double n = std::max(static_cast<double>(n_tokens), 1.0), faults = static_cast<double>(now.faults - older_.faults) / n;
  const std::string speed = concat(now.n_tokens, " tok | ", fixed(static_cast<double>(n_tokens) / seconds, 2), " tok/s | ");
  if (engine_.plan().streamed) {
    const StreamUse use = stream_use(older_.stats, now.stats, n, seconds, engine_.info().n_threads);
    return concat(speed, "hit ", fixed(100 * use.hit_rate, 0), " % | ", fixed(use.disk_bytes / 1e9, 2), " GB/tok", disk_text(use));
  }
  if (faults <= static_cast<double>(ThrashDetector::kFaultsPerToken)) return "";
  return concat(speed, "weights come from disk: ", fixed(faults, 0), " major faults/tok");
}

}  // namespace duet::cli
