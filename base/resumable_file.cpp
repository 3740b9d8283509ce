#include "base/resumable_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "base/json.h"
#include "base/locked_file.h"
#include "base/mapped_file.h"
#include "base/units.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFormat = "duet-output";
constexpr uint64_t kMaxJournalBytes = uint64_t{64} << 20;
constexpr size_t kHashDigits = 64;
// A stretch ends after so many bytes or so much time: what is lost by a kill.
constexpr uint64_t kStretchBytes = uint64_t{64} << 20;
constexpr std::chrono::milliseconds kStretchTime{100};
constexpr const char* kStateEndings[] = {".part.state-0", ".part.state-1"};

std::string errno_text() { return std::strerror(errno); }

uint64_t size_of(const FileDescriptor& file) {
  const auto identity = identify(file.get());
  return identity ? identity->size : 0;
}

// "NUMBER HASH"; nothing for anything else.
struct NumberAndHash {
  uint64_t number = 0;
  std::string hash;
};
std::optional<NumberAndHash> parse_line(std::string_view line) {
  NumberAndHash out;
  const auto [end, error] = std::from_chars(line.data(), line.data() + line.size(), out.number);
  if (error != std::errc() || end == line.data() + line.size() || *end != ' ') return std::nullopt;
  out.hash = std::string(end + 1, line.data() + line.size());
  return out.hash.size() == kHashDigits ? std::optional(out) : std::nullopt;
}

std::span<const std::byte> bytes_of(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }

FileDescriptor open_file(const fs::path& path, int flags) {
  FileDescriptor file(::open(path.c_str(), flags | O_CLOEXEC | O_NOFOLLOW, 0644));
  if (!file.is_open()) fail(ErrorKind::io, path.string(), ": cannot write: ", errno_text());
  return file;
}

// Cuts the file; what is written goes behind.
void cut(const FileDescriptor& file, const fs::path& path, uint64_t n_bytes) {
  if (::ftruncate(file.get(), static_cast<off_t>(n_bytes)) != 0 || ::lseek(file.get(), 0, SEEK_END) < 0)
    fail(ErrorKind::io, path.string(), ": cannot write: ", errno_text());
}

}  // namespace

fs::path part_file_of(const fs::path& path) { return path.string() + ".part"; }

bool is_unfinished(const fs::path& path) {
  std::error_code ec;
  return fs::exists(path, ec) && !fs::exists(part_file_of(path), ec) && fs::exists(path.string() + ".part.journal", ec);
}

struct ResumableFile::Journal {
  PartIdentity identity;
  uint64_t n_bytes = 0;
  std::vector<NumberAndHash> stretches;

  // Nothing when there is none or its first line is not one of ours.
  static std::optional<Journal> read(const fs::path& path) {
    try {
      const std::string text = read_file(path, kMaxJournalBytes);
      size_t end = text.find('\n');
      if (end == std::string::npos) return std::nullopt;
      Journal out = parse_head(text.substr(0, end), path.string());
      for (size_t at = end + 1; (end = text.find('\n', at)) != std::string::npos; at = end + 1) {
        const auto stretch = parse_line(std::string_view(text).substr(at, end - at));
        const uint64_t before = out.stretches.empty() ? 0 : out.stretches.back().number;
        if (!stretch || stretch->number <= before) break;
        out.stretches.push_back(*stretch);
      }
      return out;
    } catch (const Error&) {
      return std::nullopt;
    }
  }

 private:
  static Journal parse_head(const std::string& line, const std::string& source) {
    const Json json = parse_json(line, source);
    if (!json.is_object() || json_get<std::string>(json, "format", source) != kFormat || json_get<uint64_t>(json, "version", source) != 1)
      fail(ErrorKind::format, source, ": is no journal of ours");
    Journal out;
    out.identity.program = json_get<std::string>(json, "program", source);
    out.identity.source = json_get<std::string>(json, "source", source);
    out.identity.settings = json_get<std::string>(json, "settings", source);
    out.n_bytes = json_get<uint64_t>(json, "bytes", source);
    return out;
  }
};

