#include "calibrate/sensitivity.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "base/error.h"
#include "base/parallel.h"
#include "calibrate/source_model.h"
#include "converters/target.h"
#include "runtime/layer_eval.h"

namespace duet {
namespace {

constexpr uint64_t kRowBytes = uint64_t{1} << 29;  // without a limit; twice: rows and what experts add to them
constexpr size_t kLongest = 256, kShortest = 128;  // tokens of a sequence
constexpr size_t kFewestTokens = 512;              // in all, where the text has them
constexpr size_t kChunk = 1024;                    // rows looked at together
// So that a tensor whose errors were not seen at all is still not free.
constexpr double kLeast = 1e-9;
// Relative error below which a type is not coarse for a tensor: its values lie on that grid already.
constexpr double kFine = 1e-3;

// A type whose errors are looked at, and how large they are.
struct Coarse {
  const Format* format = nullptr;
  double error = 0;
};

// Large enough to stand out from rounding, small enough to be proportional. A source that has been rounded to the first
// type shows nothing with it.
Coarse coarse_type(const TensorJob& job, int n_threads) {
  constexpr DType kWide[] = {DType::Q3_K, DType::Q2_K}, kNarrow[] = {DType::Q4_0, DType::IQ4_NL};
  Coarse best;
  for (const DType type : job.shape.back() % 256 == 0 ? kWide : kNarrow) {
    const Format& format = format_of(type);
    const double error = relative_error(job, format, n_threads);
    if (best.format == nullptr || error > best.error) best = {&format, error};
    if (best.error >= kFine) break;
  }
  return best;
}

// One expert's matrix (0: of a tensor without experts), coarsely encoded, as floats.
SourceMatrix coarse_matrix(const TensorJob& job, const Format& format, size_t expert, int n_threads) {
  const size_t rows = matrix_rows(job), cols = job.shape.back();
  SourceMatrix m;
  m.values = SourceModel::floats(job, expert * rows, rows);
  parallel_for(n_threads, rows, 16, [&](size_t begin, size_t end) {
    std::vector<std::byte> bytes(row_bytes(format, cols));
    for (size_t r = begin; r < end; ++r) {
      format.encode_row(m.values.data() + r * cols, bytes.data(), cols, nullptr);
      format.decode_row(bytes.data(), m.values.data() + r * cols, cols);
    }
  });
  m.weight = {.format = &format_of(DType::F32), .rows = rows, .cols = cols};
  m.weight.row_bytes = cols * sizeof(float);
  m.weight.data = reinterpret_cast<const std::byte*>(m.values.data());
  return m;
}

// In place.
void to_log_probabilities(float* row, size_t n) {
  const float most = *std::max_element(row, row + n);
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += std::exp(double{row[i]} - double{most});
  const auto shift = static_cast<float>(double{most} + std::log(sum));
  for (size_t i = 0; i < n; ++i) row[i] -= shift;
}

double divergence(const float* log_p, const float* log_q, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; ++i) {
    const double d = double{log_p[i]} - double{log_q[i]};
    sum += std::exp(double{log_p[i]}) * d;
  }
  return sum;
}

class Meter {
 public:
  Meter(const ConversionSource& source, std::span<const Token> ids, size_t n_ctx, uint64_t ram_bytes,
        const ConvertOptions& options)
      : source_(source),
        hparams_(source.hparams),
        options_(options),
        model_(source),
        free_(free_types(source, options)),
        n_embd_(source.hparams.n_embd),
        n_seq_tokens_(std::min(n_ctx, kLongest)),
        rope_factors_(model_.has(TensorKind::rope_freqs, -1) ? model_.vector(TensorKind::rope_freqs, -1)
                                                             : std::vector<float>{}),
        eval_(hparams_, rope_factors_, thread_count(options.n_threads), n_seq_tokens_) {
    choose_tokens(ids, n_ctx, ram_bytes > 0 ? ram_bytes / 4 : kRowBytes);
    for (size_t i = 0; i < source.jobs.size(); ++i)
      coarse_.push_back(free_[i] ? coarse_type(source.jobs[i], eval_.n_threads()) : Coarse{});
  }

  std::vector<double> run() {
    kld_.assign(source_.jobs.size(), 0.0);
    for (size_t i = 0; i < rounds_.size(); ++i) run_round(i);
    return sensitivities();
  }

 private:
  void run_round(size_t round) {
    ids_ = rounds_[round];
    branches_.clear();
    rows_.clear();
    begin();
    const size_t n_layer = hparams_.n_layer, n_all = rounds_.size() * n_layer;
    for (size_t layer = 0; layer < n_layer; ++layer) {
      check_cancel();
      const size_t done = round * n_layer + layer;
      if (options_.progress) options_.progress({done, n_all, done, n_all, "sensitivity"});
      attention(static_cast<int>(layer));
      experts(static_cast<int>(layer));
    }
    finish();
  }

