#include "cli/generation.h"

#include <array>
#include <cstdio>

#include "base/error.h"
#include "base/json.h"
#include "base/pressure.h"
#include "base/units.h"
#include "cli/console.h"
#include "cli/model_options.h"
#include "runtime/memory_plan.h"

namespace duet::cli {
namespace {

const char* stop_name(Stop stop) {
  switch (stop) {
    case Stop::eos:
      return "eos";
    case Stop::length:
      return "length";
    case Stop::context:
      return "context";
    case Stop::interrupted:
      return "interrupted";
  }
  return "";
}

double per_second(size_t n, double seconds) {
  return seconds > 0 ? static_cast<double>(n) / seconds : 0;
}

double ratio(uint64_t part, uint64_t whole) {
  return whole > 0 ? static_cast<double>(part) / static_cast<double>(whole) : 0;
}

// Where the last tokens had stood before at length: what would now be proposed.
size_t open_gate(const Speculator& s) { return s.gate().best(kMaxDraft, s.max_draft()); }

}  // namespace

void print_status(const Engine& engine, const Session& session) {
  const ModelInfo& info = engine.info();
  std::fprintf(stderr, "[%s | %s | %s | %s, %d thread%s | ctx %u, %s KV]\n",
               one_line(info.hparams.name).c_str(), info.types.c_str(), format_size(info.file_bytes).c_str(),
               info.isa.c_str(), info.n_threads, info.n_threads == 1 ? "" : "s", session.n_ctx(),
               format_size(session.kv_bytes()).c_str());
  print_plans(engine);
}

std::optional<StreamUse> streaming(const Engine& engine, const Generation& g) {
  const std::optional<StreamStats> now = engine.stream_stats();
  if (!now || g.n_decoded == 0) return std::nullopt;
  return stream_use(g.before_decode, *now, static_cast<double>(g.n_decoded), g.decode_seconds, engine.info().n_threads);
}

void print_streaming(const StreamUse& s) {
  std::fprintf(stderr, "[experts in memory %.0f %% of the time, %.2f GB/token read at %.2f GB/s (%s), %.0f %% of the time waiting for the disk]\n",
               100 * s.hit_rate, s.disk_bytes / 1e9, s.disk_bytes_per_s / 1e9, s.backend.c_str(), 100 * s.wait_share);
}

void print_faults(const Engine& engine, const Generation& g) {
  if (g.major_faults <= ThrashDetector::kFaultsPerToken * g.n_decoded) return;
  std::fprintf(stderr, "[%.0f major faults a token: %s]\n", static_cast<double>(g.major_faults) / static_cast<double>(g.n_decoded),
               engine.plan().streamed ? "memory is short; give a smaller --ram"
                                      : "weights came from disk, as they do the first time; if it stays so, give a --ram below what is free");
}

void print_statistics(const Generation& g) {
  std::fprintf(
      stderr,
      "[prompt %zu tok, %.1f tok/s | generated %zu tok, %.1f tok/s | stop: %s | seed %llu]\n",
      g.n_prompt, per_second(g.n_prompt - g.n_reused, g.prefill_seconds), g.ids.size(),
      per_second(g.n_decoded, g.decode_seconds), stop_name(g.stop),
      static_cast<unsigned long long>(g.seed));
}

std::string answer_statistics(const Generation& g, const std::optional<StreamUse>& stream, const Session& session) {
  std::array<char, 200> line{};
  std::snprintf(line.data(), line.size(), "[%zu tok, %.1f tok/s | prompt %zu new of %zu, %.1f tok/s | ctx %zu/%u", g.ids.size(),
                per_second(g.n_decoded, g.decode_seconds), g.n_prompt - g.n_reused, g.n_prompt,
                per_second(g.n_prompt - g.n_reused, g.prefill_seconds), session.tokens().size(), session.n_ctx());
  std::string text = line.data();
  if (stream) text += concat(" | experts ", static_cast<int>(100 * stream->hit_rate + 0.5), " % in memory");
  if (g.stop != Stop::eos) text += concat(" | stop: ", stop_name(g.stop));
  return text + "]";
}

Json to_json(const Generation& g, const std::optional<StreamUse>& s) {
  Json out{{"text", g.text},
          {"ids", g.ids},
          {"prompt_tokens", g.n_prompt},
          {"generated_tokens", g.ids.size()},
          {"prefill_s", g.prefill_seconds},
          {"prefill_tok_s", per_second(g.n_prompt - g.n_reused, g.prefill_seconds)},
          {"decode_tok_s", per_second(g.n_decoded, g.decode_seconds)},
          {"major_faults", g.major_faults},
          {"stop", stop_name(g.stop)},
          {"seed", g.seed}};
  if (s)
    out["streaming"] = {{"hit_rate", s->hit_rate},
                        {"disk_bytes_per_token", s->disk_bytes},
                        {"disk_gb_s", s->disk_bytes_per_s / 1e9},
                        {"disk_wait_share", s->wait_share},
                        {"disk_bytes", s->read_bytes},
                        {"padding_bytes", s->padding_bytes},
                        {"speculative_bytes", s->speculative_bytes},
                        {"speculative_wasted_bytes", s->wasted_bytes},
                        {"backend", s->backend}};
  return out;
}

void print_speculation(const Speculator& s) {
  const SpeculationStats& stats = s.stats();
  std::string gate;
  if (s.gated()) gate = open_gate(s) > 0 ? concat(" | gate open, up to ", open_gate(s), " at once") : " | gate closed";
  std::fprintf(stderr, "[proposed %llu tok, %.0f %% accepted | %.2f tok/step%s]\n", static_cast<unsigned long long>(stats.drafted),
               100 * ratio(stats.accepted, stats.drafted), ratio(stats.tokens, stats.steps), gate.c_str());
}

Json to_json(const Speculator& s) {
  const SpeculationStats& stats = s.stats();
  Json costs = Json::array();
  for (const SpeculationGate::Length& length : s.gate().lengths())
    if (length.steps > 0) costs.push_back({{"proposed", length.n_draft}, {"relative_time", length.cost}, {"steps", length.steps}});
  Json out{{"proposed", stats.drafted},
           {"accepted", stats.accepted},
           {"steps", stats.steps},
           {"tokens_per_step", ratio(stats.tokens, stats.steps)},
           {"plain_step_s", s.gate().plain_seconds()},
           {"costs", std::move(costs)}};
  out["gate"] = s.gated() ? Json(open_gate(s)) : Json();
  return out;
}

}  // namespace duet::cli
