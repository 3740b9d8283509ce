// The public interface: open a model, run token sequences through it.
//
//   Engine engine = Engine::open("model.gguf", {});
//   Session session = engine.new_session({.n_ctx = 4096});
//   session.sync(prompt_ids);
//   while (...) { Token t = sampler.sample(session.logits()); session.append({&t, 1}); }
//
// The library never prints, aborts or exits; failures are duet::Error (base/error.h).
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/block_reader.h"
#include "base/topology.h"
#include "formats/lora.h"
#include "formats/schema.h"
#include "runtime/chat_template.h"
#include "runtime/observer.h"
#include "runtime/sampler.h"
#include "runtime/tokenizer.h"

namespace duet {

// q8_0: 8-bit integers with a scale per 32 elements; head sizes that are multiples of 32 only.
enum class KvType { f16, f32, q8_0 };

// How much memory the process may use, and the sizes of the sessions to come, which share it.
struct MemoryOptions {
  enum class Ram { automatic, all, bytes };  // all: weights mapped from the file, no limit
  Ram ram = Ram::automatic;
  uint64_t ram_bytes = 0;
  uint32_t n_ctx = 0, n_batch = 0;  // 0: SessionOptions' default, or chosen by the plan
  uint32_t n_sequences = 1;         // sequences of n_ctx positions, evaluated together (runtime/batch.h)
  KvType kv_type = KvType::f16;
  std::optional<uint32_t> slots = {};  // experts held per layer, for tests and experiments; forces streaming
};

// Reading the experts that the routers of the next layers would choose now, while nothing else is read.
// automatic: as many layers ahead as pay (runtime/lookahead_gate.h).
enum class Lookahead { automatic, off, on };
inline constexpr uint32_t kLookaheadLayers = 6;

// Of a chunk: logits of all of its tokens will be asked for.
inline constexpr size_t kAllOutputs = SIZE_MAX;

// How experts are read when they do not all fit in memory.
struct StreamOptions {
  ReadBackend backend = ReadBackend::automatic;
  unsigned depth = kReadDepth;
  size_t piece_bytes = kReadBytes;  // of one read
  Lookahead lookahead = Lookahead::automatic;
  uint32_t lookahead_layers = kLookaheadLayers;  // at most as many
  ReadFault fault = {};             // tests only
};

// Where the kernel is asked how much memory there is; and how often whether it has become short, while experts stream.
struct WatchOptions {
  std::filesystem::path root = "/";  // another: tests only
  std::chrono::milliseconds interval{1000};
  std::function<uint64_t()> faults = {};  // major faults so far, instead of the kernel's count: tests only
};

// Guesses of the look-ahead that were first made so many layers ahead: experts asked for, those chosen, and
// the bytes of them that had been read when it turned out.
struct GuessStats {
  uint64_t asked = 0, right = 0, used_bytes = 0, wasted_bytes = 0;
};

// What streaming has done since the model was opened.
//   reads.bytes = misses * bytes of an expert in the file + padding_bytes + wasted_bytes
// exactly, when no chunk of tokens is to follow at once, no read has failed, and the experts of a layer are of
// one size. To be asked for by the thread that evaluates, or while none does.
struct StreamStats {
  uint64_t hits = 0, misses = 0;  // experts that a chunk needed in a layer and that were, were not in memory
  BlockReaderStats reads;
  uint64_t padding_bytes = 0;     // around the experts needed, to whole pages
  uint64_t speculative_bytes = 0; // read before the router had chosen
  uint64_t wasted_bytes = 0;      // those of them that were not needed
  std::array<GuessStats, kLookaheadLayers> guesses = {};  // one layer ahead, two, ...
  uint64_t wait_ns = 0;           // of all threads, for rows that had not landed
  std::string backend;            // "io_uring, direct"
  std::vector<uint32_t> slots;    // [n_layer] experts held now: the plan's, or fewer when memory has become short
};

namespace gpu {
class Device;
struct CardPlan;
}  // namespace gpu

// What a graphics card computes where there is one (runtime/gpu/placement.h). automatic: as much as fits; the CPU does
// everything where there is none. attention: all but the experts. layers: and the experts of the last n_layers layers.
// Asked for by the last two, a card that is not there is an error.
struct GpuOptions {
  enum class Mode { off, automatic, attention, layers };
  Mode mode = Mode::off;
  uint32_t n_layers = 0;
  uint64_t vram_bytes = 0;        // of the card's memory, at most; 0: what is free, less a reserve
  uint32_t n_sequences = 0;       // instead of MemoryOptions', where the card is used: its memory may hold more or fewer
  gpu::Device* device = nullptr;  // an open one to use; must outlive the engine and its sessions. Null: the module's
};

struct EngineOptions {
  int n_threads = 0;    // compute threads; 0: HostCores::usable()
  std::string isa;      // "scalar", "avx2", "avx512"; "": best usable; unusable: Error(unsupported)
  NoticeFn notice;      // one-line remarks; may be null
  // Where compute threads stay and memory goes (base/topology.h). Interleaving that the system
  // refuses: Error(unsupported) when asked for, else a notice.
  PinMode pin = PinMode::automatic;
  NumaMode numa = NumaMode::automatic;
  MemoryOptions memory = {};
  StreamOptions stream = {};
  WatchOptions watch = {};
  std::vector<LoraChoice> loras = {};  // adapters (formats/lora.h), applied to the matrix products
  GpuOptions gpu = {};
};

// Told after each layer of each chunk of tokens which experts they chose, best first: [n_tokens, n_used].
// What it throws ends the evaluation, as an interruption would.
using RoutingFn = std::function<void(int layer, std::span<const int32_t> experts)>;

struct SessionOptions {
  uint32_t n_ctx = 0;       // positions; 0: the memory plan's (min(model's, 4096)); more than the model's is allowed with a notice
  uint32_t n_batch = 0;     // tokens evaluated at once in prefill; 0: the memory plan's (512 when all is in memory)
  KvType kv_type = KvType::f16;
  const std::atomic<bool>* cancel = nullptr;  // checked between layers; true -> Error(cancelled)
  RoutingFn routing = {};   // never called for a dense model
  // Sees the inputs of all matrix products. Costs scratch beyond the memory plan: at most 1024 rows of n_ff
  // floats or n_batch of n_embd. No cost when null.
  ProductObserver products = {};
};

// Bytes of weights read, multiply-adds by kind of the activations they multiply.
struct Work {
  uint64_t bytes = 0, int8_macs = 0, f32_macs = 0;
};

struct ModelCost {
  Work layers;  // one token through all layers with its n_expert_used experts, and its embedding row
  Work output;  // final norm and output head, for one row of logits
  uint64_t unused_expert_bytes = 0;  // of the experts that one token leaves out
  // Of both, the last layer without its keys and values, which only tokens with outputs pass.
  Work last_layer;
  uint64_t last_unused_expert_bytes = 0;
};

struct ModelInfo {
  HParams hparams;
  std::string layout;       // "dense", "merged experts", "per-expert"
  std::string types;        // dominant formats, e.g. "Q4_K (experts), Q8_0, F32"
  uint64_t file_bytes = 0, n_params = 0;
  std::string isa;          // kernels in use
  int n_threads = 0;
  // Tokens evaluated together up to which each one's logits have the same bits as alone: few with
  // float weights, whose products for more come from a library; fewer than chunks of which a card computes the
  // CPU's experts too; any number else.
  uint32_t exact_batch = 0;
  ModelCost cost;
  std::vector<uint64_t> expert_bytes;  // [n_layer] one expert in the file (the mean where they differ); empty when dense
  std::string gpu;          // name of the card in use; "": none
  uint64_t gpu_bytes = 0;   // of its memory, as planned
};

class Session;
struct MemoryPlan;

// An open model. Immutable after open; thread-compatible; sessions may outlive the Engine object
// (they share the mapping).
class Engine {
 public:
  // Throws Error: io, format, unsupported, memory.
  static Engine open(const std::filesystem::path& path, const EngineOptions& options);
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;
  ~Engine();

