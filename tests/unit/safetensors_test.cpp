#include "formats/safetensors.h"

#include <doctest/doctest.h>

#include <cstring>

#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"

using namespace duet;
using namespace duet::test;

namespace {

constexpr auto kFormat = ErrorKind::format;
constexpr auto kUnsupported = ErrorKind::unsupported;

// A file of this header (padded to 8 bytes as writers do) and n data bytes 0, 1, 2, ...
std::string file_of(std::string header, size_t n_data) {
  while (header.size() % 8 != 0) header += ' ';
  std::string out = raw(uint64_t{header.size()}) + header;
  for (size_t i = 0; i < n_data; ++i) out += static_cast<char>(i);
  return out;
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  size_t begin, size_t end) {
  return concat("\"", name, "\":{\"dtype\":\"", dtype, "\",\"shape\":", shape,
                ",\"data_offsets\":[", begin, ",", end, "]}");
}

Safetensors parse(const std::string& file) {
  return Safetensors::parse(std::as_bytes(std::span(file)), "test.safetensors");
}

struct BrokenFile {
  const char* name;
  std::string file;
  ErrorKind kind;
  const char* message;
};

const std::string kA = entry("a", "F32", "[2]", 0, 8);

const std::vector<BrokenFile> kBroken = {
    {"zero length", "", kFormat, "file ends inside safetensors header length"},
    {"seven bytes", "1234567", kFormat, "file ends inside safetensors header length"},
    {"header of 2^63 bytes", raw(uint64_t{1} << 63) + "{}", kFormat,
     "header of 9223372036854775808 bytes"},
    {"header over 100 MB", raw(uint64_t{100000001}) + "{}", kFormat, "at most 100000000 accepted"},
    {"header beyond the file", raw(uint64_t{1000}) + "{}", kFormat,
     "file ends inside safetensors header"},
    {"a GGUF file", "GGUF" + raw(3u) + std::string(64, '\0'), kFormat, "not a safetensors file"},
    {"header no JSON", file_of("{\"a\":", 0), kFormat, "not valid JSON"},
    {"header cut", file_of("{" + kA, 8), kFormat, "not valid JSON"},
    {"header an array", file_of("[1]", 0), kFormat, "header is no JSON object"},
    {"invalid UTF-8", file_of("{\"\xff\":1}", 0), kFormat, "not valid JSON"},
    {"deep nesting", file_of("{\"a\":[[[[[[1]]]]]]}", 0), kFormat, "nested deeper"},
    {"tensor twice", file_of("{" + kA + "," + kA + "}", 8), kFormat, "'a' appears twice"},
    {"description a number", file_of("{\"a\":5}", 0), kFormat,
     "tensor 'a': its description is no JSON object"},
    {"no dtype", file_of(R"({"a":{"shape":[1],"data_offsets":[0,4]}})", 4), kFormat,
     "'dtype' is missing"},
    {"dtype a number", file_of(R"({"a":{"dtype":1,"shape":[1],"data_offsets":[0,4]}})", 4), kFormat,
     "'dtype' is 1, expected a string"},
    {"no shape", file_of(R"({"a":{"dtype":"F32","data_offsets":[0,4]}})", 4), kFormat,
     "'shape' is missing or no array"},
    {"negative dimension", file_of("{" + entry("a", "F32", "[-2]", 0, 8) + "}", 8), kFormat,
     "a dimension is no non-negative integer"},
    {"fractional dimension", file_of("{" + entry("a", "F32", "[2.0]", 0, 8) + "}", 8), kFormat,
     "a dimension is no"},
    {"size overflow", file_of("{" + entry("a", "F32", "[4294967296,4294967296]", 0, 8) + "}", 8),
     kFormat, "does not fit 64 bits"},
    {"dimension over 64 bits",
     file_of("{" + entry("a", "F32", "[99999999999999999999]", 0, 8) + "}", 8), kFormat,
     "a dimension is no"},
    {"three offsets", file_of(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}})", 4),
     kFormat, "has 3 numbers, expected 2"},
    {"offsets reversed", file_of("{" + entry("a", "F32", "[2]", 8, 0) + "}", 8), kFormat,
     "offsets 8 to 0"},
    {"size and shape differ", file_of("{" + entry("a", "F32", "[3]", 0, 8) + "}", 8), kFormat,
     "its shape and dtype need 12 bytes"},
    {"overlap", file_of("{" + kA + "," + entry("b", "F32", "[2]", 4, 12) + "}", 12), kFormat,
     "begins at data byte 4, expected 8 (overlap)"},
    {"same bytes twice", file_of("{" + kA + "," + entry("b", "F32", "[2]", 0, 8) + "}", 8), kFormat,
     "(overlap)"},
    {"gap", file_of("{" + kA + "," + entry("b", "F32", "[2]", 12, 20) + "}", 20), kFormat,
     "begins at data byte 12, expected 8 (gap)"},
    {"gap at the start", file_of("{" + entry("a", "F32", "[2]", 4, 12) + "}", 12), kFormat,
     "expected 0 (gap)"},
    {"data cut", file_of("{" + kA + "}", 7), kFormat,
     "tensors end at data byte 8, the file has 7 bytes: it is truncated"},
    {"data left over", file_of("{" + kA + "}", 9), kFormat,
     "tensors end at data byte 8, the file has 9 bytes"},
    {"data without tensors", file_of("{}", 8), kFormat,
     "tensors end at data byte 0, the file has 8"},
    {"integer tensor", file_of("{" + entry("ids", "I64", "[1]", 0, 8) + "}", 8), kUnsupported,
     "tensor 'ids' is of dtype I64; duet reads F32, F16, BF16 and F8_E4M3"},
    {"FP8 tensor", file_of("{" + entry("w", "F8_E5M2", "[8]", 0, 8) + "}", 8), kUnsupported,
     "tensor 'w' is of dtype F8_E5M2"},
    {"unknown dtype", file_of("{" + entry("w", "Q9", "[8]", 0, 8) + "}", 8), kUnsupported,
     "dtype 'Q9' is not known"},
    {"five dimensions", file_of("{" + entry("w", "F32", "[1,1,1,1,2]", 0, 8) + "}", 8),
     kUnsupported, "has 5 dimensions"},
    {"no elements", file_of("{" + entry("w", "F32", "[0,4]", 0, 0) + "}", 0), kUnsupported,
     "tensor 'w' has no elements"},
    {"name with a line break", file_of("{" + entry("a\\nb", "F32", "[3]", 0, 8) + "}", 8), kFormat,
     "tensor 'a\\x0ab'"},
};

