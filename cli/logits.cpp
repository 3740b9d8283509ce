// logits: the model's raw output for a token sequence, as a NumPy file.
#include <CLI/CLI.hpp>
#include <optional>

#include "base/error.h"
#include "base/mapped_file.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/model_options.h"
#include "cli/options.h"

namespace duet::cli {
namespace {

struct LogitsOptions {
  ModelOptions model;
  std::optional<std::string> ids, text, file;
  std::string output;
  bool last = false;
};

// Header of a .npy file (format 1.0) of little-endian float32 [rows, cols], C order.
std::string npy_header(size_t rows, size_t cols) {
  std::string dict =
      concat("{'descr': '<f4', 'fortran_order': False, 'shape': (", rows, ", ", cols, "), }");
  constexpr size_t kPrefix = 10;  // magic, version, u16 length; data start at a multiple of 64
  dict.resize((kPrefix + dict.size() + 1 + 63) / 64 * 64 - kPrefix - 1, ' ');
  dict += '\n';
  std::string header("\x93NUMPY\x01\x00", 8);
  header += static_cast<char>(dict.size() & 0xff);
  header += static_cast<char>(dict.size() >> 8);
  return header + dict;
}

// Known before the model is opened, which plans for as many. Ids need no vocabulary: files without a tokenizer will do.
std::vector<Token> input_ids(const LogitsOptions& options) {
  std::vector<Token> ids;
  if (options.ids) {
    ids = parse_ids(*options.ids);
  } else {
    const Segment segment{options.text ? *options.text : read_text(*options.file), false};
    const Tokenizer tokenizer = Tokenizer::load(GgufFile::open(model_file(options.model.path)), notices());
    ids = tokenizer.encode({&segment, 1}, tokenizer.add_bos());
  }
  if (ids.empty()) fail(ErrorKind::usage, "logits: the input has no tokens");
  return ids;
}

void run_logits(const LogitsOptions& options) {
  if (!options.ids && !options.text && !options.file)
    fail(ErrorKind::usage, "logits: give exactly one of --ids, --text, --file");
  const std::vector<Token> ids = input_ids(options);
  ModelOptions model = options.model;
  if (model.n_ctx == 0) model.n_ctx = static_cast<uint32_t>(ids.size());
  const Engine engine = open_engine(model);
  Session session = open_session(engine, model);
  const size_t n_vocab = engine.info().hparams.n_vocab, n_rows = options.last ? 1 : ids.size();
  const std::string header = npy_header(n_rows, n_vocab);
  OutputFile output(options.output, header.size() + n_rows * n_vocab * sizeof(float));
  output.write(header);
  if (options.last) {
    session.append(ids);
    output.write(std::as_bytes(session.logits()));
  } else {
    ProgressBar bar("logits", ProgressBar::Unit::tokens);
    session.append_all_logits(ids, [&](size_t first, size_t n, std::span<const float> logits) {
      output.write(std::as_bytes(logits));
      bar.update(first + n, ids.size());
    });
  }
  output.commit();
}

}  // namespace

void add_logits(CLI::App& app) {
  CLI::App& command = *app.add_subcommand(
      "logits", "Write the logits of every position as a .npy file, float32 [n_tokens, n_vocab]");
  auto options = std::make_shared<LogitsOptions>();
  options->model.kv_type = KvType::f32;
  add_model_options(command, options->model, "as long as the input");
  command.add_option("--ids", options->ids, "Token ids, taken as they are: 1,2,3");
  command.add_option("--text", options->text, "Text; BOS is put first where the model asks for it")->excludes("--ids");
  command.add_option("--file", options->file, "File of text, likewise; - is standard input")->excludes("--ids", "--text");
  command.add_option("-o,--output", options->output, "The .npy file to write")->required();
  command.add_flag("--last", options->last, "Only the last position's row");
  add_environment(command);
  command.callback([options] { run_logits(*options); });
}

}  // namespace duet::cli
