// duet bench: speed of prefill and decode beside the machine's measured limits.
#include "cli/bench.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>

#include "base/error.h"
#include "base/host.h"
#include "base/rapl.h"
#include "base/read_rate.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/model_options.h"
#include "cli/options.h"
#include "runtime/kernels/kernels.h"
#include "runtime/kv_cache.h"
#include "runtime/model_cost.h"

namespace duet::cli {
namespace {

using Clock = std::chrono::steady_clock;

struct BenchOptions {
  ModelOptions model;
  std::vector<uint32_t> n_prompt = {512}, n_gen = {32}, depths = {0};
  std::vector<int> threads;  // empty: HostCores::usable()
  uint32_t n_repetitions = 5;
  uint64_t seed = 1;
  std::string trace;
  bool roofline = false;
  bool json = false, markdown = false, csv = false;
};

struct Test {
  bool decode;
  uint32_t n_tokens, depth;
  std::string name() const {
    return concat(decode ? "tg" : "pp", n_tokens, depth > 0 ? concat("@d", depth) : "");
  }
};

// ---- what a token costs ------------------------------------------------------------------------

struct Cost {
  double bytes = 0, int8_macs = 0, f32_macs = 0;  // per token
};

// Bytes of keys and values of so many positions (fewer with a sliding window).
double kv_bytes(const HParams& hparams, KvType type, uint64_t n_keys) {
  constexpr size_t kMany = 1 << 16;  // a cache is made of pieces of several positions
  const double per_position = static_cast<double>(KvCache::bytes_needed(hparams, kMany, type)) / kMany;
  if (hparams.sliding_window > 0) n_keys = std::min<uint64_t>(n_keys, hparams.sliding_window);
  return per_position * static_cast<double>(n_keys);
}

const char* kv_type_name(KvType type) {
  switch (type) {
    case KvType::f32: return "f32";
    case KvType::q8_0: return "q8_0";
    case KvType::f16: break;
  }
  return "f16";
}

// One token at a time: its weights, and the keys and values of all positions up to its own.
Cost decode_cost(const ModelInfo& info, KvType type, const Test& test) {
  const Work& layers = info.cost.layers;
  const Work& output = info.cost.output;
  Cost sum;
  for (uint32_t i = 0; i < test.n_tokens; ++i) {
    const uint64_t n_keys = uint64_t{test.depth} + i + 1;
    sum.bytes += static_cast<double>(layers.bytes + output.bytes) + kv_bytes(info.hparams, type, n_keys);
    sum.int8_macs += static_cast<double>(layers.int8_macs + output.int8_macs);
    sum.f32_macs += static_cast<double>(layers.f32_macs + output.f32_macs + attention_macs(info.hparams, n_keys));
  }
  const double n = test.n_tokens;
  return {sum.bytes / n, sum.int8_macs / n, sum.f32_macs / n};
}

// Batches: weights (those of all experts that can be in use) and visible keys and values are read
// once for a batch; the last layer (but for its keys and values) and the output head serve the last token only.
Cost prefill_cost(const ModelInfo& info, KvType type, uint32_t n_batch, const Test& test) {
  const HParams& hparams = info.hparams;
  const bool on_card = !info.gpu.empty();  // where no token is left out
  const Work last = on_card ? Work{} : info.cost.last_layer;
  const uint64_t last_unused = on_card ? 0 : info.cost.last_unused_expert_bytes;
  const double n = test.n_tokens;
  Cost sum{static_cast<double>(info.cost.output.bytes), static_cast<double>(info.cost.output.int8_macs),
           static_cast<double>(info.cost.output.f32_macs)};
  for (uint32_t done = 0; done < test.n_tokens;) {
    const uint32_t n_now = std::min(n_batch, test.n_tokens - done);
    const double n_others = hparams.n_expert > 0 ? hparams.n_expert - hparams.n_expert_used : 0;
    const double reached = n_others > 0 ? std::min(1.0, (n_now - 1.0) * hparams.n_expert_used / n_others) : 0.0;
    done += n_now;
    sum.bytes += static_cast<double>(info.cost.layers.bytes - last.bytes) +
                 reached * static_cast<double>(info.cost.unused_expert_bytes - last_unused) + kv_bytes(hparams, type, uint64_t{test.depth} + done);
  }
  sum.bytes += static_cast<double>(last.bytes);
  sum.int8_macs += n * static_cast<double>(info.cost.layers.int8_macs) - (n - 1) * static_cast<double>(last.int8_macs);
  sum.f32_macs += n * static_cast<double>(info.cost.layers.f32_macs) - (n - 1) * static_cast<double>(last.f32_macs);
  for (uint32_t i = 0; i < test.n_tokens; ++i) {
    const bool narrow = !on_card && i + 1 < test.n_tokens;
    const auto macs = static_cast<double>(attention_macs(hparams, uint64_t{test.depth} + i + 1));
    sum.f32_macs += narrow ? macs * (1 - 1.0 / hparams.n_layer) : macs;
  }
  return {sum.bytes / n, sum.int8_macs / n, sum.f32_macs / n};
}

// Decode against memory as it was beside each repetition, prefill against the integer units; models of float weights, which have no
// integer products, against the float units.
double share_of_limit(const BenchResult& result, const Roofline& roofline) {
  if (result.read_bytes_per_s) return result.bytes_per_token * result.mean / *result.read_bytes_per_s;
  if (result.int8_macs_per_token > 0) return result.int8_macs_per_token * result.mean / roofline.int8_macs_per_s;
  return result.macs_per_token * result.mean / roofline.f32_macs_per_s;
}

void hold_against_limits(BenchResult& result, const Roofline& roofline) {
  if (result.streamed) hold_against_memory(*result.streamed, result.bytes_per_token, roofline.read_bytes_per_s);
  result.share_of_limit = result.streamed && result.is_decode ? result.streamed->eff_sched : share_of_limit(result, roofline);
}

// ---- running -----------------------------------------------------------------------------------

// The tests of one number of threads on one model.
constexpr uint32_t kWarmUpTokens = 128;

// Positions that the longest test needs.
uint32_t context(const BenchOptions& options) {
  const auto most = [](const std::vector<uint32_t>& list) { return *std::max_element(list.begin(), list.end()); };
  return most(options.depths) + std::max({most(options.n_prompt), most(options.n_gen), kWarmUpTokens});
}

class Runner {
 public:
  // probe: made when a test first needs it.
  Runner(const BenchOptions& options, int n_threads, std::unique_ptr<ReadProbe>& probe, BenchReport& report)
      : options_(options),
        n_threads_(n_threads),
        probe_(probe),
        report_(report),
        engine_(open(options.model, n_threads, report)),
        routing_(engine_, options.trace),
        session_(open_session(engine_, options.model, 0, routing_.listener())),
        random_(options.seed) {}

