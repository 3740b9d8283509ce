// Models of random weights for benchmarks: blocks are made directly out of random bits with chosen
// scales, as fast as they can be written, not by encoding floats.
//
// Scales: every matrix has elements of magnitude 1/sqrt(inputs), so that each output is as large as
// an input; the two that add to the residual stream (attn_output, ffn_down) are smaller by
// sqrt(2 * n_layer), as GPT-2 initializes them. With embeddings of magnitude 1 the stream then
// stays dominated by the token itself: activations neither explode nor vanish, and what attention
// makes common to all tokens stays too weak to draw the router towards some experts.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>

#include "base/error.h"
#include "base/parallel.h"
#include "converters/convert.h"
#include "converters/hf_tokenizer.h"
#include "converters/quantize.h"
#include "converters/synthetic_routing.h"
#include "converters/write_queue.h"
#include "formats/gguf_parts.h"
#include "quant/f16.h"

namespace duet {
namespace {

constexpr size_t kChunkBytes = size_t{16} << 20;
constexpr size_t kGrainBlocks = 4096;  // a multiple of 8: every range starts on a random word

// ---- random bits
// ---------------------------------------------------------------------------------

// Word `index` of the stream `key` (splitmix64: Steele, Lea, Flood 2014): any part of any tensor
// can be made by itself, in any order.
uint64_t random_word(uint64_t key, uint64_t index) {
  uint64_t z = key + index * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// One stream per tensor and expert; the same in both layouts.
uint64_t stream_key(uint64_t seed, TensorKind kind, int layer, uint64_t expert) {
  uint64_t key = random_word(seed, static_cast<uint64_t>(kind) + 1);
  key = random_word(key, static_cast<uint64_t>(layer + 1));
  return random_word(key, expert);
}

// Uniform, mean 0, standard deviation 1.
float random_float(uint64_t key, uint64_t index) {
  constexpr float kSqrt12 = 3.46410162f;
  return (static_cast<float>(random_word(key, index) >> 40) * 0x1p-24f - 0.5f) * kSqrt12;
}

// ---- blocks
// --------------------------------------------------------------------------------------

// Makes the sub-block minimums of a block equal to its sub-block scales.
using PairMinimumsFn = void (*)(std::byte* block);

std::byte low_nibble_twice(std::byte b) { return (b & std::byte{15}) | (b << 4); }

void pair_q2_k(std::byte* block) {
  for (size_t i = 0; i < sizeof(BlockQ2_K::scales); ++i) block[i] = low_nibble_twice(block[i]);
}
// Q4_K and Q5_K: bytes 0-3 hold the first four scales, 4-7 the minimums, 8-11 low nibbles of the
// other scales and high nibbles of the other minimums, whose top bits sit on top of 0-3 and 4-7.
void pair_q4_k(std::byte* block) {
  std::byte* scales = block + offsetof(BlockQ4_K, scales);
  std::memcpy(scales + 4, scales, 4);
  for (size_t i = 8; i < 12; ++i) scales[i] = low_nibble_twice(scales[i]);
}
static_assert(offsetof(BlockQ4_K, scales) == offsetof(BlockQ5_K, scales) &&
              offsetof(BlockQ2_K, scales) == 0);

// Where a block holds its half-precision scale, and its offset if it has one. With random bits in
// all other fields, minimums paired with scales and offset = ratio * scale, each sub-block has mean
// zero. (Means would carry most of the variance, and leave few independent directions.)
struct ScaleFields {
  DType dtype;
  size_t scale_at;
  std::optional<size_t> offset_at = {};
  float ratio = 0;
  PairMinimumsFn pair_minimums = nullptr;
};
constexpr ScaleFields kScaleFields[] = {
    {DType::Q4_0, offsetof(BlockQ4_0, d)},
    {DType::Q4_1, offsetof(BlockQ4_1, d), offsetof(BlockQ4_1, m), -7.5f},
    {DType::Q5_0, offsetof(BlockQ5_0, d)},
    {DType::Q5_1, offsetof(BlockQ5_1, d), offsetof(BlockQ5_1, m), -15.5f},
    {DType::Q8_0, offsetof(BlockQ8_0, d)},
    {DType::Q2_K, offsetof(BlockQ2_K, d), offsetof(BlockQ2_K, dmin), 1.5f, pair_q2_k},
    {DType::Q3_K, offsetof(BlockQ3_K, d)},
    {DType::Q4_K, offsetof(BlockQ4_K, d), offsetof(BlockQ4_K, dmin), 7.5f, pair_q4_k},
    {DType::Q5_K, offsetof(BlockQ5_K, d), offsetof(BlockQ5_K, dmin), 15.5f, pair_q4_k},
    {DType::Q6_K, offsetof(BlockQ6_K, d)},
    {DType::IQ4_NL, offsetof(BlockIQ4_NL, d)},
    {DType::IQ4_XS, offsetof(BlockIQ4_XS, d)},
    {DType::IQ1_S, offsetof(BlockIQ1_S, d)},
    {DType::IQ2_XXS, offsetof(BlockIQ2_XXS, d)},
    {DType::IQ2_XS, offsetof(BlockIQ2_XS, d)},
    {DType::IQ2_S, offsetof(BlockIQ2_S, d)},
    {DType::IQ3_XXS, offsetof(BlockIQ3_XXS, d)},
    {DType::IQ3_S, offsetof(BlockIQ3_S, d)},
    {DType::TQ1_0, offsetof(BlockTQ1_0, d)},
    {DType::TQ2_0, offsetof(BlockTQ2_0, d)},
};

const ScaleFields* scale_fields(DType dtype) {
  const auto it = std::find_if(std::begin(kScaleFields), std::end(kScaleFields),
                               [&](auto& f) { return f.dtype == dtype; });
  return it == std::end(kScaleFields) ? nullptr : it;
}

uint16_t load_u16(const std::byte* at) {
  uint16_t value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}
void store_u16(std::byte* at, unsigned value) {
  const auto half = static_cast<uint16_t>(value);
  std::memcpy(at, &half, sizeof(half));
}

// Blocks [first, first + n) of the stream, first a multiple of 8. The scale keeps a random sign:
// formats whose levels are not symmetric would otherwise have a mean, which wide rows add up.
void fill_blocks(const Format& format, const ScaleFields& fields, float scale, uint64_t key,
                 uint64_t first, size_t n, std::byte* out) {
  const size_t n_bytes = n * format.block_bytes;
  const uint64_t first_word = first * format.block_bytes / 8;
  for (size_t i = 0; i < n_bytes; i += 8) {
    const uint64_t word = random_word(key, first_word + i / 8);
    std::memcpy(out + i, &word, std::min<size_t>(8, n_bytes - i));
  }
  const unsigned d = f32_to_f16(scale), offset = f32_to_f16(scale * fields.ratio);
  for (std::byte* block = out; block < out + n_bytes; block += format.block_bytes) {
    const unsigned sign = load_u16(block + fields.scale_at) & 0x8000u;
    store_u16(block + fields.scale_at, d ^ sign);
    if (fields.offset_at) store_u16(block + *fields.offset_at, offset ^ sign);
    if (fields.pair_minimums != nullptr) fields.pair_minimums(block);
  }
}

// Standard deviation of the values of random blocks whose scale is 1.
float unit_deviation(const Format& format, const ScaleFields& fields) {
  constexpr size_t kBlocks = 1024;
  std::vector<std::byte> blocks(kBlocks * format.block_bytes);
  std::vector<float> values(kBlocks * format.block_elems);
  fill_blocks(format, fields, 1.0f, 1, 0, kBlocks, blocks.data());
  format.decode_row(blocks.data(), values.data(), values.size());
  double sum = 0;
  for (const float v : values) sum += double{v} * double{v};
  return static_cast<float>(std::sqrt(sum / static_cast<double>(values.size())));
}

// Rows of equal length: an expert whose router row is longer than the others' would win more often.
void fill_router(float deviation, uint64_t key, uint64_t first, size_t n, std::byte* out) {
  std::vector<float> values(n);
  for (size_t i = 0; i < n; ++i)
    values[i] = random_word(key, first + i) >> 63 != 0 ? deviation : -deviation;
  std::memcpy(out, values.data(), n * sizeof(float));
}

void fill_floats(const Format& format, float scale, uint64_t key, uint64_t first, size_t n,
                 std::byte* out) {
  std::vector<float> values(n);
  for (size_t i = 0; i < n; ++i) values[i] = scale * random_float(key, first + i);
  format.encode_row(values.data(), out, n, nullptr);
}

// ---- tensors
// -------------------------------------------------------------------------------------

// One matrix of one stream: a tensor, or an expert's slice of one.
struct Payload {
  const TensorSpec* spec;
  const Format* format;
  uint64_t n_elems, key;
  float deviation;  // of the elements; 0: all ones (norms)

  uint64_t n_blocks() const { return n_elems / format->block_elems; }
  uint64_t n_bytes() const { return n_blocks() * format->block_bytes; }
};

struct OutputTensor {
  std::string name;
  std::vector<uint64_t> shape;
  std::vector<Payload> parts;
};

void fill(const Payload& part, float unit, uint64_t first, size_t n, std::byte* out) {
  const ScaleFields* fields = scale_fields(part.format->dtype);
  if (fields != nullptr)
    return fill_blocks(*part.format, *fields, part.deviation / unit, part.key, first, n, out);
  if (part.spec->kind == TensorKind::ffn_gate_inp)
    return fill_router(part.deviation, part.key, first, n, out);
  if (part.deviation > 0) return fill_floats(*part.format, part.deviation, part.key, first, n, out);
  const std::vector<float> ones(n, 1.0f);
  std::memcpy(out, ones.data(), n * sizeof(float));
}

// ---- routing mixtral (synthetic_routing.h)
// ---------------------------------------------------------------

// Replaces the columns that rows share in blocks [first, first + n) of `part` at out.
void share_columns(const ContextRouting& routing, const Payload& part, uint64_t seed, float unit, uint64_t first, size_t n,
                   std::byte* out) {
  const uint64_t row_blocks = part.spec->shape.back() / part.format->block_elems;
  const uint64_t n_shared = routing.n_constant() / part.format->block_elems;
  const bool embedding = part.spec->kind == TensorKind::token_embd;
  const uint64_t key = stream_key(seed, embedding ? TensorKind::token_embd : TensorKind::attn_k, part.spec->layer, 1);
  Payload shared = part;
  std::vector<std::byte> columns(n_shared * part.format->block_bytes);
  for (uint64_t row = first / row_blocks; row * row_blocks < first + n; ++row) {
    shared.key = random_word(key, routing.shared_row(part.spec->kind, row));
    fill(shared, unit, 0, n_shared, columns.data());
    const uint64_t begin = std::max(first, row * row_blocks), end = std::min(first + n, row * row_blocks + n_shared);
    if (begin >= end) continue;
    const size_t block_bytes = part.format->block_bytes;
    std::memcpy(out + (begin - first) * block_bytes, columns.data() + (begin - row * row_blocks) * block_bytes, (end - begin) * block_bytes);
  }
}

void fill_router(const ContextRouting& routing, const Payload& part, uint64_t first, size_t n, std::byte* out) {
  std::vector<float> values(n);
  const uint64_t cols = part.spec->shape.back();
  for (size_t i = 0; i < n; ++i) {
    const float weight = routing.router_weight(part.spec->layer, (first + i) % cols);
    values[i] = random_word(part.key, first + i) >> 63 != 0 ? weight : -weight;
  }
  std::memcpy(out, values.data(), n * sizeof(float));
}

// Gives blocks [first, first + n) of `part`, random so far, their part in the routing.
void shape_routing(const ContextRouting& routing, const Payload& part, uint64_t seed, float unit, uint64_t first, size_t n,
                   std::byte* out) {
  const TensorKind kind = part.spec->kind;
  if (part.spec->shape.size() < 2) return;
  if (kind == TensorKind::ffn_gate_inp) return fill_router(routing, part, first, n, out);
  if (routing.has_shared_columns(kind)) share_columns(routing, part, seed, unit, first, n, out);
  const uint64_t row_blocks = part.spec->shape.back() / part.format->block_elems;
  for (size_t i = 0; i < n; ++i) {
    const uint64_t row = (first + i) / row_blocks, column = (first + i) % row_blocks * part.format->block_elems;
    if (!routing.is_kept(kind, row, column)) std::memset(out + i * part.format->block_bytes, 0, part.format->block_bytes);
  }
}

bool adds_to_residual(TensorKind kind) {
  return kind == TensorKind::attn_output || kind == TensorKind::ffn_down_exps;
}

float deviation_of(const HParams& hparams, const TensorSpec& spec, const ContextRouting* routing) {
  if (spec.shape.size() < 2) return 0;
  if (routing != nullptr && (spec.kind == TensorKind::attn_q || spec.kind == TensorKind::attn_k)) return routing->query_deviation();
  if (spec.kind == TensorKind::token_embd) return 1;
  double deviation = 1 / std::sqrt(static_cast<double>(spec.shape.back()));
  if (adds_to_residual(spec.kind)) deviation /= std::sqrt(2.0 * hparams.n_layer);
  return static_cast<float>(deviation);
}

const Format& format_for(const TensorSpec& spec, const Format& type) {
  if (spec.shape.size() < 2 || spec.kind == TensorKind::ffn_gate_inp) return format_of(DType::F32);
  if (spec.kind == TensorKind::output)
    return format_of(type.dtype == DType::Q8_0 ? DType::Q8_0 : DType::Q6_K);
  return type;
}

std::vector<OutputTensor> lay_out(const HParams& hparams, const std::vector<TensorSpec>& specs,
                                  const Format& type, const SyntheticOptions& options,
                                  const ContextRouting* routing) {
  std::vector<OutputTensor> tensors;
  for (const TensorSpec& spec : specs) {
    const bool experts = spec.shape.size() == 3;
    const uint64_t n_parts = experts ? spec.shape[0] : 1;
    const std::vector<uint64_t> part_shape(spec.shape.begin() + (experts ? 1 : 0),
                                           spec.shape.end());
    uint64_t n_elems = 1;
    for (const uint64_t d : part_shape) n_elems *= d;
    for (uint64_t e = 0; e < n_parts; ++e) {
      const bool own_tensor = e == 0 || options.split_experts;
      if (own_tensor && experts && options.split_experts)
        tensors.push_back(
            {split_expert_name(spec.kind, spec.layer, static_cast<int>(e)), part_shape, {}});
      else if (own_tensor)
        tensors.push_back({spec.gguf_name, spec.shape, {}});
      tensors.back().parts.push_back({&spec, &format_for(spec, type), n_elems,
                                      stream_key(options.seed, spec.kind, spec.layer, e),
                                      deviation_of(hparams, spec, routing)});
    }
  }
  return tensors;
}

// ---- the model
// -----------------------------------------------------------------------------------

// Small, in the proportions of the large ones.
HParams tiny_hparams() {
  HParams h = *mixtral_hparams("8x7b");
  h.n_layer = 4;
  h.n_embd = 256;
  h.n_ff = 512;
  h.n_head = 8;
  h.n_head_kv = 2;
  h.head_dim = h.n_rot = 32;
  h.n_vocab = h.n_ctx_train = 2048;
  return h;
}

HParams shape_of(const SyntheticOptions& options) {
  std::optional<HParams> h = options.shape == "tiny" ? tiny_hparams() : mixtral_hparams(options.shape);
  if (!h) fail(ErrorKind::usage, "unknown shape '", options.shape, "'; choose one of: 8x7b 8x22b tiny");
  h->name = concat("synthetic ", options.shape, " ", options.type, options.routing == SyntheticRouting::mixtral ? " mixtral routing" : "");
  if (options.n_layer > 0) h->n_layer = options.n_layer;
  return *h;
}

// A SentencePiece vocabulary of invented pieces: specials, bytes, ASCII, then letters glued to
// pairs, to pairs with a leading space, to quadruples, so that every piece can be merged from two
// shorter.
Vocab invent_vocab(uint32_t n_vocab) {
  Vocab vocab;
  vocab.model = "llama";
  vocab.pre = "default";
  const auto add = [&](std::string text, TokenType type) {
    if (vocab.tokens.size() >= n_vocab) return;
    const bool merged = type == TokenType::normal;
    vocab.scores.push_back(merged ? -static_cast<double>(vocab.tokens.size()) : 0.0);
    vocab.tokens.push_back(std::move(text));
    vocab.types.push_back(type);
  };
  add("<unk>", TokenType::unknown);
  add("<s>", TokenType::control);
  add("</s>", TokenType::control);
  constexpr const char* kHex = "0123456789ABCDEF";
  for (size_t b = 0; b < 256; ++b)
    add(std::string("<0x") + kHex[b / 16] + kHex[b % 16] + ">", TokenType::byte);
  const std::string space = "\xe2\x96\x81";
  add(space, TokenType::normal);
  for (char c = '!'; c <= '~'; ++c) add(std::string(1, c), TokenType::normal);
  std::vector<std::string> pairs;
  const std::string letters = "etaoinsrhldcumfpgwybvkxjqz";
  for (const char c : letters) add(space + c, TokenType::normal);
  for (const char a : letters)
    for (const char b : letters) pairs.push_back({a, b});
  for (const std::string& pair : pairs) add(pair, TokenType::normal);
  for (const std::string& pair : pairs) add(space + pair, TokenType::normal);
  for (size_t i = 0; vocab.tokens.size() < n_vocab; ++i)
    add(pairs[i / pairs.size()] + pairs[i % pairs.size()], TokenType::normal);
  vocab.unk = 0;
  vocab.bos = 1;
  vocab.eos = 2;
  vocab.add_bos = true;
  vocab.add_eos = false;
  vocab.add_space_prefix = true;
  return vocab;
}

uint32_t file_type_of(const Format& type) {
  switch (type.dtype) {
    case DType::Q4_1:
      return 3;
    case DType::Q5_0:
      return 8;
    case DType::Q5_1:
      return 9;
    case DType::IQ4_NL:
      return 25;
    case DType::IQ4_XS:
      return 30;
    case DType::IQ2_XXS:
      return 19;
    case DType::IQ2_XS:
      return 20;
    case DType::IQ3_XXS:
      return 23;
    case DType::IQ1_S:
      return 24;
    case DType::IQ3_S:
      return 26;
    case DType::IQ2_S:
      return 28;
    case DType::TQ1_0:
      return 36;
    case DType::TQ2_0:
      return 37;
    default:
      break;
  }
  for (const Recipe& recipe : all_recipes()) {
    if (recipe.base == type.dtype) return static_cast<uint32_t>(recipe.file_type);
  }
  return 1024;  // llama.cpp's "guessed"
}

const Format& find_type(const std::string& name) {
  // IQ1_M, whose scale lies in pieces, is not offered.
  const auto offered = [](const Format& format) { return format.dtype != DType::IQ1_M; };
  if (const Format* format = find_format(name); format != nullptr && offered(*format)) return *format;
  std::string choices;
  for (const Format& format : all_formats())
    if (offered(format)) choices += concat(choices.empty() ? "" : " ", format.name);
  fail(ErrorKind::usage, "unknown type '", name, "'; choose one of: ", choices);
}

void declare(GgufWriter& writer, const HParams& hparams, const Format& type,
             const std::vector<OutputTensor>& tensors) {
  for (GgufKeyValue& kv : hparams_metadata(hparams)) writer.set(kv.key, kv.value);
  writer.set("general.file_type", GgufValue::u32(file_type_of(type)));
  writer.set("general.quantization_version", GgufValue::u32(2));
  for (GgufKeyValue& kv : vocab_metadata(invent_vocab(hparams.n_vocab)))
    writer.set(kv.key, kv.value);
  for (const OutputTensor& tensor : tensors)
    writer.add_tensor(tensor.name, *tensor.parts[0].format, tensor.shape);
}

class Generator {
 public:
  Generator(GgufWriter& writer, const SyntheticOptions& options, const ContextRouting* routing)
      : options_(options),
        routing_(routing),
        n_threads_(thread_count(options.n_threads)),
        queue_(3, [&writer](std::span<const std::byte> bytes) { writer.write(bytes); }) {
    for (const Format& format : all_formats()) {
      const ScaleFields* fields = scale_fields(format.dtype);
      if (fields != nullptr)
        unit_[static_cast<size_t>(format.dtype)] = unit_deviation(format, *fields);
    }
  }

  void run(const std::vector<OutputTensor>& tensors) {
    progress_.n_tensors = tensors.size();
    for (const OutputTensor& tensor : tensors)
      for (const Payload& part : tensor.parts) progress_.total_bytes += part.n_bytes();
    for (const OutputTensor& tensor : tensors) {
      progress_.tensor = tensor.name;
      for (const Payload& part : tensor.parts) make(part);
      ++progress_.tensor_index;
    }
    queue_.finish();
    check_cancel();
  }

 private:
  void check_cancel() const {
    if (options_.cancel != nullptr && options_.cancel->load())
      fail(ErrorKind::cancelled, "interrupted");
  }

  void make(const Payload& part) {
    const size_t block_bytes = part.format->block_bytes;
    const uint64_t step = kChunkBytes / block_bytes / kGrainBlocks * kGrainBlocks;
    for (uint64_t first = 0; first < part.n_blocks(); first += step) {
      check_cancel();
      const size_t n = std::min(step, part.n_blocks() - first);
      WriteQueue::Buffer buffer = queue_.take();
      buffer.resize(n * block_bytes);
      const float unit = unit_[static_cast<size_t>(part.format->dtype)];
      parallel_for(n_threads_, n, kGrainBlocks, [&](size_t begin, size_t end) {
        std::byte* out = buffer.data() + begin * block_bytes;
        fill(part, unit, first + begin, end - begin, out);
        if (routing_ != nullptr) shape_routing(*routing_, part, options_.seed, unit, first + begin, end - begin, out);
      });
      progress_.done_bytes += buffer.size();
      queue_.put(std::move(buffer));
      if (options_.progress) options_.progress(progress_);
    }
  }

  const SyntheticOptions& options_;
  const ContextRouting* routing_;  // null: uniform
  int n_threads_;
  std::array<float, kDTypeSlots> unit_{};  // unit_deviation of each format
  ConvertProgress progress_;
  WriteQueue queue_;
};

}  // namespace

void make_synthetic(const std::filesystem::path& output, const SyntheticOptions& options) {
  check_whole_name(output);
  check_overwrite(output, options.overwrite);
  const Format& type = find_type(options.type);
  const HParams hparams = shape_of(options);
  const std::vector<TensorSpec> specs = tensor_table(hparams);
  std::optional<ContextRouting> routing;
  if (options.routing == SyntheticRouting::mixtral)
    routing.emplace(hparams, type.block_elems);
  const std::vector<OutputTensor> tensors = lay_out(hparams, specs, type, options, routing ? &*routing : nullptr);
  GgufWriter writer(output);
  declare(writer, hparams, type, tensors);
  writer.begin();
  Generator(writer, options, routing ? &*routing : nullptr).run(tensors);
  writer.finish();
}

}  // namespace duet
