// bytes, error, json, units, mapped_file, zstd_frame, cpu_features.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <set>

#include "base/bytes.h"
#include "base/cpu_features.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "base/sha256.h"
#include "base/units.h"
#include "base/zstd_frame.h"
#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/skip.h"

using namespace duet;
using namespace duet::test;

namespace {

constexpr auto kFormat = ErrorKind::format;
constexpr auto kIo = ErrorKind::io;

Json parse(std::string_view text, const JsonLimits& limits = {}) {
  return parse_json(text, "test.json", limits);
}

size_t n_files(const std::filesystem::path& folder) {
  return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(folder), {}));
}

}  // namespace

TEST_CASE("bytes: arithmetic that does not fit says so") {
  uint64_t out = 0;
  CHECK(checked_add(1, 2, out));
  CHECK(out == 3);
  CHECK_FALSE(checked_add(UINT64_MAX, 1, out));
  CHECK(checked_mul(uint64_t{1} << 32, uint64_t{1} << 31, out));
  CHECK_FALSE(checked_mul(uint64_t{1} << 32, uint64_t{1} << 32, out));
  CHECK(checked_align_up(33, 32, out));
  CHECK(out == 64);
  CHECK(checked_align_up(64, 32, out));
  CHECK(out == 64);
  CHECK_FALSE(checked_align_up(UINT64_MAX - 3, 32, out));
}

TEST_CASE("bytes: a reader never passes the end") {
  const std::string text = raw(uint32_t{7}) + "abc";
  ByteReader in(std::as_bytes(std::span(text)), "f");
  CHECK(in.read<uint32_t>("number") == 7);
  CHECK(in.remaining() == 3);
  check_thrown(thrown_by([&] { (void)in.read<uint32_t>("second"); }), kFormat,
               "f: file ends inside second: need 4 bytes, 3 left; the file is truncated or damaged "
               "(byte 4)");
  check_thrown(thrown_by([&] { (void)in.take(UINT64_MAX, "all"); }), kFormat,
               "need 18446744073709551615 bytes");
  CHECK(in.text(3, "text") == "abc");
  CHECK(in.take(0, "nothing").empty());
  CHECK(in.offset() == 7);
}

TEST_CASE("error: hostile text is shown on one line and cut") {
  CHECK(quote("plain") == "'plain'");
  CHECK(quote(std::string_view("a\n\0\x1b[31m\x7f", 9)) == "'a\\x0a\\x00\\x1b[31m\\x7f'");
  CHECK(quote(std::string(500, 'x')) == "'" + std::string(80, 'x') + "...'");
  CHECK(concat("row ", 3, " of ", 4u) == "row 3 of 4");
}

TEST_CASE("json: values, order of members, numbers") {
  const Json json = parse(R"({"z":1,"a":[true,null,-2,1.5,"x"],"m":{"k":{}}})");
  CHECK(json.dump() == R"({"z":1,"a":[true,null,-2,1.5,"x"],"m":{"k":{}}})");
  CHECK(json_get<uint64_t>(json, "z", "f") == 1);
  CHECK(json_get_or<int64_t>(json, "absent", -7, "f") == -7);
  CHECK(parse("18446744073709551615").get<uint64_t>() == UINT64_MAX);
  CHECK(parse(" \"top\" ").get<std::string>() == "top");
  CHECK(parse("[]").empty());
}

TEST_CASE("json: text that is refused") {
  for (const char* text : {"", "{", "[1,]", "{\"a\" 1}", "nul", "1 2", "{\"a\":1}}", "\"\xff\"",
                           "[1e999]", "'x'", "// c\n1", "NaN"}) {
    CAPTURE(text);
    check_thrown(thrown_by([&] { (void)parse(text); }), kFormat, "test.json: not valid JSON");
  }
  check_thrown(thrown_by([] { (void)parse(R"([{"a":1,"b":{"a":1},"a":2}])"); }), kFormat,
               "JSON key 'a' appears twice");
  check_thrown(thrown_by([] { (void)parse(std::string(65, '[') + std::string(65, ']')); }), kFormat,
               "nested deeper than 64");
  CHECK(parse(std::string(64, '[') + std::string(64, ']')).is_array());
  check_thrown(thrown_by([] { (void)parse("[1,2,3]", {.max_bytes = 6}); }), kFormat,
               "JSON of 7 bytes, at most 6");
  check_thrown(thrown_by([] { (void)parse("\"" + std::string(100000, 'x')); }), kFormat,
               "not valid JSON");
  CHECK(thrown_by([] { (void)parse("\"" + std::string(100000, 'x')); }).message.size() < 300);
  CHECK(thrown_by([] { (void)parse(std::string(1000000, '[')); }).kind == kFormat);
}