  // Tokens of a copy that is all source but for one tensor (job; the original: none).
  struct Branch {
    size_t job;
    double kld = 0;
  };

  // Sequences spread over the text, as long as rows may be kept for and at once as many; in several rounds where these are few.
  void choose_tokens(std::span<const Token> ids, size_t n_ctx, uint64_t row_bytes) {
    const auto n_branches = static_cast<size_t>(std::count(free_.begin(), free_.end(), true)) + 1;
    const size_t fitting = row_bytes / (n_branches * n_embd_ * sizeof(float));
    const size_t most = std::min(fitting, kSensitivityTokens);
    if (most < n_seq_tokens_) n_seq_tokens_ = std::min(n_seq_tokens_, std::max(most, kShortest));
    const size_t n_all = ids.size() / n_ctx, at_once = std::clamp<size_t>(most / n_seq_tokens_, 1, n_all);
    const size_t tokens_at_once = at_once * n_seq_tokens_, n_rounds = (kFewestTokens + tokens_at_once - 1) / tokens_at_once;
    const size_t n = std::min(n_rounds * at_once, n_all);
    for (size_t i = 0; i < n; ++i) {
      if (i % at_once == 0) rounds_.emplace_back();
      const auto first = ids.begin() + static_cast<ptrdiff_t>(i * n_all / n * n_ctx);
      rounds_.back().insert(rounds_.back().end(), first, first + static_cast<ptrdiff_t>(n_seq_tokens_));
    }
    n_measured_ = n * n_seq_tokens_;
    if (options_.notice)
      options_.notice(concat("calibration: what errors in each tensor cost is measured on ", n_measured_, " tokens of ", n,
                             n > 1 ? " sequences" : " sequence", rounds_.size() > 1 ? concat(", in ", rounds_.size(), " passes over the model") : ""));
  }

  size_t n_tokens() const { return ids_.size(); }  // of a round
  SourceMatrix coarsely(TensorKind kind, int layer, size_t expert) const {
    const size_t job = model_.job_index(kind, layer);
    return coarse_matrix(source_.jobs[job], *coarse_[job].format, expert, eval_.n_threads());
  }
  bool is_free(TensorKind kind, int layer) const { return model_.has(kind, layer) && free_[model_.job_index(kind, layer)]; }

  // ---- rows: [branches * tokens, n_embd], the original's first -----------------------------------
  std::vector<float> original() const {
    return {rows_.begin(), rows_.begin() + static_cast<ptrdiff_t>(n_tokens() * n_embd_)};
  }
  void branch_off(TensorKind kind, int layer, const std::vector<float>& rows) {
    branches_.push_back({model_.job_index(kind, layer)});
    rows_.insert(rows_.end(), rows.begin(), rows.end());
  }

  void embed(const SourceMatrix& table, std::vector<float>& out) const {
    std::vector<float> row(n_embd_);
    for (const Token id : ids_) {
      table.weight.format->decode_row(table.weight.data + static_cast<size_t>(id) * table.weight.row_bytes, row.data(), n_embd_);
      out.insert(out.end(), row.begin(), row.end());
    }
  }

  void begin() {
    const TensorJob& embedding = model_.job(TensorKind::token_embd, -1);
    branches_.push_back({source_.jobs.size()});
    embed(model_.matrix(embedding, 0), rows_);
    if (!is_free(TensorKind::token_embd, -1)) return;
    std::vector<float> coarse;
    embed(coarsely(TensorKind::token_embd, -1, 0), coarse);
    branch_off(TensorKind::token_embd, -1, coarse);
  }

  // ---- layers ------------------------------------------------------------------------------------
  void attention(int index) {
    constexpr TensorKind kKinds[] = {TensorKind::attn_q, TensorKind::attn_k, TensorKind::attn_v, TensorKind::attn_output};
    Layer layer;
    layer.attn_norm = model_.vector(TensorKind::attn_norm, index);
    Weight* places[] = {&layer.attn_q, &layer.attn_k, &layer.attn_v, &layer.attn_output};
    SourceMatrix matrices[4];
    for (size_t i = 0; i < 4; ++i) {
      matrices[i] = model_.matrix(model_.job(kKinds[i], index), 0);
      *places[i] = matrices[i].weight;
    }
    const std::vector<float> before = original();
    attend(layer, rows_);
    for (size_t i = 0; i < 4; ++i) {
      if (!is_free(kKinds[i], index)) continue;
      const SourceMatrix coarse = coarsely(kKinds[i], index, 0);
      std::vector<float> rows = before;
      *places[i] = coarse.weight;
      attend(layer, rows);
      *places[i] = matrices[i].weight;
      branch_off(kKinds[i], index, rows);
    }
  }

