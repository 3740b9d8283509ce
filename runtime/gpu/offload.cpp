#include "runtime/gpu/offload.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/units.h"
#include "runtime/gpu/scratch.h"

namespace duet::gpu {
namespace {

// Of one of two buffers through which weights go to the card: what the host fills while the other is sent.
constexpr size_t kStagingBytes = size_t{8} << 20;

size_t weight_bytes(const Weight& w) { return w.rows * w.row_bytes; }

}  // namespace

// ---- memory ------------------------------------------------------------------------------------

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(owner_, other.owner_);
  std::swap(data_, other.data_);
  std::swap(n_bytes_, other.n_bytes_);
  return *this;
}

Memory::~Memory() {
  if (data_ != nullptr) owner_->release(data_, n_bytes_);
}

HostMemory::HostMemory(Device& device, size_t n_bytes) : device_(device), data_(static_cast<std::byte*>(device.allocate_host(n_bytes))) {
  if (data_ == nullptr) fail(ErrorKind::memory, device.info().name, ": ", format_size(n_bytes), " of the host's memory cannot be pinned; use --gpu off");
}

HostMemory::~HostMemory() { device_.release_host(data_); }

Memory Offload::try_allocate(size_t n_bytes) {
  void* const data = device_->allocate(n_bytes);
  if (data == nullptr) return {};
  used_bytes_ += n_bytes;
  return {this, data, n_bytes};
}

void Offload::release(void* data, size_t n_bytes) {
  device_->release(data);
  used_bytes_ -= n_bytes;
}

uint64_t Offload::room() const { return less(plan_.budget_bytes - plan_.context_bytes, used_bytes_); }

void Offload::require(size_t n_bytes, const char* what) const {
  if (n_bytes > room())
    fail(ErrorKind::memory, what, " need ", format_size(n_bytes), " of the card, ", format_size(room()), " are left of its budget of ", format_size(plan_.budget_bytes),
         "; open the model with the larger context or batch, or with more sequences");
}

Memory Offload::allocate(size_t n_bytes, const char* what) {
  require(n_bytes, what);
  Memory memory = try_allocate(n_bytes);
  if (memory.data() == nullptr) fail(ErrorKind::memory, what, " need ", format_size(n_bytes), " of the card, which has no more; give a smaller --vram or use --gpu off");
  return memory;
}

void Offload::settle() {
  if (!failure_.empty()) return;
  if (const char* message = device_->synchronize()) failure_ = message;
}

void Offload::check() {
  settle();
  if (!failure_.empty()) fail(ErrorKind::io, device_->info().name, ": ", failure_, "; start again, without the card: --gpu off");
}

// ---- weights -----------------------------------------------------------------------------------

Matrices ExpertMatrices::matrices(size_t first, size_t n) const {
  const Format& format = *formats[first];
  return {.dtype = format.dtype, .data = data + first, .n = n, .rows = rows, .cols = cols, .row_bytes = row_bytes(format, cols)};
}

bool ExpertMatrices::reads(ActFormat act) const {
  return std::any_of(formats.begin(), formats.end(), [&](const Format* format) { return format->act == act; });
}

// Things one after the other in one piece of memory: measured first (base null), then placed.
class Offload::Slab {
 public:
  Slab(Offload& owner, std::byte* base) : owner_(owner), base_(base) {}
  std::byte* add(const void* from, size_t n_bytes) {
    std::byte* const to = base_ + n_bytes_;
    n_bytes_ += aligned(n_bytes);
    if (base_ != nullptr) owner_.copies_.push_back({from, to, n_bytes});
    return to;
  }
  const float* floats(const std::vector<float>& values) { return reinterpret_cast<const float*>(add(values.data(), values.size() * sizeof(float))); }
  const std::byte* const* table(std::vector<const std::byte*> pointers) {
    const auto& kept = *owner_.tables_.emplace_back(std::make_unique<std::vector<const std::byte*>>(std::move(pointers)));
    return reinterpret_cast<const std::byte* const*>(add(kept.data(), kept.size() * sizeof(void*)));
  }
  size_t size() const { return n_bytes_; }

 private:
  Offload& owner_;
  std::byte* base_;
  size_t n_bytes_ = 0;
};

