#include "runtime/memory_plan.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "base/units.h"
#include "runtime/decoder.h"
#include "runtime/kv_cache.h"

namespace duet {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20, kGiB = uint64_t{1} << 30;
constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();

constexpr uint64_t kProgramBytes = 96 * kMiB;  // code and its libraries, tokenizer, metadata of the file
constexpr uint64_t kPageTableShare = 512;      // 8 bytes for 4096
constexpr uint64_t kCacheBytes = 16 * kMiB;    // under way through the page cache, where nothing else goes
constexpr uint32_t kDefaultContext = 4096;
constexpr uint32_t kLargestBatch = 4096;

// ---- the budget ------------------------------------------------------------------------------

struct Budget {
  uint64_t streamed = kNoLimit, resident = kNoLimit, reserve = 0;
  std::string reason;

  void lower(uint64_t to, std::string why) {
    if (to >= streamed) return;
    streamed = to;
    reason = std::move(why);
  }
};

std::string cgroup_text(const HostMemory& memory) { return concat("cgroup limit ", format_size(*memory.cgroup_limit_bytes)); }

// What automatic leaves of the memory that is available.
uint64_t reserve_of(uint64_t total_bytes) { return std::min(std::max(kGiB, total_bytes / 16), total_bytes / 2); }

Budget automatic_budget(const HostMemory& memory) {
  Budget budget;
  uint64_t usable = kNoLimit;
  const auto leave = [&](const char* what, uint64_t n_bytes, uint64_t reserve) {
    budget.lower(less(n_bytes, reserve), concat(what, format_size(n_bytes), ", ", format_size(reserve), " left to the system"));
  };
  if (memory.total_bytes > 0) {
    usable = memory.total_bytes;
    budget.reserve = reserve_of(usable);
    if (memory.available_bytes > 0) leave("available memory ", memory.available_bytes, budget.reserve);
    else leave("memory of ", usable, 2 * budget.reserve);  // kernels before 3.14 do not tell more
  }
  if (memory.available_bytes > 0) budget.resident = memory.available_bytes;
  if (memory.cgroup_limit_bytes) {
    const uint64_t limit = *memory.cgroup_limit_bytes;
    const uint64_t others = less(memory.cgroup_used_bytes.value_or(0), memory.cgroup_cache_bytes.value_or(0));
    usable = std::min(usable, limit);
    budget.lower(budget_in_cgroup(limit, others), cgroup_text(memory));
    budget.resident = std::min(budget.resident, less(limit, others));
  }
  if (usable != kNoLimit) budget.resident = std::min(budget.resident, usable / 10 * 9);
  return budget;
}

Budget find_budget(const MemoryOptions& options, const HostMemory& memory) {
  if (options.ram == MemoryOptions::Ram::all) return {.reason = "--ram all"};
  if (options.ram == MemoryOptions::Ram::automatic) return automatic_budget(memory);
  Budget budget;
  budget.lower(options.ram_bytes, concat("--ram ", format_size(options.ram_bytes)));
  if (memory.total_bytes > 0) budget.lower(memory.total_bytes, concat("memory of ", format_size(memory.total_bytes)));
  if (memory.cgroup_limit_bytes) budget.lower(*memory.cgroup_limit_bytes, cgroup_text(memory));
  budget.resident = budget.streamed;
  return budget;
}

// ---- the parts -------------------------------------------------------------------------------

// With the logits of a session: the last token's, and kLogitRows at once.
uint64_t program_bytes(const ModelSizes& sizes) { return kProgramBytes + (kLogitRows + 1) * sizeof(float) * sizes.hparams.n_vocab; }

// What a budget leaves for all but program and page tables.
uint64_t room_in(uint64_t budget, const ModelSizes& sizes) { return less(budget, program_bytes(sizes)) / (kPageTableShare + 1) * kPageTableShare; }

uint64_t fixed_bytes(const MemoryPlan& plan) { return plan.dense_bytes + plan.kv_bytes + plan.scratch_bytes + plan.io_bytes; }

void set_total(MemoryPlan& plan, const ModelSizes& sizes) {
  const uint64_t used = fixed_bytes(plan) + plan.expert_bytes;
  plan.program_bytes = program_bytes(sizes) + used / kPageTableShare + 1;
  plan.total_bytes = used + plan.program_bytes;
}

// Layers in an order whose every beginning is spread evenly over the model (multiples of the golden
// ratio): reads then come at regular intervals.
std::vector<size_t> spread(size_t n_layer) {
  std::vector<size_t> order(n_layer);
  std::iota(order.begin(), order.end(), size_t{0});
  const auto place = [](size_t layer) { return static_cast<uint32_t>(layer * 0x9e3779b9u); };
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return place(a) < place(b); });
  return order;
}

