// The one table of formats. To add a format: DType and block in format.h, a new quant/<name>.cpp
// that defines its Format, and one row each in the two lists here.
#include <algorithm>
#include <array>

#include "base/error.h"
#include "quant/block_parts.h"
#include "quant/format.h"

namespace duet {

extern const Format kFormatF32, kFormatF16, kFormatBF16;
extern const Format kFormatQ4_0, kFormatQ4_1, kFormatQ5_0, kFormatQ5_1, kFormatQ8_0;
extern const Format kFormatQ2_K, kFormatQ3_K, kFormatQ4_K, kFormatQ5_K, kFormatQ6_K;
extern const Format kFormatIQ1_S, kFormatIQ1_M, kFormatIQ2_XXS, kFormatIQ2_XS, kFormatIQ2_S;
extern const Format kFormatIQ3_XXS, kFormatIQ3_S, kFormatIQ4_NL, kFormatIQ4_XS;
extern const Format kFormatTQ1_0, kFormatTQ2_0;

std::span<const Format> all_formats() {
  static const std::array table = {
      kFormatF32,  kFormatF16,  kFormatBF16, kFormatQ4_0,   kFormatQ4_1,
      kFormatQ5_0, kFormatQ5_1, kFormatQ8_0, kFormatQ2_K,   kFormatQ3_K,
      kFormatQ4_K, kFormatQ5_K, kFormatQ6_K, kFormatIQ4_NL, kFormatIQ4_XS,
      kFormatIQ1_S, kFormatIQ1_M, kFormatIQ2_XXS, kFormatIQ2_XS, kFormatIQ2_S,
      kFormatIQ3_XXS, kFormatIQ3_S, kFormatTQ1_0, kFormatTQ2_0,
  };
  return table;
}

const Format* find_format(uint32_t ggml_type_id) {
  const auto formats = all_formats();
  const auto it = std::find_if(formats.begin(), formats.end(), [&](const Format& f) {
    return static_cast<uint32_t>(f.dtype) == ggml_type_id;
  });
  return it == formats.end() ? nullptr : &*it;
}

const Format* find_format(std::string_view name) {
  const auto formats = all_formats();
  const auto it =
      std::find_if(formats.begin(), formats.end(), [&](const Format& f) { return name == f.name; });
  return it == formats.end() ? nullptr : &*it;
}

const Format& format_of(DType dtype) {
  const Format* format = find_format(static_cast<uint32_t>(dtype));
  DUET_ASSERT(format != nullptr);
  return *format;
}

size_t row_bytes(const Format& format, size_t cols) {
  DUET_ASSERT(cols % format.block_elems == 0);
  return cols / format.block_elems * format.block_bytes;
}

size_t act_row_bytes(ActFormat format, size_t cols) {
  if (format == ActFormat::f32) return cols * sizeof(float);
  const size_t elems = format == ActFormat::act32 ? 32 : 256;
  DUET_ASSERT(cols % elems == 0);
  return cols / elems * (format == ActFormat::act32 ? sizeof(BlockAct32) : sizeof(BlockAct256));
}

extern const BlockGrid kGridQ4_0, kGridQ4_1, kGridQ5_0, kGridQ5_1, kGridQ8_0;
extern const BlockGrid kGridIQ4_NL, kGridIQ4_XS;
extern const BlockGrid kGridQ2_K, kGridQ3_K, kGridQ4_K, kGridQ5_K, kGridQ6_K;

const BlockGrid* block_grid(DType dtype) {
  switch (dtype) {
    case DType::Q4_0: return &kGridQ4_0;
    case DType::Q4_1: return &kGridQ4_1;
    case DType::Q5_0: return &kGridQ5_0;
    case DType::Q5_1: return &kGridQ5_1;
    case DType::Q8_0: return &kGridQ8_0;
    case DType::Q2_K: return &kGridQ2_K;
    case DType::Q3_K: return &kGridQ3_K;
    case DType::Q4_K: return &kGridQ4_K;
    case DType::Q5_K: return &kGridQ5_K;
    case DType::Q6_K: return &kGridQ6_K;
    case DType::IQ4_NL: return &kGridIQ4_NL;
    case DType::IQ4_XS: return &kGridIQ4_XS;
    default: return nullptr;
  }
}

std::string ggml_type_name(uint32_t ggml_type_id) {
  // By id; the gaps are interleaved layouts that were withdrawn from files.
  static constexpr const char* names[] = {
      "F32",   "F16",        "Q4_0",       "Q4_1",       "Q4_2",     "Q4_3",     "Q5_0",
      "Q5_1",  "Q8_0",       "Q8_1",       "Q2_K",       "Q3_K",     "Q4_K",     "Q5_K",
      "Q6_K",  "Q8_K",       "IQ2_XXS",    "IQ2_XS",     "IQ3_XXS",  "IQ1_S",    "IQ4_NL",
      "IQ3_S", "IQ2_S",      "IQ4_XS",     "I8",         "I16",      "I32",      "I64",
      "F64",   "IQ1_M",      "BF16",       "Q4_0_4_4",   "Q4_0_4_8", "Q4_0_8_8", "TQ1_0",
      "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4",    "NVFP4",    "Q1_0",
      "Q2_0",
  };
  if (ggml_type_id < std::size(names)) return names[ggml_type_id];
  return concat("type ", ggml_type_id);
}

}  // namespace duet