Matrices Offload::matrix(Slab& slab, const Weight& w) {
  const std::byte* const data = slab.add(w.data, weight_bytes(w));
  return {.dtype = w.format->dtype, .data = slab.table({data}), .n = 1, .rows = w.rows, .cols = w.cols, .row_bytes = w.row_bytes};
}

ExpertMatrices Offload::experts(Slab& slab, const Layer& layer, Weight Expert::* part) {
  ExpertMatrices out;
  std::vector<const std::byte*> pointers;
  for (const Expert& expert : layer.experts) {
    const Weight& w = expert.*part;
    pointers.push_back(slab.add(w.data, weight_bytes(w)));
    out.formats.push_back(w.format);
    out.alike &= w.format == out.formats[0];
    out.rows = w.rows;
    out.cols = w.cols;
  }
  out.data = slab.table(std::move(pointers));
  return out;
}

void Offload::place_dense() {
  const auto place = [&](Slab& slab) {
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Layer& from = model_->layers()[i];
      LayerOnCard& to = layers_[i];
      to.attn_norm = slab.floats(from.attn_norm);
      to.ffn_norm = slab.floats(from.ffn_norm);
      to.q = matrix(slab, from.attn_q);
      to.k = matrix(slab, from.attn_k);
      to.v = matrix(slab, from.attn_v);
      to.output = matrix(slab, from.attn_output);
      if (from.router.empty()) continue;
      const size_t cols = model_->hparams().n_embd;
      const auto* const data = reinterpret_cast<const std::byte*>(slab.floats(from.router));
      to.router = {.dtype = DType::F32, .data = slab.table({data}), .n = 1, .rows = model_->hparams().n_expert, .cols = cols, .row_bytes = cols * sizeof(float)};
    }
    output_norm_ = slab.floats(model_->output_norm());
    output_ = matrix(slab, model_->output());
  };
  Slab measure(*this, nullptr);
  place(measure);
  tables_.clear();
  Slab slab(*this, slabs_.emplace_back(allocate(measure.size(), "the weights")).data());
  place(slab);
}

bool Offload::place_experts(size_t layer) {
  const Layer& from = model_->layers()[layer];
  LayerOnCard to = layers_[layer];
  const auto place = [&](Slab& slab) {
    to.gate = experts(slab, from, &Expert::gate);
    to.up = experts(slab, from, &Expert::up);
    to.down = experts(slab, from, &Expert::down);
  };
  const size_t n_tables = tables_.size();
  Slab measure(*this, nullptr);
  place(measure);
  tables_.resize(n_tables);
  Memory memory = try_allocate(measure.size());
  if (memory.data() == nullptr) return false;
  Slab slab(*this, slabs_.emplace_back(std::move(memory)).data());
  place(slab);
  layers_[layer] = std::move(to);
  return true;
}

Transit::Transit(Device& device, Memory on_card, const std::array<size_t, 3>& part_bytes)
    : memory(std::move(on_card)),
      part_at{0, aligned(part_bytes[0]), aligned(part_bytes[0]) + aligned(part_bytes[1])},
      slot_bytes(part_at[2] + aligned(part_bytes[2])),
      staging(device, 2 * slot_bytes) {}

// Room for two of the experts that the CPU has; false: there is none.
bool Offload::try_transit() {
  std::array<size_t, 3> most{};
  for (size_t layer = 0; layer < plan_.first_layer; ++layer)
    for (const Expert& expert : model_->layers()[layer].experts) {
      const Weight* const parts[] = {&expert.gate, &expert.up, &expert.down};
      for (size_t i = 0; i < most.size(); ++i) most[i] = std::max(most[i], weight_bytes(*parts[i]));
    }
  const size_t pointers_at = 2 * (aligned(most[0]) + aligned(most[1]) + aligned(most[2])), n_bytes = pointers_at + kAlignment;
  Memory memory = n_bytes <= room() ? try_allocate(n_bytes) : Memory();
  if (memory.data() == nullptr) return false;
  try {
    transit_ = std::make_unique<Transit>(*device_, std::move(memory), most);
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::memory) throw;
    return false;
  }
  plan_.transit_bytes = n_bytes;
  auto& kept = *tables_.emplace_back(std::make_unique<std::vector<const std::byte*>>());
  for (const int slot : {0, 1})
    for (size_t part = 0; part < 3; ++part) kept.push_back(transit_->card(slot, part));
  std::byte* const to = transit_->memory.data() + pointers_at;
  copies_.push_back({kept.data(), to, kept.size() * sizeof(void*)});
  transit_->pointers = reinterpret_cast<const std::byte* const*>(to);
  return true;
}