std::vector<uint32_t> hand_out_slots(const ModelSizes& sizes, uint64_t room) {
  const auto n_expert = sizes.hparams.n_expert;
  const uint64_t one_each = std::accumulate(sizes.expert_bytes.begin(), sizes.expert_bytes.end(), uint64_t{0});
  std::vector<uint32_t> slots(sizes.expert_bytes.size());
  const auto each = static_cast<uint32_t>(std::min<uint64_t>(n_expert, room / one_each));
  std::fill(slots.begin(), slots.end(), each);
  room -= each * one_each;
  for (const size_t layer : spread(slots.size())) {
    if (sizes.expert_bytes[layer] > room || each == n_expert) continue;
    ++slots[layer];
    room -= sizes.expert_bytes[layer];
  }
  return slots;
}

// What its slots take, and what share of the experts they hold.
void count_slots(MemoryPlan& plan, const ModelSizes& sizes) {
  double held = 0, all = 0;
  plan.expert_bytes = 0;
  for (size_t layer = 0; layer < plan.slots.size(); ++layer) {
    const auto in_file = static_cast<double>(sizes.expert_file_bytes[layer]);
    plan.expert_bytes += plan.slots[layer] * sizes.expert_bytes[layer];
    held += in_file * plan.slots[layer] / sizes.hparams.n_expert;
    all += in_file;
  }
  plan.resident_share = held / all;
}

class Planner {
 public:
  Planner(const ModelSizes& sizes, const MemoryOptions& options, int n_threads, Budget budget)
      : sizes_(sizes), options_(options), n_threads_(n_threads), budget_(std::move(budget)) {
    plan_.budget_reason = budget_.reason;
    plan_.reserve_bytes = budget_.reserve;
    plan_.n_ctx = planned_context(sizes.hparams, options.n_ctx);
    plan_.dense_bytes = sizes.dense_bytes;
    plan_.kv_bytes = options.n_sequences * KvCache::bytes_needed(sizes.hparams, plan_.n_ctx, options.kv_type);
  }

  MemoryPlan make() {
    if (!options_.slots && fits_resident()) return plan_;
    if (sizes_.expert_bytes.empty()) refuse_dense();
    stream();
    return plan_;
  }

 private:
  bool fits_resident();
  void stream();
  void set_batch(uint32_t n_batch);
  uint32_t choose_batch() const;
  void set_staging(uint32_t n_staging);
  [[noreturn]] void refuse() const;
  [[noreturn]] void refuse_dense() const;

  const ModelSizes& sizes_;
  const MemoryOptions& options_;
  int n_threads_;
  Budget budget_;
  MemoryPlan plan_;
};

void Planner::set_batch(uint32_t n_batch) {
  plan_.n_batch = std::min(n_batch, plan_.n_ctx);
  plan_.scratch_bytes = Decoder::bytes_needed(sizes_.hparams, n_threads_, plan_.n_ctx, plan_.n_batch);
}

bool Planner::fits_resident() {
  set_batch(options_.n_batch > 0 ? options_.n_batch : kResidentBatch);
  plan_.expert_bytes = std::accumulate(sizes_.expert_file_bytes.begin(), sizes_.expert_file_bytes.end(), uint64_t{0});
  set_total(plan_, sizes_);
  plan_.budget_bytes = budget_.resident == kNoLimit ? 0 : budget_.resident;
  return plan_.total_bytes <= budget_.resident;
}

// The chunk decides how often a long prompt reads the file; a tenth of the budget at most, because
// slots are what every token gains from.
uint32_t Planner::choose_batch() const {
  constexpr uint32_t kStep = 256;
  const uint32_t least = std::min(plan_.n_ctx, kResidentBatch);
  uint32_t n_batch = std::min(plan_.n_ctx, kLargestBatch);
  while (n_batch > least &&
         Decoder::bytes_needed(sizes_.hparams, n_threads_, plan_.n_ctx, n_batch) > budget_.streamed / 10)
    n_batch = std::max(least, static_cast<uint32_t>(less(n_batch, kStep)));
  return n_batch;
}

void Planner::set_staging(uint32_t n_staging) {
  plan_.n_staging = n_staging;
  plan_.io_bytes = n_staging * *std::max_element(sizes_.expert_bytes.begin(), sizes_.expert_bytes.end()) + kCacheBytes;
}

void Planner::stream() {
  const uint32_t n_expert = sizes_.hparams.n_expert;
  plan_.streamed = true;
  plan_.budget_bytes = budget_.streamed == kNoLimit ? 0 : budget_.streamed;
  set_batch(options_.n_batch > 0 ? options_.n_batch : choose_batch());
  plan_.slots.assign(sizes_.expert_bytes.size(), std::min(options_.slots.value_or(0), n_expert));
  count_slots(plan_, sizes_);
  const uint64_t room = room_in(budget_.streamed, sizes_);
  const auto too_much = [&] { return fixed_bytes(plan_) + plan_.expert_bytes > room; };
  set_staging(3);
  if (too_much()) set_staging(2);
  if (too_much() && options_.n_batch == 0) set_batch(kResidentBatch);
  if (!options_.slots && !too_much()) plan_.slots = hand_out_slots(sizes_, room - fixed_bytes(plan_));
  count_slots(plan_, sizes_);
  set_total(plan_, sizes_);
  if (too_much()) refuse();
}

