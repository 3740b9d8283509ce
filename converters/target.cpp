#include "converters/target.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <numeric>

#include "base/error.h"
#include "base/parallel.h"
#include "base/units.h"
#include "converters/knapsack.h"
#include "converters/recipe.h"

namespace duet {
namespace {

constexpr uint64_t kSampleWeights = 131072;
constexpr uint64_t kGgufAlignment = 32;

// What a tensor may become, the smallest first; those whose block divides its rows.
constexpr DType kTypes[] = {DType::Q2_K, DType::Q3_K, DType::IQ4_XS, DType::IQ4_NL, DType::Q4_0, DType::Q4_K, DType::Q5_0,
                            DType::Q5_K, DType::Q5_1, DType::Q6_K, DType::Q8_0, DType::F16};

// Per relative error, where nothing was measured: round figures near those that were measured on the demo model. Layers
// share what the residual stream carries, embedding and head do not.
double usual_sensitivity(TensorKind kind, uint32_t n_layer) {
  switch (kind) {
    case TensorKind::token_embd:
    case TensorKind::output:
      return 4.0 * n_layer;
    case TensorKind::ffn_down:
    case TensorKind::ffn_down_exps:
      return 3;
    case TensorKind::attn_v:
    case TensorKind::attn_output:
      return 2;
    default:
      return 1;
  }
}

uint64_t n_rows(const TensorJob& job) {
  uint64_t n = 1;
  for (size_t i = 0; i + 1 < job.shape.size(); ++i) n *= job.shape[i];
  return n;
}
uint64_t n_elems(const TensorJob& job) { return n_rows(job) * job.shape.back(); }
uint64_t stored_bytes(const TensorJob& job, const Format& format) { return n_rows(job) * row_bytes(format, job.shape.back()); }
uint64_t padded(uint64_t n) { return (n + kGgufAlignment - 1) / kGgufAlignment * kGgufAlignment; }

bool has_format(const TensorJob& job, const Format& format) {
  return std::all_of(job.runs.begin(), job.runs.end(), [&](const RowRun& run) { return run.source.format == &format && run.is_plain(); });
}

// Weighted squares of a row and of its error.
struct RowError {
  double error = 0, square = 0;
};

RowError row_error(const TensorJob& job, const Format& format, uint64_t row) {
  const uint64_t cols = job.shape.back();
  std::vector<float> x(cols), y(cols);
  std::vector<std::byte> bytes(row_bytes(format, cols));
  const SourceRow from = find_row(job, row);
  read_rows(*from.run, from.row, 1, x.data());
  const uint64_t matrix_rows = job.shape.size() < 2 ? 1 : job.shape[job.shape.size() - 2];
  const float* importance = job.importance.empty() ? nullptr : job.importance.data() + row / matrix_rows * cols;
  format.encode_row(x.data(), bytes.data(), cols, importance);
  format.decode_row(bytes.data(), y.data(), cols);
  RowError out;
  for (uint64_t c = 0; c < cols; ++c) {
    const double w = importance != nullptr ? double{importance[c]} : 1, d = double{x[c]} - double{y[c]};
    out.error += w * d * d;
    out.square += w * double{x[c]} * double{x[c]};
  }
  return out;
}

// Step between the rows that are looked at, of n_rows in a circle: prime to it, so that n_rows steps meet each row once, and near
// its golden section, so that fewer are spread evenly, whatever repeats with heads and experts.
uint64_t sample_step(uint64_t n_rows) {
  uint64_t step = std::max<uint64_t>(1, n_rows * 618 / 1000);
  while (std::gcd(step, n_rows) != 1) ++step;
  return step;
}

std::vector<const Format*> candidates(const TensorJob& job) {
  std::vector<const Format*> out;
  for (const DType type : kTypes)
    if (const Format& format = format_of(type); job.shape.back() % format.block_elems == 0) out.push_back(&format);
  return out;
}

TensorKind kind_of(const ConversionSource& source, const TensorJob& job) {
  for (const TensorSpec& spec : tensor_table(source.hparams))
    if (spec.gguf_name == job.name) return spec.kind;
  fail(ErrorKind::internal, "no kind for tensor '", job.name, "'");
}

// Bytes that options allow for tensor data, and how a tensor's count.
struct Budget {
  uint64_t bytes = 0;
  bool pads = false;  // sizes are those in a file, tensors aligned
};

uint64_t file_bytes(const ConversionSource& source) {
  GgufWriter writer("");  // only declared, never begun
  for (const GgufKeyValue& kv : source.metadata) writer.set(kv.key, kv.value);
  for (const TensorJob& job : source.jobs) writer.add_tensor(job.name, *job.format, job.shape);
  return writer.total_bytes();
}

Budget budget_of(const ConvertOptions& options, const ConversionSource& source) {
  if (options.target_bytes == 0) {
    double n = 0;
    for (const TensorJob& job : source.jobs) n += static_cast<double>(n_elems(job));
    return {static_cast<uint64_t>(options.target_bpw * n / 8), false};
  }
  uint64_t header = file_bytes(source);
  for (const TensorJob& job : source.jobs) header -= padded(stored_bytes(job, *job.format));
  return {options.target_bytes - std::min(options.target_bytes, header), true};
}

struct Choices {
  std::vector<std::vector<SizedOption>> options;       // per job
  std::vector<std::vector<const Format*>> formats;     // the same
};

Choices list_choices(const ConversionSource& source, const ConvertOptions& options, std::span<const double> sensitivity, bool pads) {
  const std::vector<bool> is_free = free_types(source, options);
  Choices out;
  for (size_t i = 0; i < source.jobs.size(); ++i) {
    if (options.cancel != nullptr && options.cancel->load()) fail(ErrorKind::cancelled, "interrupted");
    const TensorJob& job = source.jobs[i];
    auto& sized = out.options.emplace_back();
    auto& formats = out.formats.emplace_back();
    const auto add = [&](const Format& format, double cost) {
      const uint64_t bytes = stored_bytes(job, format);
      sized.push_back({pads ? padded(bytes) : bytes, cost});
      formats.push_back(&format);
    };
    if (!is_free[i]) {
      add(*job.format, 0);
      continue;
    }
    const double weight = sensitivity.empty() ? usual_sensitivity(kind_of(source, job), source.hparams.n_layer) : sensitivity[i];
    for (const Format* format : candidates(job)) {
      const double error = relative_error(job, *format, thread_count(options.n_threads));
      if (std::isfinite(error)) add(*format, weight * error);
    }
    if (sized.empty()) fail(ErrorKind::format, "tensor '", job.name, "': its values are too large for every type that could be chosen");
  }
  return out;
}

// "Q5_K x2, Q4_K x6" for the layers of a kind in order.
std::string runs_text(const std::vector<std::string>& types) {
  std::string text;
  for (size_t i = 0; i < types.size();) {
    size_t n = 1;
    while (i + n < types.size() && types[i + n] == types[i]) ++n;
    text += concat(i > 0 ? ", " : "", types[i], n > 1 ? concat(" x", n) : "");
    i += n;
  }
  return text;
}

void tell(const ConversionSource& source, const ConvertOptions& options, std::span<const double> sensitivity) {
  if (!options.notice) return;
  if (sensitivity.empty())
    options.notice(concat("types are chosen by errors in the weights",
                          options.imatrix.empty() ? "" : ", weighted by the importance matrix",
                          ": how much those of each tensor matter was not measured (--calibrate TEXT measures it)"));
  const std::vector<bool> is_free = free_types(source, options);
  std::vector<std::string> kinds;
  std::map<std::string, std::vector<std::string>> types;
  for (size_t i = 0; i < source.jobs.size(); ++i) {
    if (!is_free[i]) continue;
    std::string name = source.jobs[i].name;
    if (name.starts_with("blk.")) name.erase(0, name.find('.', 4) + 1);
    if (!types.contains(name)) kinds.push_back(name);
    types[name].emplace_back(source.jobs[i].format->name);
  }
  for (const std::string& kind : kinds) options.notice(concat(kind, ": ", runs_text(types[kind])));
  options.notice(concat("chosen types make a file of ", file_bytes(source), " bytes"));
}

// The recipe whose base most bytes have: what general.file_type says.
FileType nearest_file_type(const std::vector<TensorJob>& jobs) {
  constexpr std::array<const char*, 8> kNames = {"Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16"};
  std::map<DType, uint64_t> bytes;
  for (const TensorJob& job : jobs) bytes[job.format->dtype] += stored_bytes(job, *job.format);
  const Recipe* best = &find_recipe("Q4_K_M");
  for (const char* name : kNames)
    if (const Recipe& recipe = find_recipe(name); bytes[recipe.base] > bytes[best->base]) best = &recipe;
  return best->file_type;
}

std::string asked(const ConvertOptions& options) {
  if (options.target_bytes > 0) return format_size(options.target_bytes);
  return concat(options.target_bpw, " bits per weight");
}

}  // namespace

bool has_target(const ConvertOptions& options) { return options.target_bytes > 0 || options.target_bpw > 0; }

std::string recipe_label(const ConvertOptions& options) {
  return has_target(options) ? asked(options) + " asked for" : options.recipe;
}

std::vector<bool> free_types(const ConversionSource& source, const ConvertOptions& options) {
  std::map<std::string, bool> in_model;
  for (const TensorSpec& spec : tensor_table(source.hparams)) in_model[spec.gguf_name] = true;
  const TypeRules rules(options);
  std::vector<bool> out;
  for (const TensorJob& job : source.jobs)
    out.push_back(in_model.contains(job.name) && job.format->block_elems > 1 && !rules.name(job.name));
  return out;
}

double relative_error(const TensorJob& job, const Format& format, int n_threads) {
  if (has_format(job, format)) return 0;
  const uint64_t rows = n_rows(job), wanted = std::max<uint64_t>(16, kSampleWeights / job.shape.back());
  const uint64_t n = std::min(rows, wanted);
  const uint64_t step = sample_step(rows);
  std::vector<RowError> errors(n);
  parallel_for(n_threads, n, 4, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) errors[i] = row_error(job, format, i * step % rows);
  });
  RowError sum;
  for (const RowError& e : errors) {
    sum.error += e.error;
    sum.square += e.square;
  }
  if (!std::isfinite(sum.square)) fail(ErrorKind::format, "tensor '", job.name, "': a value is not finite (NaN or infinity) or far too large; the source is damaged");
  return sum.square > 0 ? sum.error / sum.square : 0;
}

void choose_types(const ConvertOptions& options, std::span<const double> sensitivity, ConversionSource& source) {
  if (!has_target(options)) return;
  DUET_ASSERT(sensitivity.empty() || sensitivity.size() == source.jobs.size());
  const Budget budget = budget_of(options, source);
  const Choices choices = list_choices(source, options, sensitivity, budget.pads);
  const std::vector<size_t> chosen = choose_options(choices.options, budget.bytes);
  for (size_t i = 0; i < source.jobs.size(); ++i)
    source.jobs[i].format = choices.formats[i][chosen.empty() ? 0 : chosen[i]];
  if (chosen.empty())
    fail(ErrorKind::usage, "no types make a file of ", asked(options), ": the smallest is ",
         file_bytes(source), " bytes, ", plan_of(source.jobs, "").bits_per_weight, " bits per weight");
  for (GgufKeyValue& kv : source.metadata)
    if (kv.key == "general.file_type") kv.value = GgufValue::u32(static_cast<uint32_t>(nearest_file_type(source.jobs)));
  tell(source, options, sensitivity);
}

}  // namespace duet