TEST_CASE("json: members of another type are named") {
  const Json json = parse(
      R"({"s":"text","n":-1,"f":2.0,"big":18446744073709551615,"o":{"secret":1},"nothing":null})");
  const auto message = [&](auto get) { return thrown_by(get).message; };
  CHECK(message([&] { (void)json_get<uint64_t>(json, "s", "f"); }) ==
        "f: 's' is 'text', expected a non-negative integer");
  CHECK(message([&] { (void)json_get<uint64_t>(json, "n", "f"); }) ==
        "f: 'n' is -1, expected a non-negative integer");
  CHECK(message([&] { (void)json_get<int64_t>(json, "f", "f"); }) ==
        "f: 'f' is 2.0, expected an integer");
  CHECK(message([&] { (void)json_get<int64_t>(json, "big", "f"); }) ==
        "f: 'big' is 18446744073709551615, expected an integer");
  CHECK(message([&] { (void)json_get<std::string>(json, "o", "f"); }) ==
        "f: 'o' is an object, expected a string");
  CHECK(message([&] { (void)json_get<bool>(json, "none", "f"); }) == "f: 'none' is missing");
  CHECK(json_get<double>(json, "n", "f") == -1.0);
  CHECK(json_get_or<bool>(json, "nothing", true, "f"));
  CHECK(thrown_by([&] { (void)json_get_or<bool>(json, "s", true, "f"); }).kind == kFormat);
  CHECK(thrown_by([&] { (void)json_get<bool>(Json::array(), "s", "f"); }).kind == kFormat);
}

// The library's own builder needs quadratic time for the members of an ordered object.
TEST_CASE("json: an object of 200,000 members is read quickly") {
  std::string text = "{";
  for (int i = 0; i < 200000; ++i) text += concat(i == 0 ? "" : ",", "\"token", i, "\":", i);
  const auto start = std::chrono::steady_clock::now();
  CHECK(parse(text + "}").size() == 200000);
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10));
}

TEST_CASE("units: sizes as people write them") {
  CHECK(parse_size("0") == 0);
  CHECK(parse_size("1048576") == 1048576);
  CHECK(parse_size("12GiB") == uint64_t{12} << 30);
  CHECK(parse_size("12G") == uint64_t{12} << 30);
  CHECK(parse_size("12g") == uint64_t{12} << 30);
  CHECK(parse_size("12GB") == 12000000000u);
  CHECK(parse_size("1.5 KiB") == 1536);
  CHECK(parse_size("500MB") == 500000000u);
  CHECK(parse_size("2T") == uint64_t{2} << 40);
  for (const char* text :
       {"", "G", "-1", "1X", "1e5", "nan", "inf", "1GiBs", "99999999T", "0x10", "1 2"}) {
    CAPTURE(text);
    check_thrown(thrown_by([&] { (void)parse_size(text); }), ErrorKind::usage,
                 "is not a size: write it like 12GiB");
  }
  CHECK(format_size(0) == "0 B");
  CHECK(format_size(1023) == "1023 B");
  CHECK(format_size(1536) == "1.5 KiB");
  CHECK(format_size(uint64_t{26} << 30) == "26.0 GiB");
  CHECK(format_size(UINT64_MAX) == "16384.0 PiB");
}

TEST_CASE("units: durations, also of estimates that are no number") {
  CHECK(format_duration(0) == "0:00");
  CHECK(format_duration(75.4) == "1:15");
  CHECK(format_duration(3725) == "1:02:05");
  CHECK(format_duration(-5) == "0:00");
  CHECK(format_duration(NAN) == "0:00");
  CHECK(format_duration(INFINITY) == "277777:46:40");
}

TEST_CASE("mapped_file: whole files, empty files, what is no file") {
  const TempFolder folder;
  write_text(folder / "some", std::string(10000, 's'));
  MappedFile some = MappedFile::open(folder / "some");
  CHECK(some.bytes().size() == 10000);
  CHECK(some.path() == folder / "some");
  some.drop(some.bytes().subspan(4096));
  some.drop(some.bytes().first(0));
  const std::byte foreign[2] = {};
  some.drop(foreign);
  CHECK(some.bytes()[9999] == std::byte{'s'});
  const MappedFile moved = std::move(some);
  CHECK(moved.bytes().size() == 10000);
  write_text(folder / "empty", "");
  CHECK(MappedFile::open(folder / "empty").bytes().empty());
  check_thrown(thrown_by([&] { (void)MappedFile::open(folder / "none"); }), kIo,
               "none: cannot open: No such file or directory");
  check_thrown(thrown_by([&] { (void)MappedFile::open(folder.path()); }), kIo,
               "not a regular file");
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  check_thrown(thrown_by([&] { (void)MappedFile::open(folder / "pipe"); }), kIo,
               "not a regular file");  // and no waiting
}

