#include "hub/part_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>

#include "base/error.h"
#include "base/json.h"
#include "base/locked_file.h"
#include "base/mapped_file.h"
#include "base/units.h"

namespace duet::hub {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFormat = "duet-download";
constexpr uint64_t kMaxJournalBytes = 16 << 20;
constexpr uint64_t kMaxChunks = 1 << 20;

fs::path part_of(const fs::path& destination) { return destination.string() + ".part"; }
fs::path journal_of(const fs::path& destination) { return destination.string() + ".part.json"; }

std::string errno_text() { return std::strerror(errno); }

// Error(format) for anything that a journal of ours would not say.
Journal parse_journal(const fs::path& path) {
  const std::string source = path.string();
  const Json json = parse_json(read_file(path, kMaxJournalBytes), source);
  if (!json.is_object() || json_get<std::string>(json, "format", source) != kFormat || json_get<uint64_t>(json, "version", source) != 1)
    fail(ErrorKind::format, source, ": is not a journal of a download");
  Journal out;
  out.url = json_get<std::string>(json, "url", source);
  out.etag = json_get<std::string>(json, "etag", source);
  out.sha256 = json_get<std::string>(json, "sha256", source);
  out.size = json_get<uint64_t>(json, "size", source);
  out.chunk_bytes = json_get<uint64_t>(json, "chunk_bytes", source);
  const auto done = json.find("done");
  if (out.size == 0 || out.chunk_bytes == 0 || out.size / out.chunk_bytes >= kMaxChunks || done == json.end() || !done->is_array() ||
      done->size() != (out.size - 1) / out.chunk_bytes + 1)
    fail(ErrorKind::format, source, ": chunks do not fit the size");
  for (const Json& n : *done) {
    const size_t chunk = out.done.size();
    if (!n.is_number_unsigned() || n.get<uint64_t>() > out.chunk_size(chunk)) fail(ErrorKind::format, source, ": chunk ", chunk, " is too long");
    out.done.push_back(n.get<uint64_t>());
  }
  return out;
}

}  // namespace

Journal new_journal(uint64_t size, uint64_t chunk_bytes) {
  Journal out;
  out.size = size;
  out.chunk_bytes = std::max(chunk_bytes, size / (kMaxChunks - 1) + 1);
  out.done.resize((size - 1) / out.chunk_bytes + 1);
  return out;
}

uint64_t Journal::chunk_size(size_t chunk) const { return std::min(chunk_bytes, size - chunk * chunk_bytes); }
uint64_t Journal::total_done() const { return std::accumulate(done.begin(), done.end(), uint64_t{0}); }

PartFile::PartFile(fs::path destination)
    : destination_(std::move(destination)), part_(part_of(destination_)), journal_(journal_of(destination_)) {
  std::error_code ec;
  fs::create_directories(destination_.parent_path(), ec);
  file_ = open_locked(part_);
  if (!file_.is_open()) fail(ErrorKind::io, part_.string(), ": another duet pull is at work on it");
}

std::optional<Journal> PartFile::journal() const {
  try {
    Journal journal = parse_journal(journal_);
    struct stat info {};
    if (::fstat(file_.get(), &info) != 0 || static_cast<uint64_t>(info.st_size) != journal.size) return std::nullopt;
    return journal;
  } catch (const Error&) {
    return std::nullopt;  // worth no more than none: the download begins again
  }
}

void PartFile::reserve(uint64_t size) {
  struct stat info {};
  struct statvfs disk {};
  if (::fstat(file_.get(), &info) != 0 || ::fstatvfs(file_.get(), &disk) != 0) fail(ErrorKind::io, part_.string(), ": ", errno_text());
  const uint64_t have = static_cast<uint64_t>(info.st_blocks) * 512, free_bytes = uint64_t{disk.f_bavail} * disk.f_frsize;
  const uint64_t needed = size > have ? size - have : 0;
  if (needed > free_bytes)
    fail(ErrorKind::io, destination_.string(), ": needs ", format_size(needed), " more, the disk has ", format_size(free_bytes),
         " free; make room, or set DUET_MODELS to a folder on another disk");
  if (::ftruncate(file_.get(), static_cast<off_t>(size)) != 0) fail(ErrorKind::io, part_.string(), ": cannot make it ", size, " bytes: ", errno_text());
  if (::fallocate(file_.get(), 0, 0, static_cast<off_t>(size)) != 0 && (errno == ENOSPC || errno == EDQUOT))
    fail(ErrorKind::io, part_.string(), ": no room for ", format_size(size), ": ", errno_text(), "; make room, or set DUET_MODELS to a folder on another disk");
}

void PartFile::write(uint64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::pwrite(file_.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail(ErrorKind::io, part_.string(), ": cannot write: ", errno_text());
    bytes = bytes.subspan(static_cast<size_t>(n));
    offset += static_cast<uint64_t>(n);
  }
}

std::string PartFile::head(size_t n_bytes) const {
  std::string out(n_bytes, '\0');
  const ssize_t n = ::pread(file_.get(), out.data(), out.size(), 0);
  if (n < 0) fail(ErrorKind::io, part_.string(), ": cannot read: ", errno_text());
  out.resize(static_cast<size_t>(n));
  return out;
}

void PartFile::save(const Journal& journal) {
  if (::fdatasync(file_.get()) != 0) fail(ErrorKind::io, part_.string(), ": cannot write: ", errno_text());
  const Json json{{"format", kFormat},         {"version", 1},           {"url", journal.url},
                  {"etag", journal.etag},      {"sha256", journal.sha256}, {"size", journal.size},
                  {"chunk_bytes", journal.chunk_bytes}, {"done", journal.done}};
  OutputFile out(journal_, 0);
  out.write(json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
  out.commit();
}

void PartFile::restart() {
  std::error_code ec;
  fs::remove(journal_, ec);
  if (::ftruncate(file_.get(), 0) != 0) fail(ErrorKind::io, part_.string(), ": cannot write: ", errno_text());
}

void PartFile::discard() {
  std::error_code ec;
  fs::remove(journal_, ec);
  fs::remove(part_, ec);
}

void PartFile::finish() {
  if (::fsync(file_.get()) != 0) fail(ErrorKind::io, part_.string(), ": cannot complete the file: ", errno_text());
  if (::rename(part_.c_str(), destination_.c_str()) != 0)
    fail(ErrorKind::io, destination_.string(), ": cannot rename into place: ", errno_text());
  std::error_code ec;
  fs::remove(journal_, ec);
}

std::optional<Partial> partial_download(const fs::path& destination) {
  try {
    const Journal journal = parse_journal(journal_of(destination));
    return Partial{journal.total_done(), journal.size};
  } catch (const Error&) {
    return std::nullopt;
  }
}

}  // namespace duet::hub
