#include "formats/gguf.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <functional>

#include "base/mapped_file.h"
#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/tiny_model.h"

using namespace duet;
using namespace duet::test;

namespace {

constexpr uint32_t kQ8_0 = 8, kMxfp4 = 39;

// Some of everything: every kind of key, one to four dimensions, blocks, a tensor that needs
// padding.
GgufBuilder sample() {
  GgufBuilder b;
  b.text("general.architecture", "llama")
      .u8("a.u8", 200)
      .u16("a.u16", 60000)
      .u32("a.u32", 4000000000u);
  b.f32("a.f32", 0.25f).boolean("a.bool", true).texts("a.texts", {"x", "", "long text"});
  b.floats("a.floats", {1.5f, -2.0f}).ints("a.ints", {-1, 7});
  b.zeros("vector", {5})
      .zeros("matrix", {4, 3})
      .zeros("cube", {2, 3, 4})
      .zeros("four", {2, 1, 1, 2});
  b.tensors.push_back({"blocks", {64, 3}, kQ8_0, std::string(2 * 34 * 3, '\x11')});
  return b;
}

GgufFile parse(const std::vector<std::byte>& bytes) { return GgufFile::parse(bytes, "test.gguf"); }

struct BrokenFile {
  const char* name;
  std::function<void(GgufBuilder&)> mutate;
  ErrorKind kind;
  const char* message;
  std::function<void(std::vector<std::byte>&)> damage = {};  // of the finished bytes
};

GgufBuilder::Tensor& tensor(GgufBuilder& b, std::string_view name) {
  return *std::find_if(b.tensors.begin(), b.tensors.end(),
                       [&](const auto& t) { return t.name == name; });
}

void none(GgufBuilder&) {}
constexpr auto kFormat = ErrorKind::format;
constexpr auto kUnsupported = ErrorKind::unsupported;
const std::string kHuge = raw(uint64_t{1} << 62);

const std::vector<BrokenFile> kBrokenHeaders = {
    {"zero length", none, kFormat, "not a GGUF file: it is empty",
     [](auto& bytes) { bytes.clear(); }},
    {"three bytes", none, kFormat, "not a GGUF file", [](auto& bytes) { bytes.resize(3); }},
    {"magic only", none, kFormat, "file ends inside version", [](auto& bytes) { bytes.resize(4); }},
    {"other magic", [](GgufBuilder& b) { b.magic = "PK\x03\x04"; }, kFormat,
     "starts with 'PK\\x03\\x04'"},
    {"old ggml magic", [](GgufBuilder& b) { b.magic = "tjgg"; }, kFormat, "expected 'GGUF'"},
    {"version 0", [](GgufBuilder& b) { b.version = 0; }, kUnsupported, "version 0"},
    {"version 1", [](GgufBuilder& b) { b.version = 1; }, kUnsupported,
     "version 1, duet reads versions 2 and 3"},
    {"version 4", [](GgufBuilder& b) { b.version = 4; }, kUnsupported, "version 4"},
    {"big-endian", [](GgufBuilder& b) { b.version = 0x03000000; }, kUnsupported,
     "big-endian GGUF (version 3"},
    {"counts cut off", none, kFormat, "file ends inside metadata count",
     [](auto& bytes) { bytes.resize(20); }},
    {"too many keys", [](GgufBuilder& b) { b.n_keys = uint64_t{1} << 60; }, kFormat,
     "metadata count is 1152921504606846976"},
    {"keys beyond the file", [](GgufBuilder& b) { b.n_keys = 60000; }, kFormat,
     "metadata count is 60000"},
    {"too many tensors", [](GgufBuilder& b) { b.n_tensors = UINT64_MAX; }, kFormat,
     "tensor count is 18446744073709551615"},
    {"tensors beyond the file", [](GgufBuilder& b) { b.n_tensors = 1000; }, kFormat,
     "tensor count is 1000"},
    {"one key too many", [](GgufBuilder& b) { b.n_keys = b.keys.size() + 1; }, kFormat,
     "test.gguf: "},
};

const std::vector<BrokenFile> kBrokenMetadata = {
    {"duplicate key", [](GgufBuilder& b) { b.u8("a.u32", 1); }, kFormat,
     "metadata key 'a.u32' appears twice"},
    {"empty key", [](GgufBuilder& b) { b.keys[0].name = ""; }, kFormat, "is empty"},
    {"long key", [](GgufBuilder& b) { b.keys[0].name = std::string(70000, 'k'); }, kFormat,
     "metadata key of 70000 bytes"},
    {"key with line breaks", [](GgufBuilder& b) { b.u8("a\nb", 1).u8("a\nb", 1); }, kFormat,
     "'a\\x0ab' appears twice"},
    {"unknown value type", [](GgufBuilder& b) { b.keys[1].type = 13; }, kFormat,
     "type id 13 does not exist"},
    {"boolean of 2", [](GgufBuilder& b) { b.key("a.bool").bytes = "\x02"; }, kFormat,
     "boolean with value 2"},
    {"huge string", [](GgufBuilder& b) { b.keys[0].bytes = kHuge; }, kFormat,
     "metadata string of 4611686018427387904 bytes"},
    {"string over the cap", [](GgufBuilder& b) { b.text("big", std::string((64 << 20) + 1, 'x')); },
     kFormat, "at most 67108864"},
    {"string beyond the file", [](GgufBuilder& b) { b.keys[0].bytes = raw(uint64_t{1000000}); },
     kFormat, "truncated or damaged"},
    {"nested array",
     [](GgufBuilder& b) {
       b.keys.push_back({"n", 9, raw(9u) + raw(uint64_t{1})});
     },
     kFormat, "arrays of arrays"},
    {"array of unknown type",
     [](GgufBuilder& b) {
       b.keys.push_back({"n", 9, raw(77u) + raw(uint64_t{0})});
     },
     kFormat, "type id 77"},
    {"huge array",
     [](GgufBuilder& b) {
       b.keys.push_back({"n", 9, raw(4u) + kHuge});
     },
     kFormat, "array of 4611686018427387904 elements"},
    {"array beyond the file",
     [](GgufBuilder& b) {
       b.keys.push_back({"n", 9, raw(8u) + raw(uint64_t{5000})});
     },
     kFormat, "array of 5000"},
    {"alignment of another type", [](GgufBuilder& b) { b.text("general.alignment", "32"); },
     kFormat, "is of type string, expected u32"},
    {"alignment 0", [](GgufBuilder& b) { b.u32("general.alignment", 0); }, kFormat,
     "general.alignment is 0"},
    {"alignment 4", [](GgufBuilder& b) { b.u32("general.alignment", 4); }, kFormat,
     "general.alignment is 4"},
    {"alignment 48", [](GgufBuilder& b) { b.u32("general.alignment", 48); }, kFormat,
     "expected a power of two"},
    {"alignment 2 MiB", [](GgufBuilder& b) { b.u32("general.alignment", 1 << 21); }, kFormat,
     "from 8 to 1048576"},
};

const std::vector<BrokenFile> kBrokenTensors = {
    {"duplicate tensor", [](GgufBuilder& b) { b.zeros("cube", {1}); }, kFormat,
     "tensor 'cube' appears twice"},
    {"tensor without name", [](GgufBuilder& b) { b.tensors[0].name = ""; }, kFormat, "has no name"},
    {"no dimension", [](GgufBuilder& b) { b.zeros("none", {}); }, kFormat, "has 0 dimensions"},
    {"five dimensions",
     [](GgufBuilder& b) {
       b.zeros("five", {1, 1, 1, 1, 1});
     },
     kFormat, "has 5 dimensions"},
    {"dimension count of 2^31", [](GgufBuilder& b) { b.tensors[0].n_dims = 1u << 31; }, kFormat,
     "2147483648 dimensions"},
    {"dimension 0",
     [](GgufBuilder& b) {
       b.zeros("empty", {4, 0});
     },
     kFormat, "dimension of 0"},
    {"elements overflow",
     [](GgufBuilder& b) {
       tensor(b, "matrix").ne = {uint64_t{1} << 33, uint64_t{1} << 33};
     },
     kFormat, "does not fit 64 bits"},
    {"bytes overflow",
     [](GgufBuilder& b) {
       tensor(b, "matrix").ne = {uint64_t{1} << 62, 1};
     },
     kFormat, "does not fit 64 bits"},
    {"negative dimension",
     [](GgufBuilder& b) {
       tensor(b, "matrix").ne = {UINT64_MAX, 3};
     },
     kFormat, "does not fit 64 bits"},
    {"rows of broken blocks",
     [](GgufBuilder& b) {
       tensor(b, "blocks").ne = {63, 3};
     },
     kFormat, "no multiple of the 32 of a Q8_0 block"},
    {"type that does not exist", [](GgufBuilder& b) { tensor(b, "blocks").type = 1000; }, kFormat,
     "type id 1000, which does not exist"},
    {"type of ggml not read here", [](GgufBuilder& b) { tensor(b, "blocks").type = kMxfp4; },
     kUnsupported, "tensor 'blocks' is of type MXFP4"},
    {"integer tensor", [](GgufBuilder& b) { tensor(b, "blocks").type = 26; }, kUnsupported,
     "is of type I32"},
    {"unaligned offset", [](GgufBuilder& b) { tensor(b, "cube").offset = 97; }, kFormat,
     "offset 97 is not aligned to 32"},
    {"overlap", [](GgufBuilder& b) { tensor(b, "cube").offset = 32; }, kFormat,
     "overlap or wrong order"},
    {"wrong order", [](GgufBuilder& b) { tensor(b, "vector").offset = 4096; }, kFormat,
     "lie outside the file"},
    {"offset near 2^64", [](GgufBuilder& b) { tensor(b, "vector").offset = UINT64_MAX - 31; },
     kFormat, "lie outside the file"},
    {"offset + size wraps", [](GgufBuilder& b) { tensor(b, "blocks").offset = UINT64_MAX - 127; },
     kFormat, "lie outside the file"},
    {"larger than the file",
     [](GgufBuilder& b) {
       tensor(b, "blocks").ne = {64, 300};
     },
     kFormat, "truncated or damaged"},
    {"last byte missing", [](GgufBuilder& b) { b.zeros("last", {8}); }, kFormat,
     "the file is truncated", [](auto& bytes) { bytes.pop_back(); }},
    {"data missing", none, kFormat, "the file is truncated",
     [](auto& bytes) { bytes.resize(bytes.size() / 2); }},
};

void check_table(const std::vector<BrokenFile>& table) {
  for (const BrokenFile& broken : table) {
    CAPTURE(broken.name);
    GgufBuilder b = sample();
    broken.mutate(b);
    std::vector<std::byte> bytes = b.build();
    if (broken.damage) broken.damage(bytes);
    check_thrown(thrown_by([&] { (void)parse(bytes); }), broken.kind, broken.message);
  }
}

std::vector<std::byte> copy_by_writer(const GgufFile& file, const std::filesystem::path& path) {
  GgufWriter writer(path);
  for (const GgufKeyValue& kv : file.metadata()) writer.set(kv.key, kv.value);
  for (const TensorView& t : file.tensors()) writer.add_tensor(t.name, *t.format, t.shape);
  const uint64_t announced = writer.total_bytes();
  writer.begin();
  for (const TensorView& t : file.tensors()) writer.write(t.data);
  writer.finish();
  const std::string text = read_file(path, uint64_t{1} << 30);
  CHECK(text.size() == announced);
  std::vector<std::byte> bytes(text.size());
  std::memcpy(bytes.data(), text.data(), text.size());
  return bytes;
}

// The parts of a set as gguf-split writes them: all metadata in the first.
void write_part(const std::filesystem::path& folder, uint16_t no, uint16_t count,
                const std::vector<std::string>& names, int32_t n_tensors,
                const std::string& prefix = "m") {
  GgufBuilder b;
  b.u16("split.no", no).u16("split.count", count);
  b.keys.push_back({"split.tensors.count", 5, raw(n_tensors)});
  if (no == 0) b.text("general.architecture", "llama");
  for (const std::string& name : names) b.zeros(name, {4});
  std::array<char, 64> file_name{};
  std::snprintf(file_name.data(), file_name.size(), "%s-%05d-of-%05d.gguf", prefix.c_str(), no + 1,
                count);
  write_bytes(folder / file_name.data(), b.build());
}

}  // namespace

