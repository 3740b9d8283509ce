#include "server/prefix_store.h"

#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>

#include "base/bytes.h"
#include "base/error.h"
#include "base/mapped_file.h"
#include "base/parallel.h"
#include "base/private_file.h"
#include "base/zstd_frame.h"

namespace duet::server {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kMagic = "DUETKV01", kSuffix = ".kv";
constexpr size_t kBlock = Sequence::kBlock;
constexpr size_t kMostHeaderBytes = 16384;  // with the sizes of more layers than any model has
constexpr size_t kKeyDigits = 32;
constexpr size_t kMaxFiles = 16384;
constexpr std::chrono::hours kForgotten{1};  // age of a temporary file whose writer is gone
constexpr int kLevel = 1;

template <class T>
void put(std::string& out, const T& value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

std::span<const std::byte> bytes_of(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }

// High bytes of 16-bit words together: exponents are much alike, mantissas are not.
std::string split_words(std::span<const std::byte> words) {
  const size_t n = words.size() / 2;
  std::string out(words.size(), '\0');
  char* high = out.data();
  char* low = high + n;
  for (size_t i = 0; i < n; ++i) {
    high[i] = static_cast<char>(words[2 * i + 1]);
    low[i] = static_cast<char>(words[2 * i]);
  }
  return out;
}

std::vector<std::byte> join_words(std::string_view split) {
  const size_t n = split.size() / 2;
  std::vector<std::byte> out(split.size());
  std::byte* words = out.data();
  const char* high = split.data();
  const char* low = high + n;
  for (size_t i = 0; i < n; ++i) {
    words[2 * i + 1] = static_cast<std::byte>(high[i]);
    words[2 * i] = static_cast<std::byte>(low[i]);
  }
  return out;
}

std::optional<uint8_t> digit(char c) {
  if (c >= '0' && c <= '9') return static_cast<uint8_t>(c - '0');
  if (c >= 'a' && c <= 'f') return static_cast<uint8_t>(c - 'a' + 10);
  return std::nullopt;
}

// PARENT-KEY.kv
struct Name {
  std::array<std::byte, 16> parent, key;
};

std::optional<Name> parse_name(const std::string& name) {
  if (name.size() != 2 * kKeyDigits + 1 + kSuffix.size() || name[kKeyDigits] != '-' || !name.ends_with(kSuffix)) return std::nullopt;
  Name out{};
  for (size_t i = 0; i < 2 * out.key.size(); ++i) {
    const size_t at = 2 * i + (i >= out.key.size());
    const auto high = digit(name[at]), low = digit(name[at + 1]);
    if (!high || !low) return std::nullopt;
    (i < out.key.size() ? out.parent[i] : out.key[i - out.key.size()]) = static_cast<std::byte>(*high << 4 | *low);
  }
  return out;
}

bool begins_with(std::span<const Token> tokens, std::span<const Token> beginning) {
  return beginning.size() <= tokens.size() && std::equal(beginning.begin(), beginning.end(), tokens.begin());
}

// What has been written is whole, or the file was damaged since.
void check_digest(std::string_view file, const std::string& source) {
  if (file.size() <= sizeof(Sha256Digest)) fail(ErrorKind::format, source, ": the file is truncated");
  const auto bytes = bytes_of(file);
  const auto digest = Sha256().add(bytes.first(bytes.size() - sizeof(Sha256Digest))).finish();
  if (std::memcmp(digest.data(), bytes.last(sizeof digest).data(), sizeof digest) != 0) fail(ErrorKind::format, source, ": the contents do not have the SHA-256 they had");
}

struct FolderFile {
  fs::path path;
  Name name;
  uint64_t size;
  fs::file_time_type used;
};

bool is_old_temporary(const fs::directory_entry& entry) {
  const std::string name = entry.path().filename().string();
  const size_t suffix = name.find(std::string(kSuffix) + ".tmp");
  std::error_code ec;
  return suffix != std::string::npos && parse_name(name.substr(0, suffix + kSuffix.size())) && fs::file_time_type::clock::now() - entry.last_write_time(ec) > kForgotten && !ec;
}

// Those that have the name of a block. Removes what writers that were killed have left.
std::vector<FolderFile> list(const fs::path& folder) {
  std::vector<FolderFile> out;
  std::error_code ec;
  for (auto at = fs::directory_iterator(folder, ec); !ec && at != fs::directory_iterator(); at.increment(ec)) {
    std::error_code gone;
    if (at->symlink_status(gone).type() != fs::file_type::regular) continue;
    if (is_old_temporary(*at)) {
      fs::remove(at->path(), gone);
      continue;
    }
    const auto name = parse_name(at->path().filename().string());
    if (!name) continue;
    const uint64_t size = at->file_size(gone);
    const fs::file_time_type used = gone ? fs::file_time_type() : at->last_write_time(gone);
    if (!gone) out.push_back({at->path(), *name, size, used});
  }
  if (ec) fail(ErrorKind::io, folder.string(), ": cannot be listed: ", ec.message());
  return out;
}

void make_folder(const fs::path& folder) {
  std::error_code ec;
  if (folder.has_parent_path()) fs::create_directories(folder.parent_path(), ec);
  if (::mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) fail(ErrorKind::io, folder.string(), ": cannot be made: ", std::strerror(errno));
  struct stat status {};
  if (::stat(folder.c_str(), &status) != 0 || !S_ISDIR(status.st_mode)) fail(ErrorKind::io, folder.string(), ": is not a folder");
  if ((status.st_mode & (S_IWGRP | S_IWOTH)) != 0) fail(ErrorKind::io, folder.string(), ": others may write to this folder, and change answers; chmod 700 it or choose another");
}

}  // namespace

PrefixStore::PrefixStore(PrefixStoreOptions options, const std::string& identity, int n_threads)
    : options_(std::move(options)), n_threads_(n_threads), identity_(Sha256().add(bytes_of(kMagic)).add(bytes_of(options_.version)).add(bytes_of(identity)).finish()) {
  std::copy_n(identity_.begin(), root_.size(), root_.begin());
  make_folder(options_.folder);
  scan();
}

PrefixStore::Key PrefixStore::child(const Key& parent, std::span<const Token> tokens) {
  const auto digest = Sha256().add(std::span<const std::byte>(parent)).add(tokens).finish();
  Key key;
  std::copy_n(digest.begin(), key.size(), key.begin());
  return key;
}

PrefixStore::Key PrefixStore::key_before(std::span<const Token> tokens, size_t block) const {
  Key key = root_;
  for (size_t i = 0; i < block; ++i) key = child(key, tokens.subspan(i * kBlock, kBlock));
  return key;
}

fs::path PrefixStore::path(const Key& parent, const Key& key) const { return options_.folder / concat(hex(parent), '-', hex(key), kSuffix); }

void PrefixStore::note(const std::string& text) const {
  if (options_.notice) options_.notice(text);
}

void PrefixStore::scan() {
  size_t n_strange = 0;
  for (const FolderFile& file : list(options_.folder)) {
    bytes_ += file.size;
    if (n_blocks_ < kMaxFiles) n_strange += !index(file.path, file.size);
  }
  if (n_strange > 0) note(concat(options_.folder.string(), ": ", n_strange, n_strange == 1 ? " file is" : " files are", " damaged or of another version of duet: ignored"));
  make_room(0);
}

// False for a file that is none of ours. Contents are checked when they are loaded.
bool PrefixStore::index(const fs::path& path, uint64_t size) {
  const Name name = *parse_name(path.filename().string());
  try {
    const std::string begin = read_beginning(path, kMostHeaderBytes);
    ByteReader in(bytes_of(begin), path.string());
    if (in.text(kMagic.size(), "magic") != kMagic) return false;
    const auto identity = in.take(sizeof identity_, "identity");
    if (std::memcmp(identity.data(), identity_.data(), sizeof identity_) != 0) return true;  // another model's
    const auto n = in.read<uint32_t>("tokens");
    const auto n_layer = in.read<uint32_t>("layers");
    in.take(sizeof(uint64_t), "bytes of a layer");
    if (n == 0 || n > kBlock) return false;
    Block block{name.key, std::vector<Token>(n)};
    std::memcpy(block.tokens.data(), in.take(n * sizeof(Token), "tokens").data(), n * sizeof(Token));
    if (child(name.parent, block.tokens) != name.key) return false;
    uint64_t expected = sizeof(Sha256Digest);
    for (uint32_t i = 0; i < n_layer; ++i) expected += in.read<uint32_t>("frame bytes");
    if (expected + in.offset() != size) return false;
    remember(name.parent, std::move(block));
    return true;
  } catch (const Error&) {
    return false;
  }
}

void PrefixStore::remember(const Key& parent, Block block) {
  children_[parent].push_back(std::move(block));
  ++n_blocks_;
}

void PrefixStore::forget(const Key& parent, const Key& key) {
  const auto found = children_.find(parent);
  if (found == children_.end()) return;
  n_blocks_ -= std::erase_if(found->second, [&](const Block& block) { return block.key == key; });
  if (found->second.empty()) children_.erase(found);
}

PrefixStore::Found PrefixStore::longest(const Key& parent, std::span<const Token> tokens) const {
  Found best;
  const auto found = children_.find(parent);
  if (found == children_.end()) return best;
  for (const Block& block : found->second) {
    const auto n = static_cast<size_t>(std::mismatch(block.tokens.begin(), block.tokens.end(), tokens.begin(), tokens.end()).first - block.tokens.begin());
    if (n > best.n_common) best = {&block, n};
  }
  return best;
}

size_t PrefixStore::extend(Sequence& sequence, std::span<const Token> prompt) {
  const size_t n_before = sequence.tokens().size();
  size_t block = n_before / kBlock;
  for (Key parent = key_before(prompt, block);;) {
    const auto rest = prompt.subspan(block * kBlock);
    const size_t n_held = sequence.tokens().size() - block * kBlock;
    const Found found = longest(parent, rest);
    if (found.n_common < n_held + kWorthLoading) break;
    const Key key = found.block->key;
    try {
      read(path(parent, key), sequence, block, found.block->tokens);
    } catch (const Error& e) {
      note(concat("kept keys and values are ignored: ", e.what()));
      forget(parent, key);
      continue;
    }
    sequence.continue_with(rest.subspan(n_held, found.n_common - n_held));
    if (found.n_common < kBlock) break;
    parent = key;
    ++block;
  }
  const size_t n_after = sequence.tokens().size();
  if (n_after > n_before) touch(prompt.first(n_after), (n_after + kBlock - 1) / kBlock);
  return n_after - n_before;
}

bool PrefixStore::store(const Sequence& sequence, size_t block) {
  const auto tokens = sequence.tokens();
  if (broken_ || block * kBlock + kWorthLoading > tokens.size()) return false;
  const size_t n = std::min(kBlock, tokens.size() - block * kBlock);
  // Not for a sequence that would push out its own beginning.
  if (sequence.block_bytes(kBlock) * sequence.n_layer() * (block + 1) > options_.max_bytes) return false;
  const Key parent = key_before(tokens, block);
  const auto own = tokens.subspan(block * kBlock, n);
  if (longest(parent, own).n_common < n) {
    try {
      const Key key = child(parent, own);
      write(path(parent, key), sequence, block, own);
      drop_beginnings(parent, own);
      remember(parent, {key, {own.begin(), own.end()}});
    } catch (const Error& e) {
      broken_ = true;
      note(concat("no more keys and values are kept: ", e.what()));
      return false;
    }
  }
  touch(tokens, block + 1);
  return true;
}

// Of a conversation that has gone on: its last block was shorter.
void PrefixStore::drop_beginnings(const Key& parent, std::span<const Token> tokens) {
  const auto found = children_.find(parent);
  if (found == children_.end()) return;
  std::vector<Key> gone;
  for (const Block& block : found->second)
    if (begins_with(tokens, block.tokens)) gone.push_back(block.key);
  for (const Key& key : gone) {
    std::error_code ec;
    const uint64_t size = fs::file_size(path(parent, key), ec);
    if (!ec && fs::remove(path(parent, key), ec)) bytes_ -= std::min(bytes_, size);
    forget(parent, key);
  }
}

// As used just now, the last block first: a beginning must not go before what follows it.
void PrefixStore::touch(std::span<const Token> tokens, size_t n_blocks) const {
  std::vector<fs::path> paths;
  Key parent = root_;
  for (size_t i = 0; i < n_blocks; ++i) {
    const auto own = tokens.subspan(i * kBlock, std::min(kBlock, tokens.size() - i * kBlock));
    const Found found = longest(parent, own);
    if (found.n_common == own.size()) paths.push_back(path(parent, found.block->key));
    parent = child(parent, own);
  }
  const auto now = fs::file_time_type::clock::now();
  std::error_code ec;  // who cannot be touched goes earlier
  for (size_t i = 0; i < paths.size(); ++i) fs::last_write_time(paths[i], now - std::chrono::microseconds(i), ec);
}

void PrefixStore::make_room(uint64_t n_bytes) {
  if (bytes_ + n_bytes <= options_.max_bytes && n_blocks_ < kMaxFiles) return;
  std::vector<FolderFile> files = list(options_.folder);
  std::sort(files.begin(), files.end(), [](const FolderFile& a, const FolderFile& b) { return a.used < b.used; });
  bytes_ = 0;
  for (const FolderFile& file : files) bytes_ += file.size;
  size_t n_left = files.size();
  for (const FolderFile& file : files) {  // some more than needed, not to list the folder for each
    if (bytes_ + n_bytes <= options_.max_bytes - options_.max_bytes / 8 && n_left <= kMaxFiles / 8 * 7) return;
    std::error_code ec;
    fs::remove(file.path, ec);
    if (ec) continue;
    bytes_ -= file.size;
    --n_left;
    forget(file.name.parent, file.name.key);
  }
}

std::string PrefixStore::header(const Sequence& sequence, std::span<const Token> tokens) const {
  std::string out(kMagic);
  put(out, identity_);
  put(out, static_cast<uint32_t>(tokens.size()));
  put(out, static_cast<uint32_t>(sequence.n_layer()));
  put(out, uint64_t{sequence.block_bytes(tokens.size())});
  for (const Token token : tokens) put(out, token);
  return out;
}

void PrefixStore::write(const fs::path& path, const Sequence& sequence, size_t block, std::span<const Token> tokens) {
  std::vector<std::string> frames(sequence.n_layer());
  parallel_for(n_threads_, frames.size(), 1, [&](size_t begin, size_t end) {
    std::vector<std::byte> raw(sequence.block_bytes(tokens.size()));
    for (size_t layer = begin; layer < end; ++layer) {
      sequence.save(layer, block, tokens.size(), raw);
      frames[layer] = zstd_compress(split_words(raw), kLevel);
    }
  });
  std::string head = header(sequence, tokens);
  uint64_t size = sizeof(Sha256Digest);
  for (const std::string& frame : frames) {
    put(head, static_cast<uint32_t>(frame.size()));
    size += frame.size();
  }
  size += head.size();
  make_room(size);
  std::vector<std::string_view> parts{head};
  parts.insert(parts.end(), frames.begin(), frames.end());
  Sha256 hash;
  for (const std::string_view part : parts) hash.add(bytes_of(part));
  const Sha256Digest digest = hash.finish();
  parts.emplace_back(reinterpret_cast<const char*>(digest.data()), digest.size());
  write_private_file(path, parts);
  bytes_ += size;
}

// Nothing of the sequence has changed when this fails.
void PrefixStore::read(const fs::path& path, Sequence& sequence, size_t block, std::span<const Token> tokens) const {
  const size_t n_layer = sequence.n_layer(), layer_bytes = sequence.block_bytes(tokens.size());
  const std::string file = read_file(path, 2 * layer_bytes * n_layer + (uint64_t{1} << 20));
  check_digest(file, path.string());
  const std::string expected = header(sequence, tokens);
  if (!file.starts_with(expected)) fail(ErrorKind::format, path.string(), ": the header is not what it was");
  ByteReader in(bytes_of(file).subspan(expected.size()), path.string());
  std::vector<uint32_t> sizes(n_layer);
  for (uint32_t& size : sizes) size = in.read<uint32_t>("sizes");
  std::vector<std::string_view> frames(n_layer);
  for (size_t i = 0; i < n_layer; ++i) frames[i] = in.text(sizes[i], "a layer");
  std::vector<std::vector<std::byte>> layers(n_layer);
  parallel_for(n_threads_, n_layer, 1, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      layers[i] = join_words(zstd_decompress(frames[i], layer_bytes, path.string()));
      if (layers[i].size() != layer_bytes) fail(ErrorKind::format, path.string(), ": a layer has ", layers[i].size(), " bytes, not ", layer_bytes);
    }
  });
  for (size_t i = 0; i < n_layer; ++i) sequence.load(i, block, tokens.size(), layers[i]);
}

}  // namespace duet::server
