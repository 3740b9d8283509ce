// What a model is made of: hyper-parameters and the table of its tensors, with names in GGUF and
// Hugging Face form. Shared by the converter (which writes the table) and the runtime (which binds
// it). One architecture family: GGUF "llama" = Llama, Mistral, Mixtral; n_expert 0 is dense.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json_fwd.h"
#include "formats/gguf.h"

namespace duet {

// One-line remarks for the user ("sliding_window 4096 ignored: ...").
using NoticeFn = std::function<void(const std::string&)>;

struct HParams {
  std::string arch = "llama";
  std::string name;
  uint32_t n_layer = 0, n_embd = 0, n_ff = 0, n_vocab = 0, n_ctx_train = 0;
  uint32_t n_head = 0, n_head_kv = 0, head_dim = 0;
  uint32_t n_rot = 0;                  // rotated dimensions of each head, even, <= head_dim
  uint32_t n_expert = 0, n_expert_used = 0;
  float rope_freq_base = 10000.0f;
  float rope_scale = 1.0f;             // linear scaling: positions are multiplied by it
  float rms_eps = 1e-5f;
  uint32_t sliding_window = 0;         // 0: full attention
  bool tied_output = false;            // no output.weight: token_embd serves
  // Llama-3 rope scaling {factor, low_freq_factor, high_freq_factor, original_max}; factor 0: none.
  struct { float factor = 0, low_freq_factor = 0, high_freq_factor = 0; uint32_t n_ctx_original = 0; } llama3_rope;
  // There is a rope_freqs tensor: in the file read, or to be written because of llama3_rope (GGUF has
  // no keys for that scaling, only the tensor).
  bool rope_freqs = false;
};

// From GGUF metadata; checks ranges and consistency (compatibility rules: a missing rope base of an
// 8-expert file becomes 1e6 with a notice, a sliding window with experts is ignored with a notice).
// Throws Error: unsupported (architecture, rope scaling kind), format (inconsistent numbers).
HParams read_hparams(const GgufFile& file, const NoticeFn& notice);
// From config.json of a Hugging Face folder.
HParams read_hf_config(const Json& config, const std::string& source, const NoticeFn& notice);
// Of the two published Mixtrals, "8x7b" and "8x22b" (their config.json); nullopt for other names.
std::optional<HParams> mixtral_hparams(std::string_view size);
// The GGUF metadata of these hyper-parameters (general.* and llama.*, without tokenizer).
std::vector<GgufKeyValue> hparams_metadata(const HParams& hparams);

enum class TensorKind {
  token_embd, output_norm, output, rope_freqs,
  attn_norm, attn_q, attn_k, attn_v, attn_output, ffn_norm, ffn_gate_inp,
  ffn_gate, ffn_up, ffn_down,            // dense (n_expert 0)
  ffn_gate_exps, ffn_up_exps, ffn_down_exps,  // experts
};

struct TensorSpec {
  TensorKind kind;
  int layer = -1;               // -1: not of a layer
  std::string gguf_name;        // merged layout: "blk.3.ffn_up_exps.weight"
  std::vector<uint64_t> shape;  // row-major: {rows, cols}, experts {n_expert, rows, cols}, norms {n}
  bool optional = false;        // rope_freqs: no source tensor in a Hugging Face folder
};

// Every tensor of the model in the order files are written. rope_freqs only with hparams.rope_freqs,
// output only when not tied.
std::vector<TensorSpec> tensor_table(const HParams& hparams);

// The rope_freqs tensor [n_rot / 2]: what each rotation frequency is divided by for llama3_rope
// (transformers, _compute_llama3_parameters: long wavelengths by factor, short ones by 1, a linear
// ramp of the reciprocal between). Needs llama3_rope.factor > 0.
std::vector<float> llama3_rope_freqs(const HParams& hparams);

// Name of a tensor of the merged layout: "blk.3.ffn_up_exps.weight"; layer -1: not of a layer.
std::string tensor_name(TensorKind kind, int layer);

// Old per-expert layout: "blk.L.ffn_gate.E.weight" (kind one of the *_exps).
std::string split_expert_name(TensorKind kind, int layer, int expert);

// Where a tensor's data come from in a Hugging Face folder: every accepted form, best first; the
// last index of a form is for experts (one source per expert, or one fused tensor).
struct HfSource {
  std::vector<std::string> names;  // one, or n_expert of them (per-expert tensors to be stacked)
  enum class Rows { all, first_half, second_half } rows = Rows::all;  // of a fused gate_up_proj [E, 2I, H]
  bool permute_rope = false;       // q/k rows: half-split pairs -> interleaved pairs
  // One matrix [n_expert * n_ff, n_embd] for all experts; transposed: that of down, which is [n_ff, n_embd] there.
  bool stacked = false, transposed = false;
};
std::vector<HfSource> hf_sources(const HParams& hparams, const TensorSpec& spec);
// The same for Mistral's own files, whose q and k have interleaved pairs already: layout A (an expert's matrices
// apart) and B (the first release of 8x7B: stacked).
std::vector<HfSource> mistral_sources(const HParams& hparams, const TensorSpec& spec);

}  // namespace duet
