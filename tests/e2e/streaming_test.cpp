// duet with experts streamed from disk: the same output, in the memory it was given.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "base/json.h"
#include "base/mapped_file.h"
#include "runtime/expert_policy.h"
#include "runtime/expert_replay.h"
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

// Bytes that Belady's choice misses from chunk `first` on, beginning with what the engine holds then /
// those that the engine missed.
double best_share(const duet::ExpertTrace& trace, size_t first) {
  duet::ExpertPolicy policy(trace.header.n_expert, trace.header.slots);
  duet::ExpertPolicy::Step step;
  for (size_t i = 0; i < first; ++i)
    for (size_t l = 0; l < trace.chunks[i].layers.size(); ++l) policy.use(l, trace.chunks[i].layers[l], trace.header.n_used, step);
  duet::HeldExperts held(trace.header.slots.size());
  for (size_t l = 0; l < held.size(); ++l)
    for (int32_t e = 0; e < static_cast<int32_t>(trace.header.n_expert); ++e)
      if (policy.slot_of(l, e) != duet::ExpertPolicy::kStaging) held[l].push_back(e);
  duet::ExpertTrace rest = trace;
  rest.chunks.erase(rest.chunks.begin(), rest.chunks.begin() + static_cast<ptrdiff_t>(first));
  const auto engine = duet::replay_engine(trace, trace.header.slots);
  double best = 0, missed = 0;
  for (const auto& c : duet::replay_belady(rest, rest.header.slots, held)) best += static_cast<double>(c.bytes);
  for (size_t i = first; i < engine.size(); ++i) missed += static_cast<double>(engine[i].bytes);
  return best / missed;
}

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
          CHECK(logits(folder, {"--threads", threads, "--io", io, "--slots", slots, "--batch", batch, "--lookahead", "on"}) == want);
          if (std::string(batch) == "1") CHECK(logits(folder, {"--threads", threads, "--io", io, "--slots", slots, "--batch", batch, "--lookahead", "off"}) == want);
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

TEST_CASE("streaming: run --trace-experts holds what the engine counted") {
  const Folder folder;
  const std::string path = folder / "trace.jsonl";
  const ProcessResult result = run_duet({"run", kDemo, "-p", "The package manager installs", "-n", "12", "--temp", "0", "--ignore-eos", "--slots", "2", "--batch", "3",
                                         "--json", "--trace-experts", path});
  CAPTURE(result.err);
  REQUIRE(result.exit_code == 0);
  const Json json = duet::parse_json(result.out, "stdout");
  const duet::ExpertTrace trace = duet::read_expert_trace(path);
  const auto counts = duet::replay_engine(trace, trace.header.slots);
  duet::ReplayCounts all, decode;
  for (const auto& c : counts) all += c;
  for (size_t i = counts.size() - 11; i < counts.size(); ++i) decode += counts[i];  // the 12th token is not evaluated
  REQUIRE(trace.engine.has_value());
  CHECK(trace.engine->hits == all.hits);
  CHECK(trace.engine->misses == all.misses);
  CHECK(trace.engine->disk_bytes == all.bytes + trace.engine->padding_bytes + trace.engine->wasted_bytes);
  CHECK(json["streaming"]["hit_rate"].get<double>() == static_cast<double>(decode.hits) / static_cast<double>(decode.hits + decode.misses));
  size_t n_tokens = 0;
  for (const auto& chunk : trace.chunks) n_tokens += trace.n_tokens(chunk);
  CHECK(n_tokens == json["prompt_tokens"].get<size_t>() + 11);
}

TEST_CASE("streaming: bench says how near its choice of experts is to the best, and traces all it does") {
  const Folder folder;
  const std::string path = folder / "trace.jsonl";
  const ProcessResult result = run_duet({"bench", kDemo, "-p", "4", "-n", "24", "-r", "2", "-t", "1", "--slots", "2", "--json", "--trace-experts", path});
  CAPTURE(result.err);
  REQUIRE(result.exit_code == 0);
  const Json json = duet::parse_json(result.out, "stdout");
  const Json &prefill = json["results"][0], &decode = json["results"][1];
  CHECK_FALSE(prefill.contains("eff_policy"));
  CHECK(decode["eff_policy"].get<double>() > 0.3);
  CHECK(decode["eff_policy"].get<double>() <= 1.0);
  const duet::ExpertTrace trace = duet::read_expert_trace(path);
  const auto counts = duet::replay_engine(trace, trace.header.slots);
  duet::ReplayCounts all, measured;
  for (const auto& c : counts) all += c;
  for (size_t i = counts.size() - 48; i < counts.size(); ++i) measured += counts[i];
  CHECK(trace.engine->hits == all.hits);
  CHECK(trace.engine->misses == all.misses);
  CHECK(trace.engine->disk_bytes == all.bytes + trace.engine->padding_bytes + trace.engine->wasted_bytes);
  CHECK(decode["disk_bytes"].get<uint64_t>() == measured.bytes + decode["padding_bytes"].get<uint64_t>() + decode["speculative_wasted_bytes"].get<uint64_t>());
  CHECK(decode["speculative_bytes"].get<uint64_t>() >= decode["speculative_wasted_bytes"].get<uint64_t>());
  CHECK(decode.contains("kernel_read_bytes_per_token"));
  CHECK(decode["hit_rate"].get<double>() == static_cast<double>(measured.hits) / static_cast<double>(measured.hits + measured.misses));
  CHECK(decode["eff_policy"].get<double>() == doctest::Approx(best_share(trace, counts.size() - 48)));
}