  void run() {
    warm_up();
    for (const uint32_t depth : options_.depths) {
      session_.truncate(0);
      session_.append(random_ids(depth));
      for (const uint32_t n : options_.n_prompt)
        if (n > 0) measure({.decode = false, .n_tokens = n, .depth = depth});
      for (const uint32_t n : options_.n_gen)
        if (n > 0) measure({.decode = true, .n_tokens = n, .depth = depth});
    }
    routing_.commit();
  }

 private:
  static Engine open(ModelOptions options, int n_threads, BenchReport& report) {
    options.n_threads = n_threads;
    Engine engine = open_engine(options);
    report.info = engine.info();
    report.n_batch = engine.plan().n_batch;
    if (engine.plan().streamed && !report.disk_bytes_per_s)
      report.disk_bytes_per_s = measure_read_rate(options.path, {.backend = options.backend, .seconds = 1.0}).bytes_per_second;
    report.plan = engine.plan().streamed ? describe(engine.plan(), engine.info().hparams) : "";
    if (const gpu::CardPlan* card = engine.card_plan()) report.card = concat(engine.info().gpu, ": ", describe(*card, engine.info().hparams));
    return engine;
  }

  // Reads in a file that is not in memory yet: enough tokens to reach every expert.
  void warm_up() {
    session_.append(random_ids(kWarmUpTokens - 1));
    session_.append(random_ids(1));
  }

  // Uniform over the vocabulary, never the model's own output.
  std::vector<Token> random_ids(size_t n) {
    std::vector<Token> ids(n);
    const uint64_t n_vocab = engine_.info().hparams.n_vocab;
    for (Token& id : ids) id = static_cast<Token>(random_() % n_vocab);  // bias below 2^-40
    return ids;
  }