TEST_CASE("gguf: broken headers are refused") { check_table(kBrokenHeaders); }
TEST_CASE("gguf: broken metadata are refused") { check_table(kBrokenMetadata); }
TEST_CASE("gguf: broken tensors are refused") { check_table(kBrokenTensors); }

TEST_CASE("gguf: every truncation of a file is an error") {
  const std::vector<std::byte> whole = sample().build();
  const size_t padding = 32 - (2 * 34 * 3) % 32;  // after the last tensor: may be absent
  for (size_t n = 0; n < whole.size() - padding; ++n) {
    // A copy of exactly n bytes: a read past the end is an error of the sanitizer.
    const std::vector<std::byte> part(whole.begin(),
                                      whole.begin() + static_cast<std::ptrdiff_t>(n));
    CAPTURE(n);
    REQUIRE(thrown_by([&] { (void)parse(part); }).kind == ErrorKind::format);
  }
}

TEST_CASE("gguf: a flipped bit is an Error or harmless, never a crash") {
  const std::vector<std::byte> whole = sample().build();
  size_t n_refused = 0;
  for (size_t i = 0; i < whole.size() * 8; ++i) {
    std::vector<std::byte> flipped = whole;
    flipped[i / 8] ^= std::byte{1} << (i % 8);
    size_t n_tensors = 0;
    n_refused += thrown_by([&] { n_tensors = parse(flipped).tensors().size(); }).kind.has_value();
    REQUIRE(n_tensors <= 5);
  }
  CHECK(n_refused > whole.size());
}