  const ModelInfo& info() const;
  const MemoryPlan& plan() const;                    // runtime/memory_plan.h; as made on opening
  const gpu::CardPlan* card_plan() const;            // runtime/gpu/placement.h; null: no card is used
  std::optional<StreamStats> stream_stats() const;   // nothing when all weights are in memory
  // [n_layer, n_expert] whether it is in memory, for the thread that evaluates; empty when all weights are.
  std::vector<bool> resident_experts() const;
  // From the next chunk of tokens on, to compare settings; nothing happens when all weights are in memory.
  void set_lookahead(Lookahead lookahead, uint32_t n_layers) const;
  // A file without (or with an unusable) tokenizer or template opens all the same, for use by token
  // ids; what is wrong with them is thrown when they are asked for: Error(format), Error(unsupported).
  const Tokenizer& tokenizer() const;
  const std::optional<ChatTemplate>& chat_template() const;
  // Error(memory) when keys and values do not fit, or are more than a card was planned for; Error(unsupported): products
  // to be observed while a card computes.
  Session new_session(const SessionOptions& options) const;

 private:
  friend class Session;
  friend class Batch;
  struct State;
  Engine() = default;
  std::shared_ptr<const State> state_;
};

// One growing token sequence with its KV cache. One thread at a time. All memory is allocated on
// creation. After an exception the session stands at its last complete batch.
class Session {
 public:
  // Called after each prefill batch with tokens done and in total.
  using Progress = std::function<void(size_t done, size_t total)>;
  // Logits of consecutive positions: row i belongs to position first + i. [n_rows, n_vocab]
  using LogitsSink = std::function<void(size_t first, size_t n_rows, std::span<const float> logits)>;

  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;
  ~Session();

  std::span<const Token> tokens() const;  // evaluated so far
  uint32_t n_ctx() const;
  size_t kv_bytes() const;  // of address space; physical pages follow as positions are written

  // Makes the sequence equal to `prompt` (not empty): keeps the common prefix, evaluates the rest;
  // logits() then are those of the last token. Error(usage) when it exceeds n_ctx or an id the
  // vocabulary.
  void sync(std::span<const Token> prompt, const Progress& progress = {});
  // Appends tokens; logits() then are those of the last one.
  void append(std::span<const Token> tokens, const Progress& progress = {});
  // Appends tokens and delivers the logits of every one of them but the first `skip`, in pieces.
  void append_all_logits(std::span<const Token> tokens, const LogitsSink& sink, size_t skip = 0);
  // Drops all but the first n tokens; the next call must evaluate before logits() is valid.
  void truncate(size_t n);

  // [n_vocab] of the last token evaluated; Error(usage) before the first and after truncate().
  std::span<const float> logits() const;

  // How often each expert was chosen since the session began, [n_layer, n_expert]; empty when dense.
  std::span<const uint64_t> expert_uses() const;

 private:
  friend class Engine;
  struct State;
  explicit Session(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace duet
