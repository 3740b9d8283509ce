// What streaming cost in a test of `duet bench`.
#include <sys/resource.h>

#include <algorithm>

#include "cli/bench.h"

namespace duet::cli {
namespace {

struct rusage usage() {
  struct rusage out {};
  ::getrusage(RUSAGE_SELF, &out);
  return out;
}

}  // namespace

StreamMeter::StreamMeter(const Engine& engine)
    : engine_(engine), before_(engine.stream_stats()), faults_before_(static_cast<uint64_t>(usage().ru_majflt)) {}

StreamShare StreamMeter::end(double n_tokens, double seconds, double weight_bytes, double memory_bytes_per_s,
                             double disk_bytes_per_s) const {
  const StreamStats now = *engine_.stream_stats();
  const struct rusage used = usage();
  const auto hits = static_cast<double>(now.hits - before_->hits), misses = static_cast<double>(now.misses - before_->misses);
  const auto bytes = static_cast<double>(now.reads.bytes - before_->reads.bytes);
  const double t_io = bytes / n_tokens / disk_bytes_per_s, t_mem = weight_bytes / memory_bytes_per_s, t = seconds / n_tokens;
  const double waited = static_cast<double>(now.wait_ns - before_->wait_ns) * 1e-9 / engine_.info().n_threads;
  StreamShare out;
  out.hit_rate = hits + misses > 0 ? hits / (hits + misses) : 1.0;
  out.disk_bytes = bytes / n_tokens;
  out.disk_bytes_per_s = bytes / seconds;
  out.wait_share = waited / seconds;
  out.t_perfect = std::max(t_io, t_mem);
  out.t_demand = t_io + std::max(0.0, t_mem - bytes / n_tokens / memory_bytes_per_s);
  out.eff_sched = out.t_perfect / t;
  out.eff_disk = t_io / t;
  out.major_faults = static_cast<double>(static_cast<uint64_t>(used.ru_majflt) - faults_before_) / n_tokens;
  out.peak_bytes = static_cast<uint64_t>(used.ru_maxrss) * 1024;
  out.backend = now.backend;
  return out;
}

}  // namespace duet::cli
