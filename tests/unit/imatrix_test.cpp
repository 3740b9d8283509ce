// Importance matrices: both file forms, the look-up by tensor, and what a calibration run collects.
#include "formats/imatrix.h"

#include <doctest/doctest.h>

#include <cmath>
#include <map>

#include "converters/convert.h"
#include "runtime/calibration.h"
#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/logits.h"
#include "tests/support/random_model.h"
#include "tests/support/reference_model.h"

using namespace duet;
using test::check_thrown;
using test::raw;
using test::thrown_by;

namespace {

std::string floats(const std::vector<float>& values) {
  std::string out;
  for (const float v : values) out += raw(v);
  return out;
}

std::span<const std::byte> bytes_of(const std::string& text) { return std::as_bytes(std::span(text)); }

std::string legacy_entry(const std::string& name, int32_t n_calls, const std::vector<float>& values) {
  return raw(static_cast<int32_t>(name.size())) + name + raw(n_calls) + raw(static_cast<int32_t>(values.size())) + floats(values);
}

TensorSpec spec_of(TensorKind kind, std::vector<uint64_t> shape) {
  return {.kind = kind, .layer = 0, .gguf_name = tensor_name(kind, 0), .shape = std::move(shape)};
}

}  // namespace

TEST_CASE("imatrix: written and read back") {
  const test::TempFolder folder;
  Imatrix imatrix;
  imatrix.datasets = {"a.txt", "b.txt"};
  imatrix.n_chunks = 3;
  imatrix.chunk_size = 512;
  imatrix.entries["blk.0.attn_q.weight"] = {{1, 2, 3}, {7}};
  imatrix.entries["blk.0.ffn_up_exps.weight"] = {{1, 2, 3, 4, 0, 0}, {5, 6, 0}};
  write_imatrix(folder / "i.gguf", imatrix);
  const Imatrix back = read_imatrix(folder / "i.gguf");
  CHECK(back.datasets == imatrix.datasets);
  CHECK(back.n_chunks == 3);
  CHECK(back.chunk_size == 512);
  CHECK(!back.legacy);
  REQUIRE(back.entries.size() == 2);
  for (const auto& [name, entry] : imatrix.entries) {
    CHECK(back.entries.at(name).sums == entry.sums);
    CHECK(back.entries.at(name).counts == entry.counts);
  }
}

TEST_CASE("imatrix: the legacy form, with and without its tail") {
  const std::string entries = raw(2) + legacy_entry("blk.0.attn_q.weight", 4, {8, 4}) + legacy_entry("blk.0.ffn_up.1.weight", 2, {6, 2});
  for (const std::string& tail : {std::string(), raw(9) + raw(3) + "txt"}) {
    const Imatrix imatrix = parse_imatrix(bytes_of(entries + tail), "old.dat");
    CHECK(imatrix.legacy);
    CHECK(imatrix.n_chunks == (tail.empty() ? 0 : 9));
    CHECK(imatrix.datasets.size() == (tail.empty() ? 0 : 1));
    const auto q = find_importance(imatrix, spec_of(TensorKind::attn_q, {5, 2}), "old.dat");
    REQUIRE(q);
    CHECK(q->weights == std::vector<float>{2, 1});
    // Of the old experts' own names: one of two is there.
    const auto up = find_importance(imatrix, spec_of(TensorKind::ffn_up_exps, {2, 5, 2}), "old.dat");
    REQUIRE(up);
    CHECK(up->weights == std::vector<float>{3, 1, 3, 1});
    CHECK(up->without_data == std::vector<size_t>{0});
  }
  for (size_t n = 4; n < entries.size(); ++n)
    check_thrown(thrown_by([&] { parse_imatrix(bytes_of(entries.substr(0, n)), "old.dat"); }), ErrorKind::format, "old.dat: ");
}