  // rows, whole sequences, += attention over them
  void attend(const Layer& layer, std::vector<float>& rows) {
    const size_t width = size_t{hparams_.n_head} * hparams_.head_dim, n = n_seq_tokens_;
    std::vector<float> heads(n * width), added(n * n_embd_);
    for (size_t first = 0; first < rows.size(); first += n * n_embd_) {
      float* at = rows.data() + first;
      eval_.heads(layer, at, n, heads.data());
      eval_.multiply(layer.attn_output, heads.data(), n, added.data());
      for (size_t i = 0; i < added.size(); ++i) at[i] += added[i];
    }
  }

  // Rows of the layer's experts: those that see all matrices as they are, then, for gate, up and down, a copy of the
  // original's that sees this one coarsely.
  void experts(int index) {
    const bool dense = hparams_.n_expert == 0;
    const TensorKind kinds[] = {dense ? TensorKind::ffn_gate : TensorKind::ffn_gate_exps,
                                dense ? TensorKind::ffn_up : TensorKind::ffn_up_exps,
                                dense ? TensorKind::ffn_down : TensorKind::ffn_down_exps};
    const size_t n_plain = rows_.size() / n_embd_;
    const std::vector<float> before = original();
    for (const TensorKind kind : kinds)
      if (is_free(kind, index)) branch_off(kind, index, before);
    Layer layer;
    layer.ffn_norm = model_.vector(TensorKind::ffn_norm, index);
    if (!dense) layer.router = SourceModel::floats(model_.job(TensorKind::ffn_gate_inp, index), 0, hparams_.n_expert);
    const Routes routes = route(layer);
    std::vector<float> added(rows_.size());
    for (size_t e = 0; e < routes.size(); ++e) {
      check_cancel();
      SourceMatrix m[3];
      for (size_t i = 0; i < 3; ++i) m[i] = model_.matrix(model_.job(kinds[i], index), e);
      Expert expert{m[0].weight, m[1].weight, m[2].weight};
      add_expert(layer, expert, routes[e], 0, n_plain, added);
      Weight* places[] = {&expert.gate, &expert.up, &expert.down};
      size_t first = n_plain;
      for (size_t i = 0; i < 3; ++i) {
        if (!is_free(kinds[i], index)) continue;
        const SourceMatrix coarse = coarsely(kinds[i], index, e);
        *places[i] = coarse.weight;
        add_expert(layer, expert, routes[e], first, first + n_tokens(), added);
        *places[i] = m[i].weight;
        first += n_tokens();
      }
    }
    for (size_t i = 0; i < rows_.size(); ++i) rows_[i] += added[i];
  }

  struct Routed {
    size_t row;
    float weight;
  };
  using Routes = std::vector<std::vector<Routed>>;  // per expert, ascending rows

  Routes route(const Layer& layer) const {
    const size_t n_used = eval_.n_used(), n_rows = rows_.size() / n_embd_;
    Routes routes(std::max<size_t>(hparams_.n_expert, 1));
    std::vector<float> x(kChunk * n_embd_), weights(kChunk * n_used);
    std::vector<int32_t> chosen(kChunk * n_used);
    for (size_t first = 0; first < n_rows; first += kChunk) {
      const size_t n = std::min(kChunk, n_rows - first);
      eval_.norm(layer.ffn_norm, rows_.data() + first * n_embd_, n, x.data());
      eval_.route(layer, x.data(), n, chosen.data(), weights.data());
      for (size_t i = 0; i < n * n_used; ++i)
        routes[static_cast<size_t>(chosen[i])].push_back({first + i / n_used, weights[i]});
    }
    return routes;
  }

  // added += what the expert gives to those of its rows that are in [begin, end)
  void add_expert(const Layer& layer, const Expert& expert, const std::vector<Routed>& routed, size_t begin, size_t end,
                  std::vector<float>& added) const {
    const auto before = [](const Routed& r, size_t row) { return r.row < row; };
    auto at = std::lower_bound(routed.begin(), routed.end(), begin, before);
    const auto stop = std::lower_bound(at, routed.end(), end, before);
    std::vector<float> x(kChunk * n_embd_), hidden(kChunk * hparams_.n_ff);
    while (at != stop) {
      const auto n = std::min<size_t>(kChunk, static_cast<size_t>(stop - at));
      for (size_t i = 0; i < n; ++i) std::copy_n(rows_.data() + at[static_cast<ptrdiff_t>(i)].row * n_embd_, n_embd_, x.data() + i * n_embd_);
      eval_.norm(layer.ffn_norm, x.data(), n, x.data());
      eval_.hidden(expert, x.data(), n, hidden.data());
      eval_.multiply(expert.down, hidden.data(), n, x.data());
      for (size_t i = 0; i < n; ++i, ++at)
        for (size_t c = 0; c < n_embd_; ++c) added[at->row * n_embd_ + c] += at->weight * x[i * n_embd_ + c];
    }
  }

