// The tensors of the "llama" family (Llama, Mistral, Mixtral): names, shapes, Hugging Face sources.
#include <array>

#include "base/error.h"
#include "formats/schema.h"

namespace duet {
namespace {

enum class Presence { always, dense, experts, untied, rope_freqs };
using ShapeFn = std::vector<uint64_t> (*)(const HParams&);

struct Row {
  TensorKind kind;
  const char* gguf;  // after "blk.N." in layers; ".weight" follows
  const char* hf;    // after "model.layers.N." in layers; null: experts and rope_freqs, see below
  ShapeFn shape;
  Presence presence = Presence::always;
};

using H = HParams;
using Shape = std::vector<uint64_t>;

uint64_t q_rows(const H& h) { return uint64_t{h.n_head} * h.head_dim; }
uint64_t kv_rows(const H& h) { return uint64_t{h.n_head_kv} * h.head_dim; }
Shape norm(const H& h) { return {h.n_embd}; }
Shape vocab_matrix(const H& h) { return {h.n_vocab, h.n_embd}; }

// Before the layers, in each layer, after them: the order of the file.
const std::array kHead = {
    Row{TensorKind::token_embd, "token_embd", "model.embed_tokens", vocab_matrix},
    Row{TensorKind::rope_freqs, "rope_freqs", nullptr,
        [](const H& h) { return Shape{h.n_rot / 2}; }, Presence::rope_freqs},
};
const std::array kLayer = {
    Row{TensorKind::attn_norm, "attn_norm", "input_layernorm", norm},
    Row{TensorKind::attn_q, "attn_q", "self_attn.q_proj",
        [](const H& h) {
          return Shape{q_rows(h), h.n_embd};
        }},
    Row{TensorKind::attn_k, "attn_k", "self_attn.k_proj",
        [](const H& h) {
          return Shape{kv_rows(h), h.n_embd};
        }},
    Row{TensorKind::attn_v, "attn_v", "self_attn.v_proj",
        [](const H& h) {
          return Shape{kv_rows(h), h.n_embd};
        }},
    Row{TensorKind::attn_output, "attn_output", "self_attn.o_proj",
        [](const H& h) {
          return Shape{h.n_embd, q_rows(h)};
        }},
    Row{TensorKind::ffn_norm, "ffn_norm", "post_attention_layernorm", norm},
    Row{TensorKind::ffn_gate_inp, "ffn_gate_inp", "block_sparse_moe.gate",
        [](const H& h) {
          return Shape{h.n_expert, h.n_embd};
        },
        Presence::experts},
    Row{TensorKind::ffn_gate, "ffn_gate", "mlp.gate_proj",
        [](const H& h) {
          return Shape{h.n_ff, h.n_embd};
        },
        Presence::dense},
    Row{TensorKind::ffn_up, "ffn_up", "mlp.up_proj",
        [](const H& h) {
          return Shape{h.n_ff, h.n_embd};
        },
        Presence::dense},
    Row{TensorKind::ffn_down, "ffn_down", "mlp.down_proj",
        [](const H& h) {
          return Shape{h.n_embd, h.n_ff};
        },
        Presence::dense},
    Row{TensorKind::ffn_gate_exps, "ffn_gate_exps", nullptr,
        [](const H& h) {
          return Shape{h.n_expert, h.n_ff, h.n_embd};
        },
        Presence::experts},
    Row{TensorKind::ffn_up_exps, "ffn_up_exps", nullptr,
        [](const H& h) {
          return Shape{h.n_expert, h.n_ff, h.n_embd};
        },
        Presence::experts},
    Row{TensorKind::ffn_down_exps, "ffn_down_exps", nullptr,
        [](const H& h) {
          return Shape{h.n_expert, h.n_embd, h.n_ff};
        },
        Presence::experts},
};
const std::array kTail = {
    Row{TensorKind::output_norm, "output_norm", "model.norm", norm},
    Row{TensorKind::output, "output", "lm_head", vocab_matrix, Presence::untied},
};

bool present(const Row& row, const HParams& h) {
  switch (row.presence) {
    case Presence::always:
      return true;
    case Presence::dense:
      return h.n_expert == 0;
    case Presence::experts:
      return h.n_expert > 0;
    case Presence::untied:
      return !h.tied_output;
    case Presence::rope_freqs:
      return h.rope_freqs;
  }
  return false;
}

void append(std::vector<TensorSpec>& out, std::span<const Row> rows, const HParams& h, int layer) {
  for (const Row& row : rows) {
    if (!present(row, h)) continue;
    TensorSpec spec;
    spec.kind = row.kind;
    spec.layer = layer;
    spec.gguf_name = tensor_name(row.kind, layer);
    spec.shape = row.shape(h);
    spec.optional = row.presence == Presence::rope_freqs;
    out.push_back(std::move(spec));
  }
}

const Row& row_of(TensorKind kind) {
  for (const std::span<const Row> rows :
       {std::span<const Row>(kHead), std::span<const Row>(kLayer), std::span<const Row>(kTail)})
    for (const Row& row : rows)
      if (row.kind == kind) return row;
  fail(ErrorKind::internal, "tensor kind ", static_cast<int>(kind), " has no row");
}

// Mixtral's letters: w1 = gate, w3 = up, w2 = down.
const char* hf_expert_matrix(TensorKind kind) {
  switch (kind) {
    case TensorKind::ffn_gate_exps:
      return "w1";
    case TensorKind::ffn_up_exps:
      return "w3";
    case TensorKind::ffn_down_exps:
      return "w2";
    default:
      return nullptr;
  }
}

// One tensor per expert, or (transformers 5, save_original_format=False) one for all of them with
// gate above up.
std::vector<HfSource> expert_sources(const HParams& h, const TensorSpec& spec,
                                     const std::string& prefix) {
  HfSource single, fused;
  for (uint32_t e = 0; e < h.n_expert; ++e)
    single.names.push_back(concat(prefix, "block_sparse_moe.experts.", e, ".",
                                  hf_expert_matrix(spec.kind), ".weight"));
  const bool down = spec.kind == TensorKind::ffn_down_exps;
  fused.names.push_back(concat(prefix, "mlp.experts.", down ? "down_proj" : "gate_up_proj"));
  if (spec.kind == TensorKind::ffn_gate_exps) fused.rows = HfSource::Rows::first_half;
  if (spec.kind == TensorKind::ffn_up_exps) fused.rows = HfSource::Rows::second_half;
  return {single, fused};
}

}  // namespace

std::vector<TensorSpec> tensor_table(const HParams& hparams) {
  std::vector<TensorSpec> out;
  append(out, kHead, hparams, -1);
  for (uint32_t layer = 0; layer < hparams.n_layer; ++layer)
    append(out, kLayer, hparams, static_cast<int>(layer));
  append(out, kTail, hparams, -1);
  return out;
}

std::string tensor_name(TensorKind kind, int layer) {
  const char* name = row_of(kind).gguf;
  return layer < 0 ? concat(name, ".weight") : concat("blk.", layer, ".", name, ".weight");
}

std::string split_expert_name(TensorKind kind, int layer, int expert) {
  DUET_ASSERT(hf_expert_matrix(kind) != nullptr);
  std::string stem = row_of(kind).gguf;
  stem.resize(stem.size() - std::string_view("_exps").size());
  return concat("blk.", layer, ".", stem, ".", expert, ".weight");
}

std::vector<HfSource> hf_sources(const HParams& hparams, const TensorSpec& spec) {
  const std::string prefix = spec.layer < 0 ? "" : concat("model.layers.", spec.layer, ".");
  if (hf_expert_matrix(spec.kind) != nullptr) return expert_sources(hparams, spec, prefix);
  const Row& row = row_of(spec.kind);
  if (row.hf == nullptr) return {};
  HfSource source;
  source.names = {concat(prefix, row.hf, ".weight")};
  source.permute_rope = spec.kind == TensorKind::attn_q || spec.kind == TensorKind::attn_k;
  std::vector<HfSource> out = {source};
  if (spec.kind == TensorKind::ffn_gate_inp) {
    source.names = {concat(prefix, "mlp.gate.weight")};  // transformers 5
    out.push_back(source);
  }
  return out;
}

// ---- Mistral's own names
// -------------------------------------------------------------------------

namespace {

const char* mistral_name(TensorKind kind) {
  switch (kind) {
    case TensorKind::token_embd:
      return "tok_embeddings";
    case TensorKind::output_norm:
      return "norm";
    case TensorKind::output:
      return "output";
    case TensorKind::attn_norm:
      return "attention_norm";
    case TensorKind::attn_q:
      return "attention.wq";
    case TensorKind::attn_k:
      return "attention.wk";
    case TensorKind::attn_v:
      return "attention.wv";
    case TensorKind::attn_output:
      return "attention.wo";
    case TensorKind::ffn_norm:
      return "ffn_norm";
    case TensorKind::ffn_gate_inp:
      return "feed_forward.gate";
    case TensorKind::ffn_gate:
      return "feed_forward.w1";
    case TensorKind::ffn_down:
      return "feed_forward.w2";
    case TensorKind::ffn_up:
      return "feed_forward.w3";
    default:
      return nullptr;
  }
}

std::vector<HfSource> mistral_experts(const HParams& h, TensorKind kind, const std::string& prefix) {
  HfSource single, stacked;
  const char* matrix = hf_expert_matrix(kind);
  for (uint32_t e = 0; e < h.n_expert; ++e) single.names.push_back(concat(prefix, "feed_forward.experts.", e, ".", matrix, ".weight"));
  stacked.stacked = true;
  stacked.transposed = kind == TensorKind::ffn_down_exps;
  stacked.names = {concat(prefix, "block_sparse_moe.", matrix)};
  std::vector<HfSource> out = {single, stacked};
  stacked.names = {concat(prefix, "block_sparse_moe.", matrix, ".weight")};
  out.push_back(stacked);
  return out;
}

}  // namespace

std::vector<HfSource> mistral_sources(const HParams& hparams, const TensorSpec& spec) {
  const std::string prefix = spec.layer < 0 ? "" : concat("layers.", spec.layer, ".");
  if (hf_expert_matrix(spec.kind) != nullptr) return mistral_experts(hparams, spec.kind, prefix);
  const char* name = mistral_name(spec.kind);
  if (name == nullptr) return {};
  std::vector<HfSource> out = {{.names = {concat(prefix, name, ".weight")}}};
  if (spec.kind == TensorKind::ffn_gate_inp) out.push_back({.names = {concat(prefix, "block_sparse_moe.gate.weight")}});
  return out;
}

}  // namespace duet
