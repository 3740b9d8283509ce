#include "runtime/calibration.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/parallel.h"

namespace duet {

void ImatrixCollector::add(const ProductInput& in) {
  if (in.kind == TensorKind::output && !output_) return;
  const bool is_expert = in.expert >= 0;
  const size_t n_matrices = is_expert ? n_expert_ : 1, matrix = is_expert ? static_cast<size_t>(in.expert) : 0;
  auto it = sums_.find(in.tensor);
  if (it == sums_.end()) it = sums_.emplace(in.tensor, Sums{std::vector<double>(n_matrices * in.cols), std::vector<uint64_t>(n_matrices)}).first;
  Sums& sums = it->second;
  sums.rows[matrix] += in.n_rows;
  double* squares = sums.squares.data() + matrix * in.cols;
  parallel_for(n_threads_, in.cols, 256, [&](size_t begin, size_t end) {
    for (size_t r = 0; r < in.n_rows; ++r) {
      const float* row = in.rows + r * in.cols;
      for (size_t c = begin; c < end; ++c) squares[c] += double{row[c]} * double{row[c]};
    }
  });
}

Imatrix ImatrixCollector::result() const {
  Imatrix out;
  for (const auto& [name, sums] : sums_) {
    ImatrixEntry& entry = out.entries[name];
    entry.sums.assign(sums.squares.begin(), sums.squares.end());
    entry.counts.assign(sums.rows.begin(), sums.rows.end());
    if (!std::all_of(entry.sums.begin(), entry.sums.end(), [](float v) { return std::isfinite(v); }))
      fail(ErrorKind::format, "the inputs of '", name, "' are not finite: the model or the file is damaged");
  }
  return out;
}

Imatrix collect_imatrix(const Engine& engine, std::span<const Token> chunks, uint32_t n_ctx, const ImatrixOptions& options) {
  ImatrixCollector collector(engine.info().hparams, options.output, engine.info().n_threads);
  Session session = engine.new_session({.n_ctx = n_ctx, .n_batch = options.n_batch, .kv_type = options.kv_type, .cancel = options.cancel, .routing = {},
                                        .products = [&](const ProductInput& in) { collector.add(in); }});
  const size_t n_chunks = chunks.size() / n_ctx;
  for (size_t i = 0; i < n_chunks; ++i) {
    session.truncate(0);
    const auto chunk = chunks.subspan(i * n_ctx, n_ctx);
    if (options.output) session.append_all_logits(chunk, [](size_t, size_t, std::span<const float>) {});
    else session.append(chunk);
    if (options.progress) options.progress(i + 1, n_chunks);
  }
  Imatrix out = collector.result();
  out.n_chunks = static_cast<uint32_t>(n_chunks);
  out.chunk_size = n_ctx;
  return out;
}

std::vector<uint64_t> expert_coverage(const Imatrix& imatrix, const HParams& hparams, uint32_t layer) {
  const auto it = imatrix.entries.find(tensor_name(TensorKind::ffn_gate_exps, static_cast<int>(layer)));
  if (it == imatrix.entries.end() || it->second.counts.size() != hparams.n_expert) return {};
  std::vector<uint64_t> out;
  for (const float n : it->second.counts) out.push_back(static_cast<uint64_t>(n));
  return out;
}

}  // namespace duet