ResumableFile::ResumableFile(fs::path path, uint64_t expected_bytes, PartOptions options) : path_(std::move(path)), options_(std::move(options)) {
  std::error_code ec;
  const bool named = options_.mode == PartOptions::Mode::resume && is_unfinished(path_);
  const fs::path begun = named ? path_ : beside(".part");
  const uint64_t there = fs::exists(begun, ec) ? fs::file_size(begun, ec) : 0;
  check_destination(path_, expected_bytes - std::min(expected_bytes, there) + 2 * options_.state_bytes);
  const auto journal = Journal::read(beside(".part.journal"));
  const bool resume = options_.mode == PartOptions::Mode::resume;
  if (resume && journal) check_identity(*journal);
  if (resume && journal && !fs::exists(beside(".part"), ec) && fs::is_regular_file(fs::symlink_status(path_, ec))) {
    // Killed between the last byte and the end of the work: the file has its name already.
    file_ = open_file(path_, O_RDWR);
    named_ = size_of(file_) == expected_bytes && verified(*journal) == expected_bytes;
  }
  if (!named_) open_part();
  if (options_.mode == PartOptions::Mode::fresh && size_of(file_) > 0) {
    const std::string of = journal ? concat(" of ", format_size(journal->n_bytes)) : "";
    fail(ErrorKind::io, beside(".part").string(), ": an unfinished file is there (", format_size(size_of(file_)), of,
         "); --resume goes on with it, --force begins anew");
  }
  if (resume && !journal && size_of(file_) > 0)
    fail(ErrorKind::io, beside(".part").string(), ": is not of an unfinished run of ours (no journal beside it); remove it or choose another name");
  if (resume && journal && size_of(file_) > 0) take_up(*journal);
  if (!named_) begin_anew(expected_bytes);
}

ResumableFile::~ResumableFile() {
  if (!journal_.is_open() || !ours_) return;
  try {
    if (options_.mode != PartOptions::Mode::resume)
      remove_all();
    else
      record();
  } catch (const Error&) {  // less to go on with
  }
}

fs::path ResumableFile::beside(const char* ending) const { return path_.string() + ending; }

void ResumableFile::open_part() {
  file_ = open_locked(beside(".part"));
  if (!file_.is_open()) fail(ErrorKind::io, beside(".part").string(), ": another process is writing it");
}

void ResumableFile::check_identity(const Journal& journal) const {
  const auto check = [&](const std::string& was, const std::string& is, const char* what) {
    if (was != is) fail(ErrorKind::usage, beside(".part").string(), ": was begun with ", what, " and cannot be gone on with; --force without --resume begins anew");
  };
  check(journal.identity.source, options_.identity.source, "other source files (or they have changed since)");
  check(journal.identity.settings, options_.identity.settings, "other options");
  check(journal.identity.program, options_.identity.program, "another version of this program");
}

// Keeps what is intact of an earlier run.
void ResumableFile::take_up(const Journal& journal) {
  intact_ = named_ ? journal.stretches.back().number : verified(journal);
  if (options_.needs_state && !named_) find_state(intact_);
  if (options_.notice && intact_ > 0)
    options_.notice(concat("resumed: ", format_size(intact_), " of ", format_size(journal.n_bytes), " are there and intact"));
}

// Bytes from the start of file_ that are as they were recorded.
uint64_t ResumableFile::verified(const Journal& journal) {
  kept_.clear();
  std::vector<std::byte> buffer(size_t{4} << 20);
  uint64_t at = 0, good = 0;
  for (const auto& [end, expected] : journal.stretches) {
    Sha256 hash;
    while (at < end) {
      if (options_.cancel != nullptr && options_.cancel->load()) fail(ErrorKind::cancelled, "interrupted");
      const ssize_t n = ::pread(file_.get(), buffer.data(), std::min<uint64_t>(buffer.size(), end - at), static_cast<off_t>(at));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return good;
      hash.add(std::span(buffer).first(static_cast<size_t>(n)));
      at += static_cast<uint64_t>(n);
    }
    if (hex(hash.finish()) != expected) break;
    kept_.push_back(concat(end, " ", expected));
    good = end;
  }
  return good;
}

// The newest intact state of at most `end` bytes of output; intact_ is where it was saved.
void ResumableFile::find_state(uint64_t end) {
  intact_ = 0;
  for (size_t i = 0; i < std::size(kStateEndings); ++i) {
    std::error_code ec;
    const fs::path path = beside(kStateEndings[i]);
    if (!fs::exists(path, ec)) continue;
    const MappedFile file = MappedFile::open(path);
    const auto bytes = file.bytes();
    const std::string_view text(reinterpret_cast<const char*>(bytes.data()), std::min<size_t>(bytes.size(), 128));
    const size_t line = text.find('\n');
    const auto head = line == std::string_view::npos ? std::nullopt : parse_line(text.substr(0, line));
    if (!head || head->number > end || head->number <= intact_) continue;
    const auto data = bytes.subspan(line + 1);
    if (sha256_of(data) != head->hash) continue;
    state_.assign(data.begin(), data.end());
    intact_ = head->number;
    next_state_ = 1 - i;
  }
}

