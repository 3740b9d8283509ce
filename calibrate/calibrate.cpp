#include "calibrate/calibrate.h"

#include <unistd.h>

#include <algorithm>
#include <functional>

#include "base/error.h"
#include "base/sha256.h"
#include "calibrate/encoder.h"
#include "calibrate/memory.h"
#include "calibrate/sensitivity.h"
#include "converters/repack.h"
#include "converters/source.h"
#include "converters/target.h"
#include "formats/gguf_parts.h"
#include "quant/second_order.h"
#include "runtime/tokenizer.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

// Whole sequences of the text, each beginning with BOS where the vocabulary wants one.
std::vector<Token> sequences(const Tokenizer& tokenizer, const CalibrationOptions& calibration,
                             const ConversionSource& source) {
  const size_t n_ctx = calibration.n_ctx;
  if (calibration.max_tokens > 0 && calibration.max_tokens < n_ctx)
    fail(ErrorKind::usage, "calibration: at most ", calibration.max_tokens, " tokens are allowed, one sequence needs ", n_ctx);
  const Segment segment{calibration.text};
  std::vector<Token> ids = tokenizer.encode({&segment, 1}, tokenizer.add_bos());
  const size_t fitting = plan_calibration(source, n_ctx, ids.size(), calibration.ram_bytes).max_tokens;
  const size_t most = calibration.max_tokens > 0 ? std::min(calibration.max_tokens, fitting) : fitting;
  const size_t n = std::min(ids.size(), std::max(most, n_ctx)) / n_ctx;
  if (n == 0)
    fail(ErrorKind::usage, "calibration: the text has ", ids.size(), " tokens, one sequence needs ",
         n_ctx, "; give a longer text");
  ids.resize(n * n_ctx);
  if (tokenizer.add_bos() && tokenizer.bos())
    for (size_t i = 0; i < n; ++i) ids[i * n_ctx] = *tokenizer.bos();
  return ids;
}