TEST_CASE("read_file: whole text, size limit") {
  const TempFolder folder;
  write_text(folder / "f", "12345");
  CHECK(read_file(folder / "f", 5) == "12345");
  check_thrown(thrown_by([&] { (void)read_file(folder / "f", 4); }), kFormat,
               "f: 5 B is larger than the 4 B expected");
  CHECK(thrown_by([&] { (void)read_file(folder / "none", 4); }).kind == kIo);
}

TEST_CASE("sha256: of a file is that of its bytes; a read that fails is an error") {
  const TempFolder folder;
  const std::string text((size_t{8} << 20) + 12345, 'x');
  write_text(folder / "f", text);
  uint64_t told = 0;
  CHECK(sha256_of(folder / "f", [&](uint64_t done) { told = done; }) == sha256_of(std::as_bytes(std::span(text.data(), text.size()))));
  CHECK(told == text.size());
  // Of no size that is told, and its first page cannot be read: as on a failing disk.
  check_thrown(thrown_by([] { (void)sha256_of(std::filesystem::path("/proc/self/mem")); }), kIo, "cannot read at byte 0: Input/output error");
  check_thrown(thrown_by([&] { (void)sha256_of(folder / "none"); }), kIo, "none: cannot open");
}

TEST_CASE("output_file: the target changes only at commit") {
  const TempFolder folder;
  const auto path = folder / "out";
  write_text(path, "old");
  {
    OutputFile out(path, 100);
    out.write("new ");
    out.write(std::string(100000, 'x'));
    CHECK(out.size() == 100004);
    CHECK(read_file(path, 1000) == "old");
    out.commit();
  }
  CHECK(read_file(path, 1 << 20).size() == 100004);
  CHECK(n_files(folder.path()) == 1);
}

TEST_CASE("output_file: without commit nothing is left") {
  const TempFolder folder;
  {
    OutputFile out(folder / "out", 0);
    out.write("half");
    CHECK(n_files(folder.path()) == 1);
  }
  CHECK(n_files(folder.path()) == 0);
}

TEST_CASE("output_file: places that cannot be written") {
  const TempFolder folder;
  const auto open = [](const std::filesystem::path& path, uint64_t n_bytes) {
    return thrown_by([&] { OutputFile out(path, n_bytes); });
  };
  check_thrown(open(folder / "out", uint64_t{1} << 60), kIo, "needs 1024.0 PiB, the disk has");
  check_thrown(open(folder.path(), 0), kIo, "is a folder, not a file to write");
  check_thrown(open(folder / "none" / "out", 0), kIo, "cannot write there: No such file");
  write_text(folder / "file", "");
  check_thrown(open(folder / "file" / "out", 0), kIo, "cannot write: Not a directory");
  check_thrown(open("/proc/out", 0), kIo,
               "/proc/out: cannot write: ");  // refuses the superuser too
  check_thrown(open("/dev/null", 0), kIo, "/dev/null: is not a regular file");
  CHECK(n_files(folder.path()) == 1);
}

TEST_CASE("output_file: a read-only folder") {
  if (::geteuid() == 0) DUET_SKIP("the superuser may write to read-only folders");
  const TempFolder folder;
  REQUIRE(::chmod(folder.path().c_str(), 0555) == 0);
  check_thrown(thrown_by([&] { OutputFile out(folder / "out", 0); }), kIo,
               "cannot write: Permission denied");
}

TEST_CASE("zstd_frame: round trip, damage, bombs") {
  const std::string text = std::string(100000, 'a') + "end";
  const std::string frame = zstd_compress(text);
  CHECK(frame.size() < 1000);
  CHECK(zstd_decompress(frame, text.size(), "f") == text);
  CHECK(zstd_decompress(zstd_compress(""), 0, "f").empty());
  check_thrown(thrown_by([&] { (void)zstd_decompress(frame, text.size() - 1, "f"); }), kFormat,
               "f: zstd frame unpacks to more than");
  check_thrown(
      thrown_by([&] { (void)zstd_decompress(frame.substr(0, frame.size() / 2), 1 << 20, "f"); }),
      kFormat, "zstd frame");
  check_thrown(thrown_by([&] { (void)zstd_decompress("no frame", 1 << 20, "f"); }), kFormat,
               "f: damaged zstd frame");
  check_thrown(thrown_by([&] { (void)zstd_decompress("", 1 << 20, "f"); }), kFormat,
               "zstd frame ends early");
}

TEST_CASE("cpu_features: names, and sets without contradiction") {
  CHECK(cpu_feature_names(0) == "none");
  CHECK(cpu_feature_names(kCpuAvx2 | kCpuFma) == "avx2 fma");
  const CpuFeatures have = detect_cpu_features();
  if ((have & (kCpuAvx512Vnni | kCpuAvx512Bf16)) != 0) CHECK((have & kCpuAvx512) != 0);
  if ((have & kCpuAvx512) != 0) CHECK((have & kCpuAvx2) != 0);
  CHECK_FALSE(cpu_model_name().empty());
}