TEST_CASE("gguf: values, shapes and data are read") {
  const std::vector<std::byte> bytes = sample().build();
  const GgufFile file = parse(bytes);
  CHECK(file.version() == 3);
  CHECK(file.alignment() == 32);
  CHECK(file.n_parts() == 1);
  CHECK(file.file_bytes() == bytes.size());
  CHECK(file.get_uint("a.u8") == 200);
  CHECK(file.get_uint("a.u16") == 60000);
  CHECK(file.get_uint("a.u32") == 4000000000u);
  CHECK(file.get_float("a.f32") == 0.25);
  CHECK(file.get_bool("a.bool") == true);
  REQUIRE(file.get_strings("a.texts") != nullptr);
  CHECK(*file.get_strings("a.texts") == std::vector<std::string>{"x", "", "long text"});
  CHECK(std::get<std::vector<int64_t>>(file.find("a.ints")->data) == std::vector<int64_t>{-1, 7});
  CHECK(std::get<std::vector<double>>(file.find("a.floats")->data) ==
        std::vector<double>{1.5, -2.0});
  CHECK(file.find_tensor("cube")->shape == std::vector<uint64_t>{4, 3, 2});
  CHECK(file.find_tensor("vector")->shape == std::vector<uint64_t>{5});
  const TensorView& blocks = *file.find_tensor("blocks");
  CHECK(blocks.rows() == 3);
  CHECK(blocks.cols() == 64);
  CHECK(blocks.format->dtype == DType::Q8_0);
  CHECK(blocks.data.size() == 2 * 34 * 3);
  CHECK(std::all_of(blocks.data.begin(), blocks.data.end(),
                    [](std::byte b) { return b == std::byte{0x11}; }));
}