  // ---- head --------------------------------------------------------------------------------------
  void finish() {
    const bool tied = !model_.has(TensorKind::output, -1);
    const TensorKind head_kind = tied ? TensorKind::token_embd : TensorKind::output;
    const std::vector<float> norm = model_.vector(TensorKind::output_norm, -1);
    const TensorJob& job = model_.job(head_kind, -1);
    const SourceMatrix head = model_.matrix(job, 0);
    SourceMatrix coarse;
    if (is_free(head_kind, -1)) {
      coarse = coarsely(head_kind, -1, 0);
      if (!tied) branch_off(head_kind, -1, original());
    }
    for (size_t t = 0; t < n_tokens(); t += n_seq_tokens_) compare(norm, head, coarse, model_.job_index(head_kind, -1), t);
    for (size_t b = 1; b < branches_.size(); ++b) kld_[branches_[b].job] += branches_[b].kld;
  }

  // Where no type leaves an error that could be looked at: the largest of all, so that the tensor is not taken for free.
  std::vector<double> sensitivities() const {
    std::vector<double> out(source_.jobs.size(), 0.0);
    for (size_t i = 0; i < out.size(); ++i) {
      if (!std::isfinite(kld_[i]))
        fail(ErrorKind::format, "tensor '", source_.jobs[i].name, "': what the model predicts with errors in it is not finite; the source is damaged or its values are far too large");
      const double kld = std::max(kld_[i] / static_cast<double>(n_measured_), kLeast);
      if (free_[i] && coarse_[i].error > 0) out[i] = kld / coarse_[i].error;
    }
    const double most = out.empty() ? 0 : *std::max_element(out.begin(), out.end());
    for (size_t i = 0; i < out.size(); ++i)
      if (free_[i] && !(coarse_[i].error > 0)) out[i] = std::max(most, kLeast);
    return out;
  }

  // One sequence of all branches. head_job: the one that `coarse` stands for.
  void compare(const std::vector<float>& norm, const SourceMatrix& head, const SourceMatrix& coarse, size_t head_job, size_t t) {
    check_cancel();
    const size_t n = n_seq_tokens_, n_vocab = head.weight.rows;
    std::vector<float> x(n * n_embd_), p(n * n_vocab), q(p.size());
    std::vector<double> kld(n);
    for (size_t b = 0; b < branches_.size(); ++b) {
      std::vector<float>& logits = b == 0 ? p : q;
      const SourceMatrix& used = branches_[b].job == head_job ? coarse : head;
      eval_.norm(norm, rows_.data() + (b * n_tokens() + t) * n_embd_, n, x.data());
      eval_.multiply(used.weight, x.data(), n, logits.data());
      parallel_for(eval_.n_threads(), n, 4, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
          to_log_probabilities(logits.data() + i * n_vocab, n_vocab);
          kld[i] = divergence(p.data() + i * n_vocab, logits.data() + i * n_vocab, n_vocab);
        }
      });
      for (const double v : kld) branches_[b].kld += v;
    }
  }

  void check_cancel() const {
    if (options_.cancel != nullptr && options_.cancel->load()) fail(ErrorKind::cancelled, "interrupted");
  }

  const ConversionSource& source_;
  const HParams& hparams_;
  const ConvertOptions& options_;
  SourceModel model_;
  std::vector<bool> free_;  // per job
  size_t n_embd_, n_seq_tokens_;
  std::vector<float> rope_factors_;
  LayerEval eval_;
  std::vector<Coarse> coarse_;  // per job
  std::vector<double> kld_;     // the same, over all tokens
  std::vector<std::vector<Token>> rounds_;
  size_t n_measured_ = 0;       // tokens of all rounds
  std::vector<Token> ids_;      // of this round
  std::vector<Branch> branches_;
  std::vector<float> rows_;
};

}  // namespace

std::vector<double> measure_sensitivity(const ConversionSource& source, std::span<const Token> ids, size_t n_ctx,
                                        uint64_t ram_bytes, const ConvertOptions& options) {
  return Meter(source, ids, n_ctx, ram_bytes, options).run();
}

}  // namespace duet
