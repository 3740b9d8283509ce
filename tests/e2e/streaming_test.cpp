// duet with experts streamed from disk: the same output, in the memory it was given.
#include <doctest/doctest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "base/json.h"
#include "base/mapped_file.h"
#include "tests/support/process.h"
#include "tests/support/skip.h"

using namespace duet::test;
using duet::Json;
namespace fs = std::filesystem;

namespace {

const std::string kDemo = DUET_TEST_DIR "/demo-q4_k_m.gguf";

// A folder of this process, removed with all in it.
struct Folder {
  fs::path path = fs::path(DUET_TEST_DIR) / ("streaming-" + std::to_string(::getpid()));
  Folder() { fs::create_directories(path); }
  ~Folder() { fs::remove_all(path); }
  std::string operator/(const char* name) const { return (path / name).string(); }
};

std::string logits(const Folder& folder, const std::vector<std::string>& options) {
  const std::string file = folder / "logits.npy";
  std::vector<std::string> command{"logits", kDemo, "--text", "The package manager installs the package. Le paquet est", "-o", file};
  command.insert(command.end(), options.begin(), options.end());
  const ProcessResult result = run_duet(command);
  CAPTURE(result.err);
  REQUIRE(result.exit_code == 0);
  return duet::read_file(file, uint64_t{1} << 30);
}

// A memory cgroup (version 1) with a limit; needs root and the hierarchy where it usually is.
class MemoryGroup {
 public:
  explicit MemoryGroup(uint64_t limit) : path_(fs::path("/sys/fs/cgroup/memory") / ("duet-test-" + std::to_string(::getpid()))) {
    std::error_code error;
    if (!fs::exists("/sys/fs/cgroup/memory/memory.limit_in_bytes", error) || !fs::create_directory(path_, error)) return;
    std::ofstream(path_ / "memory.limit_in_bytes") << limit;
    usable_ = read("memory.limit_in_bytes") == limit;
  }
  ~MemoryGroup() {
    std::error_code error;
    fs::remove(path_, error);
  }
  bool usable() const { return usable_; }
  uint64_t read(const char* name) const {
    uint64_t value = 0;
    std::ifstream(path_ / name) >> value;
    return value;
  }
  ProcessResult run(const std::string& arguments) const {
    return run_process({"/bin/sh", "-c", "echo $$ > " + (path_ / "cgroup.procs").string() + " && exec " DUET_BINARY " " + arguments});
  }

 private:
  fs::path path_;
  bool usable_ = false;
};

}  // namespace

TEST_CASE("streaming: logits of the demo model equal resident ones byte for byte") {
  const Folder folder;
  const std::string want = logits(folder, {"--threads", "1"});
  for (const char* io : {"auto", "pread", "buffered"})
    for (const char* slots : {"1", "2", "3", "7"})
      for (const char* threads : {"1", "2"})
        for (const char* batch : {"1", "32", "512"}) {
          CAPTURE(io);
          CAPTURE(slots);
          CAPTURE(batch);
          CHECK(logits(folder, {"--threads", threads, "--io", io, "--slots", slots, "--batch", batch}) == want);
        }
}

TEST_CASE("streaming: run says how experts were read") {
  const ProcessResult result = run_duet({"run", kDemo, "-p", "The package", "-n", "8", "--temp", "0", "--slots", "2", "--json"});
  REQUIRE(result.exit_code == 0);
  const Json json = duet::parse_json(result.out, "stdout")["streaming"];
  CHECK(json["hit_rate"].get<double>() > 0);
  CHECK(json["hit_rate"].get<double>() < 1);
  CHECK(json["disk_bytes_per_token"].get<double>() > 0);
  CHECK(json["backend"].get<std::string>().find(",") != std::string::npos);
}

TEST_CASE("streaming: a model larger than its memory cgroup keeps to --ram, and its text stays") {
  const MemoryGroup group(uint64_t{956} << 20);
  if (!group.usable()) DUET_SKIP("needs root and memory cgroups of version 1");
  const Folder folder;
  const std::string model = folder / "model.gguf";
  REQUIRE(run_duet({"make-synthetic", "8x7b", "--layers", "2", "--type", "Q2_K", "-o", model}).exit_code == 0);
  const std::string options = model + " -p hello -n 8 --temp 0 --raw --ctx 256 --batch 64 --json --ram ";
  const ProcessResult streamed = group.run("run " + options + "700MiB");
  CAPTURE(streamed.err);
  REQUIRE(streamed.exit_code == 0);
  const Json json = duet::parse_json(streamed.out, "stdout");
  CHECK(json.contains("streaming"));
  CHECK(group.read("memory.max_usage_in_bytes") <= uint64_t{700} << 20);
  CHECK(group.read("memory.failcnt") == 0);
  const ProcessResult resident = run_duet({"run", model, "-p", "hello", "-n", "8", "--temp", "0", "--raw", "--ctx", "256", "--batch", "64", "--json", "--ram", "all"});
  REQUIRE(resident.exit_code == 0);
  CHECK(duet::parse_json(resident.out, "stdout")["ids"] == json["ids"]);
}