// The files as they are to be at the beginning: cut to what is intact, with a journal of that. A kill in between
// leaves a part file shorter than its journal says, or an empty one.
void ResumableFile::begin_anew(uint64_t expected_bytes) {
  ours_ = true;
  std::error_code ec;
  if (intact_ == 0)  // those of a run before would be taken for this one's
    for (const char* ending : kStateEndings) fs::remove(beside(ending), ec);
  cut(file_, beside(".part"), intact_);
  const PartIdentity& id = options_.identity;
  std::string head = Json{{"format", kFormat},     {"version", 1},        {"bytes", expected_bytes},
                          {"program", id.program}, {"source", id.source}, {"settings", id.settings}}
                         .dump() + "\n";
  journal_ = open_file(beside(".part.journal"), O_WRONLY | O_CREAT);
  uint64_t n_kept = 0;
  for (const std::string& line : kept_)
    if (parse_line(line)->number <= intact_) n_kept += line.size() + 1;
  cut(journal_, beside(".part.journal"), intact_ > 0 ? head.size() + n_kept : 0);
  if (intact_ == 0) write_all(journal_.get(), bytes_of(head), beside(".part.journal"), 0);
  recorded_ = intact_;
}

void ResumableFile::skip(uint64_t n) {
  DUET_ASSERT(n <= intact_ - std::min(position_, intact_));
  position_ += n;
}

void ResumableFile::write(std::span<const std::byte> bytes) {
  if (position_ < intact_) {
    const uint64_t n = std::min<uint64_t>(bytes.size(), intact_ - position_);
    skip(n);
    bytes = bytes.subspan(n);
  }
  if (!bytes.empty()) append(bytes);
}

void ResumableFile::append(std::span<const std::byte> bytes) {
  write_all(file_.get(), bytes, path_, position_);
  hash_.add(bytes);
  position_ += bytes.size();
  if (position_ - recorded_ >= kStretchBytes || Clock::now() - last_record_ >= kStretchTime) record();
}

// What has been written since the last time counts from now on.
void ResumableFile::record() {
  if (named_ || position_ <= recorded_) return;
  write_all(journal_.get(), bytes_of(concat(position_, " ", hex(hash_.finish()), "\n")), beside(".part.journal"), 0);
  recorded_ = position_;
  last_record_ = Clock::now();
}

void ResumableFile::save_state(const std::vector<std::span<const std::byte>>& pieces) {
  if (position_ < intact_ || named_) return;
  record();
  Sha256 hash;
  for (const auto& piece : pieces) hash.add(piece);
  const fs::path path = beside(kStateEndings[next_state_]);
  const FileDescriptor file = open_file(path, O_WRONLY | O_CREAT | O_TRUNC);
  write_all(file.get(), bytes_of(concat(position_, " ", hex(hash.finish()), "\n")), path, 0);
  for (const auto& piece : pieces) write_all(file.get(), piece, path, 0);
  next_state_ = 1 - next_state_;
}

void ResumableFile::complete() {
  if (named_) return;
  record();
  if (::fsync(file_.get()) != 0) fail(ErrorKind::io, path_.string(), ": cannot complete the file: ", errno_text());
}

void ResumableFile::publish(std::span<ResumableFile* const> files) {
  for (ResumableFile* file : files) file->ours_ = false;
  for (ResumableFile* file : files) file->take_name();
  for (auto file = files.rbegin(); file != files.rend(); ++file) (*file)->forget();
}

void ResumableFile::take_name() {
  if (named_) return;
  if (::rename(beside(".part").c_str(), path_.c_str()) != 0)
    fail(ErrorKind::io, path_.string(), ": cannot rename into place: ", errno_text());
  named_ = true;
}

void ResumableFile::forget() {
  std::error_code ec;
  for (const char* ending : kStateEndings) fs::remove(beside(ending), ec);
  fs::remove(beside(".part.journal"), ec);
}

void ResumableFile::remove_all() noexcept {
  std::error_code ec;
  for (const char* ending : kStateEndings) fs::remove(beside(ending), ec);
  fs::remove(beside(".part.journal"), ec);  // before its file: without that it would vouch for what has the name
  fs::remove(beside(".part"), ec);
}

}  // namespace duet
