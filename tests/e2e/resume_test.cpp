// --resume: work cut off at any moment goes on, and the file is the one that would have been made anyway.
#include <doctest/doctest.h>
#include <signal.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "formats/gguf.h"
#include "tests/support/process.h"
#include "tests/support/tiny_model.h"

using namespace duet::test;
namespace fs = std::filesystem;

namespace {

constexpr int kUsage = 2, kIo = 3, kKilled = 128 + SIGKILL;
const std::string kDemo = DUET_SOURCE_DIR "/models/demo";
constexpr uint64_t kMaxBytes = 1 << 30;

using Arguments = std::vector<std::string>;

Arguments with(Arguments arguments, const Arguments& more) {
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

std::string ok(const Arguments& arguments) {
  const ProcessResult result = run_duet(arguments, {.timeout_s = 600});
  CAPTURE(result.err);
  REQUIRE(result.exit_code == 0);
  return result.err;
}

// Runs it again and again, killed after ever more time, until it comes to its end; how often it was killed.
size_t kill_and_resume(const Arguments& arguments, double first_s) {
  size_t n_kills = 0;
  for (double seconds = first_s;; seconds *= 1.2) {
    const ProcessResult result = run_duet(with(arguments, {"--resume"}), {.signal_after_s = seconds, .signal = SIGKILL, .timeout_s = 600});
    CAPTURE(result.err);
    if (result.exit_code == 0) return n_kills;
    // The kill before came between the end of the work and that of the process.
    if (n_kills > 0 && result.exit_code == kIo && result.err.find("exists already") != std::string::npos) return n_kills;
    REQUIRE(result.exit_code == kKilled);
    ++n_kills;
  }
}

std::string bytes_of(const fs::path& path) { return duet::read_file(path, kMaxBytes); }

// What is left by a run that a signal ended after some of the work.
void leave_unfinished(const Arguments& arguments, const fs::path& out, int signal = SIGKILL) {
  const fs::path part = out.string() + ".part", journal = out.string() + ".part.journal";
  for (int attempt = 0; attempt < 200; ++attempt) {
    const ProcessResult result = run_duet(arguments, {.signal_after_s = 0.05 + 0.04 * (attempt % 40), .signal = signal});
    CAPTURE(result.err);
    REQUIRE((result.exit_code == 0 || result.exit_code == (signal == SIGINT ? 130 : 128 + signal)));
    std::error_code ec;
    if (result.exit_code != 0 && fs::exists(journal, ec) && std::ranges::count(bytes_of(journal), '\n') >= 2) return;
    for (const fs::path& path : {part, journal, out}) fs::remove(path);
  }
  FAIL("never ended at the right moment");
}

void check_only(const TempFolder& folder, const Arguments& names) {
  size_t n = 0;
  for (const auto& entry : fs::directory_iterator(folder.path())) {
    CAPTURE(entry.path().string());
    CHECK(std::ranges::count(names, entry.path().filename().string()) == 1);
    ++n;
  }
  CHECK(n == names.size());
}

}  // namespace

TEST_CASE("resume: a conversion killed at many moments ends with the same bytes, whatever the threads") {
  const TempFolder folder;
  const std::string plain = (folder / "plain.gguf").string(), out = (folder / "out.gguf").string();
  ok({"convert", kDemo, "-q", "Q4_K_M", "-o", plain, "-t", "2"});
  const size_t n = kill_and_resume({"convert", kDemo, "-q", "Q4_K_M", "-o", out, "-t", "1"}, 0.02);
  CHECK(n > 0);
  CHECK(bytes_of(plain) == bytes_of(out));
  check_only(folder, {"plain.gguf", "out.gguf"});
}

TEST_CASE("resume: a calibrated conversion goes on behind its last finished layer") {
  const TempFolder folder;
  const std::string plain = (folder / "plain.gguf").string(), out = (folder / "out.gguf").string(), text = (folder / "text").string();
  write_text(text, bytes_of(DUET_SOURCE_DIR "/tests/golden/data/sample.txt").substr(0, 6000));
  const Arguments common = {"convert", kDemo, "-q", "F16", "--tensor", "attn_output=Q4_K", "--calibrate", text, "--calibrate-tokens", "512", "-o"};
  ok(with(common, {plain}));
  CHECK(kill_and_resume(with(common, {out}), 0.3) > 0);
  CHECK(bytes_of(plain) == bytes_of(out));
  check_only(folder, {"plain.gguf", "out.gguf", "text"});
}

TEST_CASE("resume: quantize into parts, killed at many moments") {
  const TempFolder folder;
  const Arguments common = {"quantize", DUET_TEST_DIR "/demo-f32.gguf"};
  ok(with(common, {(folder / "a.gguf").string(), "Q8_0", "--split-max-size", "4M"}));
  CHECK(kill_and_resume(with(common, {(folder / "b.gguf").string(), "Q8_0", "--split-max-size", "4M"}), 0.02) > 0);
  size_t n = 0;
  for (const auto& entry : fs::directory_iterator(folder.path())) {
    std::string name = entry.path().filename().string();
    REQUIRE(name.ends_with(".gguf"));
    if (name[0] == 'b') continue;
    name[0] = 'b';
    CHECK(bytes_of(entry.path()) == bytes_of(folder / name));
    ++n;
  }
  CHECK(n > 3);
}

TEST_CASE("resume: a plain run names what is unfinished, and other sources or options are refused") {
  const TempFolder folder;
  const fs::path out = folder / "out.gguf", source = folder / "in.gguf";
  fs::copy_file(DUET_TEST_DIR "/demo-f32.gguf", source);
  const Arguments run = {"quantize", source.string(), out.string(), "Q3_K_M", "-t", "1"};
  leave_unfinished(run, out);
  CHECK(refusal(run_duet(run), kIo, "out.gguf.part: an unfinished file is there") == "");
  Arguments other = run;
  other[3] = "Q4_K_M";
  CHECK(refusal(run_duet(with(other, {"--resume"})), kUsage, "other options") == "");
  fs::last_write_time(source, fs::last_write_time(source) + std::chrono::seconds(5));
  CHECK(refusal(run_duet(with(run, {"--resume"})), kUsage, "other source files") == "");
  fs::last_write_time(source, fs::last_write_time(source) - std::chrono::seconds(5));
  CHECK(ok(with(run, {"--resume"})).find("resumed: ") != std::string::npos);
  ok({"quantize", source.string(), (folder / "whole.gguf").string(), "Q3_K_M"});
  CHECK(bytes_of(out) == bytes_of(folder / "whole.gguf"));
}

TEST_CASE("resume: bytes that are not as they were recorded are made again") {
  const TempFolder folder;
  const fs::path out = folder / "out.gguf";
  const Arguments run = {"quantize", DUET_TEST_DIR "/demo-f32.gguf", out.string(), "Q3_K_M", "-t", "1"};
  leave_unfinished(run, out);
  {
    std::fstream file(out.string() + ".part", std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(1000);
    file << "damage";
  }
  ok(with(run, {"--resume"}));
  ok({"quantize", DUET_TEST_DIR "/demo-f32.gguf", (folder / "whole.gguf").string(), "Q3_K_M"});
  CHECK(bytes_of(out) == bytes_of(folder / "whole.gguf"));
  leave_unfinished(with(run, {"--force"}), out);
  ok(with(run, {"--force"}));  // begins anew
  CHECK(bytes_of(out) == bytes_of(folder / "whole.gguf"));
  check_only(folder, {"out.gguf", "whole.gguf"});
}

TEST_CASE("resume: Ctrl-C leaves nothing, or with --resume what is done") {
  const TempFolder folder;
  const fs::path out = folder / "out.gguf";
  const Arguments run = {"quantize", DUET_TEST_DIR "/demo-f32.gguf", out.string(), "Q3_K_M", "-t", "1"};
  CHECK(run_duet(run, {.signal_after_s = 0.1}).exit_code == 130);
  check_only(folder, {});
  leave_unfinished(with(run, {"--resume"}), out, SIGINT);
  check_only(folder, {"out.gguf.part", "out.gguf.part.journal"});
  const ProcessResult again = run_duet(with(run, {"--resume"}), {.signal_after_s = 0.1});
  CHECK(again.exit_code == 130);
  CHECK(again.err.find("out.gguf.part is kept") != std::string::npos);
  CHECK(ok(with(run, {"--resume"})).find("resumed: ") != std::string::npos);
  check_only(folder, {"out.gguf"});
}

TEST_CASE("convert --dry-run gives the exact size of the file, and of parts") {
  const TempFolder folder;
  const std::string out = (folder / "out.gguf").string();
  for (const Arguments& more : {Arguments{}, Arguments{"--split-max-size", "4M"}}) {
    const ProcessResult plan = run_duet(with({"convert", kDemo, "-q", "Q4_0", "--dry-run", "--json"}, more));
    REQUIRE(plan.exit_code == 0);
    const duet::Json json = duet::parse_json(plan.out, "stdout");
    ok(with({"convert", kDemo, "-q", "Q4_0", "-o", out}, more));
    uint64_t n_bytes = 0, n_files = 0;
    for (const auto& entry : fs::directory_iterator(folder.path())) {
      n_bytes += entry.file_size();
      ++n_files;
      fs::remove(entry.path());
    }
    CHECK(json["file_bytes"] == n_bytes);
    CHECK(json["files"] == n_files);
  }
}
