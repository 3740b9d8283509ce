#include "calibrate/encoder.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "base/parallel.h"
#include "quant/second_order.h"

namespace duet {
namespace {

// Matrices of a layer, in the order in which they are encoded.
enum LayerPlace : size_t { kQ, kK, kV, kOutput, kGate, kUp, kDown, kPlaces };

TensorKind kind_of(const HParams& hparams, LayerPlace place) {
  const bool dense = hparams.n_expert == 0;
  switch (place) {
    case kQ:
      return TensorKind::attn_q;
    case kK:
      return TensorKind::attn_k;
    case kV:
      return TensorKind::attn_v;
    case kOutput:
      return TensorKind::attn_output;
    case kGate:
      return dense ? TensorKind::ffn_gate : TensorKind::ffn_gate_exps;
    case kUp:
      return dense ? TensorKind::ffn_up : TensorKind::ffn_up_exps;
    default:
      return dense ? TensorKind::ffn_down : TensorKind::ffn_down_exps;
  }
}

Weight weight_of(const TensorJob& job, size_t expert, const std::vector<std::byte>& bytes) {
  Weight w{.format = job.format, .rows = matrix_rows(job), .cols = job.shape.back()};
  w.row_bytes = row_bytes(*job.format, w.cols);
  w.data = bytes.data() + expert * w.rows * w.row_bytes;
  return w;
}

void scale_rows(std::vector<float>& x, std::span<const float> weights) {
  const size_t cols = x.size() / weights.size();
  for (size_t i = 0; i < x.size(); ++i) x[i] *= weights[i / cols];
}

void add(std::vector<float>& to, const std::vector<float>& from) {
  for (size_t i = 0; i < to.size(); ++i) to[i] += from[i];
}

}  // namespace

CalibratedEncoder::CalibratedEncoder(const ConversionSource& source, std::span<const Token> ids,
                                     size_t n_ctx, const CalibrationSizes& sizes,
                                     const ConvertOptions& options)
    : source_(source),
      hparams_(source.hparams),
      model_(source),
      ids_(ids),
      n_ctx_(n_ctx),
      n_embd_(source.hparams.n_embd),
      sizes_(sizes),
      options_(options),
      rope_factors_(model_.has(TensorKind::rope_freqs, -1)
                        ? model_.vector(TensorKind::rope_freqs, -1)
                        : std::vector<float>{}),
      eval_(hparams_, rope_factors_, thread_count(options.n_threads), n_ctx) {
  DUET_ASSERT(!ids.empty() && ids.size() % n_ctx == 0 && sizes.chunk_tokens > 0);
  plan_order();
  for (const TensorJob& job : source.jobs) progress_.total_bytes += source_bytes(job);
  progress_.n_tensors = source.jobs.size();
}

void CalibratedEncoder::plan_order() {
  std::vector<int> stage(source_.jobs.size(), -1);
  for (const TensorSpec& spec : tensor_table(hparams_)) {
    if (!model_.has(spec.kind, spec.layer)) continue;
    const bool head = spec.kind == TensorKind::output;
    stage[model_.job_index(spec.kind, spec.layer)] =
        head ? static_cast<int>(hparams_.n_layer) : spec.layer;
  }
  for (size_t i = 0; i < source_.jobs.size(); ++i) order_.push_back(i);
  std::stable_sort(order_.begin(), order_.end(),
                   [&](size_t a, size_t b) { return stage[a] < stage[b]; });
}

void CalibratedEncoder::run(GgufWriter& writer) {
  writer_ = &writer;
  const int n_layer = static_cast<int>(hparams_.n_layer);
  int layer = restore_state();
  if (layer == 0) begin_streams();
  for (; layer < n_layer; ++layer) {
    run_layer(layer);
    save_state(layer + 1);
  }
  encode_head();
  report_few();
}

// ---- going on with an interrupted run ------------------------------------------------------------

namespace {

// Before the two streams.
struct StateHead {
  uint64_t next_layer, n_few, n_unseen;
};

template <class T>
std::span<const std::byte> bytes_of(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}

}  // namespace

uint64_t CalibratedEncoder::state_bytes() const {
  return sizeof(StateHead) + 2 * n_tokens() * n_embd_ * sizeof(float);
}

void CalibratedEncoder::save_state(int next_layer) {
  const std::vector<StateHead> head = {{static_cast<uint64_t>(next_layer), n_few_, n_unseen_}};
  writer_->save_state({bytes_of(head), bytes_of(source_stream_), bytes_of(encoded_stream_)});
}

int CalibratedEncoder::restore_state() {
  const std::vector<std::byte> state = writer_->take_state();
  if (state.size() != state_bytes()) return 0;
  StateHead head{};
  std::memcpy(&head, state.data(), sizeof head);
  if (head.next_layer == 0 || head.next_layer > hparams_.n_layer) return 0;
  n_few_ = head.n_few;
  n_unseen_ = head.n_unseen;
  source_stream_.resize(n_tokens() * n_embd_);
  encoded_stream_.resize(n_tokens() * n_embd_);
  const size_t n = source_stream_.size() * sizeof(float);
  std::memcpy(source_stream_.data(), state.data() + sizeof head, n);
  std::memcpy(encoded_stream_.data(), state.data() + sizeof head + n, n);
  pass_tensors(static_cast<int>(head.next_layer));
  return static_cast<int>(head.next_layer);
}

// All that come before those of this layer.
void CalibratedEncoder::pass_tensors(int next_layer) {
  for (const size_t i : order_) {
    const TensorJob& job = source_.jobs[i];
    if (model_.layer_of(i) >= next_layer || model_.is(i, TensorKind::output)) break;
    writer_->pass(output_bytes(job));
    progress_.done_bytes += source_bytes(job);
    ++progress_.tensor_index;
  }
  show(concat("layer ", next_layer));
}

// All tensors that are of no layer, but the head; the embedding begins the streams.
void CalibratedEncoder::begin_streams() {
  const size_t embedding = model_.job_index(TensorKind::token_embd, -1);
  for (const size_t i : order_) {
    const TensorJob& job = source_.jobs[i];
    if (model_.layer_of(i) >= 0 || model_.is(i, TensorKind::output)) break;
    const std::vector<std::byte> bytes = encoded_plainly(job);
    if (i == embedding) {
      source_stream_.reserve(n_tokens() * n_embd_);
      encoded_stream_.resize(n_tokens() * n_embd_);
      for (size_t t = 0; t < n_tokens(); ++t) {
        const auto id = static_cast<size_t>(ids_[t]);
        const std::vector<float> row = SourceModel::floats(job, id, 1);
        source_stream_.insert(source_stream_.end(), row.begin(), row.end());
        job.format->decode_row(bytes.data() + id * row_bytes(*job.format, n_embd_),
                               encoded_stream_.data() + t * n_embd_, n_embd_);
      }
    }
    finish_tensor(i, bytes);
  }
}

void CalibratedEncoder::run_layer(int index) {
  LayerState s;
  s.index = index;
  s.bytes.resize(kPlaces);
  s.source.attn_norm = s.encoded.attn_norm = model_.vector(TensorKind::attn_norm, index);
  s.source.ffn_norm = s.encoded.ffn_norm = model_.vector(TensorKind::ffn_norm, index);
  if (hparams_.n_expert > 0)
    s.source.router = s.encoded.router =
        SourceModel::floats(model_.job(TensorKind::ffn_gate_inp, index), 0, hparams_.n_expert);
  encode_attention(s);
  route(s, encoded_stream_);
  count_tokens(s);
  s.added.assign(n_tokens() * n_embd_, 0.0f);
  for (size_t e = 0; e < s.routed.size(); ++e) encode_expert(s, e);
  add(encoded_stream_, s.added);
  run_source_experts(s);
  add(source_stream_, s.added);
  write_layer(s);
}

// Whether moments of their inputs are of use.
bool CalibratedEncoder::fits_any(const LayerState& s, std::initializer_list<size_t> places) const {
  return std::any_of(places.begin(), places.end(), [&](size_t place) {
    return has_second_order(*model_.job(kind_of(hparams_, static_cast<LayerPlace>(place)), s.index).format);
  });
}

// ---- attention ---------------------------------------------------------------------------------

void CalibratedEncoder::encode_attention(LayerState& s) {
  show(concat("layer ", s.index, ", attention"));
  const SourceMatrix q = model_.matrix(model_.job(TensorKind::attn_q, s.index), 0),
                     k = model_.matrix(model_.job(TensorKind::attn_k, s.index), 0),
                     v = model_.matrix(model_.job(TensorKind::attn_v, s.index), 0),
                     output = model_.matrix(model_.job(TensorKind::attn_output, s.index), 0);
  s.source.attn_q = q.weight;
  s.source.attn_k = k.weight;
  s.source.attn_v = v.weight;
  s.source.attn_output = s.encoded.attn_output = output.weight;  // the latter until it is known
  Weight* encoded[] = {&s.encoded.attn_q, &s.encoded.attn_k, &s.encoded.attn_v};
  {
    Moments inputs = attention_inputs(s);
    for (const LayerPlace place : {kQ, kK, kV}) {
      const TensorJob& job = model_.job(kind_of(hparams_, place), s.index);
      encode(job, 0, inputs, s.bytes[place]);
      *encoded[place] = weight_of(job, 0, s.bytes[place]);
    }
  }
  encode_output_projection(s);
}

Moments CalibratedEncoder::attention_inputs(const LayerState& s) const {
  Moments inputs(n_embd_, moment_cols(n_embd_), 0);
  if (!fits_any(s, {kQ, kK, kV})) return inputs;
  std::vector<float> source(sizes_.chunk_tokens * n_embd_), encoded(source.size());
  in_chunks(n_tokens(), [&](size_t t, size_t n) {
    eval_.norm(s.source.attn_norm, source_stream_.data() + t * n_embd_, n, source.data());
    eval_.norm(s.source.attn_norm, encoded_stream_.data() + t * n_embd_, n, encoded.data());
    inputs.add(eval_, encoded.data(), source.data(), nullptr, n);
  });
  return inputs;
}

// The projection, which also makes up for what the residual stream has drifted so far; then both
// streams go through it.
void CalibratedEncoder::encode_output_projection(LayerState& s) {
  const size_t width = size_t{hparams_.n_head} * hparams_.head_dim;
  std::vector<float> source(n_tokens() * width), encoded(source.size());
  for (size_t t = 0; t < n_tokens(); t += n_ctx_) {
    eval_.heads(s.source, source_stream_.data() + t * n_embd_, n_ctx_, source.data() + t * width);
    eval_.heads(s.encoded, encoded_stream_.data() + t * n_embd_, n_ctx_,
                encoded.data() + t * width);
  }
  Moments inputs(width, moment_cols(width), n_embd_);
  std::vector<float> a(sizes_.chunk_tokens * n_embd_), b(a.size());
  if (fits_any(s, {kOutput})) in_chunks(n_tokens(), [&](size_t t, size_t n) {
    for (size_t i = 0; i < n * n_embd_; ++i)
      a[i] = source_stream_[t * n_embd_ + i] - encoded_stream_[t * n_embd_ + i];
    inputs.add(eval_, encoded.data() + t * width, source.data() + t * width, a.data(), n);
  });
  const TensorJob& job = model_.job(TensorKind::attn_output, s.index);
  encode(job, 0, inputs, s.bytes[kOutput]);
  s.encoded.attn_output = weight_of(job, 0, s.bytes[kOutput]);
  in_chunks(n_tokens(), [&](size_t t, size_t n) {
    eval_.multiply(s.source.attn_output, source.data() + t * width, n, a.data());
    eval_.multiply(s.encoded.attn_output, encoded.data() + t * width, n, b.data());
    for (size_t i = 0; i < n * n_embd_; ++i) {
      source_stream_[t * n_embd_ + i] += a[i];
      encoded_stream_[t * n_embd_ + i] += b[i];
    }
  });
}

// ---- experts -----------------------------------------------------------------------------------

// Which tokens of a stream each expert sees.
void CalibratedEncoder::route(LayerState& s, const std::vector<float>& stream) const {
  const size_t n_used = eval_.n_used();
  s.routed.assign(std::max<size_t>(hparams_.n_expert, 1), {});
  std::vector<float> x(sizes_.chunk_tokens * n_embd_), weights(sizes_.chunk_tokens * n_used);
  std::vector<int32_t> chosen(sizes_.chunk_tokens * n_used);
  in_chunks(n_tokens(), [&](size_t t, size_t n) {
    eval_.norm(s.source.ffn_norm, stream.data() + t * n_embd_, n, x.data());
    eval_.route(s.source, x.data(), n, chosen.data(), weights.data());
    for (size_t i = 0; i < n * n_used; ++i) {
      Routed& routed = s.routed[static_cast<size_t>(chosen[i])];
      routed.tokens.push_back(static_cast<int32_t>(t + i / n_used));
      routed.weights.push_back(weights[i]);
    }
  });
}

void CalibratedEncoder::encode_expert(LayerState& s, size_t e) {
  show(concat("layer ", s.index, ", expert ", e));
  const TensorJob &gate = model_.job(kind_of(hparams_, kGate), s.index),
                  &up = model_.job(kind_of(hparams_, kUp), s.index),
                  &down = model_.job(kind_of(hparams_, kDown), s.index);
  const SourceMatrix source_gate = model_.matrix(gate, e), source_up = model_.matrix(up, e);
  const bool unseen = s.routed[e].tokens.empty();
  if (unseen) s.routed[e] = stand_in();
  {
    Moments inputs = expert_inputs(s, e);
    encode(gate, e, inputs, s.bytes[kGate]);
    encode(up, e, inputs, s.bytes[kUp]);
  }
  Expert encoded{weight_of(gate, e, s.bytes[kGate]), weight_of(up, e, s.bytes[kUp]), {}};
  Moments hidden = hidden_inputs(s, e, {source_gate.weight, source_up.weight, {}}, encoded);
  encode(down, e, hidden, s.bytes[kDown]);
  encoded.down = weight_of(down, e, s.bytes[kDown]);
  if (unseen)
    s.routed[e] = {};
  else
    add_expert(s, e, encoded, encoded_stream_);
}

// Tokens from all over the text, one chunk at most.
CalibratedEncoder::Routed CalibratedEncoder::stand_in() const {
  Routed routed;
  routed.stand_in = true;
  const size_t n = std::min(sizes_.chunk_tokens, n_tokens());
  for (size_t i = 0; i < n; ++i) routed.tokens.push_back(static_cast<int32_t>(i * n_tokens() / n));
  routed.weights.assign(n, 1.0f);
  return routed;
}

template <class Body>
void CalibratedEncoder::for_chunks(const LayerState& s, size_t e, const Body& body) const {
  const Routed& routed = s.routed[e];
  in_chunks(routed.tokens.size(), [&](size_t first, size_t n) {
    ExpertChunk chunk{n, std::vector<float>(n * n_embd_), std::vector<float>(n * n_embd_),
                      std::vector<float>(n * n_embd_), std::span(routed.weights).subspan(first, n)};
    for (size_t i = 0; i < n; ++i) {
      const size_t from = static_cast<size_t>(routed.tokens[first + i]) * n_embd_;
      std::copy_n(source_stream_.data() + from, n_embd_, chunk.source.data() + i * n_embd_);
      std::copy_n(encoded_stream_.data() + from, n_embd_, chunk.encoded.data() + i * n_embd_);
    }
    // An expert that was not asked has no part in what the stream has drifted.
    for (size_t i = 0; i < chunk.behind.size(); ++i)
      chunk.behind[i] = routed.stand_in ? 0.0f : chunk.source[i] - chunk.encoded[i];
    eval_.norm(s.source.ffn_norm, chunk.source.data(), n, chunk.source.data());
    eval_.norm(s.source.ffn_norm, chunk.encoded.data(), n, chunk.encoded.data());
    body(chunk);
  });
}

Moments CalibratedEncoder::expert_inputs(const LayerState& s, size_t e) const {
  Moments inputs(n_embd_, moment_cols(n_embd_), 0);
  if (!fits_any(s, {kGate, kUp})) return inputs;
  for_chunks(s, e, [&](ExpertChunk& chunk) {
    scale_rows(chunk.source, chunk.weights);
    scale_rows(chunk.encoded, chunk.weights);
    inputs.add(eval_, chunk.encoded.data(), chunk.source.data(), nullptr, chunk.n);
  });
  return inputs;
}

// Of the down projection. An expert is to make up for its part, the router's weight, of what the
// residual stream has drifted.
Moments CalibratedEncoder::hidden_inputs(const LayerState& s, size_t e, const Expert& source,
                                         const Expert& encoded) const {
  const size_t n_ff = hparams_.n_ff;
  Moments inputs(n_ff, moment_cols(n_ff), n_embd_);
  if (!fits_any(s, {kDown})) return inputs;
  for_chunks(s, e, [&](ExpertChunk& chunk) {
    std::vector<float> a(chunk.n * n_ff), b(chunk.n * n_ff);
    eval_.hidden(source, chunk.source.data(), chunk.n, a.data());
    eval_.hidden(encoded, chunk.encoded.data(), chunk.n, b.data());
    for (std::vector<float>* rows : {&a, &b, &chunk.behind}) scale_rows(*rows, chunk.weights);
    inputs.add(eval_, b.data(), a.data(), chunk.behind.data(), chunk.n);
  });
  return inputs;
}

// added += what an expert gives to its tokens of a stream.
void CalibratedEncoder::add_expert(LayerState& s, size_t e, const Expert& expert,
                                   const std::vector<float>& stream) const {
  const Routed& routed = s.routed[e];
  in_chunks(routed.tokens.size(), [&](size_t first, size_t n) {
    std::vector<float> x(n * n_embd_), hidden(n * hparams_.n_ff);
    for (size_t i = 0; i < n; ++i)
      std::copy_n(stream.data() + static_cast<size_t>(routed.tokens[first + i]) * n_embd_, n_embd_,
                  x.data() + i * n_embd_);
    eval_.norm(s.source.ffn_norm, x.data(), n, x.data());
    eval_.hidden(expert, x.data(), n, hidden.data());
    eval_.multiply(expert.down, hidden.data(), n, x.data());
    for (size_t i = 0; i < n; ++i) {
      float* to = s.added.data() + static_cast<size_t>(routed.tokens[first + i]) * n_embd_;
      for (size_t c = 0; c < n_embd_; ++c) to[c] += routed.weights[first + i] * x[i * n_embd_ + c];
    }
  });
}

void CalibratedEncoder::run_source_experts(LayerState& s) const {
  // The encoded stream has what it needs; routing is now that of the source's.
  std::fill(s.added.begin(), s.added.end(), 0.0f);
  route(s, source_stream_);
  for (size_t e = 0; e < s.routed.size(); ++e) {
    const auto matrix = [&](LayerPlace place) {
      return model_.matrix(model_.job(kind_of(hparams_, place), s.index), e);
    };
    const SourceMatrix gate = matrix(kGate), up = matrix(kUp), down = matrix(kDown);
    add_expert(s, e, {gate.weight, up.weight, down.weight}, source_stream_);
  }
}

// ---- head, encoding, writing ------------------------------------------------------------------

void CalibratedEncoder::encode_head() {
  if (!model_.has(TensorKind::output, -1)) return;
  show("output head");
  const std::vector<float> norm = model_.vector(TensorKind::output_norm, -1);
  Moments inputs(n_embd_, moment_cols(n_embd_), 0);
  std::vector<float> source(sizes_.chunk_tokens * n_embd_), encoded(source.size());
  in_chunks(n_tokens(), [&](size_t t, size_t n) {
    eval_.norm(norm, source_stream_.data() + t * n_embd_, n, source.data());
    eval_.norm(norm, encoded_stream_.data() + t * n_embd_, n, encoded.data());
    inputs.add(eval_, encoded.data(), source.data(), nullptr, n);
  });
  std::vector<std::byte> bytes;
  encode(model_.job(TensorKind::output, -1), 0, inputs, bytes);
  finish_tensor(model_.job_index(TensorKind::output, -1), bytes);
}

void CalibratedEncoder::encode_plain(const TensorJob& job, size_t first_row, size_t n_rows,
                                     std::byte* out) const {
  const size_t bytes = row_bytes(*job.format, job.shape.back());
  parallel_for(eval_.n_threads(), n_rows, 64, [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) SourceModel::store_row(job, first_row + r, out + r * bytes);
  });
}