  double seconds(const Test& test) {
    const std::vector<Token> ids = random_ids(test.n_tokens);
    const Clock::time_point start = Clock::now();
    if (test.decode)
      for (const Token& id : ids) session_.append({&id, 1});
    else
      session_.append(ids);
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

  void measure(const Test& test) {
    BenchResult result;
    result.test = test.name();
    result.is_decode = test.decode;
    result.n_threads = n_threads_;
    const std::vector<uint64_t> before = uses();
    const StreamMeter stream(engine_);
    routing_.record(test.decode);
    double joules = 0, read_rates = 0, total_seconds = 0;
    for (uint32_t i = 0; i < options_.n_repetitions; ++i) {
      const double joules_before = meter_.joules();
      const double t = seconds(test);
      total_seconds += t;
      result.tok_s.push_back(test.n_tokens / t);
      joules += meter_.joules() - joules_before;
      if (test.decode && !stream.active()) read_rates += read_rate();
      session_.truncate(test.depth);
    }
    const double n_tokens = double{1} * test.n_tokens * options_.n_repetitions;
    if (meter_.available()) result.joules_per_token = joules / n_tokens;
    if (test.decode && !stream.active()) result.read_bytes_per_s = read_rates / options_.n_repetitions;
    count_uses(before, test.decode ? report_.decode_uses : report_.prefill_uses);
    finish(test, result, stream, total_seconds);
  }

  double read_rate() {
    if (!probe_) probe_ = std::make_unique<ReadProbe>(select_kernels(options_.model.isa), n_threads_);
    return probe_->bytes_per_s(n_threads_);
  }

  void finish(const Test& test, BenchResult& result, const StreamMeter& stream, double total_seconds) {
    const double n = static_cast<double>(result.tok_s.size());
    result.mean = std::accumulate(result.tok_s.begin(), result.tok_s.end(), 0.0) / n;
    for (const double x : result.tok_s) result.deviation += (x - result.mean) * (x - result.mean);
    result.deviation = n > 1 ? std::sqrt(result.deviation / (n - 1)) : 0.0;
    const ModelInfo& info = engine_.info();
    const Cost cost = test.decode ? decode_cost(info, options_.model.kv_type, test)
                                  : prefill_cost(info, options_.model.kv_type, report_.n_batch, test);
    result.bytes_per_token = cost.bytes;
    result.int8_macs_per_token = cost.int8_macs;
    result.macs_per_token = cost.int8_macs + cost.f32_macs;
    if (stream.active()) result.streamed = stream.end(n * test.n_tokens, total_seconds, *report_.disk_bytes_per_s);
    if (result.streamed && test.decode) result.streamed->eff_policy = routing_.eff_policy();
    report_.results.push_back(std::move(result));
  }

  std::vector<uint64_t> uses() const { return {session_.expert_uses().begin(), session_.expert_uses().end()}; }

  void count_uses(const std::vector<uint64_t>& before, std::vector<uint64_t>& sum) const {
    const auto now = session_.expert_uses();
    sum.resize(now.size());
    for (size_t i = 0; i < now.size(); ++i) sum[i] += now[i] - before[i];
  }

  const BenchOptions& options_;
  int n_threads_;
  std::unique_ptr<ReadProbe>& probe_;
  BenchReport& report_;
  Engine engine_;
  BenchRouting routing_;
  Session session_;
  std::mt19937_64 random_;
  EnergyMeter meter_;
};

// ---- the command -------------------------------------------------------------------------------

BenchFormat format_of_output(const BenchOptions& options) {
  if (options.json) return BenchFormat::json;
  if (options.markdown) return BenchFormat::markdown;
  return options.csv ? BenchFormat::csv : BenchFormat::table;
}

bool any(const std::vector<uint32_t>& list) {
  return std::any_of(list.begin(), list.end(), [](uint32_t n) { return n > 0; });
}

// With --roofline every usable instruction set, else the one in use.
void measure_limits(const BenchOptions& options, const KernelTable& kernels, BenchReport& report) {
  std::vector<const KernelTable*> tables = {&kernels};
  if (options.roofline && options.model.isa.empty()) {
    const auto usable = usable_kernels();
    tables.assign(usable.begin(), usable.end());
  }
  for (const int n : report.threads) {
    const std::vector<Roofline> rooflines = measure_rooflines(tables, n);
    for (size_t i = 0; i < tables.size(); ++i)
      report.limits.push_back({.n_threads = n, .isa = tables[i]->isa, .roofline = rooflines[i]});
  }
}

const Limits& limits_of(const BenchReport& report, int n_threads) {
  return *std::find_if(report.limits.begin(), report.limits.end(), [&](const Limits& limits) {
    return limits.n_threads == n_threads && limits.isa == report.isa;
  });
}

// Refused before anything is measured; nothing is loaded. The card that will be used.
gpu::FoundDevice check_model(const ModelOptions& options, int n_threads) {
  using Mode = GpuOptions::Mode;
  const ModelSizes sizes = sizes_of(options, [](const std::string&) {});
  gpu::FoundDevice found = find_card(options);
  if (found.device == nullptr && (options.gpu.mode == Mode::attention || options.gpu.mode == Mode::layers))
    fail(ErrorKind::unsupported, "no card can be used: ", found.reason, "; use --gpu auto or off");
  divide(sizes, options, found.device != nullptr ? std::optional(gpu::card_of(*found.device)) : std::nullopt, n_threads, read_host_memory());
  return found;
}

void run_bench(BenchOptions options) {
  const BenchFormat format = format_of_output(options);
  const bool has_model = !options.model.path.empty();
  if (!has_model && !options.roofline)
    fail(ErrorKind::usage, "bench: MODEL is required (or --roofline, for the machine's limits only)");
  if (has_model && !any(options.n_prompt) && !any(options.n_gen))
    fail(ErrorKind::usage, "bench: -p 0 and -n 0 leave nothing to measure");
  if (!options.trace.empty() && (!has_model || options.threads.size() > 1))
    fail(ErrorKind::usage, "bench: --trace-experts records one model run with one number of threads");
  if (has_model) options.model.path = model_file(options.model.path).string();
  options.model.n_ctx = context(options);
  const KernelTable& kernels = select_kernels(options.model.isa);
  BenchReport report;
  report.model = options.model.path;
  report.kv_type = kv_type_name(options.model.kv_type);
  report.seed = options.seed;
  report.isa = kernels.isa;
  report.threads = options.threads.empty() ? std::vector{read_host_cores().usable()} : options.threads;
  const gpu::FoundDevice card = has_model ? check_model(options.model, report.threads.front()) : gpu::FoundDevice{};
  options.model.gpu.device = card.device.get();
  report.energy_absent = EnergyMeter().why_not();
  // The limits come last and the probe goes at the end: virtual machines give freed memory back to their host, which
  // takes a core away for many seconds (12 instead of 8 s for a prefill after 4 GB were freed).
  std::unique_ptr<ReadProbe> probe;
  if (has_model)
    for (const int n : report.threads) Runner(options, n, probe, report).run();
  measure_limits(options, kernels, report);
  for (BenchResult& result : report.results) hold_against_limits(result, limits_of(report, result.n_threads).roofline);
  print_report(report, format);
}

void add_bench_options(CLI::App& command, BenchOptions& options) {
  const auto list = [&](const char* name, std::vector<uint32_t>& target, const char* text) {
    command.add_option(name, target, text)
        ->delimiter(',')
        ->check(whole_number(0, 1u << 24))
        ->type_name("N,...")
        ->capture_default_str();
  };
  list("-p,--n-prompt", options.n_prompt, "Lengths of prefill to measure; 0: none");
  list("-n,--n-gen", options.n_gen, "Numbers of tokens to decode one by one; 0: none");
  list("-d,--depth", options.depths, "Tokens already in the context; every test runs at every depth");
  command.add_option("-t,--threads", options.threads, "Compute threads, one or several numbers [default: as for run]")
      ->delimiter(',')
      ->check(whole_number(1, 1024))
      ->type_name("N,...");
  command.add_option("-r,--repetitions", options.n_repetitions, "Runs of each test")
      ->check(whole_number(1, 1000))
      ->type_name("N")
      ->capture_default_str();
  command.add_option("--seed", options.seed, "Of the random token ids")->check(whole_number(0))->capture_default_str();
  add_trace_option(command, options.trace);
  command.add_flag("--roofline", options.roofline,
                   "Show the limits of every usable instruction set; without MODEL nothing else");
  command.add_flag("--json", options.json, "One JSON document: {machine, limits, results, ...}");
  command.add_flag("--md", options.markdown, "Markdown")->excludes("--json");
  command.add_flag("--csv", options.csv, "Results as comma-separated values")->excludes("--json", "--md");
}

constexpr const char* kNotes =
    "Share of limit: decode = bytes per token (weights in use, keys and values) * tokens per second /\n"
    "memory read bandwidth beside the runs; prefill = integer multiply-adds per token * tokens per second / peak of\n"
    "the instruction set in use (models of float weights: float multiply-adds, float peak). The limits\n"
    "are measured with the same threads: reading up to 4 GB of huge pages, register-only loops.\n"
    "Joules per token are those of all processor packages (RAPL), where they can be read.\n\n";

}  // namespace

void add_bench(CLI::App& app) {
  CLI::App& command = *app.add_subcommand(
      "bench", "Measure prefill (pp) and decode (tg) speed on random token ids, beside the machine's limits");
  auto options = std::make_shared<BenchOptions>();
  add_model_options(command, options->model, "");
  // The context follows from the tests, and --threads takes several numbers here.
  for (const char* name : {"--ctx", "--threads"}) command.remove_option(command.get_option(name));
  command.get_option("MODEL")->required(false);
  add_bench_options(command, *options);
  add_environment(command);
  command.footer(kNotes + command.get_footer());
  command.callback([options] { run_bench(*options); });
}

}  // namespace duet::cli
