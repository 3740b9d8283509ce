#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "base/json.h"
#include "base/mapped_file.h"
#include "quant/format.h"
#include "tests/support/blocks.h"
#include "tests/support/errors.h"

using namespace duet;
using namespace duet::test;

namespace {

const std::string kData = DUET_SOURCE_DIR "/tests/unit/data/quant_blocks";

// NaN payloads have no meaning; all else must agree in every bit.
bool same_bits(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) ||
         std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
}

bool quantized(const Format& format) { return format.block_elems > 1; }

}  // namespace

TEST_CASE("formats: decoding random blocks is bit-equal to ggml") {
  const Json index = parse_json(read_file(kData + ".json", 1 << 16), "quant_blocks.json");
  const std::string bin = read_file(kData + ".bin", 1 << 20);
  std::set<std::string> seen;
  for (const Json& entry : index["formats"]) {
    const Format* format = find_format(entry["name"].get<std::string>());
    REQUIRE(format != nullptr);
    CAPTURE(std::string(format->name));
    CHECK(static_cast<uint32_t>(format->dtype) == entry["dtype"].get<uint32_t>());
    const size_t n = entry["n"].get<size_t>();
    REQUIRE(row_bytes(*format, n) == entry["bytes"].get<size_t>());
    std::vector<uint16_t> blocks(entry["bytes"].get<size_t>() /
                                 2);  // aligned as in a file: to 2 bytes
    std::memcpy(blocks.data(), bin.data() + entry["at"].get<size_t>(), blocks.size() * 2);
    std::vector<float> expected(n), got(n, 12345.0f);
    std::memcpy(expected.data(), bin.data() + entry["values_at"].get<size_t>(), n * sizeof(float));
    format->decode_row(blocks.data(), got.data(), n);
    size_t different = 0;
    for (size_t i = 0; i < n; ++i) different += !same_bits(got[i], expected[i]);
    CHECK(different == 0);
    seen.insert(format->name);
  }
  CHECK(seen.size() == all_formats().size());
}

TEST_CASE("formats: the table is consistent") {
  CHECK(all_formats().size() == 24);
  std::set<std::string> names;
  for (const Format& f : all_formats()) {
    CAPTURE(std::string(f.name));
    CHECK(static_cast<size_t>(f.dtype) < kDTypeSlots);
    CHECK(names.insert(f.name).second);
    CHECK(find_format(f.name) == &f);
    CHECK(find_format(static_cast<uint32_t>(f.dtype)) == &f);
    CHECK(&format_of(f.dtype) == &f);
    CHECK(ggml_type_name(static_cast<uint32_t>(f.dtype)) == f.name);
    CHECK(bool{f.decode_row != nullptr});
    CHECK(bool{f.scales_finite != nullptr});
    const std::string name = f.name;
    CHECK((f.encode_row == nullptr) == ((name.starts_with("IQ") && !name.starts_with("IQ4")) || name.starts_with("TQ")));
    CHECK(row_bytes(f, 3 * f.block_elems) == 3 * f.block_bytes);
    CHECK((f.act == ActFormat::f32) == !quantized(f));
  }
}

TEST_CASE("formats: unknown names and ids are null, odd rows are errors") {
  CHECK(find_format("Q4_k") == nullptr);
  CHECK(find_format("") == nullptr);
  CHECK(find_format("MXFP4") == nullptr);
  CHECK(find_format(39u) == nullptr);
  CHECK(find_format(0xffffffffu) == nullptr);
  CHECK(thrown_by([] { format_of(static_cast<DType>(9)); }).kind == ErrorKind::internal);
  CHECK(thrown_by([] { row_bytes(format_of(DType::Q4_K), 128); }).kind == ErrorKind::internal);
  CHECK(ggml_type_name(16) == "IQ2_XXS");
  CHECK(ggml_type_name(39) == "MXFP4");
  CHECK(ggml_type_name(77) == "type 77");
}

TEST_CASE("formats: size of activation rows") {
  CHECK(act_row_bytes(ActFormat::f32, 96) == 384);
  CHECK(act_row_bytes(ActFormat::act32, 96) == 3 * sizeof(BlockAct32));
  CHECK(act_row_bytes(ActFormat::act256, 512) == 2 * sizeof(BlockAct256));
  CHECK(thrown_by([] { act_row_bytes(ActFormat::act256, 128); }).kind == ErrorKind::internal);
}

TEST_CASE("formats: a scale that is not finite is noticed in any block") {
  Rng rng(4);
  for (const Format& f : all_formats()) {
    CAPTURE(std::string(f.name));
    if (!quantized(f)) continue;
    const size_t n = 3 * f.block_elems;
    std::vector<uint16_t> row(row_bytes(f, n) / 2);
    fill_random_weights(f, row.data(), n, rng);
    CHECK(f.scales_finite(row.data(), n));
    const ScaleFields fields = scale_fields(f.dtype);
    for (const int at : {fields.d, fields.dmin}) {
      if (at < 0) continue;
      for (const uint16_t bad :
           {uint16_t{0x7c00}, uint16_t{0xfc00}, uint16_t{0x7e00}, uint16_t{0xffff}}) {
        std::vector<uint16_t> broken = row;
        broken[(2 * f.block_bytes + static_cast<size_t>(at)) / 2] = bad;
        CHECK_FALSE(f.scales_finite(broken.data(), n));
        CHECK(f.scales_finite(broken.data(), 2 * f.block_elems));
      }
    }
  }
}

TEST_CASE("formats: floats that are not finite are noticed") {
  for (const DType dtype : {DType::F32, DType::F16, DType::BF16}) {
    const Format& f = format_of(dtype);
    CAPTURE(std::string(f.name));
    const float good[] = {0.0f, -1.5f, 1e-30f, 65504.0f}, bad[] = {0.0f, std::nanf(""), 1.0f, 2.0f};
    uint16_t row[8];
    f.encode_row(good, row, 4, nullptr);
    CHECK(f.scales_finite(row, 4));
    f.encode_row(bad, row, 4, nullptr);
    CHECK_FALSE(f.scales_finite(row, 4));
    CHECK(f.scales_finite(row, 1));
  }
}
