#include "tests/support/reference_model.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "base/error.h"

namespace duet::test {
namespace {

using Vector = std::vector<double>;

Vector values(const TensorView& view) {
  std::vector<float> decoded(view.n_elems());
  view.format->decode_row(view.data.data(), decoded.data(), decoded.size());
  return Vector(decoded.begin(), decoded.end());
}

struct Reference {
  const GgufFile& file;
  const HParams& hp;
  const ReferenceWatch& watch;

  void tell(const std::string& tensor, const Vector& row, int expert = -1, double weight = 1) const {
    if (watch) watch(tensor + ".weight", expert, row, weight);
  }

  Vector vector(const std::string& name) const {
    const TensorView* view = file.find_tensor(name);
    if (view == nullptr) fail(ErrorKind::internal, "reference: no tensor ", name);
    return values(*view);
  }

  // Slice `e` of a tensor of n_slices matrices of `rows` rows.
  Matrix matrix(const std::string& name, size_t rows, size_t e = 0, size_t n_slices = 1) const {
    const Vector all = vector(name);
    const size_t cols = all.size() / rows / n_slices;
    Matrix out(rows, Vector(cols));
    for (size_t r = 0; r < rows; ++r)
      for (size_t c = 0; c < cols; ++c) out[r][c] = all[(e * rows + r) * cols + c];
    return out;
  }

  Matrix expert(size_t layer, const std::string& what, size_t e, size_t rows) const {
    const std::string prefix = "blk." + std::to_string(layer) + ".ffn_" + what;
    if (hp.n_expert == 0) return matrix(prefix + ".weight", rows);
    if (file.find_tensor(prefix + "_exps.weight")) return matrix(prefix + "_exps.weight", rows, e, hp.n_expert);
    return matrix(prefix + "." + std::to_string(e) + ".weight", rows);
  }
};

Vector times(const Matrix& w, const Vector& x) {
  Vector y(w.size());
  for (size_t r = 0; r < w.size(); ++r) y[r] = std::inner_product(x.begin(), x.end(), w[r].begin(), 0.0);
  return y;
}

Vector rms_norm(const Vector& x, const Vector& weight, double eps) {
  const double mean = std::inner_product(x.begin(), x.end(), x.begin(), 0.0) / static_cast<double>(x.size());
  Vector y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = x[i] / std::sqrt(mean + eps) * weight[i];
  return y;
}

Vector softmax(const Vector& x) {
  const double best = *std::max_element(x.begin(), x.end());
  Vector p(x.size());
  for (size_t i = 0; i < x.size(); ++i) p[i] = std::exp(x[i] - best);
  const double sum = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& v : p) v /= sum;
  return p;
}

// Rotates neighbouring pairs of the first n_rot elements of each head.
void rotate(Vector& x, size_t head_dim, const HParams& hp, const Vector& factors, size_t pos) {
  for (size_t head = 0; head < x.size() / head_dim; ++head)
    for (size_t i = 0; i < hp.n_rot / 2; ++i) {
      double angle = static_cast<double>(pos) * double{hp.rope_scale} *
                     std::pow(double{hp.rope_freq_base}, -2.0 * static_cast<double>(i) / hp.n_rot);
      if (!factors.empty()) angle /= factors[i];
      double& a = x[head * head_dim + 2 * i];
      double& b = x[head * head_dim + 2 * i + 1];
      const double a0 = a, b0 = b;
      a = a0 * std::cos(angle) - b0 * std::sin(angle);
      b = a0 * std::sin(angle) + b0 * std::cos(angle);
    }
}

// One query token's heads against all keys it may see.
Vector attend(const HParams& hp, const Vector& q, const Matrix& keys, const Matrix& vals, size_t pos) {
  const size_t hd = hp.head_dim, group = hp.n_head / hp.n_head_kv;
  Vector out(q.size());
  for (size_t h = 0; h < hp.n_head; ++h) {
    const size_t kv = h / group * hd;
    Vector scores;
    std::vector<size_t> seen;
    for (size_t j = 0; j <= pos; ++j) {
      if (hp.sliding_window > 0 && pos - j >= hp.sliding_window) continue;
      double dot = 0;
      for (size_t i = 0; i < hd; ++i) dot += q[h * hd + i] * keys[j][kv + i];
      scores.push_back(dot / std::sqrt(static_cast<double>(hd)));
      seen.push_back(j);
    }
    const Vector p = softmax(scores);
    for (size_t n = 0; n < seen.size(); ++n)
      for (size_t i = 0; i < hd; ++i) out[h * hd + i] += p[n] * vals[seen[n]][kv + i];
  }
  return out;
}

// (expert, weight) pairs of one token.
std::vector<std::pair<size_t, double>> route(const HParams& hp, const Vector& logits) {
  const Vector p = softmax(logits);
  std::vector<size_t> order(p.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return p[a] > p[b]; });
  order.resize(hp.n_expert_used);
  double sum = 0;
  for (const size_t e : order) sum += p[e];
  std::vector<std::pair<size_t, double>> out;
  for (const size_t e : order) out.emplace_back(e, p[e] / sum);
  return out;
}