TEST_CASE("imatrix: experts without data have the mean of the others, and are told") {
  Imatrix imatrix;
  imatrix.entries["blk.0.ffn_up_exps.weight"] = {{2, 4, 0, 0, 12, 0}, {2, 0, 6}};
  const auto found = find_importance(imatrix, spec_of(TensorKind::ffn_up_exps, {3, 5, 2}), "i");
  REQUIRE(found);
  CHECK(found->weights == std::vector<float>{1, 2, 1.75f, 0.5f, 2, 0});
  CHECK(found->without_data == std::vector<size_t>{1});
  CHECK(!find_importance(imatrix, spec_of(TensorKind::attn_q, {5, 2}), "i"));
  imatrix.entries["blk.0.ffn_down_exps.weight"] = {{0, 0, 0, 0}, {0, 0}};
  CHECK(!find_importance(imatrix, spec_of(TensorKind::ffn_down_exps, {2, 5, 2}), "i"));
}

TEST_CASE("imatrix: what does not fit is refused by name") {
  Imatrix imatrix;
  imatrix.entries["blk.0.attn_q.weight"] = {{1, 2, 3}, {1}};
  imatrix.entries["blk.0.ffn_up_exps.weight"] = {{1, 2, 3, 4}, {1, 1}};
  for (const TensorSpec& spec : {spec_of(TensorKind::attn_q, {5, 4}), spec_of(TensorKind::ffn_up_exps, {4, 5, 2}), spec_of(TensorKind::ffn_up_exps, {4, 5, 1})})
    check_thrown(thrown_by([&] { find_importance(imatrix, spec, "i"); }), ErrorKind::format, "made with another model");

  const auto refuse = [](const auto& change, const std::string& words) {
    test::GgufBuilder file;
    file.text("general.type", "imatrix");
    file.tensors.push_back({"a.weight.in_sum2", {2, 2}, 0, floats({1, 2, 3, 4})});
    file.tensors.push_back({"a.weight.counts", {1, 2}, 0, floats({1, 2})});
    change(file);
    const auto bytes = file.build();
    check_thrown(thrown_by([&] { parse_imatrix(bytes, "i.gguf"); }), ErrorKind::format, words);
  };
  refuse([](auto& f) { f.keys.clear(); }, "not an importance matrix");
  refuse([](auto& f) { f.tensors.pop_back(); }, "no counts");
  refuse([](auto& f) { f.tensors.erase(f.tensors.begin()); }, "without entries");
  refuse([](auto& f) { f.tensors[1] = {"a.weight.counts", {1, 3}, 0, floats({1, 2, 3})}; }, "sums of 2 matrices, counts of 3");
  refuse([](auto& f) { f.tensors[0].data = floats({1, 2, NAN, 4}); }, "not finite");
  refuse([](auto& f) { f.tensors[0].data = floats({1, 2, -1, 4}); }, "negative");
  refuse([](auto& f) { f.tensors[1] = {"a.weight.counts", {1, 2}, 1, std::string(4, '\0')}; }, "expected F32");
  check_thrown(thrown_by([&] { parse_imatrix(bytes_of(raw(-1)), "i"); }), ErrorKind::format, "negative number");
  check_thrown(thrown_by([&] { parse_imatrix(bytes_of(raw(0)), "i"); }), ErrorKind::format, "without entries");
}

TEST_CASE("imatrix: a calibration run sums the squares that the naive model has") {
  const test::RandomModel model{.hparams = test::tiny_hparams()};
  const auto path = test::write_model(model, "imatrix.gguf");
  const Engine engine = Engine::open(path, {.n_threads = 2, .isa = {}, .notice = {}});
  const auto ids = test::some_tokens(48, model.hparams.n_vocab);
  const GgufFile file = GgufFile::open(path);
  const HParams hparams = read_hparams(file, [](const std::string&) {});
  std::map<std::string, std::vector<double>> want;
  std::map<std::string, std::map<int, double>> counts;
  for (size_t chunk = 0; chunk < 3; ++chunk)
    test::reference_logits(file, hparams, std::span(ids).subspan(chunk * 16, 16), [&](const std::string& tensor, int expert, const std::vector<double>& row, double) {
      const size_t e = static_cast<size_t>(std::max(expert, 0)), n = expert < 0 ? 1 : hparams.n_expert;
      auto& sums = want[tensor];
      sums.resize(n * row.size());
      for (size_t c = 0; c < row.size(); ++c) sums[e * row.size() + c] += row[c] * row[c];
      counts[tensor][static_cast<int>(e)] += 1;
    });
  const Imatrix got = collect_imatrix(engine, ids, 16, {.n_batch = 7, .output = true});
  REQUIRE(got.entries.size() == want.size());
  for (const auto& [name, sums] : want) {
    CAPTURE(name);
    const ImatrixEntry& entry = got.entries.at(name);
    REQUIRE(entry.sums.size() == sums.size());
    for (size_t i = 0; i < sums.size(); ++i) CHECK(double{entry.sums[i]} == doctest::Approx(sums[i]).epsilon(1e-3));
    for (size_t e = 0; e < entry.counts.size(); ++e) CHECK(double{entry.counts[e]} == counts[name][static_cast<int>(e)]);
  }
  const auto coverage = expert_coverage(got, hparams, 1);
  REQUIRE(coverage.size() == hparams.n_expert);
  uint64_t total = 0;
  for (const uint64_t n : coverage) total += n;
  CHECK(total == 48 * hparams.n_expert_used);
  CHECK(!collect_imatrix(engine, ids, 16, {}).entries.contains("output.weight"));
}