std::vector<std::byte> CalibratedEncoder::encoded_plainly(const TensorJob& job) const {
  const size_t n_rows = matrix_count(job) * matrix_rows(job);
  std::vector<std::byte> out(n_rows * row_bytes(*job.format, job.shape.back()));
  encode_plain(job, 0, n_rows, out.data());
  return out;
}

// One matrix of a tensor, whose bytes are made room for when it is the first.
void CalibratedEncoder::encode(const TensorJob& job, size_t expert, Moments& moments,
                               std::vector<std::byte>& out) const {
  check_cancel();
  const size_t rows = matrix_rows(job), bytes = row_bytes(*job.format, job.shape.back());
  out.resize(matrix_count(job) * rows * bytes);
  std::byte* to = out.data() + expert * rows * bytes;
  if (!has_second_order(*job.format) || moments.n_tokens() == 0)
    return encode_plain(job, expert * rows, rows, to);
  std::vector<float> w = SourceModel::floats(job, expert * rows, rows);
  const InputMetric& metric = moments.metric(eval_);
  moments.correct(metric, w, eval_.n_threads());
  encode_second_order(*job.format, metric, w.data(), rows, to, eval_.n_threads());
}

void CalibratedEncoder::write_layer(const LayerState& s) {
  std::vector<const std::vector<std::byte>*> ready(source_.jobs.size(), nullptr);
  for (size_t p = 0; p < kPlaces; ++p)
    ready[model_.job_index(kind_of(hparams_, static_cast<LayerPlace>(p)), s.index)] = &s.bytes[p];
  for (const size_t i : order_) {
    if (model_.layer_of(i) != s.index) continue;
    if (ready[i] != nullptr)
      finish_tensor(i, *ready[i]);
    else
      finish_tensor(i, encoded_plainly(source_.jobs[i]));
  }
}

