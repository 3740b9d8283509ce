// Tensor types of every recipe against those of llama.cpp's quantizer, for full-size and odd shapes
// (table made by tests/oracle/recipes_oracle.py).
#include "converters/recipe.h"

#include <doctest/doctest.h>

#include <map>

#include "base/json.h"
#include "base/mapped_file.h"
#include "converters/convert.h"
#include "tests/support/errors.h"

namespace duet {
namespace {

HParams hparams_from(const Json& shape) {
  const auto at = [&](size_t i) { return shape[i].get<uint32_t>(); };
  HParams h;
  h.n_layer = at(0);
  h.n_embd = at(1);
  h.n_ff = at(2);
  h.n_head = at(3);
  h.n_head_kv = at(4);
  h.head_dim = h.n_rot = at(5);
  h.n_vocab = at(6);
  h.n_expert = at(7);
  h.tied_output = at(8) != 0;
  return h;
}

// "blk.3.attn_q.weight" -> "attn_q".
std::string short_name(const TensorSpec& spec) {
  std::string name =
      spec.gguf_name.substr(0, spec.gguf_name.size() - std::string(".weight").size());
  return spec.layer < 0 ? name : name.substr(name.rfind('.') + 1);
}

// {"attn_q": "Q4_K*6", "ffn_down": "Q6_K*2 Q4_K*4", ...}: types over the layers, norms left out.
std::map<std::string, std::string> types_of(const Recipe& recipe, const HParams& hparams, bool has_imatrix) {
  std::map<std::string, std::vector<std::pair<std::string, int>>> runs;
  for (const TensorSpec& spec : tensor_table(hparams)) {
    const Format& format = recipe_format(recipe, hparams, spec, has_imatrix);
    if (spec.shape.size() < 2) {
      CHECK(format.dtype == DType::F32);
      continue;
    }
    auto& list = runs[short_name(spec)];
    if (list.empty() || list.back().first != format.name) list.emplace_back(format.name, 0);
    ++list.back().second;
  }
  std::map<std::string, std::string> out;
  for (const auto& [name, list] : runs)
    for (const auto& [type, n] : list)
      out[name] += concat(out[name].empty() ? "" : " ", type, "*", n);
  return out;
}

TEST_CASE("recipe: every recipe gives every tensor the type that llama.cpp gives it") {
  const std::string path = DUET_SOURCE_DIR "/tests/golden/data/recipes.json";
  const Json table = parse_json(read_file(path, 1 << 20), path);
  size_t n_compared = 0, n_differing = 0;
  for (const auto& model : table["models"].items()) {
    const HParams hparams = hparams_from(model.value()["shape"]);
    CHECK(model.value()["types"].size() == recipe_names().size());
    const Json& differing = model.value()["imatrix"];
    for (const auto& plain : model.value()["types"].items())
      for (const bool has_imatrix : {false, true}) {
        const Json& expected = has_imatrix && differing.contains(plain.key()) ? differing[plain.key()] : plain.value();
        const auto types = types_of(find_recipe(plain.key()), hparams, has_imatrix);
        CHECK(types.size() == expected.size());
        for (const auto& kind : expected.items()) {
          CAPTURE(concat(model.key(), " ", plain.key(), " ", kind.key(), has_imatrix ? " with imatrix" : ""));
          REQUIRE(types.contains(kind.key()));
          CHECK(types.at(kind.key()) == kind.value().get<std::string>());
          ++n_compared;
        }
        n_differing += has_imatrix && differing.contains(plain.key());
      }
  }
  CHECK(n_compared > 2000);
  CHECK(n_differing > 20);
}

TEST_CASE("recipe: names and file types") {
  CHECK(recipe_names().size() == 16);
  CHECK(static_cast<uint32_t>(find_recipe("Q4_K_M").file_type) == 15);
  CHECK(static_cast<uint32_t>(find_recipe("BF16").file_type) == 32);
  test::check_thrown(test::thrown_by([] { find_recipe("Q4_K_X"); }), ErrorKind::usage, "Q3_K_S");
  test::check_thrown(test::thrown_by([] { find_recipe("q4_k_m"); }), ErrorKind::usage,
                     "choose one of");
}

TEST_CASE("recipe: every format that a recipe can ask for can be encoded") {
  for (const Recipe& recipe : all_recipes()) CHECK((format_of(recipe.base).encode_row != nullptr));
  for (const DType type : {DType::Q5_0, DType::Q5_1, DType::Q4_0, DType::Q8_0})
    CHECK((format_of(type).encode_row != nullptr));
}

}  // namespace
}  // namespace duet