// Two shards: a and b in the first, c in the second.
void write_shards(const TempFolder& folder) {
  write_text(folder / "model-00001-of-00002.safetensors",
             file_of("{" + entry("b", "F16", "[2,2]", 8, 16) + "," + kA + "}", 16));
  write_text(folder / "model-00002-of-00002.safetensors",
             file_of("{" + entry("c", "BF16", "[4]", 0, 8) + "}", 8));
  write_text(
      folder / "model.safetensors.index.json",
      R"({"metadata":{"total_size":24},"weight_map":{"c":"model-00002-of-00002.safetensors",)"
      R"("a":"model-00001-of-00002.safetensors","b":"model-00001-of-00002.safetensors"}})");
}

Thrown open_thrown(const std::filesystem::path& path) {
  return thrown_by([&] { (void)Safetensors::open(path); });
}

}  // namespace

TEST_CASE("safetensors: broken files are refused") {
  for (const BrokenFile& broken : kBroken) {
    CAPTURE(broken.name);
    check_thrown(thrown_by([&] { (void)parse(broken.file); }), broken.kind, broken.message);
  }
}

TEST_CASE("safetensors: every truncation of a file is an error") {
  const std::string whole = file_of("{\"__metadata__\":{\"format\":\"pt\"}," + kA + "}", 8);
  for (size_t n = 0; n < whole.size(); ++n) {
    const std::vector<char> part(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(n));
    CAPTURE(n);
    REQUIRE(thrown_by([&] {
              (void)Safetensors::parse(std::as_bytes(std::span(part)), "t");
            }).kind == kFormat);
  }
}