TEST_CASE("streaming: with all slots nothing is missed, and the choice is the best") {
  const ProcessResult result = run_duet({"bench", kDemo, "-p", "0", "-n", "4", "-r", "1", "-t", "1", "--slots", "8", "--json"});
  REQUIRE(result.exit_code == 0);
  CHECK(duet::parse_json(result.out, "stdout")["results"][0]["eff_policy"] == 1.0);
}

TEST_CASE("streaming: what cannot be traced is refused, a resident run can") {
  const Folder folder;
  const std::string path = folder / "trace.jsonl";
  CHECK(refusal(run_duet({"bench", kDemo, "-t", "1,2", "--trace-experts", path}), 2, "one number of threads") == "");
  CHECK(refusal(run_duet({"bench", "--roofline", "--trace-experts", path}), 2, "--trace-experts") == "");
  CHECK(refusal(run_duet({"run", kDemo, "-p", "a", "--trace-experts", folder / "absent/trace"}), 3, "absent") == "");
  CHECK(fs::is_empty(folder.path));
  REQUIRE(run_duet({"run", kDemo, "-p", "a", "-n", "2", "--ram", "all", "--trace-experts", path}).exit_code == 0);
  const duet::ExpertTrace trace = duet::read_expert_trace(path);
  CHECK_FALSE(trace.engine.has_value());
  CHECK(trace.header.slots.front() == trace.header.n_expert);
}

namespace {

// A terminal that nobody sits at.
class Terminal {
 public:
  Terminal() : fd_(::posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK)) {
    if (fd_ < 0 || ::grantpt(fd_) != 0 || ::unlockpt(fd_) != 0) return;
    path_ = ::ptsname(fd_);
    own_ = ::open(path_.c_str(), O_RDWR | O_NOCTTY);  // keeps what was written
  }
  Terminal(const Terminal&) = delete;
  Terminal& operator=(const Terminal&) = delete;
  ~Terminal() {
    if (own_ >= 0) ::close(own_);
    if (fd_ >= 0) ::close(fd_);
  }
  const std::string& path() const { return path_; }  // "": there is none
  std::string shown() const {
    std::string text;
    struct pollfd waiting {fd_, POLLIN, 0};
    char piece[4096];
    while (::poll(&waiting, 1, 300) > 0) {  // what was written arrives a little later
      const ssize_t n = ::read(fd_, piece, sizeof(piece));
      if (n <= 0) break;
      text.append(piece, static_cast<size_t>(n));
    }
    return text;
  }

 private:
  int fd_, own_ = -1;
  std::string path_;
};

// What a terminal on stderr shows of a run that streams for some seconds, with stdout as given.
std::string shown_by_run(const std::string& options, const std::string& to) {
  const Terminal terminal;
  if (terminal.path().empty()) return {};
  const ProcessResult result = run_process({"/bin/sh", "-c", DUET_BINARY " run " + kDemo + " -p 'The package' -n 1500 --ctx 2048 --temp 0 --ignore-eos --slots 2 " + options + " < /dev/null 2> " + terminal.path() + to},
                                           {.environment = {{"TERM", "xterm"}}});
  CHECK(result.exit_code == 0);
  return terminal.shown();
}

size_t count(const std::string& text, const char* words) {
  size_t n = 0;
  for (size_t at = text.find(words); at != text.npos; at = text.find(words, at + 1)) ++n;
  return n;
}

}  // namespace

TEST_CASE("streaming: a live line on the terminal, never between the text") {
  const std::string with_json = shown_by_run("--json", " | cat > /dev/null");
  if (with_json.empty()) DUET_SKIP("no pseudo-terminals here");
  const std::string erase = "\r\033[K";
  for (const std::string& shown : {with_json, shown_by_run("", " > /dev/null")}) {
    CAPTURE(shown);
    CHECK(count(shown, " tok | ") > 0);
    CHECK(count(shown, " GB/tok | disk ") == count(shown, " tok | "));
    const size_t last = shown.rfind(" tok | "), end = shown.find(erase, last), closing = shown.find("[prompt ");
    CHECK(end < closing);  // removed before the last words
  }
  const std::string piped = shown_by_run("", " | cat > /dev/null");  // cat may show it on the terminal
  CHECK(count(piped, "[prompt ") == 1);
  CHECK(count(piped, " tok | ") == 0);
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