TEST_CASE("gguf: absent keys are empty, keys of another type are errors") {
  const std::vector<std::byte> bytes = sample().build();
  const GgufFile file = parse(bytes);
  CHECK(file.get_uint("none") == std::nullopt);
  CHECK(file.get_string("none") == nullptr);
  CHECK(file.find("none") == nullptr);
  CHECK(file.find_tensor("none") == nullptr);
  check_thrown(thrown_by([&] { (void)file.get_uint("a.f32"); }), kFormat,
               "key 'a.f32' is f32, expected an integer");
  check_thrown(thrown_by([&] { (void)file.get_float("a.u8"); }), kFormat, "key 'a.u8' is u8");
  check_thrown(thrown_by([&] { (void)file.get_bool("a.u8"); }), kFormat, "expected a boolean");
  check_thrown(thrown_by([&] { (void)file.get_string("a.texts"); }), kFormat,
               "is an array of string, expected a string");
  check_thrown(thrown_by([&] { (void)file.get_strings("a.ints"); }), kFormat, "is an array of i32");
}

TEST_CASE("gguf: integers of every width are accepted, negative ones refused") {
  GgufBuilder b;
  b.keys = {{"i8", 1, raw(int8_t{7})},
            {"i64", 11, raw(int64_t{1} << 40)},
            {"u64", 10, raw(UINT64_MAX)},
            {"minus", 5, raw(-3)}};
  const std::vector<std::byte> bytes = b.build();
  const GgufFile file = parse(bytes);
  CHECK(file.get_uint("i8") == 7);
  CHECK(file.get_uint("i64") == uint64_t{1} << 40);
  CHECK(file.get_uint("u64") == UINT64_MAX);
  check_thrown(thrown_by([&] { (void)file.get_uint("minus"); }), kFormat,
               "is -3, expected a non-negative integer");
}

