// What streaming cost in a test of `duet bench`.
#include <sys/resource.h>

#include <algorithm>
#include <fstream>

#include "cli/bench.h"
#include "runtime/memory_plan.h"

namespace duet::cli {
namespace {

struct rusage usage() {
  struct rusage out {};
  ::getrusage(RUSAGE_SELF, &out);
  return out;
}

// What the kernel has read from disks for this process; nothing where it does not say.
std::optional<uint64_t> kernel_read_bytes() {
  std::ifstream file("/proc/self/io");
  uint64_t value = 0;
  for (std::string name; file >> name >> value;)
    if (name == "read_bytes:") return value;
  return std::nullopt;
}

}  // namespace

StreamMeter::StreamMeter(const Engine& engine)
    : engine_(engine), before_(engine.stream_stats()), faults_before_(static_cast<uint64_t>(usage().ru_majflt)), kernel_bytes_before_(kernel_read_bytes()) {}

StreamShare StreamMeter::end(double n_tokens, double seconds, double disk_bytes_per_s) const {
  const struct rusage used = usage();
  StreamShare out;
  static_cast<StreamUse&>(out) = stream_use(*before_, *engine_.stream_stats(), n_tokens, seconds, engine_.info().n_threads);
  out.t = seconds / n_tokens;
  out.t_io = out.disk_bytes / disk_bytes_per_s;
  out.eff_disk = out.t_io / out.t;
  out.major_faults = static_cast<double>(static_cast<uint64_t>(used.ru_majflt) - faults_before_) / n_tokens;
  if (const auto now = kernel_read_bytes(); now && kernel_bytes_before_) out.kernel_bytes = static_cast<double>(*now - *kernel_bytes_before_) / n_tokens;
  out.peak_bytes = static_cast<uint64_t>(used.ru_maxrss) * 1024;
  return out;
}

void hold_against_memory(StreamShare& share, double weight_bytes, double memory_bytes_per_s) {
  const double t_mem = weight_bytes / memory_bytes_per_s;
  share.t_perfect = std::max(share.t_io, t_mem);
  share.t_demand = share.t_io + std::max(0.0, t_mem - share.disk_bytes / memory_bytes_per_s);
  share.eff_sched = share.t_perfect / share.t;
}

BenchRouting::BenchRouting(const Engine& engine, const std::string& trace) : engine_(engine) {
  if (!trace.empty()) writer_.emplace(trace, trace_header(engine));
  if (!engine.plan().streamed) return;
  test_.header = trace_header(engine);
  policy_.emplace(test_.header.n_expert, test_.header.slots);
}

RoutingFn BenchRouting::listener() {
  if (!writer_ && !policy_) return {};
  return [this](int layer, std::span<const int32_t> experts) { add(layer, experts); };
}

// The engine's slots became fewer: the copy of its policy follows.
void BenchRouting::follow(const std::vector<uint32_t>& slots) {
  if (slots == test_.header.slots) return;
  std::vector<int32_t> freed;
  for (size_t l = 0; l < slots.size(); ++l) policy_->shrink(l, slots[l], freed);
  test_.header.slots = slots;
  if (recording_) test_.chunks.back().slots = slots;
}

void BenchRouting::add(int layer, std::span<const int32_t> experts) {
  if (writer_) trace_routing(*writer_, engine_)(layer, experts);
  if (!policy_) return;
  const auto l = static_cast<size_t>(layer);
  if (layer == 0 && recording_) test_.chunks.emplace_back();
  if (layer == 0) follow(engine_.stream_stats()->slots);
  policy_->use(l, experts, test_.header.n_used, step_);
  if (!recording_) return;
  missed_bytes_ += step_.loads.size() * test_.header.expert_bytes[l];
  test_.chunks.back().layers.emplace_back(experts.begin(), experts.end());
}

void BenchRouting::record(bool on) {
  recording_ = on;
  test_.chunks.clear();
  missed_bytes_ = 0;
  if (!policy_ || !on) return;
  first_slots_ = test_.header.slots;
  held_.assign(first_slots_.size(), {});
  for (size_t l = 0; l < held_.size(); ++l)
    for (int32_t e = 0; e < static_cast<int32_t>(test_.header.n_expert); ++e)
      if (policy_->slot_of(l, e) != ExpertPolicy::kStaging) held_[l].push_back(e);
}

double BenchRouting::eff_policy() const {
  ReplayCounts best;
  for (const ReplayCounts& counts : replay_belady(test_, first_slots_, held_)) best += counts;
  return missed_bytes_ > 0 ? static_cast<double>(best.bytes) / static_cast<double>(missed_bytes_) : 1.0;
}

void BenchRouting::commit() {
  if (writer_) writer_->commit(engine_.stream_stats());
}

}  // namespace duet::cli