TEST_CASE("safetensors: tensors come in the order of their data") {
  const std::string file =
      file_of("{\"__metadata__\":{\"format\":\"pt\"}," + entry("z", "F32", "[1,2]", 8, 16) + "," +
                  kA + "," + entry("scalar", "BF16", "[]", 16, 18) + "}",
              18);
  const Safetensors tensors = parse(file);
  REQUIRE(tensors.tensors().size() == 3);
  CHECK(tensors.tensors()[0].name == "a");
  CHECK(tensors.tensors()[1].name == "z");
  CHECK(tensors.tensors()[1].shape == std::vector<uint64_t>{1, 2});
  CHECK(tensors.tensors()[2].shape == std::vector<uint64_t>{1});
  CHECK(tensors.find_tensor("z")->data[0] == std::byte{8});
  CHECK(tensors.find_tensor("z")->format->dtype == DType::F32);
  CHECK(tensors.find_tensor("scalar")->format->dtype == DType::BF16);
  CHECK(tensors.find_tensor("none") == nullptr);
  CHECK(tensors.file_bytes() == file.size());
}

TEST_CASE("safetensors: an odd start of 16-bit data is refused, not read") {
  std::string file = raw(uint64_t{0}) + "{" + entry("a", "F16", "[1]", 0, 2) + "}";
  if (file.size() % 2 == 0) file += ' ';
  const uint64_t header_bytes = file.size() - 8;
  std::memcpy(file.data(), &header_bytes, 8);
  check_thrown(thrown_by([&] { (void)parse(file + "12"); }), kUnsupported,
               "tensor 'a' begins at an odd byte");
}

TEST_CASE("safetensors: a sharded folder") {
  const TempFolder folder;
  write_shards(folder);
  const Safetensors tensors = Safetensors::open(folder.path());
  REQUIRE(tensors.tensors().size() == 3);
  CHECK(tensors.tensors()[0].name == "a");
  CHECK(tensors.tensors()[2].name == "c");
  CHECK(tensors.find_tensor("b")->shape == std::vector<uint64_t>{2, 2});
  tensors.drop(*tensors.find_tensor("c"));
  CHECK(tensors.find_tensor("c")->data[7] == std::byte{7});
  CHECK(Safetensors::open(folder / "model-00002-of-00002.safetensors").tensors().size() == 1);
}

TEST_CASE("safetensors: shards that do not fit their index") {
  const TempFolder folder;
  write_shards(folder);
  const auto second = folder / "model-00002-of-00002.safetensors",
             index = folder / "model.safetensors.index.json";
  write_text(second, file_of("{" + entry("d", "BF16", "[4]", 0, 8) + "}", 8));
  check_thrown(open_thrown(folder.path()), kFormat,
               "model-00002-of-00002.safetensors: lacks tensor 'c' (1 in all)");
  std::filesystem::remove(second);
  check_thrown(open_thrown(folder.path()), ErrorKind::io,
               "model-00002-of-00002.safetensors: this shard of the index is missing");
  for (const char* text : {"{}", R"({"weight_map":{}})", R"({"weight_map":[]})"}) {
    write_text(index, text);
    check_thrown(open_thrown(folder.path()), kFormat, "'weight_map' is missing or empty");
  }
  write_text(index, R"({"weight_map":{"a":7}})");
  check_thrown(open_thrown(folder.path()), kFormat, "its shard is no file name");
  for (const char* name : {"../x.safetensors", "/etc/passwd", "..", "", "a\\\\b", "x\\u0000y"}) {
    write_text(index, concat(R"({"weight_map":{"a":")", name, R"("}})"));
    check_thrown(open_thrown(folder.path()), kFormat, "is no plain file name");
  }
  write_text(index, "[");
  check_thrown(open_thrown(folder.path()), kFormat, "model.safetensors.index.json: not valid JSON");
}

TEST_CASE("safetensors: folders without an index") {
  const TempFolder folder;
  check_thrown(open_thrown(folder.path()), ErrorKind::io, "no .safetensors file there");
  write_text(folder / "pytorch_model-00001-of-00002.bin", "PK");
  check_thrown(open_thrown(folder.path()), kUnsupported, "duet reads safetensors");
  write_text(folder / "consolidated.safetensors", file_of("{" + kA + "}", 8));
  CHECK(Safetensors::open(folder.path()).tensors().size() == 1);
  write_text(folder / "more.safetensors", file_of("{}", 0));
  check_thrown(open_thrown(folder.path()), ErrorKind::io,
               "model.safetensors.index.json: missing, and the folder has 2");
  write_text(folder / "model.safetensors",
             file_of("{" + kA + "," + entry("b", "F32", "[1]", 8, 12) + "}", 12));
  CHECK(Safetensors::open(folder.path()).tensors().size() == 2);
  check_thrown(open_thrown(folder / "nowhere"), ErrorKind::io, "cannot open: No such file");
}