void attention_layer(const Reference& ref, size_t layer, const Vector& factors, Matrix& x) {
  const HParams& hp = ref.hp;
  const std::string prefix = "blk." + std::to_string(layer) + ".";
  const Vector norm = ref.vector(prefix + "attn_norm.weight");
  const Matrix wq = ref.matrix(prefix + "attn_q.weight", size_t{hp.n_head} * hp.head_dim);
  const Matrix wk = ref.matrix(prefix + "attn_k.weight", size_t{hp.n_head_kv} * hp.head_dim);
  const Matrix wv = ref.matrix(prefix + "attn_v.weight", size_t{hp.n_head_kv} * hp.head_dim);
  const Matrix wo = ref.matrix(prefix + "attn_output.weight", hp.n_embd);
  Matrix keys, vals;
  for (size_t t = 0; t < x.size(); ++t) {
    const Vector y = rms_norm(x[t], norm, double{hp.rms_eps});
    Vector q = times(wq, y), k = times(wk, y);
    rotate(q, hp.head_dim, hp, factors, t);
    rotate(k, hp.head_dim, hp, factors, t);
    keys.push_back(k);
    vals.push_back(times(wv, y));
    const Vector mixed = attend(hp, q, keys, vals, t), out = times(wo, mixed);
    for (const char* name : {"attn_q", "attn_k", "attn_v"}) ref.tell(prefix + name, y);
    ref.tell(prefix + "attn_output", mixed);
    for (size_t i = 0; i < out.size(); ++i) x[t][i] += out[i];
  }
}

void ffn_layer(const Reference& ref, size_t layer, Matrix& x) {
  const HParams& hp = ref.hp;
  const std::string prefix = "blk." + std::to_string(layer) + ".";
  const Vector norm = ref.vector(prefix + "ffn_norm.weight");
  const size_t n_expert = std::max<size_t>(hp.n_expert, 1);
  Matrix router;
  if (hp.n_expert > 0) router = ref.matrix(prefix + "ffn_gate_inp.weight", n_expert);
  std::vector<Matrix> gate, up, down;
  for (size_t e = 0; e < n_expert; ++e) {
    gate.push_back(ref.expert(layer, "gate", e, hp.n_ff));
    up.push_back(ref.expert(layer, "up", e, hp.n_ff));
    down.push_back(ref.expert(layer, "down", e, hp.n_embd));
  }
  for (Vector& row : x) {
    const Vector y = rms_norm(row, norm, double{hp.rms_eps});
    std::vector<std::pair<size_t, double>> chosen{{0, 1.0}};
    if (hp.n_expert > 0) chosen = route(hp, times(router, y));
    if (hp.n_expert > 0) ref.tell(prefix + "ffn_gate_inp", y);
    for (const auto& [e, weight] : chosen) {
      Vector h = times(gate[e], y);
      const Vector u = times(up[e], y);
      for (size_t i = 0; i < h.size(); ++i) h[i] = h[i] / (1 + std::exp(-h[i])) * u[i];
      const Vector out = times(down[e], h);
      const std::string suffix = hp.n_expert > 0 ? "_exps" : "";
      const int expert = hp.n_expert > 0 ? static_cast<int>(e) : -1;
      ref.tell(prefix + "ffn_gate" + suffix, y, expert, weight);
      ref.tell(prefix + "ffn_up" + suffix, y, expert, weight);
      ref.tell(prefix + "ffn_down" + suffix, h, expert, weight);
      for (size_t i = 0; i < out.size(); ++i) row[i] += weight * out[i];
    }
  }
}

}  // namespace

Matrix reference_logits(const GgufFile& file, const HParams& hparams, std::span<const Token> tokens,
                        const ReferenceWatch& watch) {
  const Reference ref{file, hparams, watch};
  const Matrix embedding = ref.matrix("token_embd.weight", hparams.n_vocab);
  Vector factors;
  if (file.find_tensor("rope_freqs.weight")) factors = ref.vector("rope_freqs.weight");
  Matrix x;
  for (const Token token : tokens) x.push_back(embedding[static_cast<size_t>(token)]);
  for (size_t layer = 0; layer < hparams.n_layer; ++layer) {
    attention_layer(ref, layer, factors, x);
    ffn_layer(ref, layer, x);
  }
  const bool tied = file.find_tensor("output.weight") == nullptr;
  const Matrix output = tied ? embedding : ref.matrix("output.weight", hparams.n_vocab);
  const Vector norm = ref.vector("output_norm.weight");
  Matrix logits;
  for (const Vector& row : x) {
    const Vector y = rms_norm(row, norm, double{hparams.rms_eps});
    ref.tell("output", y);
    logits.push_back(times(output, y));
  }
  return logits;
}

}  // namespace duet::test
