#include "runtime/engine.h"

#include <cstdlib>

#include "base/host.h"
#include "runtime/engine_state.h"
#include "runtime/model_cost.h"

namespace duet {
namespace {

// Runs `load`; its Error, if any, is kept for whoever asks for the result.
template <class Load>
std::exception_ptr try_load(const Load& load) {
  try {
    load();
  } catch (const Error&) {
    return std::current_exception();
  }
  return nullptr;
}

Placement place(const HostCores& cores, int n_threads, const EngineOptions& options, const NoticeFn& notice) {
  Placement out = place_threads(cores.topology, n_threads, options.pin, options.numa);
  if (options.pin == PinMode::on && out.cpus.empty())
    notice(concat(n_threads, " threads on ", cores.logical, " CPUs: threads are not pinned"));
  if (out.interleave.empty()) return out;
  const bool asked = options.numa == NumaMode::interleave;
  if (!asked && has_memory_policy()) {  // numactl's: leave it
    out.interleave.clear();
  } else if (set_interleave(out.interleave)) {
    set_interleave({});  // possible; teams do it for their threads
  } else if (asked) {
    fail(ErrorKind::unsupported, "numa: the system refuses to interleave memory (a container may need the capability SYS_NICE); use off");
  } else {
    out.interleave.clear();
    notice("several memory nodes, but the system refuses to interleave memory: give the container the capability SYS_NICE, or use numactl --interleave=all");
  }
  return out;
}

// Long chunks have the CPU's experts multiplied by a card, which rounds the rest of their layers differently.
uint32_t exact_rows(const Model& model, const gpu::Offload* card) {
  const bool transits = card != nullptr && card->transit() != nullptr;
  return transits ? std::min(exact_batch(model), gpu::kTransitTokens - 1) : exact_batch(model);
}

std::vector<uint64_t> one_expert(const ModelSizes& sizes) {
  std::vector<uint64_t> out = sizes.expert_file_bytes;
  for (uint64_t& n_bytes : out) n_bytes /= sizes.hparams.n_expert;
  return out;
}

// Padded matrices have rows that no token is written by; a token without a row could not be evaluated.
void check_vocabulary(const GgufFile& file, const HParams& hparams) {
  const std::vector<std::string>* tokens = file.get_strings("tokenizer.ggml.tokens");
  if (tokens != nullptr && tokens->size() > hparams.n_vocab)
    fail(ErrorKind::format, file.source(), ": tokenizer.ggml.tokens has ", tokens->size(), " tokens, token_embd.weight only ", hparams.n_vocab,
         " rows: the tokenizer is not that of the weights; convert the model again");
}

}  // namespace

// Whether experts stream is known only once their memory is planned; then none passes through the card.
ModelSizes Engine::State::plan_host(const ModelSizes& all, const MemoryOptions& options) {
  if (card == nullptr) {
    plan = plan_memory(all, options, compute.n_threads, memory);
    return all;
  }
  gpu::CardPlan beside = card->plan();
  plan = gpu::plan_beside(all, options, beside, compute.n_threads, memory);
  if (beside.transit_bytes == 0) card->drop_transit();
  return gpu::sizes_beside(all, beside);
}

void Engine::State::load(const ModelSizes& all, const EngineOptions& options) {
  const ModelSizes sizes = plan_host(all, options.memory);
  watch = plan.streamed ? std::make_unique<MemoryWatch>(sizes, plan, options.watch, notice) : nullptr;  // first: loading takes long enough for a limit to change
  if (card != nullptr && !upload(options.gpu)) return load(all, options);
  if (!plan.streamed) return;
  model.own_dense(options.stream, card != nullptr);
  experts = std::make_unique<ExpertSource>(model, plan.slots, plan.n_staging, options.stream);
  watch->begin();
}

// The page cache keeps what the card has only where the whole file has room: else it would push out what is needed.
bool Engine::State::upload(const GpuOptions& options) {
  const bool has_room = plan.budget_bytes == 0 || model.file().file_bytes() <= plan.budget_bytes;
  try {
    card->upload(compute, !plan.streamed && has_room);
    return true;
  } catch (const Error& e) {
    go_without(options, e);
    return false;
  }
}

// In a handler of the refusal.
void Engine::State::go_without(const GpuOptions& options, const Error& refusal) {
  if (!gpu::may_go_without(options, refusal)) throw;
  const gpu::Device& refused = options.device != nullptr ? *options.device : *device;
  notice(concat(refused.info().name, " is not used: ", refusal.what()));
  card.reset();
  device.reset();
}

gpu::Device* Engine::State::find_device(const GpuOptions& options) {
  if (options.device != nullptr) return options.device;
  auto [opened, reason, is_broken] = gpu::find_device();
  device = std::move(opened);
  if (device != nullptr) return device.get();
  if (options.mode != GpuOptions::Mode::automatic) fail(ErrorKind::unsupported, "no card can be used: ", reason, "; use --gpu auto or off");
  const char* const named = std::getenv("DUET_GPU_MODULE");
  if (is_broken || options.vram_bytes > 0 || (named != nullptr && *named != '\0')) notice(concat("no card is used: ", reason));
  return nullptr;
}

void Engine::State::open_card(const ModelSizes& sizes, const EngineOptions& options) {
  const GpuOptions& gpu = options.gpu;
  if (gpu.mode == GpuOptions::Mode::off) return;
  if (!options.loras.empty()) {
    if (gpu.mode != GpuOptions::Mode::automatic) fail(ErrorKind::unsupported, "adapters are applied on the CPU only; use --gpu off with them");
    if (gpu.device != nullptr || gpu.vram_bytes > 0 || gpu::has_module()) notice("adapters are applied on the CPU only: no card is used");
    return;
  }
  gpu::Device* const found = find_device(gpu);
  if (found == nullptr) return;
  memory = read_host_memory(options.watch.root);  // less what the driver takes
  try {
    check_support(model, options.memory.kv_type, *found);
    card = std::make_unique<gpu::Offload>(model, sizes, plan_card(sizes, gpu, options.memory, gpu::card_of(*found), compute.n_threads, memory), *found, notice);
  } catch (const Error& e) {
    go_without(gpu, e);
  }
}

std::unique_ptr<gpu::Forward> Engine::State::forward_on_card(const gpu::ChunkSizes& chunk, bool observed) const {
  if (card == nullptr) return nullptr;
  if (observed) fail(ErrorKind::unsupported, "the inputs of matrix products are seen on the CPU only; open the model with --gpu off");
  const HParams& hparams = model.hparams();
  card->require(gpu::scratch_bytes(hparams, chunk, &card->device()) + chunk.n_sequences * gpu::cache_bytes(hparams, chunk.n_ctx, chunk.kv_type),
                "working memory and keys and values");
  return std::make_unique<gpu::Forward>(*card, chunk);
}

void Engine::State::after_chunk(size_t n_tokens) const {
  if (watch == nullptr) return;
  if (const auto slots = watch->after(n_tokens)) experts->shrink(*slots);
}

// Resident: only maps, weights are read when they are first used. No madvise: eager population would read a
// file larger than memory once for nothing, and MADV_RANDOM would split reads into single pages.
Engine Engine::open(const std::filesystem::path& path, const EngineOptions& options) {
  if (options.n_threads < 0) fail(ErrorKind::usage, "threads: ", options.n_threads, " is not a number of threads");
  const NoticeFn notice = options.notice ? options.notice : [](const std::string&) {};
  const KernelTable& kernels = select_kernels(options.isa);
  const GgufFile file = GgufFile::open(path);
  const HParams hparams = read_hparams(file, notice);
  check_vocabulary(file, hparams);
  auto state = std::make_shared<State>(Model::bind(file, hparams));
  state->notice = notice;
  for (const LoraChoice& lora : options.loras) state->model.apply(lora);
  const HostCores cores = read_host_cores();
  const int n_threads = options.n_threads > 0 ? options.n_threads : cores.usable();
  state->placement = place(cores, n_threads, options, notice);
  state->compute = {.kernels = &kernels, .n_threads = n_threads, .placement = &state->placement};
  ModelSizes all_sizes = model_sizes(file, hparams);
  all_sizes.dense_bytes += state->model.lora_bytes();
  state->memory = read_host_memory(options.watch.root);
  state->open_card(all_sizes, options);
  state->load(all_sizes, options);
  const gpu::Offload* const card = state->card.get();
  state->tokenizer_error = try_load([&] { state->tokenizer = Tokenizer::load(file, notice); });
  state->template_error = try_load([&] { state->chat_template = ChatTemplate::of_model(file, notice); });
  state->info = {.hparams = hparams,
                 .layout = state->model.layout(),
                 .types = state->model.types(),
                 .file_bytes = file.file_bytes(),
                 .n_params = state->model.n_params(),
                 .isa = kernels.isa,
                 .n_threads = state->compute.n_threads,
                 .exact_batch = exact_rows(state->model, card),
                 .cost = model_cost(hparams, state->model.token_embd(), state->model.output(), state->model.layers()),
                 .expert_bytes = one_expert(all_sizes),
                 .gpu = card != nullptr ? card->device().info().name : "",
                 .gpu_bytes = card != nullptr ? card->plan().total_bytes() : 0};
  Engine engine;
  engine.state_ = std::move(state);
  return engine;
}

Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;
Engine::~Engine() = default;

const ModelInfo& Engine::info() const { return state_->info; }

const MemoryPlan& Engine::plan() const { return state_->plan; }

const gpu::CardPlan* Engine::card_plan() const { return state_->card != nullptr ? &state_->card->plan() : nullptr; }

std::optional<StreamStats> Engine::stream_stats() const {
  if (state_->experts == nullptr) return std::nullopt;
  StreamStats stats = state_->experts->stats();
  stats.slots.resize(info().hparams.n_layer, info().hparams.n_expert);  // a card holds the others
  return stats;
}

std::vector<bool> Engine::resident_experts() const {
  if (state_->experts == nullptr) return {};
  std::vector<bool> resident = state_->experts->resident();
  resident.resize(size_t{info().hparams.n_layer} * info().hparams.n_expert, true);  // a card holds the others
  return resident;
}

void Engine::set_lookahead(Lookahead lookahead, uint32_t n_layers) const {
  if (state_->experts != nullptr) state_->experts->set_lookahead(lookahead, n_layers);
}

const Tokenizer& Engine::tokenizer() const {
  if (state_->tokenizer_error) std::rethrow_exception(state_->tokenizer_error);
  return *state_->tokenizer;
}

const std::optional<ChatTemplate>& Engine::chat_template() const {
  if (state_->template_error) std::rethrow_exception(state_->template_error);
  return state_->chat_template;
}

}  // namespace duet
