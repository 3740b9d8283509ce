#include "formats/logits_reference.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <random>

#include "base/mapped_file.h"
#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"

using namespace duet;
using test::check_thrown;
using test::thrown_by;

namespace {

constexpr uint32_t kVocab = 1000, kCtx = 16, kChunks = 11;  // 7 rows a chunk: 77 in all, blocks of 32, 32, 13

std::vector<float> some_logits(size_t n_rows) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 4);
  std::vector<float> out(n_rows * kVocab);
  for (float& x : out) x = normal(random);
  for (size_t i = 0; i < kVocab; ++i) out[i] = i == 7 ? 200.0f : -200.0f;  // one sure prediction
  return out;
}

LogitsReferenceHeader some_header() {
  LogitsReferenceHeader header{"a model", kVocab, kCtx, kChunks, {}};
  for (uint32_t i = 0; i < kCtx * kChunks; ++i) header.tokens.push_back(static_cast<int32_t>(i * 37 % kVocab));
  return header;
}

std::vector<int32_t> some_targets(size_t n) {
  std::vector<int32_t> out(n);
  for (size_t i = 0; i < n; ++i) out[i] = static_cast<int32_t>(i * 13 % kVocab);
  return out;
}

// Written in pieces of 5 rows.
std::string written(const std::filesystem::path& path) {
  const LogitsReferenceHeader header = some_header();
  const size_t n = header.n_rows();
  const auto logits = some_logits(n);
  const auto targets = some_targets(n);
  LogitsReferenceWriter writer(path, header);
  for (size_t row = 0; row < n; row += 5) {
    const size_t part = std::min<size_t>(5, n - row);
    writer.add(std::span(logits).subspan(row * kVocab, part * kVocab), std::span(targets).subspan(row, part), 2);
  }
  CHECK(!std::filesystem::exists(path));
  writer.finish();
  return read_file(path, 1 << 24);
}

std::span<const std::byte> bytes_of(const std::string& text) { return std::as_bytes(std::span(text)); }

void read_all(const std::string& bytes) {
  LogitsReferenceReader reader = LogitsReferenceReader::parse(bytes_of(bytes), "ref");
  ReferenceRows rows;
  for (uint64_t i = 0; i < reader.header().n_rows(); ++i) reader.read(1, 1, rows);
}

}  // namespace

TEST_CASE("logits reference: rows come back as probabilities whose divergence is small") {
  const test::TempFolder folder;
  written(folder / "ref");
  LogitsReferenceReader reader = LogitsReferenceReader::open(folder / "ref");
  const LogitsReferenceHeader want = some_header();
  CHECK(reader.header().model == want.model);
  CHECK(reader.header().n_vocab == kVocab);
  CHECK(reader.header().n_ctx == kCtx);
  CHECK(reader.header().n_chunks == kChunks);
  CHECK(reader.header().tokens == want.tokens);
  CHECK(reader.header().n_rows() == 77);
  const auto logits = some_logits(77);
  const auto targets = some_targets(77);
  ReferenceRows rows;
  for (size_t row = 0; row < 77; row += 11) {
    reader.read(11, 2, rows);
    for (size_t i = 0; i < 11; ++i) {
      const float* x = logits.data() + (row + i) * kVocab;
      double sum = 0, total = 0, kld = 0;
      size_t best = 0;
      for (size_t c = 0; c < kVocab; ++c) {
        if (x[c] > x[best]) best = c;
      }
      for (size_t c = 0; c < kVocab; ++c) sum += std::exp(double{x[c]} - double{x[best]});
      const double offset = double{x[best]} + std::log(sum);
      for (size_t c = 0; c < kVocab; ++c) {
        const double p = double{rows.probs[i * kVocab + c]};
        total += p;
        if (p > 0) kld += p * (std::log(p) - (double{x[c]} - offset));
      }
      CHECK(total == doctest::Approx(1).epsilon(1e-5));
      CHECK(std::abs(kld) < 3e-7);
      CHECK(rows.top[i] == best);
      CHECK(double{rows.nll[i]} == doctest::Approx(offset - double{x[targets[row + i]]}).epsilon(1e-5));
    }
  }
  check_thrown(thrown_by([&] { reader.read(1, 1, rows); }), ErrorKind::format, "more rows");
}

TEST_CASE("logits reference: damage is told as such, wherever it is") {
  const test::TempFolder folder;
  const std::string good = written(folder / "ref");
  read_all(good);
  check_thrown(thrown_by([&] { read_all("GGUF" + good); }), ErrorKind::format, "not a reference");
  check_thrown(thrown_by([&] { read_all(""); }), ErrorKind::format, "not a reference");
  std::string version = good;
  version[8] = 2;
  check_thrown(thrown_by([&] { read_all(version); }), ErrorKind::unsupported, "version 2");
  for (const size_t n : {10ul, 23ul, 30ul, good.size() / 2, good.size() - 1})
    check_thrown(thrown_by([&] { read_all(good.substr(0, n)); }), ErrorKind::format, "ref: ");
  std::string counts = good;
  std::memset(counts.data() + 20, 0x7f, 4);  // chunks
  check_thrown(thrown_by([&] { read_all(counts); }), ErrorKind::format, "more than the file can hold");
  std::memset(counts.data() + 20, 0, 4);
  check_thrown(thrown_by([&] { read_all(counts); }), ErrorKind::format, "impossible counts");
  std::string vocab = good;
  vocab[12] = 2;  // 512 + 232 -> 514: tokens outside, blocks of another size
  vocab[13] = 2;
  check_thrown(thrown_by([&] { read_all(vocab); }), ErrorKind::format, "vocabulary");
  size_t n_refused = 0;
  for (size_t at = 24; at < good.size(); at += 97) {  // no flipped byte does anything worse than an error
    std::string flipped = good;
    flipped[at] = static_cast<char>(flipped[at] ^ 0x55);
    const auto thrown = thrown_by([&] { read_all(flipped); });
    CHECK((!thrown.kind || *thrown.kind == ErrorKind::format));
    n_refused += thrown.kind.has_value();
  }
  CHECK(n_refused > 0);
}
