#include "cli/divergence_report.h"

#include "base/error.h"
#include "base/json.h"
#include "cli/console.h"

namespace duet::cli {
namespace {

std::string with_error(const Estimate& e, int digits) { return concat(fixed(e.value, digits), " +- ", fixed(e.error, digits)); }
std::string percent(const Estimate& e) { return with_error({100 * e.value, 100 * e.error}, 3) + " %"; }

Json pair(const Estimate& e) { return Json{{"value", e.value}, {"stderr", e.error}}; }

}  // namespace

std::string divergence_text(const DivergenceResult& r) {
  return concat("perplexity       ", with_error(r.perplexity, 4), ", reference ", with_error(r.reference_perplexity, 4), " (", r.n_tokens,
                " tokens scored, ", r.n_chunks, " chunks of ", r.n_ctx, ")\n",
                "ratio            ", with_error(r.ratio, 6), ", logarithm ", with_error(r.log_ratio, 6), "\n",
                "KLD mean         ", with_error(r.kld, 6), "\n",
                "KLD quantiles    median ", fixed(r.kld_median, 6), ", 90 % ", fixed(r.kld_90, 6), ", 95 % ", fixed(r.kld_95, 6), ", 99 % ",
                fixed(r.kld_99, 6), ", 99.9 % ", fixed(r.kld_999, 6), ", max ", fixed(r.kld_max, 6), "\n",
                "same top token   ", percent(r.same_top), "\n",
                "probability diff RMS ", percent(r.rms_difference), ", mean ", percent(r.mean_difference), "\n");
}

Json divergence_json(const DivergenceResult& r) {
  return {{"perplexity", pair(r.perplexity)},
          {"reference_perplexity", pair(r.reference_perplexity)},
          {"ratio", pair(r.ratio)},
          {"log_ratio", pair(r.log_ratio)},
          {"kld", Json{{"mean", r.kld.value}, {"stderr", r.kld.error}, {"median", r.kld_median}, {"p90", r.kld_90}, {"p95", r.kld_95}, {"p99", r.kld_99}, {"p999", r.kld_999}, {"max", r.kld_max}}},
          {"same_top", pair(r.same_top)},
          {"rms_difference", pair(r.rms_difference)},
          {"mean_difference", pair(r.mean_difference)},
          {"tokens", r.n_tokens},
          {"chunks", r.n_chunks},
          {"ctx", r.n_ctx}};
}

}  // namespace duet::cli
