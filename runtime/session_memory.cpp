#include "runtime/session_memory.h"

#include <algorithm>

#include "base/bytes.h"
#include "base/host.h"
#include "base/units.h"
#include "runtime/decoder.h"
#include "runtime/gpu/placement.h"
#include "runtime/kv_cache.h"
#include "runtime/memory_plan.h"

namespace duet {
namespace {

uint32_t context_length(const HParams& hparams, uint32_t asked, uint32_t planned, const NoticeFn& notice) {
  if (asked == 0) return planned;
  if (hparams.n_ctx_train > 0 && asked > hparams.n_ctx_train)
    notice(concat("context ", asked, " is longer than the ", hparams.n_ctx_train,
                  " positions the model was trained with; quality beyond them is unknown"));
  return asked;
}

const char* smaller_kv_types(const HParams& hparams, KvType type) {
  const bool q8 = hparams.head_dim % 32 == 0;
  if (type == KvType::f32) return q8 ? " or keys and values in f16 or q8_0" : " or keys and values in f16";
  return type == KvType::f16 && q8 ? " or keys and values in q8_0" : "";
}

// "a context of 4096 positions", "3 contexts of 4096 positions"
std::string contexts(uint32_t n_sequences, uint32_t n_ctx) {
  return n_sequences == 1 ? concat("a context of ", n_ctx, " positions") : concat(n_sequences, " contexts of ", n_ctx, " positions");
}

struct Needs {
  uint64_t kv = 0, scratch = 0;
};

Needs needs(const Engine& engine, const SessionSize& size, uint32_t n_sequences, KvType type) {
  const HParams& hparams = engine.info().hparams;
  Needs out;
  if (!checked_mul(KvCache::bytes_needed(hparams, size.n_ctx, type), uint64_t{n_sequences}, out.kv))
    fail(ErrorKind::memory, contexts(n_sequences, size.n_ctx), " do not fit any memory");
  if (engine.card_plan() != nullptr) out.kv = 0;  // there
  out.scratch = Decoder::bytes_needed(hparams, engine.info().n_threads, size.n_ctx, size.n_batch);
  return out;
}

// Refuses what clearly cannot fit. The page cache that holds the weights counts as available, so a
// model larger than memory is no obstacle.
void check_memory(const HParams& hparams, const SessionSize& size, uint32_t n_sequences, KvType type, const Needs& need) {
  const HostMemory memory = read_host_memory();
  uint64_t available = memory.available_bytes;
  if (memory.cgroup_limit_bytes) available = std::min(available, *memory.cgroup_limit_bytes);
  if (available == 0 || (need.kv <= available && need.scratch <= available - need.kv)) return;
  fail(ErrorKind::memory, contexts(n_sequences, size.n_ctx), n_sequences == 1 ? " needs " : " need ", need.kv, " bytes (", format_size(need.kv),
       ") of KV cache and ", format_size(need.scratch), " of working memory, ", available, " bytes (", format_size(available),
       ") are available; use a smaller context", n_sequences > 1 ? ", fewer of them" : "", smaller_kv_types(hparams, type),
       need.scratch > need.kv ? " or a smaller batch" : "");
}

// Where experts are streamed, memory is divided already.
void check_plan(const MemoryPlan& plan, const SessionSize& size, uint32_t n_sequences, const Needs& need) {
  const uint64_t planned = plan.kv_bytes + plan.scratch_bytes;
  if (need.kv + need.scratch <= planned) return;
  fail(ErrorKind::memory, contexts(n_sequences, size.n_ctx), " in batches of ", size.n_batch, n_sequences == 1 ? " needs " : " need ",
       format_size(need.kv + need.scratch), ", but ", format_size(planned), " were set aside for a context of ", plan.n_ctx,
       " in batches of ", plan.n_batch, " when the model was opened; open it with the larger context");
}

}  // namespace

SessionSize session_size(const Engine& engine, uint32_t n_ctx, uint32_t n_batch, uint32_t n_sequences, KvType type, const NoticeFn& notice) {
  const HParams& hparams = engine.info().hparams;
  const MemoryPlan& plan = engine.plan();
  SessionSize size{context_length(hparams, n_ctx, plan.n_ctx, notice), 0};
  size.n_batch = std::min(n_batch > 0 ? n_batch : plan.n_batch, size.n_ctx);
  if (engine.card_plan() != nullptr) size.n_batch = std::min(size.n_batch, gpu::largest_batch(hparams));
  const Needs need = needs(engine, size, n_sequences, type);
  if (plan.streamed) check_plan(plan, size, n_sequences, need);
  else check_memory(hparams, size, n_sequences, type, need);
  return size;
}

}  // namespace duet