TEST_CASE("gguf: version 2 has the layout of version 3") {
  GgufBuilder b = sample();
  b.version = 2;
  const std::vector<std::byte> bytes = b.build();
  CHECK(parse(bytes).version() == 2);
  CHECK(parse(bytes).tensors().size() == 5);
}

TEST_CASE("3f-12 alignment: other alignments count from the aligned end of the header") {
  for (const uint32_t alignment : {8u, 16u, 64u, 4096u, 1u << 20}) {
    GgufBuilder b = sample();
    b.alignment = alignment;
    b.u32("general.alignment", alignment);
    const std::vector<std::byte> bytes = b.build();
    const GgufFile file = parse(bytes);
    CHECK(file.alignment() == alignment);
    CHECK(file.find_tensor("blocks")->data[0] == std::byte{0x11});
    CHECK(static_cast<size_t>(file.find_tensor("blocks")->data.data() - bytes.data()) % alignment ==
          0);
  }
}

TEST_CASE("gguf: a file without tensors may end with its header") {
  GgufBuilder b;
  b.text("general.architecture", "llama");
  std::vector<std::byte> bytes = b.build();
  CHECK(parse(bytes).tensors().empty());
  bytes.resize(bytes.size() - 3);  // of the padding
  CHECK(parse(bytes).metadata().size() == 1);
}

TEST_CASE("gguf: what was written is what was read") {
  const TempFolder folder;
  GgufBuilder wide = sample();
  wide.alignment = 128;
  wide.u32("general.alignment", 128);
  wide.keys.push_back({"all.i8", 1, raw(int8_t{-5})});
  wide.keys.push_back({"all.i16", 3, raw(int16_t{-500})});
  wide.keys.push_back({"all.u64", 10, raw(UINT64_MAX)});
  wide.keys.push_back({"all.f64", 12, raw(0.1)});
  wide.keys.push_back({"all.bools", 9, raw(7u) + raw(uint64_t{2}) + std::string("\1\0", 2)});
  wide.keys.push_back({"all.none", 9, raw(8u) + raw(uint64_t{0})});
  const TinyModelOptions per_expert{.split_experts = true};
  for (const auto& bytes :
       {sample().build(), wide.build(), tiny_model_bytes({}), tiny_model_bytes(per_expert)})
    CHECK(copy_by_writer(parse(bytes), folder / "copy.gguf") == bytes);
}

