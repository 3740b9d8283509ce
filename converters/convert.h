// Building GGUF files: from a Hugging Face folder, from another GGUF, from nothing (synthetic).
// Bounded memory: one tensor (for experts: one expert slice) of float values at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "formats/gguf.h"
#include "formats/lora.h"
#include "formats/schema.h"

namespace duet {

// Bytes of source read so far, of how many, and the tensor being worked on. Called from the thread
// that called convert, at least once per tensor.
struct ConvertProgress {
  uint64_t done_bytes = 0, total_bytes = 0;
  size_t tensor_index = 0, n_tensors = 0;
  std::string tensor;
};

struct ConvertOptions {
  std::string recipe = "Q4_K_M";  // a name of recipe_names()
  // Types that replace those of the recipe, by name in either case; "": the recipe's.
  std::string token_embedding_type = {}, output_tensor_type = {};
  // "REGEX=TYPE": for matrices in whose name the expression is found; the first that fits wins, before
  // the two above. Norms and the router stay F32.
  std::vector<std::string> tensor_types = {};
  // A size instead of a recipe: the type of every tensor that no rule above names is chosen so that the file has
  // at most so many bytes, or its weights on average so many bits (converters/target.h). 0: none.
  uint64_t target_bytes = 0;
  double target_bpw = 0;
  bool vocab_only = false;
  bool overwrite = false;  // an existing output is an error otherwise
  // Goes on with what an interrupted run has left (base/resumable_file.h), and leaves what there is when it is
  // interrupted itself.
  bool resume = false;
  std::string program = {};  // which program this is: another one's unfinished output is not gone on with
  uint64_t split_max_bytes = 0;  // more make several files (converters/repack.h); 0: always one
  int n_threads = 0;       // 0: HostCores::usable()
  std::string name;        // general.name; "": from the folder
  std::string imatrix;     // importance matrix (formats/imatrix.h) that weights squared errors; "": none
  std::vector<LoraChoice> loras = {};  // adapters to merge into the weights
  NoticeFn notice;         // one-line remarks; may be null
  std::function<void(const ConvertProgress&)> progress;
  const std::atomic<bool>* cancel = nullptr;  // true -> Error(cancelled)
};

struct PlannedTensor {
  std::string name;
  const Format* format;
  std::vector<uint64_t> shape;
  uint64_t n_bytes;
};
struct ConvertPlan {
  std::string recipe;
  uint64_t source_bytes = 0, output_bytes = 0;  // of all tensors
  uint64_t file_bytes = 0;                      // of the file, or of all its parts
  size_t n_files = 1;
  double bits_per_weight = 0;
  std::vector<PlannedTensor> tensors;
};

// Recipes as users name them: F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q4_K_M Q4_K_S Q4_0 Q3_K_L Q3_K_M
// Q3_K_S Q2_K IQ4_NL IQ4_XS.
std::vector<std::string> recipe_names();

// Model folder -> GGUF: Hugging Face's form (config.json, *.safetensors, tokenizer.model or tokenizer.json) or
// Mistral's (params.json, consolidated*.safetensors, tokenizer.model).
ConvertPlan plan_convert(const std::filesystem::path& folder, const ConvertOptions& options);
void convert(const std::filesystem::path& folder, const std::filesystem::path& output,
             const ConvertOptions& options);

// GGUF (any layout) -> GGUF of another recipe, merged expert layout, metadata kept.
ConvertPlan plan_quantize(const std::filesystem::path& input, const ConvertOptions& options);
void quantize(const std::filesystem::path& input, const std::filesystem::path& output,
              const ConvertOptions& options);

// A model of random weights for benchmarks. Routing of random tokens: uniform: of its own for each;
// mixtral: consecutive tokens share experts as often as in Mixtral (converters/synthetic_routing.h).
enum class SyntheticRouting { uniform, mixtral };
struct SyntheticOptions {
  std::string shape = "8x7b";  // "8x7b", "8x22b", "tiny"
  uint32_t n_layer = 0;        // 0: the shape's own
  std::string type = "Q4_K";   // a Format name
  bool split_experts = false;  // old per-expert layout
  SyntheticRouting routing = SyntheticRouting::uniform;
  uint64_t seed = 1;
  bool overwrite = false;
  int n_threads = 0;
  NoticeFn notice;
  std::function<void(const ConvertProgress&)> progress;
  const std::atomic<bool>* cancel = nullptr;
};
void make_synthetic(const std::filesystem::path& output, const SyntheticOptions& options);

}  // namespace duet
