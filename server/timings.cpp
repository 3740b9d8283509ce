#include "server/timings.h"

#include "base/json.h"

namespace duet::server {

Json timings(const Choice& choice) {
  const Finish& f = choice.finish;
  const size_t n_prompt = choice.n_prompt - choice.n_cached, n_decoded = f.n_generated > 0 ? f.n_generated - 1 : 0;
  const auto rate = [](size_t n, double s) { return s > 0 ? static_cast<double>(n) / s : 0.0; };
  Json out{{"cache_n", choice.n_cached},
           {"prompt_n", n_prompt},
           {"prompt_ms", f.prompt_s * 1e3},
           {"prompt_per_second", rate(n_prompt, f.prompt_s)},
           {"predicted_n", f.n_generated},
           {"predicted_ms", f.decode_s * 1e3},
           {"predicted_per_second", rate(n_decoded, f.decode_s)}};
  const uint64_t n_experts = f.experts.hits + f.experts.misses;
  if (n_experts > 0) out["expert_hit_rate"] = static_cast<double>(f.experts.hits) / static_cast<double>(n_experts);
  return out;
}

}  // namespace duet::server