TEST_CASE("gguf writer: pieces of any size, replaced keys") {
  const TempFolder folder;
  GgufWriter writer(folder / "out.gguf");
  writer.set("k", GgufValue::u32(1));
  writer.set("other", GgufValue::string("text"));
  writer.set("k", GgufValue::u32(2));
  writer.add_tensor("big", format_of(DType::F32), {3, 1000000});
  writer.add_tensor("small", format_of(DType::F32), {3});
  writer.begin();
  std::vector<float> values(3000003);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  const auto bytes = std::as_bytes(std::span(values));
  for (size_t at = 0, n = 1; at < 12000000; at += n, n = n * 3 + 1)
    writer.write(bytes.subspan(at, n = std::min(n, 12000000 - at)));
  writer.write(bytes.subspan(12000000));
  writer.finish();
  const GgufFile file = GgufFile::open(folder / "out.gguf");
  CHECK(file.get_uint("k") == 2);
  CHECK(file.metadata().size() == 2);
  CHECK(file.metadata()[0].key == "k");
  CHECK(std::equal(bytes.begin(), bytes.begin() + 12000000, file.find_tensor("big")->data.begin()));
  CHECK(std::equal(bytes.begin() + 12000000, bytes.end(), file.find_tensor("small")->data.begin()));
  file.drop(*file.find_tensor("big"));
  CHECK(file.find_tensor("big")->data[4 * 2999999] == bytes[4 * 2999999]);
}

TEST_CASE("gguf writer: mistakes of the caller are internal errors and leave no file") {
  const TempFolder folder;
  const auto path = folder / "out.gguf";
  const std::vector<std::byte> five(20);
  {
    GgufWriter writer(path);
    writer.add_tensor("t", format_of(DType::F32), {4});
    check_thrown(thrown_by([&] { writer.add_tensor("t", format_of(DType::F32), {4}); }),
                 ErrorKind::internal, "declared twice");
    CHECK(thrown_by([&] { writer.add_tensor("u", format_of(DType::Q8_0), {33}); }).kind ==
          ErrorKind::internal);
    writer.begin();
    check_thrown(thrown_by([&] { writer.finish(); }), ErrorKind::internal,
                 "is incomplete: 0 of 16 bytes");
    check_thrown(thrown_by([&] { writer.write(five); }), ErrorKind::internal,
                 "20 bytes delivered, declared 16");
  }
  CHECK(std::filesystem::is_empty(folder.path()));
}

TEST_CASE("gguf writer: a full disk is refused before anything is written") {
  const TempFolder folder;
  GgufWriter writer(folder / "out.gguf");
  writer.add_tensor("t", format_of(DType::F32), {1 << 20, 1 << 20, 1 << 10});  // 4 PiB
  check_thrown(thrown_by([&] { writer.begin(); }), ErrorKind::io, "needs 4.0 PiB, the disk has");
  CHECK(std::filesystem::is_empty(folder.path()));
}

TEST_CASE("gguf set: opens from any part") {
  const TempFolder folder;
  write_part(folder.path(), 0, 3, {"a", "b"}, 4);
  write_part(folder.path(), 1, 3, {"c"}, 4);
  write_part(folder.path(), 2, 3, {"d"}, 4);
  for (const char* name :
       {"m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"}) {
    const GgufFile file = GgufFile::open(folder / name);
    CHECK(file.n_parts() == 3);
    CHECK(file.tensors().size() == 4);
    CHECK(file.tensors()[3].name == "d");
    CHECK(*file.get_string("general.architecture") == "llama");
    CHECK(file.find("split.count") == nullptr);  // the joined model is no part
  }
}