// Only a matter of speed: where there is no room, none.
void Offload::place_transit(const NoticeFn& notice) {
  if (plan_.transit_bytes == 0 || try_transit()) return;
  plan_.transit_bytes = 0;
  notice(concat(device_->info().name, ": out of memory: long prompts do not have the CPU's experts copied through the card"));
}

void Offload::drop_transit() {
  if (transit_ == nullptr) return;
  std::erase_if(copies_, [&](const Copy& copy) { return copy.to == reinterpret_cast<const std::byte*>(transit_->pointers); });
  transit_.reset();
  plan_.transit_bytes = 0;
}

// What sessions will need, and experts on their way, is kept free meanwhile.
void Offload::place_all(const ModelSizes& sizes, const NoticeFn& notice) {
  layers_.resize(model_->layers().size());
  place_dense();
  const Memory kept = allocate(plan_.kv_bytes + plan_.scratch_bytes, "keys and values and working memory");
  Memory passing = plan_.transit_bytes > 0 ? try_allocate(plan_.transit_bytes + 8 * kAlignment) : Memory();
  for (uint32_t layer = plan_.n_layer; layer-- > plan_.first_layer;) {
    if (place_experts(layer)) continue;
    const uint32_t n_planned = plan_.n_layer - plan_.first_layer;
    plan_ = with_first_layer(plan_, sizes, layer + 1);
    plan_.transit_bytes = transit_bytes(sizes, plan_);  // of layers that were to be on the card, too
    notice(concat(device_->info().name, ": out of memory: experts of ", plan_.n_layer - plan_.first_layer, " layers are on the card instead of ", n_planned));
    break;
  }
  passing = Memory();
  place_transit(notice);
}

Offload::Offload(const Model& model, const ModelSizes& sizes, CardPlan plan, Device& device, const NoticeFn& notice)
    : model_(&model), device_(&device), plan_(std::move(plan)) {
  place_all(sizes, notice);
}

Offload::~Offload() { static_cast<void>(device_->synchronize()); }

// Of what the card has, the CPU reads only rows of a tied table of embeddings again.
void Offload::let_go(std::span<const std::byte> bytes, bool keeps_cached) const {
  const Weight& table = model_->token_embd();
  const bool is_table = bytes.data() >= table.data && bytes.data() < table.data + weight_bytes(table);
  if (!keeps_cached || !is_table) model_->file().drop(bytes, !keeps_cached);
}

// One half is filled, by all threads because the file's pages come with it, while the other is sent. What has been read of
// the file is let go of at once: it would count as this process's memory, all of it together.
void Offload::upload(const Compute& compute, bool keeps_cached) {
  const HostMemory staging(*device_, 2 * kStagingBytes);
  int slot = 0;
  size_t filled = 0;
  for (const Copy& copy : copies_) {
    for (size_t done = 0; done < copy.n_bytes; done += filled) {
      if (!device_->slot_read(slot)) check();
      filled = std::min(kStagingBytes, copy.n_bytes - done);
      std::byte* const to = staging.data() + static_cast<size_t>(slot) * kStagingBytes;
      const auto* const from = static_cast<const std::byte*>(copy.from) + done;
      // And the next piece; what is read around pages by itself would come back behind what has been let go of.
      if (!keeps_cached) model_->file().fetch({from, std::min(2 * kStagingBytes, copy.n_bytes - done)});
      compute.team([&] {
        parallel_for(compute.threads_for(filled), filled, size_t{256} << 10, [&](size_t begin, size_t end) { std::memcpy(to + begin, from + begin, end - begin); });
      });
      let_go({from, filled}, keeps_cached);
      device_->upload_beside(slot, copy.to + done, to, filled);
      slot = 1 - slot;
    }
  }
  for (const int each : {0, 1}) {
    device_->await_slot(each);
    if (!device_->slot_read(each)) check();
  }
  check();
  copies_.clear();
  tables_.clear();
}

}  // namespace duet::gpu
