// plan: what fits into memory, what streams, how fast it will be; nothing is loaded.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <optional>

#include "base/error.h"
#include "base/host.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "base/units.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/measure.h"
#include "cli/model_options.h"
#include "cli/options.h"
#include "converters/recipe.h"
#include "runtime/roofline.h"
#include "runtime/speed_estimate.h"

namespace duet::cli {
namespace {

namespace fs = std::filesystem;

struct PlanOptions {
  ModelOptions model;
  std::string recipe, path;
  bool json = false, recipe_given = false, loras_given = false;  // given: on the command line
};

// One model file, or one that could be made.
struct Candidate {
  std::string type;  // recipe; "" for a file
  ModelSizes sizes;
};

struct Outcome {
  const Candidate* candidate;
  MemoryPlan plan;  // of what a card leaves to the CPU
  std::optional<gpu::CardPlan> card;
  std::string card_refusal;  // why the card that is there would not be used
  SpeedEstimate speed;
  std::string refusal;  // why there is no plan
};

struct Report {
  std::string model;
  std::vector<Outcome> outcomes;
  MachineRates rates;
  gpu::FoundDevice device;
  std::optional<gpu::Card> card;  // to plan for: here, or of a size that was given
  std::string reader, rates_missing;  // "pread, direct"; why there are no rates
  int n_threads = 1;
  bool has_speed() const { return rates_missing.empty(); }
};

// ---- candidates --------------------------------------------------------------------------------

std::vector<Candidate> of_recipes(const HParams& hparams, const std::string& recipe) {
  std::vector<Candidate> out;
  const auto add = [&](const Recipe& r) {
    out.push_back({r.name, model_sizes(hparams, [&](const TensorSpec& spec) -> const Format& { return recipe_format(r, hparams, spec); })});
  };
  if (!recipe.empty())
    add(find_recipe(recipe));
  else
    for (const Recipe& r : all_recipes()) add(r);
  return out;
}

// The sizes of a model that is known by name, where no file has that name.
std::optional<HParams> known_model(const PlanOptions& options) {
  constexpr std::string_view kKnown = "mixtral-";
  if (!options.model.path.starts_with(kKnown) || fs::exists(options.model.path)) return std::nullopt;
  return mixtral_hparams(options.model.path.substr(kKnown.size()));
}

std::vector<Candidate> find_candidates(const PlanOptions& options) {
  const fs::path path = options.model.path;
  const auto known = known_model(options);
  if ((known || fs::is_directory(path)) && options.loras_given)
    fail(ErrorKind::usage, "--lora: adapters are applied to a GGUF file, and ", options.model.path, " is none; merged into one by duet convert, they take nothing");
  if (known) return of_recipes(*known, options.recipe);
  if (fs::is_directory(path)) {
    const fs::path config = path / "config.json";
    constexpr uint64_t kMaxConfig = 1 << 20;
    return of_recipes(read_hf_config(parse_json(read_file(config, kMaxConfig), config.string()), config.string(), notices()), options.recipe);
  }
  if (options.recipe_given) fail(ErrorKind::usage, "--type: a GGUF file has its types already; leave it out");
  return {{"", sizes_of(options.model, notices())}};
}

// ---- rates -------------------------------------------------------------------------------------

// What stands for the disk: the file itself, the largest weights of a folder, else a folder.
fs::path disk_path(const PlanOptions& options) {
  if (!options.path.empty()) return options.path;
  const fs::path model = options.model.path;
  if (known_model(options)) return ".";
  if (!fs::exists(model)) return model_file(options.model.path);
  if (!fs::is_directory(model)) return model;
  fs::path largest = model;
  uintmax_t most = 0;
  std::error_code ec;  // what cannot be read is not the file to measure
  for (const auto& entry : fs::directory_iterator(model, ec)) {
    const uintmax_t size = entry.is_regular_file(ec) && entry.path().extension() == ".safetensors" ? entry.file_size(ec) : 0;
    if (ec || size <= most) continue;
    most = size;
    largest = entry.path();
  }
  return largest;
}

void measure_rates(Report& report, const PlanOptions& options) {
  const KernelTable* kernels = &select_kernels(options.model.isa);
  const Roofline roofline = measure_rooflines({&kernels, 1}, report.n_threads, uint64_t{512} << 20).front();
  report.rates = {.read_bytes_per_s = roofline.read_bytes_per_s,
                  .int8_macs_per_s = roofline.int8_macs_per_s,
                  .f32_macs_per_s = roofline.f32_macs_per_s};
  try {
    const ReadRate disk = measure_disk(disk_path(options));
    report.rates.disk_bytes_per_s = disk.bytes_per_second;
    report.reader = disk.reader;
  } catch (const Error& e) {
    report.rates_missing = concat("disk not measured (name a folder on it with --path): ", e.what());
  }
}

// A card that is here, or one of --vram with an assumed rate.
void plan_for_card(Report& report, const ModelOptions& model) {
  using Mode = GpuOptions::Mode;
  const GpuOptions& options = model.gpu;
  report.device = find_card(model);
  if (options.mode == Mode::off) return;
  if (!model.loras.empty()) {
    if (options.vram_bytes > 0 || gpu::has_module()) notices()("adapters are applied on the CPU only: no card is planned for");
    return;
  }
  if (report.device.device != nullptr) report.card = gpu::card_of(*report.device.device);
  else if (options.vram_bytes > 0) report.card = gpu::Card{.name = "", .free_bytes = 0, .memory_bytes_per_s = gpu::kAssumedBytesPerS, .device = nullptr};
  else if (options.mode != Mode::automatic)
    fail(ErrorKind::unsupported, "no card can be used: ", report.device.reason, "; to plan for one that is not here, say how much memory it has with --vram");
  else if (report.device.is_broken) notices()(concat("no card is planned for: ", report.device.reason));
  if (report.card && !(report.card->memory_bytes_per_s > 0)) report.card->memory_bytes_per_s = gpu::kAssumedBytesPerS;
}

// ---- forms -------------------------------------------------------------------------------------

std::string rate(double value) { return fixed(value, value < 1 ? 3 : value < 100 ? 2 : 0); }
std::string gigabytes(double n_bytes) { return fixed(n_bytes / 1e9, 2); }

std::string slots_text(const MemoryPlan& plan) {
  if (!plan.streamed) return "all";
  const auto [least, most] = std::minmax_element(plan.slots.begin(), plan.slots.end());
  return *least == *most ? concat(*least) : concat(*least, "-", *most);
}

Json plan_json(const Outcome& o, const Report& report) {
  const MemoryPlan& p = o.plan;
  Json json = {{"type", o.candidate->type.empty() ? Json() : Json(o.candidate->type)},
               {"file_bytes", o.candidate->sizes.file_bytes},
               {"bytes_per_token", o.candidate->sizes.bytes_per_token}};
  if (!o.refusal.empty()) {
    json["error"] = o.refusal;
    return json;
  }
  json["plan"] = {{"streamed", p.streamed}, {"budget_bytes", p.budget_bytes}, {"budget_reason", p.budget_reason},
                  {"total_bytes", p.total_bytes}, {"program_bytes", p.program_bytes}, {"dense_bytes", p.dense_bytes},
                  {"kv_bytes", p.kv_bytes}, {"scratch_bytes", p.scratch_bytes}, {"io_bytes", p.io_bytes},
                  {"expert_bytes", p.expert_bytes}, {"ctx", p.n_ctx}, {"batch", p.n_batch}, {"staging", p.n_staging},
                  {"slots", p.slots}, {"resident_share", p.resident_share}};
  if (o.card)
    json["card"] = {{"name", report.card->name.empty() ? Json() : Json(report.card->name)}, {"budget_bytes", o.card->budget_bytes}, {"budget_reason", o.card->budget_reason},
                    {"total_bytes", o.card->total_bytes()}, {"context_bytes", o.card->context_bytes}, {"weight_bytes", o.card->weight_bytes},
                    {"kv_bytes", o.card->kv_bytes}, {"scratch_bytes", o.card->scratch_bytes}, {"transit_bytes", o.card->transit_bytes}, {"expert_bytes", o.card->expert_bytes},
                    {"first_layer", o.card->first_layer}, {"layers", o.card->n_layer}, {"bytes_per_s", report.card->memory_bytes_per_s}};
  if (!o.card_refusal.empty()) json["card_refusal"] = o.card_refusal;
  if (!report.has_speed()) return json;
  const SpeedEstimate& s = o.speed;
  json["speed"] = {{"hit_rate", s.hit_rate}, {"disk_bytes_per_token", s.disk_bytes_per_token}, {"t_io_s", s.t_io_s},
                   {"t_mem_s", s.t_mem_s}, {"t_perfect_s", s.t_perfect_s}, {"t_demand_s", s.t_demand_s},
                   {"decode_tok_s", s.decode_tok_s}, {"prefill_read_s", s.prefill_read_s},
                   {"prefill_compute_s", s.prefill_compute_s}, {"prefill_tok_s", s.prefill_tok_s}};
  if (o.card) json["speed"].update({{"card_bytes_per_token", s.card_bytes_per_token}, {"t_card_s", s.t_card_s}});
  return json;
}

void print_plan_json(const Report& report) {
  Json plans = Json::array();
  for (const Outcome& o : report.outcomes) plans.push_back(plan_json(o, report));
  Json rates;
  if (report.has_speed())
    rates = {{"disk_bytes_per_s", report.rates.disk_bytes_per_s}, {"reader", report.reader},
             {"read_bytes_per_s", report.rates.read_bytes_per_s}, {"int8_macs_per_s", report.rates.int8_macs_per_s},
             {"f32_macs_per_s", report.rates.f32_macs_per_s}, {"threads", report.n_threads}};
  print_json({{"model", report.model}, {"rates", rates}, {"plans", plans}});
}

std::string line(const char* name, uint64_t n_bytes, const std::string& remark = {}) {
  char text[128];
  std::snprintf(text, sizeof(text), "  %-18s %10s", name, format_size(n_bytes).c_str());
  return concat(text, remark.empty() ? "" : "  ", remark, "\n");
}

std::string expert_remark(const MemoryPlan& p, const HParams& hparams) {
  if (!p.streamed) return "all of them";
  const std::string held = concat(slots_text(p), " of ", hparams.n_expert, " in each layer, ", fixed(100 * p.resident_share, 0), " %; the others stream");
  return *std::min_element(p.slots.begin(), p.slots.end()) < 2 ? held + "; below two in each, expect little of them" : held;
}

std::string memory_text(const Outcome& o) {
  const MemoryPlan& p = o.plan;
  std::string text = concat(p.streamed ? "streamed: " : "resident: ", format_size(p.total_bytes), " of memory, ",
                            p.budget_bytes > 0 ? concat("budget ", format_size(p.budget_bytes)) : "no limit", " (", p.budget_reason, ")\n");
  text += line("dense weights", p.dense_bytes);
  text += line("keys and values", p.kv_bytes, concat(p.n_ctx, " positions"));
  text += line("working memory", p.scratch_bytes, concat("batch of ", p.n_batch));
  text += line("program", p.program_bytes);
  if (p.streamed) text += line("staging", p.io_bytes, concat(p.n_staging, " experts on their way"));
  if (p.expert_bytes > 0 || p.streamed) text += line("experts", p.expert_bytes, expert_remark(p, o.candidate->sizes.hparams));
  return text;
}

// "experts of layers 6 to 31 of 32", "no experts"
std::string card_layers(const gpu::CardPlan& p, const HParams& hparams) {
  const char* what = hparams.n_expert > 0 ? "experts" : "feed-forward parts";
  if (p.first_layer == p.n_layer) return concat("no ", what);
  if (p.first_layer == 0) return concat(what, " of all ", p.n_layer, " layers");
  return concat(what, " of layers ", p.first_layer, " to ", p.n_layer - 1, " of ", p.n_layer);
}

std::string card_text(const Outcome& o, const Report& report) {
  const gpu::CardPlan& p = *o.card;
  const HParams& hparams = o.candidate->sizes.hparams;
  const std::string name = report.card->name.empty() ? "a card that is not here" : report.card->name;
  std::string text = concat("card: ", name, ": ", format_size(p.total_bytes()), " of its memory, budget ", format_size(p.budget_bytes), " (", p.budget_reason, ")\n");
  text += line("weights", p.weight_bytes, "attention, norms, routers, output");
  text += line("keys and values", p.kv_bytes, concat(p.sizes.n_ctx, " positions"));
  text += line("working memory", p.scratch_bytes, concat("batch of ", p.sizes.n_batch));
  if (p.transit_bytes > 0) text += line("in transit", p.transit_bytes, concat("two experts of the CPU, in chunks of ", gpu::kTransitTokens, " tokens or more"));
  if (p.context_bytes > 0) text += line("driver", p.context_bytes);
  return text + line(hparams.n_expert > 0 ? "experts" : "feed-forward", p.expert_bytes, card_layers(p, hparams));
}

std::string card_speed_text(const Outcome& o, const Report& report) {
  const bool assumed = report.card->memory_bytes_per_s == gpu::kAssumedBytesPerS;
  return concat("of a token the card reads ", gigabytes(o.speed.card_bytes_per_token), " GB in ", fixed(1e3 * o.speed.t_card_s, 1), " ms, at three quarters of ",
                fixed(report.card->memory_bytes_per_s / 1e9, 0), " GB/s (", assumed ? concat("assumed: that of an ", gpu::kAssumedCard) : "its data sheet", ")\n");
}

std::string speed_text(const Outcome& o, const Report& report) {
  const SpeedEstimate& s = o.speed;
  std::string text = concat("measured: disk ", gigabytes(report.rates.disk_bytes_per_s), " GB/s (", report.reader, "), memory ",
                            gigabytes(report.rates.read_bytes_per_s), " GB/s with ", report.n_threads, " threads\n");
  text += concat("expected: decode ", rate(s.decode_tok_s), " tok/s");
  if (o.plan.streamed)
    text += concat(" (", rate(1 / s.t_perfect_s), " with perfect look-ahead; hit rate ", fixed(s.hit_rate, 2), ", ",
                   gigabytes(s.disk_bytes_per_token), " GB from disk per token)");
  if (o.card && s.prefill_tok_s > 0) text += concat("; prefill at most ", rate(s.prefill_tok_s), " tok/s, by the CPU's experts, ", o.plan.n_batch, " at once");
  else if (!o.card) text += concat("; prefill ", rate(s.prefill_tok_s), " tok/s, ", o.plan.n_batch, " at once");
  if (o.plan.streamed) text += concat(" (reading ", fixed(s.prefill_read_s, 1), " s, arithmetic ", fixed(s.prefill_compute_s, 1), " s)");
  return text + "\n" + (o.card ? card_speed_text(o, report) : "");
}

void print_one(const Report& report) {
  const Outcome& o = report.outcomes.front();
  const std::string type = o.candidate->type.empty() ? "" : concat(" in ", o.candidate->type);
  print(concat(report.model, type, ": ", format_size(o.candidate->sizes.file_bytes), ", ",
               gigabytes(static_cast<double>(o.candidate->sizes.bytes_per_token)), " GB read per token\n", o.card ? card_text(o, report) : "", memory_text(o)));
  if (report.has_speed()) print(speed_text(o, report));
}

void print_table(const Report& report) {
  print(concat(report.model, ", one row per type; budget ", report.outcomes.front().plan.budget_reason, "\n"));
  if (report.card)
    print(concat("card: ", report.card->name.empty() ? concat("one that is not here, ", gpu::kAssumedCard, "'s memory rate assumed") : report.card->name, "; experts of the last layers on it, the others held in memory\n"));
  if (report.has_speed())
    print(concat("measured: disk ", gigabytes(report.rates.disk_bytes_per_s), " GB/s (", report.reader, "), memory ",
                 gigabytes(report.rates.read_bytes_per_s), " GB/s with ", report.n_threads, " threads\n"));
  print(concat("type         file GiB  ", report.card ? "on the card  " : "", "experts held  per layer  hit rate  decode tok/s  prefill tok/s\n"));
  for (const Outcome& o : report.outcomes) {
    char text[256];
    const double file = static_cast<double>(o.candidate->sizes.file_bytes) / (uint64_t{1} << 30);
    if (!o.refusal.empty()) {
      std::snprintf(text, sizeof(text), "%-10s %10.1f  ", o.candidate->type.c_str(), file);
      print(concat(text, o.refusal, "\n"));
      continue;
    }
    std::snprintf(text, sizeof(text), "%-10s %10.1f  ", o.candidate->type.c_str(), file);
    std::string row = text;
    if (o.card) {
      std::snprintf(text, sizeof(text), "%3u layers   ", o.card->n_layer - o.card->first_layer);
      row += text;
    } else if (report.card) {
      row += "not used     ";
    }
    std::snprintf(text, sizeof(text), "%10.0f %%  %9s", 100 * o.plan.resident_share, slots_text(o.plan).c_str());
    row += text;
    if (report.has_speed()) {
      std::snprintf(text, sizeof(text), "  %8.2f  %12s  %13s", o.speed.hit_rate, rate(o.speed.decode_tok_s).c_str(),
                    rate(o.speed.prefill_tok_s).c_str());
      row += text;
    }
    print(row + "\n");
  }
}

Outcome divided(const Candidate& candidate, const PlanOptions& options, const Report& report, const HostMemory& memory) {
  Division d = divide(candidate.sizes, options.model, report.card, report.n_threads, memory);
  return {.candidate = &candidate, .plan = std::move(d.memory), .card = std::move(d.card), .card_refusal = std::move(d.card_refusal), .speed = {}, .refusal = {}};
}

Outcome plan_one(const Candidate& candidate, const PlanOptions& all, const Report& report, const HostMemory& memory) {
  Outcome out{.candidate = &candidate, .plan = {}, .card = {}, .card_refusal = {}, .speed = {}, .refusal = {}};
  try {
    out = divided(candidate, all, report, memory);
    if (!report.has_speed()) return out;
    CardShare share;
    if (out.card) share = {out.card->first_layer, report.card->memory_bytes_per_s};
    out.speed = estimate_speed(candidate.sizes, out.plan, report.rates, out.card ? &share : nullptr);
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::memory) throw;
    out.refusal = e.what();
  }
  return out;
}

void run_plan(const PlanOptions& options) {
  const std::vector<Candidate> candidates = find_candidates(options);
  Report report;
  report.model = options.model.path;
  report.n_threads = options.model.n_threads > 0 ? options.model.n_threads : read_host_cores().usable();
  const HostMemory memory = read_host_memory();
  plan_for_card(report, options.model);
  if (candidates.size() == 1) divided(candidates.front(), options, report, memory);  // refused before measuring
  measure_rates(report, options);
  for (const Candidate& candidate : candidates) report.outcomes.push_back(plan_one(candidate, options, report, memory));
  if (!report.has_speed()) note(report.rates_missing);
  const std::string& refusal = report.outcomes.front().card_refusal;
  if (candidates.size() == 1 && !refusal.empty()) note(concat(report.card->name, " is not used: ", refusal));
  if (options.json) return print_plan_json(report);
  if (candidates.size() == 1) return print_one(report);
  print_table(report);
}

}  // namespace

void add_plan(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("plan", "What fits into memory, what streams from disk, how fast it will be");
  auto options = std::make_shared<PlanOptions>();
  add_model_options(command, options->model, "the model's, at most 4096");
  // Of no influence on a plan.
  for (const char* name : {"--pin", "--numa", "--io"}) command.remove_option(command.get_option(name));
  command.get_option("MODEL")->description("GGUF file, Hugging Face folder, mixtral-8x7b or mixtral-8x22b");
  const CLI::Option* type = command.add_option("--type", options->recipe, "Plan for this type only, for instance Q4_K_M [default: all]")->type_name("TYPE");
  command.add_option("--path", options->path, "Folder or file whose disk is measured [default: the model's; of a name, where you are]")->type_name("PATH");
  command.add_flag("--json", options->json, "One JSON document");
  add_environment(command);
  command.callback([options, type, lora = command.get_option("--lora")] {
    options->recipe_given = type->count() > 0;
    options->loras_given = lora->count() > 0;
    run_plan(*options);
  });
}

}  // namespace duet::cli
