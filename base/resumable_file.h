// Output that work cut off at any moment can go on with.
//
// PATH.part grows; beside it PATH.part.journal says what of it can be trusted: first one JSON line with
// what the bytes depend on, then a line "END SHA256" for each stretch that was written, the hash being that
// of the bytes since the stretch before. Nothing is synchronized while writing: after a power failure the
// hashes tell how far the file is good. PATH.part.state-0 and -1 hold, in turns, what else the work needs to
// go on: a line "POSITION SHA256", then the bytes. What had the name PATH before stays until all is complete.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/file_descriptor.h"
#include "base/sha256.h"

namespace duet {

// What the bytes of an output depend on. An interrupted one is gone on with only when all are equal.
struct PartIdentity {
  std::string program, source, settings;
};

struct PartOptions {
  // fresh: Error(io) when there is something unfinished; replace: begins anew; resume: goes on with what is
  // intact, and what is there stays when the work fails. Otherwise nothing is left behind then.
  enum class Mode { fresh, replace, resume } mode = Mode::fresh;
  PartIdentity identity;
  // Go on only where a state was saved.
  bool needs_state = false;
  uint64_t state_bytes = 0;  // of each state, for the check of disk space
  std::function<void(const std::string&)> notice = {};
  const std::atomic<bool>* cancel = nullptr;  // while checking: true -> Error(cancelled)
};

std::filesystem::path part_file_of(const std::filesystem::path& path);
// Whether work on `path` was cut off after it had got its name, and no newer one was begun.
bool is_unfinished(const std::filesystem::path& path);

class ResumableFile {
 public:
  // Checks disk space for expected_bytes and locks out other processes. Error(io): also when something
  // unfinished is there and may not be touched, or was made otherwise (naming which of the three).
  ResumableFile(std::filesystem::path path, uint64_t expected_bytes, PartOptions options);
  ResumableFile(const ResumableFile&) = delete;
  ResumableFile& operator=(const ResumableFile&) = delete;
  ~ResumableFile();

  uint64_t intact() const { return intact_; }      // bytes that an earlier run has left
  uint64_t position() const { return position_; }  // of what was written or skipped
  void skip(uint64_t n);                           // stays within intact()
  void write(std::span<const std::byte> bytes);    // those within intact() are passed over
  // What is needed to go on from here.
  void save_state(const std::vector<std::span<const std::byte>>& pieces);
  // That of an earlier run, at intact(); empty without needs_state or without one.
  std::vector<std::byte> take_state() { return std::move(state_); }

  void complete();  // all bytes are on disk, still as PATH.part
  // Gives complete files that belong together their names, the first one first, and then forgets how to go on,
  // the first one last: as long as it is not forgotten, the others are of the same unfinished run. From here on
  // nothing is removed, whatever the mode: what fails is gone on with by `resume`.
  static void publish(std::span<ResumableFile* const> files);

 private:
  using Clock = std::chrono::steady_clock;
  struct Journal;
  std::filesystem::path beside(const char* ending) const;
  void open_part();
  void begin_anew(uint64_t expected_bytes);
  void take_up(const Journal& journal);
  void check_identity(const Journal& journal) const;
  uint64_t verified(const Journal& journal);  // and fills kept_
  void find_state(uint64_t end);
  void append(std::span<const std::byte> bytes);
  void record();
  void take_name();
  void forget();
  void remove_all() noexcept;

  std::filesystem::path path_;
  PartOptions options_;
  FileDescriptor file_, journal_;
  bool named_ = false;  // no longer PATH.part
  bool ours_ = false;   // what is on disk may be removed
  uint64_t intact_ = 0, position_ = 0, recorded_ = 0;
  std::vector<std::string> kept_;  // lines of the journal that hold
  std::vector<std::byte> state_;
  size_t next_state_ = 0;
  Sha256 hash_;
  Clock::time_point last_record_ = Clock::now();
};

}  // namespace duet
