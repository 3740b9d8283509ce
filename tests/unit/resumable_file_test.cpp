#include "base/resumable_file.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <fstream>
#include <functional>

#include "base/mapped_file.h"
#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"

namespace duet {
namespace {

namespace fs = std::filesystem;
using Mode = PartOptions::Mode;
using test::TempFolder;

constexpr uint64_t kBytes = 100;

std::string whole() {
  std::string out(kBytes, '?');
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<char>('a' + i % 26);
  return out;
}

std::span<const std::byte> bytes_of(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }

PartOptions options(Mode mode, bool needs_state = false) {
  return {.mode = mode, .identity = {"program", "source", "settings"}, .needs_state = needs_state, .notice = {}};
}

// Does `work` in a process that ends as a killed one does: nothing is tidied up.
void killed(const std::function<void()>& work) {
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    try {
      work();
    } catch (...) {
      ::_exit(1);
    }
    ::_exit(0);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  REQUIRE(WIFEXITED(status));
  REQUIRE(WEXITSTATUS(status) == 0);
}

// Bytes [0, end) of the work, with a state where each of `states` is, then a kill. Each write is on record: it
// comes after the time of a stretch or before a state.
void begin_and_kill(const fs::path& path, PartOptions how, size_t end, const std::vector<size_t>& states) {
  killed([&] {
    auto* file = new ResumableFile(path, kBytes, std::move(how));  // never destroyed
    for (const size_t at : states) {
      file->write(bytes_of(whole()).subspan(file->position(), at - file->position()));
      file->save_state({bytes_of("state at "), bytes_of(std::to_string(at))});
    }
    if (end <= file->position()) return;
    ::usleep(110'000);
    file->write(bytes_of(whole()).subspan(file->position(), end - file->position()));
  });
}

std::string text_of(const std::vector<std::byte>& bytes) { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }

void finish(ResumableFile& file) {
  file.write(bytes_of(whole()).subspan(file.position()));
  file.complete();
  ResumableFile::publish(std::array{&file});
}

std::vector<std::string> names_in(const TempFolder& folder) {
  std::vector<std::string> out;
  for (const auto& entry : fs::directory_iterator(folder.path())) out.push_back(entry.path().filename().string());
  return out;
}

TEST_CASE("resumable file: written whole, nothing else remains") {
  const TempFolder folder;
  ResumableFile file(folder / "out", kBytes, options(Mode::fresh));
  CHECK(file.intact() == 0);
  finish(file);
  CHECK(read_file(folder / "out", 1000) == whole());
  CHECK(names_in(folder) == std::vector<std::string>{"out"});
}

TEST_CASE("resumable file: what a killed run has left is gone on with, and only where all is equal") {
  const TempFolder folder;
  begin_and_kill(folder / "out", options(Mode::resume), 40, {});
  test::check_thrown(test::thrown_by([&] { ResumableFile(folder / "out", kBytes, options(Mode::fresh)); }), ErrorKind::io, "an unfinished file is there");
  PartOptions other = options(Mode::resume);
  other.identity.settings = "others";
  test::check_thrown(test::thrown_by([&] { ResumableFile(folder / "out", kBytes, other); }), ErrorKind::usage, "other options");
  ResumableFile file(folder / "out", kBytes, options(Mode::resume));
  CHECK(file.intact() == 40);
  file.write(bytes_of(std::string(30, 'x')));  // passed over: those there are good
  file.skip(10);
  finish(file);
  CHECK(read_file(folder / "out", 1000) == whole());
  CHECK(names_in(folder) == std::vector<std::string>{"out"});
}

TEST_CASE("resumable file: damaged bytes are not gone on with") {
  const TempFolder folder;
  begin_and_kill(folder / "out", options(Mode::resume), 40, {});
  {
    std::fstream part(folder / "out.part", std::ios::in | std::ios::out | std::ios::binary);
    part.seekp(5);
    part << "#";
  }
  ResumableFile file(folder / "out", kBytes, options(Mode::resume));
  CHECK(file.intact() == 0);
  finish(file);
  CHECK(read_file(folder / "out", 1000) == whole());
}

TEST_CASE("resumable file: work that needs a state goes on at the newest one") {
  const TempFolder folder;
  begin_and_kill(folder / "out", options(Mode::resume, true), 90, {20, 50, 70});
  {
    ResumableFile file(folder / "out", kBytes, options(Mode::resume, true));
    CHECK(file.intact() == 70);
    CHECK(text_of(file.take_state()) == "state at 70");
  }
  {
    std::ofstream(folder / "out.part.state-0") << "damage";  // the third went where the first had been
    ResumableFile file(folder / "out", kBytes, options(Mode::resume, true));
    CHECK(file.intact() == 50);
    CHECK(text_of(file.take_state()) == "state at 50");
    finish(file);
  }
  CHECK(read_file(folder / "out", 1000) == whole());
  CHECK(names_in(folder) == std::vector<std::string>{"out"});
}

TEST_CASE("resumable file: a run that began anew does not take the states of the one before") {
  const TempFolder folder;
  begin_and_kill(folder / "out", options(Mode::resume, true), 90, {20, 50});
  begin_and_kill(folder / "out", options(Mode::replace, true), 60, {});  // killed before its first state
  REQUIRE(fs::file_size(folder / "out.part") == 60);
  ResumableFile file(folder / "out", kBytes, options(Mode::resume, true));
  CHECK(file.intact() == 0);
  CHECK(file.take_state().empty());
  finish(file);
  CHECK(read_file(folder / "out", 1000) == whole());
  CHECK(names_in(folder) == std::vector<std::string>{"out"});
}

TEST_CASE("resumable file: failing work leaves nothing, or with resume what is done") {
  const TempFolder folder;
  {
    ResumableFile file(folder / "out", kBytes, options(Mode::replace, true));
    file.write(bytes_of(whole()).first(30));
    file.save_state({bytes_of("state")});
  }
  CHECK(names_in(folder).empty());
  {
    ResumableFile file(folder / "out", kBytes, options(Mode::resume));
    file.write(bytes_of(whole()).first(30));
    test::check_thrown(test::thrown_by([&] { ResumableFile(folder / "out", kBytes, options(Mode::resume)); }), ErrorKind::io, "another process is writing it");
  }
  CHECK(ResumableFile(folder / "out", kBytes, options(Mode::resume)).intact() == 30);
}

TEST_CASE("resumable file: what has the name stays until all that belong together are complete") {
  const TempFolder folder;
  test::write_text(folder / "a", "old a");
  test::write_text(folder / "b", "old b");
  {
    ResumableFile a(folder / "a", kBytes, options(Mode::replace)), b(folder / "b", kBytes, options(Mode::replace));
    a.write(bytes_of(whole()));
    a.complete();
    b.write(bytes_of(whole()).first(30));
  }
  CHECK(names_in(folder).size() == 2);
  CHECK(read_file(folder / "a", 1000) == "old a");
  CHECK(read_file(folder / "b", 1000) == "old b");
  {
    ResumableFile a(folder / "a", kBytes, options(Mode::resume)), b(folder / "b", kBytes, options(Mode::resume));
    a.write(bytes_of(whole()));
    a.complete();
    b.write(bytes_of(whole()).first(30));
  }
  CHECK(read_file(folder / "a", 1000) == "old a");
  ResumableFile a(folder / "a", kBytes, options(Mode::resume)), b(folder / "b", kBytes, options(Mode::resume));
  CHECK(a.intact() == kBytes);
  CHECK(b.intact() == 30);
  for (ResumableFile* file : {&a, &b}) {
    file->write(bytes_of(whole()));
    file->complete();
  }
  ResumableFile::publish(std::array{&a, &b});
  CHECK(names_in(folder).size() == 2);
  CHECK(read_file(folder / "a", 1000) == whole());
  CHECK(read_file(folder / "b", 1000) == whole());
}

TEST_CASE("resumable file: files that cannot all get their names are kept and gone on with") {
  const TempFolder folder;
  {
    ResumableFile a(folder / "a", kBytes, options(Mode::replace)), b(folder / "b", kBytes, options(Mode::replace));
    for (ResumableFile* file : {&a, &b}) {
      file->write(bytes_of(whole()));
      file->complete();
    }
    fs::create_directory(folder / "b");
    test::check_thrown(test::thrown_by([&] { ResumableFile::publish(std::array{&a, &b}); }), ErrorKind::io, "cannot rename");
    fs::remove(folder / "b");
  }
  CHECK(is_unfinished(folder / "a"));
  CHECK(ResumableFile(folder / "a", kBytes, options(Mode::resume)).intact() == kBytes);
  CHECK(ResumableFile(folder / "b", kBytes, options(Mode::resume)).intact() == kBytes);
}

TEST_CASE("resumable file: named already, and then killed") {
  const TempFolder folder;
  killed([&] {
    auto* file = new ResumableFile(folder / "out", kBytes, options(Mode::resume));
    file->write(bytes_of(whole()));
    file->complete();
    fs::rename(folder / "out.part", folder / "out");
  });
  CHECK(is_unfinished(folder / "out"));
  PartOptions other = options(Mode::resume);
  other.identity.settings = "others";
  test::check_thrown(test::thrown_by([&] { ResumableFile(folder / "out", kBytes - 1, other); }), ErrorKind::usage, "other options");
  CHECK(is_unfinished(folder / "out"));
  ResumableFile file(folder / "out", kBytes, options(Mode::resume));
  CHECK(file.intact() == kBytes);
  finish(file);
  CHECK_FALSE(is_unfinished(folder / "out"));
  CHECK(read_file(folder / "out", 1000) == whole());
}

}  // namespace
}  // namespace duet
