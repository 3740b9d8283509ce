// Which tensor is stored in which format: llama.cpp's mixtures, so that file sizes and perplexities
// compare with published ones (facts: its src/llama-quant.cpp; checked against its quantizer by
// tests/oracle/recipes_oracle.py).
#pragma once

#include <cstdint>
#include <regex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "converters/convert.h"
#include "formats/schema.h"
#include "quant/format.h"

namespace duet {

// general.file_type of GGUF.
enum class FileType : uint32_t {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q8_0 = 7,
  Q2_K = 10,
  Q3_K_S = 11,
  Q3_K_M = 12,
  Q3_K_L = 13,
  Q4_K_S = 14,
  Q4_K_M = 15,
  Q5_K_S = 16,
  Q5_K_M = 17,
  Q6_K = 18,
  IQ4_NL = 25,
  IQ4_XS = 30,
  BF16 = 32,
};

struct Recipe {
  const char* name;
  FileType file_type;
  DType base;  // of every matrix without a rule of its own
};

std::span<const Recipe> all_recipes();
// Exact upper-case name; Error(usage) naming the choices otherwise.
const Recipe& find_recipe(std::string_view name);

// The format a type name in either case stands for, with an encoder; Error(usage) otherwise.
const Format& writable_format(std::string_view name);

// The types that options ask for instead of the recipe's.
class TypeRules {
 public:
  explicit TypeRules(const ConvertOptions& options);  // Error(usage): not a rule, not a type
  // The recipe's format (with options.imatrix, that for it), or another. Error(usage) when its block does not divide the rows.
  const Format& format(const Recipe& recipe, const HParams& hparams, const TensorSpec& spec);
  bool name(const std::string& tensor) const;  // whether a rule says something of it
  void check_used() const;  // Error(usage) for a rule that has met no tensor

 private:
  struct Rule {
    std::string text;
    std::regex pattern;
    const Format* format;
    bool used = false;
  };
  std::vector<Rule> rules_;
  bool has_imatrix_;
};

// Format of one tensor. Norms, the router, one-dimensional and unscaled tensors are F32 in every
// recipe. Rows that a format's block does not divide get the next format that fits, at last F16. has_imatrix: errors are weighted
// by an importance matrix, with which llama.cpp's mixtures differ in the first layers.
const Format& recipe_format(const Recipe& recipe, const HParams& hparams, const TensorSpec& spec, bool has_imatrix = false);

}  // namespace duet