TEST_CASE("gguf set: missing, foreign and inconsistent parts") {
  const TempFolder folder;
  write_part(folder.path(), 0, 2, {"a"}, 2);
  const auto first = folder / "m-00001-of-00002.gguf", second = folder / "m-00002-of-00002.gguf";
  const auto open_first = [&] { (void)GgufFile::open(first); };
  check_thrown(thrown_by(open_first), ErrorKind::io,
               "m-00002-of-00002.gguf: part 2 of 2 is missing");
  write_part(folder.path(), 1, 2, {"a"}, 2);
  check_thrown(thrown_by(open_first), kFormat, "tensor 'a' is in two parts of the set");
  write_part(folder.path(), 1, 2, {"b", "c"}, 2);
  check_thrown(thrown_by(open_first), kFormat,
               "the parts have 3 tensors, split.tensors.count says 2");
  std::filesystem::copy_file(first, second, std::filesystem::copy_options::overwrite_existing);
  check_thrown(thrown_by(open_first), kFormat,
               "named part 2 of 2, but its metadata say part 1 of 2");
  write_text(second, "GGUF");
  check_thrown(thrown_by(open_first), kFormat, "m-00002-of-00002.gguf: file ends inside version");
  std::filesystem::rename(first, folder / "renamed.gguf");
  check_thrown(thrown_by([&] { (void)GgufFile::open(folder / "renamed.gguf"); }), ErrorKind::io,
               "part 1 of 2 of a set, but not named");
  const auto alone = folder / "m-00001-of-00001.gguf";
  std::filesystem::rename(folder / "renamed.gguf", alone);
  check_thrown(thrown_by([&] { (void)GgufFile::open(alone); }), ErrorKind::io,
               "part 1 of 2 of a set, but not named '...-00001-of-00002.gguf'");
}

TEST_CASE("gguf: a string of many MiB is read") {
  GgufBuilder b = sample();
  const std::string text(3 << 20, 'x');
  b.text("tokenizer.huggingface.json", text);
  const std::vector<std::byte> bytes = b.build();
  CHECK(*parse(bytes).get_string("tokenizer.huggingface.json") == text);
}

TEST_CASE("gguf set: a name alone is no set of one, a bad number is refused") {
  const TempFolder folder;
  write_bytes(folder / "m-00001-of-00001.gguf", sample().build());
  CHECK(GgufFile::open(folder / "m-00001-of-00001.gguf").tensors().size() == 5);
  write_bytes(folder / "m-00003-of-00002.gguf", sample().build());
  check_thrown(thrown_by([&] { (void)GgufFile::open(folder / "m-00003-of-00002.gguf"); }), kFormat,
               "named part 3 of 2");
}

TEST_CASE("gguf: raw pieces name the way to join them") {
  const TempFolder folder;
  for (const char* name :
       {"x.gguf-split-a", "x.gguf-split-b", "x.gguf.part12of20", "x.gguf.part-a"}) {
    write_text(folder / name, "GGUF");
    check_thrown(thrown_by([&] { (void)GgufFile::open(folder / name); }), kUnsupported,
                 "a raw piece of 'x.gguf': join all pieces");
  }
}

TEST_CASE("gguf: paths that cannot be opened") {
  const TempFolder folder;
  check_thrown(thrown_by([&] { (void)GgufFile::open(folder / "none.gguf"); }), ErrorKind::io,
               "cannot open: No such file");
  check_thrown(thrown_by([&] { (void)GgufFile::open(folder.path()); }), ErrorKind::io,
               "not a regular file");
  write_text(folder / "empty.gguf", "");
  check_thrown(thrown_by([&] { (void)GgufFile::open(folder / "empty.gguf"); }), kFormat,
               "not a GGUF file: it is empty");
}