TEST_CASE("imatrix: quantize weights errors by it, expert by expert") {
  const test::TempFolder folder;
  const test::RandomModel model{.hparams = test::small_mixtral_hparams(1, 512)};
  const auto source = test::write_model(model, "imatrix-source.gguf");
  Imatrix imatrix;
  const size_t cols = model.hparams.n_embd, n_expert = model.hparams.n_expert;
  ImatrixEntry gate{std::vector<float>(n_expert * cols, 1.0f), std::vector<float>(n_expert, 1.0f)};
  for (size_t c = 0; c < cols; c += 16) gate.sums[2 * cols + c] = 1000;  // expert 2: these columns matter
  gate.counts[5] = 0;
  imatrix.entries["blk.0.ffn_gate_exps.weight"] = gate;
  write_imatrix(folder / "i.gguf", imatrix);
  std::vector<std::string> notices;
  ConvertOptions options{.recipe = "Q4_K_S", .n_threads = 2, .name = {}, .imatrix = {}, .notice = [&](const std::string& n) { notices.push_back(n); }, .progress = {}};
  quantize(source, folder / "plain.gguf", options);
  CHECK(notices.empty());
  options.imatrix = (folder / "i.gguf").string();
  quantize(source, folder / "weighted.gguf", options);
  REQUIRE(notices.size() == 2);
  CHECK(notices[0].find("1 experts in 1 layers") != std::string::npos);
  CHECK(notices[1].find("no data for") != std::string::npos);

  const GgufFile from = GgufFile::open(source), plain = GgufFile::open(folder / "plain.gguf"), weighted = GgufFile::open(folder / "weighted.gguf");
  REQUIRE(weighted.get_string("quantize.imatrix.file") != nullptr);
  CHECK(*weighted.get_string("quantize.imatrix.file") == "i.gguf");
  const auto values = [](const GgufFile& f) {
    const TensorView& t = *f.find_tensor("blk.0.ffn_gate_exps.weight");
    std::vector<float> out(t.n_elems());
    t.format->decode_row(t.data.data(), out.data(), out.size());
    return out;
  };
  const auto x = values(from), a = values(plain), b = values(weighted);
  const size_t per_expert = x.size() / n_expert;
  // Squared error of the columns that matter, of an expert.
  const auto error = [&](const std::vector<float>& y, size_t e) {
    double sum = 0;
    for (size_t i = e * per_expert; i < (e + 1) * per_expert; i += 16) sum += (double{x[i]} - double{y[i]}) * (double{x[i]} - double{y[i]});
    return sum;
  };
  CHECK(error(b, 2) < 0.5 * error(a, 2));
  CHECK(error(b, 1) > 0.8 * error(a, 1));  // even weights
  for (const char* same : {"blk.0.ffn_down_exps.weight", "token_embd.weight"}) {
    const auto p = plain.find_tensor(same)->data, w = weighted.find_tensor(same)->data;
    CHECK(std::equal(p.begin(), p.end(), w.begin(), w.end()));
  }
  imatrix.entries.clear();
  imatrix.entries["blk.7.attn_q.weight"] = {{1}, {1}};
  write_imatrix(folder / "other.gguf", imatrix);
  options.imatrix = (folder / "other.gguf").string();
  check_thrown(thrown_by([&] { quantize(source, folder / "none.gguf", options); }), ErrorKind::format, "made with another model");
}
