// The results of duet bench as a table, Markdown, CSV or JSON.
#include <algorithm>
#include <cstdio>
#include <numeric>

#include "base/cpu_features.h"
#include "base/error.h"
#include "base/host.h"
#include "base/json.h"
#include "base/units.h"
#include "cli/bench.h"
#include "cli/build_info.h"
#include "cli/console.h"

namespace duet::cli {
namespace {

constexpr double kGiga = 1e9;

// Three significant digits or more, no exponent: 0.0123, 4.56, 7890.
std::string figure(double value) { return fixed(value, value < 0.1 ? 4 : value < 1 ? 3 : value < 100 ? 2 : 1); }

std::string percent(double share) { return fixed(share * 100, 1) + " %"; }

// ---- machine and limits ------------------------------------------------------------------------

Json machine_json(const BenchReport& r) {
  const HostCores cores = read_host_cores();
  const HostMemory memory = read_host_memory();
  return {{"cpu", cpu_model_name()},
          {"features", cpu_feature_names(detect_cpu_features())},
          {"isa", r.isa},
          {"cores", cores.physical},
          {"logical_cpus", cores.logical},
          {"threads", r.threads},
          {"memory_bytes", memory.total_bytes},
          {"memory_available_bytes", memory.available_bytes},
          {"version", DUET_VERSION},
          {"commit", build_commit()}};
}

std::string machine_text(const BenchReport& r) {
  const HostCores cores = read_host_cores();
  return concat("machine: ", cpu_model_name(), ", ", cores.physical, cores.physical == 1 ? " core, " : " cores, ", r.isa,
                ", ", format_size(read_host_memory().total_bytes), "; duet " DUET_VERSION " ", build_commit());
}

Json limits_json(const Limits& limits) {
  return {{"read_gb_s", limits.roofline.read_bytes_per_s / kGiga},
          {"int8_gmac_s", limits.roofline.int8_macs_per_s / kGiga},
          {"f32_gmac_s", limits.roofline.f32_macs_per_s / kGiga}};
}

std::string limits_text(const Limits& limits) {
  return concat("limits: ", limits.n_threads, limits.n_threads == 1 ? " thread, " : " threads, ", limits.isa, ": read ",
                fixed(limits.roofline.read_bytes_per_s / kGiga, 2), " GB/s, int8 ",
                fixed(limits.roofline.int8_macs_per_s / kGiga, 1), " GMAC/s, f32 ",
                fixed(limits.roofline.f32_macs_per_s / kGiga, 1), " GMAC/s");
}

// Those of the most threads, with the instruction set in use.
const Limits& main_limits(const BenchReport& r) {
  const Limits* best = nullptr;
  for (const Limits& limits : r.limits)
    if (limits.isa == r.isa && (best == nullptr || limits.n_threads > best->n_threads)) best = &limits;
  DUET_ASSERT(best != nullptr);
  return *best;
}

// ---- experts -----------------------------------------------------------------------------------

// Share of all choices that each expert had, over all layers.
std::vector<double> expert_shares(const BenchReport& r, const std::vector<uint64_t>& uses) {
  const size_t n = r.info ? r.info->hparams.n_expert : 0;
  const uint64_t total = std::accumulate(uses.begin(), uses.end(), uint64_t{0});
  std::vector<double> shares(total > 0 ? n : 0);
  for (size_t i = 0; i < uses.size() && total > 0; ++i) shares[i % n] += static_cast<double>(uses[i]) / static_cast<double>(total);
  return shares;
}

std::string experts_text(const BenchReport& r, const char* what, const std::vector<uint64_t>& uses) {
  const std::vector<double> shares = expert_shares(r, uses);
  if (shares.empty()) return {};
  std::string text = concat("experts used in ", what, ", % of choices:");
  for (const double share : shares) text += " " + fixed(share * 100, 1);
  const auto [least, most] = std::minmax_element(uses.begin(), uses.end());
  const double per_layer = static_cast<double>(std::accumulate(uses.begin(), uses.end(), uint64_t{0})) / r.info->hparams.n_layer;
  return text + concat("; in one layer ", fixed(static_cast<double>(*least) * 100 / per_layer, 1), " to ",
                       fixed(static_cast<double>(*most) * 100 / per_layer, 1), "\n");
}

Json expert_counts(const BenchReport& r, const std::vector<uint64_t>& uses) {
  const size_t n = r.info->hparams.n_expert;
  Json layers = Json::array();
  for (size_t i = 0; n > 0 && i < uses.size(); i += n)
    layers.push_back(std::vector<uint64_t>(uses.begin() + static_cast<ptrdiff_t>(i), uses.begin() + static_cast<ptrdiff_t>(i + n)));
  return layers;
}

// ---- forms -------------------------------------------------------------------------------------

Json result_json(const BenchResult& result) {
  Json json = {{"test", result.test},
               {"threads", result.n_threads},
               {"tok_s", result.mean},
               {"tok_s_std", result.deviation},
               {"samples_tok_s", result.tok_s},
               {"bytes_per_token", result.bytes_per_token},
               {"macs_per_token", result.macs_per_token},
               {"share_of_limit", result.share_of_limit},
               {"read_gb_s", result.read_bytes_per_s ? Json(*result.read_bytes_per_s / kGiga) : Json()},
               {"joules_per_token", nullptr}};
  if (result.joules_per_token) json["joules_per_token"] = *result.joules_per_token;
  if (!result.streamed) return json;
  const StreamShare& s = *result.streamed;
  json.update({{"hit_rate", s.hit_rate}, {"disk_bytes_per_token", s.disk_bytes}, {"disk_gb_s", s.disk_bytes_per_s / kGiga},
               {"wait_share", s.wait_share}, {"t_perfect_s", s.t_perfect}, {"t_demand_s", s.t_demand}, {"eff_sched", s.eff_sched},
               {"eff_disk", s.eff_disk}, {"majflt_per_token", s.major_faults}, {"peak_bytes", s.peak_bytes}, {"backend", s.backend}});
  json.update({{"disk_bytes", s.read_bytes}, {"padding_bytes", s.padding_bytes}, {"speculative_bytes", s.speculative_bytes},
               {"speculative_wasted_bytes", s.wasted_bytes}, {"good_guesses", s.good_guesses ? Json(*s.good_guesses) : Json()},
               {"kernel_read_bytes_per_token", s.kernel_bytes ? Json(*s.kernel_bytes) : Json()}});
  if (s.eff_policy) json["eff_policy"] = *s.eff_policy;
  return json;
}

void print_bench_json(const BenchReport& r) {
  Json limits_by_threads = Json::array(), results = Json::array();
  for (const Limits& limits : r.limits) {
    Json entry = limits_json(limits);
    entry["threads"] = limits.n_threads;
    entry["isa"] = limits.isa;
    limits_by_threads.push_back(std::move(entry));
  }
  for (const BenchResult& result : r.results) results.push_back(result_json(result));
  Json json = {{"machine", machine_json(r)}, {"limits", limits_json(main_limits(r))}, {"limits_by_threads", limits_by_threads}, {"results", results}};
  if (r.info)
    json["model"] = {{"path", r.model}, {"types", r.info->types}, {"layers", r.info->hparams.n_layer}, {"file_bytes", r.info->file_bytes},
                     {"kv_type", r.kv_type}, {"batch", r.n_batch}, {"seed", r.seed}};
  if (r.disk_bytes_per_s) json["limits"]["disk_gb_s"] = *r.disk_bytes_per_s / kGiga;
  if (r.info) json["expert_uses"] = {{"prefill", expert_counts(r, r.prefill_uses)}, {"decode", expert_counts(r, r.decode_uses)}};
  if (!r.energy_absent.empty()) json["joules_absent"] = r.energy_absent;
  print_json(json);
}

std::string streaming_text(const BenchReport& r, const BenchResult& x) {
  const StreamShare& s = *x.streamed;
  const std::string policy = s.eff_policy ? concat("; the best choice of experts would miss ", percent(*s.eff_policy), " of the bytes") : "";
  const std::string guesses = s.good_guesses ? concat("; ", percent(*s.good_guesses), " of the guesses were right, ", format_size(s.wasted_bytes), " of ",
                                                      format_size(s.read_bytes), " read in vain") : "";
  return concat(x.test, ": experts in memory ", percent(s.hit_rate), ", ", figure(s.disk_bytes / kGiga), " GB/token from disk at ",
                figure(s.disk_bytes_per_s / kGiga), " of ", figure(*r.disk_bytes_per_s / kGiga), " GB/s (", s.backend, "); T_perfect ",
                figure(s.t_perfect), " s, T_demand ", figure(s.t_demand), " s, measured ", figure(1 / x.mean), " s: ", percent(s.eff_sched),
                " of the perfect schedule", policy, guesses, "; waiting ", percent(s.wait_share), "; ", figure(s.major_faults), " major faults/token; peak ",
                format_size(s.peak_bytes), "\n");
}

using Row = std::vector<std::string>;

std::vector<Row> rows_of(const BenchReport& r) {
  std::vector<Row> rows = {{"test", "threads", "tok/s", "+-", "GB/token", "GMAC/token", "of limit", "J/token"}};
  for (const BenchResult& x : r.results)
    rows.push_back({x.test, std::to_string(x.n_threads), figure(x.mean), figure(x.deviation), figure(x.bytes_per_token / kGiga),
                    figure(x.macs_per_token / kGiga), percent(x.share_of_limit),
                    x.joules_per_token ? figure(*x.joules_per_token) : "-"});
  return rows;
}

std::string table_text(const std::vector<Row>& rows, bool markdown) {
  std::vector<size_t> widths(rows[0].size());
  for (const Row& row : rows)
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  std::string text;
  for (size_t line = 0; line < rows.size(); ++line) {
    for (size_t i = 0; i < widths.size(); ++i) {
      const std::string pad(widths[i] - rows[line][i].size(), ' ');
      const char* before = markdown ? "| " : i > 0 ? "  " : "";
      text += concat(before, i == 0 ? rows[line][i] + pad : pad + rows[line][i], markdown ? " " : "");
    }
    text += markdown ? "|\n" : "\n";
    if (line > 0 || !markdown) continue;
    for (size_t i = 0; i < widths.size(); ++i) text += concat("|", i == 0 ? ":" : "-", std::string(widths[i], '-'), i == 0 ? "-" : ":");
    text += "|\n";
  }
  return text;
}

std::string model_text(const BenchReport& r) {
  return concat("model: ", r.model, ", ", r.info->types, ", ", r.info->hparams.n_layer, " layers, ",
                format_size(r.info->file_bytes), "; keys and values ", r.kv_type, ", batch ", r.n_batch, ", seed ", r.seed);
}

void print_text(const BenchReport& r, bool markdown) {
  const char* item = markdown ? "- " : "";
  print(concat(item, machine_text(r), "\n"));
  for (const Limits& limits : r.limits) print(concat(item, limits_text(limits), "\n"));
  if (!r.info) return;
  print(concat(item, model_text(r), "\n\n", table_text(rows_of(r), markdown), "\n"));
  for (const std::string& line : {experts_text(r, "prefill", r.prefill_uses), experts_text(r, "decode", r.decode_uses)})
    if (!line.empty()) print(concat(item, line));
  if (!r.card.empty()) print(concat(item, r.card, "\n"));
  if (!r.plan.empty()) print(concat(item, r.plan, "\n"));
  for (const BenchResult& x : r.results)
    if (x.streamed) print(concat(item, streaming_text(r, x)));
  if (!r.energy_absent.empty()) print(concat(item, "no energy figures: ", r.energy_absent, "\n"));
}

void print_csv(const BenchReport& r) {
  print("test,threads,tok_s,tok_s_std,bytes_per_token,macs_per_token,share_of_limit,joules_per_token,"
        "read_gb_s,int8_gmac_s,f32_gmac_s,isa,cpu,commit\n");
  for (const BenchResult& x : r.results) {
    const Limits& limits = *std::find_if(r.limits.begin(), r.limits.end(), [&](const Limits& l) {
      return l.n_threads == x.n_threads && l.isa == r.isa;
    });
    print(concat(x.test, ",", x.n_threads, ",", fixed(x.mean, 4), ",", fixed(x.deviation, 4), ",", fixed(x.bytes_per_token, 0), ",",
                 fixed(x.macs_per_token, 0), ",", fixed(x.share_of_limit, 4), ",",
                 x.joules_per_token ? fixed(*x.joules_per_token, 4) : "", ",", fixed(limits.roofline.read_bytes_per_s / kGiga, 3), ",",
                 fixed(limits.roofline.int8_macs_per_s / kGiga, 2), ",", fixed(limits.roofline.f32_macs_per_s / kGiga, 2), ",", r.isa,
                 ",\"", cpu_model_name(), "\",", build_commit(), "\n"));
  }
}

}  // namespace

void print_report(const BenchReport& report, BenchFormat format) {
  switch (format) {
    case BenchFormat::json: return print_bench_json(report);
    case BenchFormat::csv: return print_csv(report);
    case BenchFormat::markdown: return print_text(report, true);
    case BenchFormat::table: return print_text(report, false);
  }
}

}  // namespace duet::cli
