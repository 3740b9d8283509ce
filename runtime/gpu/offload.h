// A card in use by an engine: its memory within the plan, and the weights it holds. What sessions make of them:
// runtime/gpu/forward.h.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "runtime/compute.h"
#include "runtime/gpu/placement.h"
#include "runtime/model.h"

namespace duet::gpu {

class Offload;

// Memory of the card. Empty, or of an Offload, which must outlive it.
class Memory {
 public:
  Memory() = default;
  Memory(Offload* owner, void* data, size_t n_bytes) : owner_(owner), data_(static_cast<std::byte*>(data)), n_bytes_(n_bytes) {}
  Memory(Memory&& other) noexcept { *this = std::move(other); }
  Memory& operator=(Memory&& other) noexcept;
  ~Memory();
  std::byte* data() const { return data_; }
  size_t size() const { return n_bytes_; }

 private:
  Offload* owner_ = nullptr;
  std::byte* data_ = nullptr;
  size_t n_bytes_ = 0;
};

// Memory of the host that the card reads and writes by itself. Error(memory).
class HostMemory {
 public:
  HostMemory(Device& device, size_t n_bytes);
  ~HostMemory();
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  std::byte* data() const { return data_; }

 private:
  Device& device_;
  std::byte* data_;
};

// One matrix of each expert. Where their formats differ, products are made expert by expert.
struct ExpertMatrices {
  const std::byte* const* data = nullptr;  // device array [n_expert]
  std::vector<const Format*> formats;      // [n_expert]
  size_t rows = 0, cols = 0;
  bool alike = true;
  // Those of experts [first, first + n), which are of one format.
  Matrices matrices(size_t first, size_t n) const;
  bool reads(ActFormat format) const;
};

struct LayerOnCard {
  const float *attn_norm = nullptr, *ffn_norm = nullptr;
  Matrices q{}, k{}, v{}, output{}, router{};  // router.n 0: dense
  ExpertMatrices gate, up, down;               // data null: experts are the CPU's
};

// Where experts that are the CPU's pass through, two at a time: while one is multiplied the next arrives.
struct Transit {
  Transit(Device& device, Memory on_card, const std::array<size_t, 3>& part_bytes);
  std::byte* host(int slot, size_t part) const { return staging.data() + place(slot, part); }
  std::byte* card(int slot, size_t part) const { return memory.data() + place(slot, part); }
  size_t place(int slot, size_t part) const { return static_cast<size_t>(slot) * slot_bytes + part_at[part]; }

  Memory memory;
  std::array<size_t, 3> part_at;  // of gate, up, down in a slot
  size_t slot_bytes;
  HostMemory staging;
  const std::byte* const* pointers = nullptr;  // device array [slot][part]
  int next = 0;                                // slot to fill
};

class Offload {
 public:
  // Takes memory for the weights, fewer layers of experts than planned when the card has not enough, with a notice.
  // Error(memory) when it has not even enough for the rest. The model must outlive it.
  Offload(const Model& model, const ModelSizes& sizes, CardPlan plan, Device& device, const NoticeFn& notice);
  ~Offload();
  Offload(const Offload&) = delete;
  Offload& operator=(const Offload&) = delete;

  // Gives back what experts of the CPU would pass through: those that are streamed do not. Before upload().
  void drop_transit();
  // Copies the weights, and lets go of the file's pages behind itself; keeps_cached: the system may keep them in its page
  // cache for the next start. Error(io); Error(memory) where the host's memory cannot be pinned.
  void upload(const Compute& compute, bool keeps_cached);

  Device& device() const { return *device_; }
  const CardPlan& plan() const { return plan_; }
  const Model& model() const { return *model_; }
  const std::vector<LayerOnCard>& layers() const { return layers_; }
  Transit* transit() const { return transit_.get(); }  // null: experts of the CPU stay there
  const float* output_norm() const { return output_norm_; }
  const Matrices& output() const { return output_; }

  // Error(memory) beyond the plan's budget. By any thread, as all that takes or gives back memory.
  void require(size_t n_bytes, const char* what) const;
  // The same, and when the card has no more.
  Memory allocate(size_t n_bytes, const char* what);
  // Waits for the card, and remembers what has failed.
  void settle();
  // The same; Error(io) when something has failed since the last time; and ever after.
  void check();
  // One thread at a time uses the device.
  std::mutex& mutex() { return mutex_; }

 private:
  friend class Memory;
  struct Copy {  // of host bytes to the card
    const void* from;
    std::byte* to;
    size_t n_bytes;
  };
  class Slab;
  void place_dense();
  bool place_experts(size_t layer);
  void place_transit(const NoticeFn& notice);
  bool try_transit();
  uint64_t room() const;
  void place_all(const ModelSizes& sizes, const NoticeFn& notice);
  void let_go(std::span<const std::byte> bytes, bool keeps_cached) const;
  Matrices matrix(Slab& slab, const Weight& w);
  ExpertMatrices experts(Slab& slab, const Layer& layer, Weight Expert::* part);
  Memory try_allocate(size_t n_bytes);
  void release(void* data, size_t n_bytes);

  const Model* model_;
  Device* device_;
  CardPlan plan_;
  std::atomic<uint64_t> used_bytes_{0};
  std::vector<Memory> slabs_;
  std::vector<Copy> copies_;
  std::vector<std::unique_ptr<std::vector<const std::byte*>>> tables_;  // on their way to the card
  std::vector<LayerOnCard> layers_;
  const float* output_norm_ = nullptr;
  Matrices output_{};
  std::unique_ptr<Transit> transit_;
  std::string failure_;
  std::mutex mutex_;
};

}  // namespace duet::gpu
