#include "runtime/memory_watch.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "base/units.h"

namespace duet {
namespace {

std::optional<uint64_t> soft_limit(const HostMemory& memory) {
  return memory.cgroup_soft ? std::optional(memory.cgroup_soft->bytes) : std::nullopt;
}

// Keeps `now` for the next look.
bool lowered(std::optional<uint64_t>& before, std::optional<uint64_t> now) {
  const bool is_lower = now && (!before || *now < *before);
  before = now;
  return is_lower;
}

}  // namespace

MemoryWatch::MemoryWatch(ModelSizes sizes, MemoryPlan plan, const WatchOptions& options, NoticeFn notice)
    : sizes_(std::move(sizes)),
      plan_(std::move(plan)),
      options_(options),
      notice_(std::move(notice)),
      thrashing_(Clock::now()),
      pressure_(read_memory_pressure(options.root)),
      looked_(Clock::now()),
      hard_(pressure_.memory.cgroup_limit_bytes),
      soft_(soft_limit(pressure_.memory)),
      faults_(count_faults()),
      high_events_(pressure_.high_events) {
  pressure_.full_avg10 = 0;  // of the time before
}

void MemoryWatch::begin(Clock::time_point now) {
  const std::lock_guard lock(mutex_);
  thrashing_ = ThrashDetector(now);
  pressure_.full_avg10 = 0;
  high_events_ = read_memory_pressure(options_.root).high_events;
  faults_ = count_faults();
}

std::optional<std::vector<uint32_t>> MemoryWatch::after(size_t n_tokens, Clock::time_point now) {
  const std::lock_guard lock(mutex_);
  const uint64_t expert_bytes = plan_.expert_bytes, faults = count_faults();
  const uint64_t n_faults = faults - std::exchange(faults_, faults);
  look(now);
  if (thrashing_.after(n_tokens, n_faults, pressure_.full_avg10, now)) react_to_thrashing(n_faults, n_tokens);
  if (plan_.expert_bytes == expert_bytes) return std::nullopt;
  return plan_.slots;
}

void MemoryWatch::look(Clock::time_point now) {
  if (now - looked_ < options_.interval) return;
  looked_ = now;
  pressure_ = read_memory_pressure(options_.root);
  const HostMemory& memory = pressure_.memory;
  if (lowered(hard_, memory.cgroup_limit_bytes))
    react_to_limit("memory limit", *hard_, memory.cgroup_used_bytes.value_or(0), memory.cgroup_cache_bytes.value_or(0));
  if (lowered(soft_, soft_limit(memory)))
    react_to_limit("soft memory limit", *soft_, memory.cgroup_soft->used_bytes.value_or(0), memory.cgroup_soft->cache_bytes.value_or(0));
  if (memory.available_bytes > 0 && memory.available_bytes < plan_.reserve_bytes / 2) react_to_others(memory.available_bytes);
}

void MemoryWatch::react_to_others(uint64_t available) {
  const uint64_t before = plan_.expert_bytes;
  plan_ = shrunk_plan(std::move(plan_), sizes_, less(plan_.total_bytes, less(plan_.reserve_bytes, available)));
  tell(concat("available memory has fallen to ", format_size(available)), before);
}

void MemoryWatch::react_to_limit(const char* name, uint64_t limit, uint64_t used, uint64_t cache) {
  const uint64_t others = less(used, cache + pressure_.own_bytes), budget = budget_in_cgroup(limit, others);
  if (plan_.total_bytes <= budget) return;
  const uint64_t before = plan_.expert_bytes;
  const std::string what = concat(name, " lowered to ", format_size(limit));
  plan_ = shrunk_plan(std::move(plan_), sizes_, budget);
  tell(what, before);
  if (plan_.total_bytes > budget)
    notice_(concat(what, ": without any expert in memory this process still takes ", format_size(plan_.total_bytes),
                   "; it goes on, but may be slowed down or killed"));
}

void MemoryWatch::react_to_thrashing(uint64_t n_faults, size_t n_tokens) {
  const uint64_t before = plan_.expert_bytes, n_high = less(pressure_.high_events, high_events_);
  const std::string what =
      concat("memory is short (", n_faults / n_tokens, " major faults a token, ", static_cast<int>(pressure_.full_avg10 + 0.5),
             " % of the time waiting for it", n_high > 0 ? concat(", memory.high exceeded ", n_high, " times") : "", ")");
  plan_ = with_one_slot_less(std::move(plan_), sizes_);
  if (before > 0) return tell(what, before);
  if (!std::exchange(told_floor_, true)) notice_(concat(what, ": no experts are held that could make room"));
}

void MemoryWatch::tell(const std::string& what, uint64_t bytes_before) {
  if (plan_.expert_bytes == bytes_before) return;
  notice_(concat(what, ": ", slots_text(plan_.slots), " experts per layer stay in memory, ", format_size(bytes_before - plan_.expert_bytes),
                 " given back"));
}

}  // namespace duet
