// Output files appear complete or not at all.
#include <doctest/doctest.h>
#include <sched.h>
#include <sys/mount.h>
#include <unistd.h>

#include <filesystem>

#include "tests/support/process.h"
#include "tests/support/skip.h"
#include "tests/support/tiny_model.h"

using namespace duet::test;
namespace fs = std::filesystem;

namespace {

constexpr int kIo = 3;
const std::string kDemo = DUET_SOURCE_DIR "/models/demo";
const std::string kModel = DUET_TEST_DIR "/demo-q4_k_m.gguf";

// A small file system of our own, seen by this process and its children only.
class SmallDisk {
 public:
  explicit SmallDisk(const char* options) : path_(folder_.path().string()) {
    ok_ = ::geteuid() == 0 && ::unshare(CLONE_NEWNS) == 0 &&
          ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
          ::mount("tmpfs", path_.c_str(), "tmpfs", 0, options) == 0;
  }
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;
  ~SmallDisk() {
    if (ok_) ::umount2(path_.c_str(), MNT_DETACH);
  }
  bool ok() const { return ok_; }
  bool make_read_only() {
    return ::mount(nullptr, path_.c_str(), nullptr, MS_REMOUNT | MS_RDONLY, nullptr) == 0;
  }
  const std::string& path() const { return path_; }

 private:
  TempFolder folder_;
  std::string path_;
  bool ok_ = false;
};

// Every command that writes a file, with its output in `folder`.
std::vector<std::vector<std::string>> writers(const std::string& folder) {
  return {{"convert", kDemo, "-q", "Q8_0", "-o", folder + "/out"},
          {"quantize", kModel, folder + "/out", "Q8_0"},
          {"make-synthetic", "tiny", "--layers", "2", "--type", "Q8_0", "-o", folder + "/out"},
          {"logits", kModel, "--file", DUET_SOURCE_DIR "/LICENSE", "-o", folder + "/out"}};
}

}  // namespace

TEST_CASE("a full disk is an I/O error and leaves nothing behind") {
  SmallDisk disk("size=256k");
  if (!disk.ok()) DUET_SKIP("needs root and a mount namespace for a small tmpfs");
  for (const auto& command : writers(disk.path())) {
    CAPTURE(command.front());
    CHECK(refusal(run_duet(command), kIo, "out") == "");
    CHECK(fs::is_empty(disk.path()));
  }
}

TEST_CASE("a write that fails midway is an I/O error and leaves nothing behind") {
  const TempFolder folder;
  for (const auto& command : writers(folder.path().string())) {
    CAPTURE(command.front());
    CHECK(refusal(run_duet(command, {.file_size_limit = 100000}), kIo, "out") == "");
    CHECK(fs::is_empty(folder.path()));
  }
}

TEST_CASE("a read-only output folder is an I/O error") {
  SmallDisk disk("size=64m");
  if (!disk.ok() || !disk.make_read_only())
    DUET_SKIP("needs root and a mount namespace for a read-only tmpfs");
  for (const auto& command : writers(disk.path())) {
    CAPTURE(command.front());
    CHECK(refusal(run_duet(command), kIo, "out") == "");
  }
}

TEST_CASE("an output folder that is not there is an I/O error") {
  for (const auto& command : writers("/nonexistent/folder")) {
    CAPTURE(command.front());
    CHECK(refusal(run_duet(command), kIo, "/nonexistent/folder") == "");
  }
}

TEST_CASE("an existing model is not replaced without --force") {
  const TempFolder folder;
  const std::string out = (folder / "out.gguf").string();
  write_text(out, "precious");
  CHECK(refusal(run_duet({"convert", kDemo, "-q", "Q8_0", "-o", out}), kIo, "--force") == "");
  CHECK(fs::file_size(out) == 8);
  CHECK(run_duet({"convert", kDemo, "-q", "Q8_0", "-o", out, "--force"}).exit_code == 0);
  CHECK(fs::file_size(out) > 1000000);
}

TEST_CASE("an interrupted conversion leaves nothing behind") {
  const TempFolder folder;
  const ProcessResult result =
      run_duet({"convert", kDemo, "-q", "Q2_K", "--threads", "1", "-o", (folder / "out").string()},
               {.signal_after_s = 0.15});
  CHECK((result.exit_code == 130 || result.exit_code == 0));
  if (result.exit_code == 130)
    CHECK(fs::is_empty(folder.path()));
  else
    CHECK(fs::file_size(folder / "out") > 1000000);
}

TEST_CASE("--dry-run writes nothing") {
  const TempFolder folder;
  const ProcessResult result =
      run_duet({"convert", kDemo, "-q", "Q4_K_M", "--dry-run", "-o", (folder / "out").string()});
  CHECK(result.exit_code == 0);
  CHECK(result.out.find("Q4_K_M") != std::string::npos);
  CHECK(fs::is_empty(folder.path()));
}