void CalibratedEncoder::finish_tensor(size_t job, std::span<const std::byte> bytes) {
  check_cancel();
  writer_->write(bytes);
  const TensorJob& done = source_.jobs[job];
  progress_.done_bytes += source_bytes(done);
  model_.drop(done);
  show(done.name);
  ++progress_.tensor_index;
}

// ---- reports -----------------------------------------------------------------------------------

void CalibratedEncoder::count_tokens(const LayerState& s) {
  for (const Routed& routed : s.routed) {
    n_unseen_ += routed.tokens.empty();
    n_few_ += !routed.tokens.empty() && routed.tokens.size() < n_embd_;
  }
}

void CalibratedEncoder::report_few() const {
  if (!options_.notice) return;
  const size_t n = size_t{hparams_.n_layer} * std::max<uint32_t>(hparams_.n_expert, 1);
  if (n_unseen_ > 0)
    options_.notice(concat("calibration: ", n_unseen_, " of ", n,
                           " experts saw no token of the text and are fitted to tokens that others saw"));
  if (n_few_ > 0)
    options_.notice(concat("calibration: ", n_few_, " of ", n, " experts saw fewer than ", n_embd_,
                           " tokens of the text; their errors are compensated less"));
}

void CalibratedEncoder::show(const std::string& what) {
  progress_.tensor = what;
  if (options_.progress) options_.progress(progress_);
}

void CalibratedEncoder::check_cancel() const {
  if (options_.cancel != nullptr && options_.cancel->load())
    fail(ErrorKind::cancelled, "interrupted");
}

}  // namespace duet