uint64_t in_mib(uint64_t n_bytes) { return (n_bytes + kMiB - 1) / kMiB; }

// As it stands, the plan is the least there is.
void Planner::refuse() const {
  fail(ErrorKind::memory, "the budget of ", format_size(plan_.budget_bytes), " (", plan_.budget_reason, ") is too small: ",
       in_mib(plan_.total_bytes), "MiB would do (dense weights ", format_size(plan_.dense_bytes), ", keys and values of ",
       plan_.n_ctx, " positions ", format_size(plan_.kv_bytes), ", working memory of a batch of ", plan_.n_batch, " ",
       format_size(plan_.scratch_bytes), ", reading ", format_size(plan_.io_bytes), ", program ",
       format_size(plan_.program_bytes), plan_.expert_bytes > 0 ? concat(", slots ", format_size(plan_.expert_bytes)) : "",
       "); give it more, or use a smaller context");
}

void Planner::refuse_dense() const {
  const char* const why = sizes_.hparams.n_expert > 0 ? "nothing is left to stream beside the card: "
                          : options_.slots            ? "slots are for experts, and this model has none: "
                                                      : "a model without experts cannot be streamed: ";
  fail(ErrorKind::memory, why, "it needs ", in_mib(plan_.total_bytes), "MiB, the budget is ", format_size(plan_.budget_bytes), " (", plan_.budget_reason,
       "); without a limit (--ram all) it is mapped all the same");
}

}  // namespace

uint32_t planned_context(const HParams& hparams, uint32_t asked) {
  if (asked > 0) return asked;
  return hparams.n_ctx_train > 0 ? std::min(hparams.n_ctx_train, kDefaultContext) : kDefaultContext;
}

uint64_t budget_in_cgroup(uint64_t limit, uint64_t used_by_others) {
  return less(limit, std::max(128 * kMiB, limit / 64) + used_by_others);
}

MemoryPlan plan_memory(const ModelSizes& sizes, const MemoryOptions& options, int n_threads, const HostMemory& memory) {
  return Planner(sizes, options, n_threads, find_budget(options, memory)).make();
}

MemoryPlan shrunk_plan(MemoryPlan plan, const ModelSizes& sizes, uint64_t budget_bytes) {
  const std::vector<uint32_t> fitting = hand_out_slots(sizes, less(room_in(budget_bytes, sizes), fixed_bytes(plan)));
  for (size_t layer = 0; layer < fitting.size(); ++layer) plan.slots[layer] = std::min(plan.slots[layer], fitting[layer]);
  count_slots(plan, sizes);
  set_total(plan, sizes);
  return plan;
}

MemoryPlan with_one_slot_less(MemoryPlan plan, const ModelSizes& sizes) {
  for (uint32_t& n : plan.slots) n -= std::min(n, 1u);
  count_slots(plan, sizes);
  set_total(plan, sizes);
  return plan;
}

std::string slots_text(const std::vector<uint32_t>& slots) {
  const auto [least, most] = std::minmax_element(slots.begin(), slots.end());
  return *least == *most ? concat(*least) : concat(*least, " to ", *most);
}

std::string describe(const MemoryPlan& plan, const HParams& hparams) {
  const std::string fixed = concat("dense weights ", format_size(plan.dense_bytes), ", keys and values ", format_size(plan.kv_bytes), " (",
                                   plan.n_ctx, " positions), working memory ", format_size(plan.scratch_bytes + plan.program_bytes), " (batch ", plan.n_batch, ")");
  const std::string limit = plan.budget_bytes == 0 ? "no limit" : concat("budget ", format_size(plan.budget_bytes), ", ", plan.budget_reason);
  if (!plan.streamed)
    return concat("resident, ", format_size(plan.total_bytes), " (", limit, "): ", fixed,
                  plan.expert_bytes > 0 ? concat(", experts ", format_size(plan.expert_bytes)) : "");
  const auto percent = static_cast<int>(100 * plan.resident_share + 0.5);
  return concat("streamed, ", format_size(plan.total_bytes), " (", limit, "): ", fixed, ", reading ", format_size(plan.io_bytes), ", experts ",
                format_size(plan.expert_bytes), ": ", slots_text(plan.slots), " of ", hparams.n_expert, " per layer, ", percent, " %");
}

}  // namespace duet