// Only the vocabulary, as a file that the tokenizer reads.
class VocabularyFile {
 public:
  VocabularyFile(const fs::path& folder, const fs::path& beside, ConvertOptions options)
      : path_(beside) {
    path_ += ".vocabulary.part";
    options.vocab_only = true;
    options.target_bytes = 0;
    options.target_bpw = 0;
    options.overwrite = true;
    options.progress = {};
    options.notice = {};
    convert(folder, path_, options);
  }
  VocabularyFile(const VocabularyFile&) = delete;
  VocabularyFile& operator=(const VocabularyFile&) = delete;
  ~VocabularyFile() {
    std::error_code ignored;
    fs::remove(path_, ignored);
  }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

std::string settings_of(std::span<const Token> ids, const CalibrationOptions& calibration, const CalibrationSizes& sizes) {
  return concat("calibrated ", calibration.n_ctx, " ", sizes.moment_cols, " ", sizes.chunk_tokens, " ", sha256_of(std::as_bytes(ids)));
}

void write(const ConversionSource& source, std::span<const Token> ids, const fs::path& output,
           const ConvertOptions& options, const CalibrationOptions& calibration) {
  const CalibrationSizes sizes = plan_calibration(source, calibration.n_ctx, ids.size(), calibration.ram_bytes);
  CalibratedEncoder encoder(source, ids, calibration.n_ctx, sizes, options);
  PartOptions part = part_options(options, source.jobs, source.identity, settings_of(ids, calibration, sizes));
  part.needs_state = true;
  part.state_bytes = encoder.state_bytes();
  GgufWriter writer(output, std::move(part));
  for (const GgufKeyValue& kv : source.metadata) writer.set(kv.key, kv.value);
  for (const size_t i : encoder.write_order())
    writer.add_tensor(source.jobs[i].name, *source.jobs[i].format, source.jobs[i].shape);
  writer.begin();
  encoder.run(writer);
  writer.finish();
}

void check_options(const ConvertOptions& options) {
  if (!options.imatrix.empty())
    fail(ErrorKind::usage, "calibration: measures the inputs itself and leaves no use for the importance matrix ", options.imatrix, "; give one of the two");
}

void check_output(const fs::path& output, const ConvertOptions& options) {
  check_options(options);
  check_whole_name(output);
  check_overwrite(output, options);
  settle_unfinished(output, 1, options);
}

void check_worthwhile(const ConversionSource& source) {
  for (const TensorJob& job : source.jobs)
    if (has_second_order(*job.format)) return;
  fail(ErrorKind::usage, "calibration: nothing to fit: no tensor of this conversion is quantized");
}

std::vector<Token> ids_of(const GgufFile& vocabulary, const ConversionSource& source,
                          const ConvertOptions& options, const CalibrationOptions& calibration) {
  const NoticeFn quiet = [](const std::string&) {};
  const std::vector<Token> ids =
      sequences(Tokenizer::load(vocabulary, quiet), calibration, source);
  for (const Token id : ids)
    if (id < 0 || static_cast<uint32_t>(id) >= source.hparams.n_vocab)
      fail(ErrorKind::format, "calibration: the tokenizer gives id ", id, ", the model has ",
           source.hparams.n_vocab);
  if (options.notice)
    options.notice(
        concat("calibration: ", ids.size(), " tokens in sequences of ", calibration.n_ctx));
  return ids;
}

std::vector<Token> ids_of_folder(const fs::path& folder, const fs::path& beside, const ConversionSource& source,
                                 const ConvertOptions& options, const CalibrationOptions& calibration) {
  const VocabularyFile vocabulary(folder, beside, options);
  return ids_of(GgufFile::open(vocabulary.path()), source, options, calibration);
}

void record(ConversionSource& source, size_t n_tokens) {
  std::erase_if(source.metadata, [](const GgufKeyValue& kv) { return kv.key == kCalibratedKey; });
  source.metadata.push_back({std::string(kCalibratedKey), GgufValue::u32(static_cast<uint32_t>(n_tokens))});
}

// The file says that it was fitted; types that the text decides are chosen.
void prepare(ConversionSource& source, std::span<const Token> ids, const ConvertOptions& options, const CalibrationOptions& calibration) {
  record(source, ids.size());
  if (has_target(options))
    choose_types(options, measure_sensitivity(source, ids, calibration.n_ctx, calibration.ram_bytes, options), source);
}

}  // namespace

void convert_calibrated(const fs::path& folder, const fs::path& output,
                        const ConvertOptions& options, const CalibrationOptions& calibration) {
  check_output(output, options);
  ConversionSource source = open_folder(folder, options);
  check_worthwhile(source);
  const std::vector<Token> ids = ids_of_folder(folder, output, source, options, calibration);
  prepare(source, ids, options, calibration);
  write(source, ids, output, options, calibration);
}

void quantize_calibrated(const fs::path& input, const fs::path& output,
                         const ConvertOptions& options, const CalibrationOptions& calibration) {
  check_output(output, options);
  ConversionSource source = open_gguf(input, options);
  check_worthwhile(source);
  const std::vector<Token> ids = ids_of(*source.file, source, options, calibration);
  prepare(source, ids, options, calibration);
  write(source, ids, output, options, calibration);
}

ConvertPlan plan_convert_calibrated(const fs::path& folder, const ConvertOptions& options,
                                    const CalibrationOptions& calibration) {
  check_options(options);
  ConversionSource source = open_folder(folder, options);
  const fs::path beside = fs::temp_directory_path() / concat("duet-", ::getpid());
  std::vector<Token> ids;
  if (has_target(options)) ids = ids_of_folder(folder, beside, source, options, calibration);
  prepare(source, ids, options, calibration);
  return plan_parts(source.metadata, source.jobs, recipe_label(options), options);
}

ConvertPlan plan_quantize_calibrated(const fs::path& input, const ConvertOptions& options,
                                     const CalibrationOptions& calibration) {
  check_options(options);
  ConversionSource source = open_gguf(input, options);
  std::vector<Token> ids;
  if (has_target(options)) ids = ids_of(*source.file, source, options, calibration);
  prepare(source, ids, options, calibration);
  return plan_parts(source.metadata, source.jobs, recipe_label(options), options);
}

}  // namespace duet
