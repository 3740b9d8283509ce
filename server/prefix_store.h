// Keys and values of prompts' beginnings in files of a folder, for other requests and the server's next start.
//
// A file holds the 256 tokens of a block (Sequence::kBlock), or what there is of a sequence's last one:
//   "DUETKV01", 32 bytes that tell model, kernels, version and KvType, u32 n_tokens, u32 n_layer,
//   u64 bytes of a layer before compression, i32 tokens[n_tokens], u32 frame bytes[n_layer], zstd frames
//   (the high bytes of its 16-bit words, then the low ones), SHA-256 of all that.
// Its name is PARENT-KEY.kv: a key is the first half of SHA-256 of the parent's key, that of the block before, and
// its tokens, so that conversations with the same beginning share its files. The first block's parent is made
// from the 32 bytes. Files that are damaged, or of another kind, are left alone: they only count towards the size
// and go when they are the least recently used.
//
// They hold users' text: the folder is made for its owner only, and the files are.
#pragma once

#include <array>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "base/sha256.h"
#include "runtime/batch.h"

namespace duet::server {

struct PrefixStoreOptions {
  std::filesystem::path folder;  // "": none
  uint64_t max_bytes = uint64_t{4} << 30;
  std::string version = {};  // of the program
  NoticeFn notice = {};
};

// One thread.
class PrefixStore {
 public:
  // `identity`: of what keys and values depend on beside the tokens. Error(io) for a folder that cannot be made
  // or that others may write to.
  PrefixStore(PrefixStoreOptions options, const std::string& identity, int n_threads);

  // Lengthens a sequence, whose tokens are a beginning of the prompt, by what is stored of it behind them. Returns
  // the tokens added: at least kWorthLoading, or none.
  size_t extend(Sequence& sequence, std::span<const Token> prompt);

  // Sees to it that a block of a sequence is stored. False: there is no such block, or storing has failed, after
  // which (a full disk) nothing more is stored.
  bool store(const Sequence& sequence, size_t block);

  uint64_t bytes() const { return bytes_; }  // of the folder's files
  size_t n_blocks() const { return n_blocks_; }  // that may be loaded

  static constexpr size_t kWorthLoading = 16;

 private:
  using Key = std::array<std::byte, 16>;
  struct Block {
    Key key;
    std::vector<Token> tokens;
    bool operator==(const Block&) const = default;
  };
  struct Found {
    const Block* block = nullptr;
    size_t n_common = 0;
  };

  static Key child(const Key& parent, std::span<const Token> tokens);
  Key key_before(std::span<const Token> tokens, size_t block) const;
  Found longest(const Key& parent, std::span<const Token> tokens) const;
  std::filesystem::path path(const Key& parent, const Key& key) const;
  void scan();
  void remember(const Key& parent, Block block);
  void forget(const Key& parent, const Key& key);
  bool index(const std::filesystem::path& path, uint64_t size);
  std::string header(const Sequence& sequence, std::span<const Token> tokens) const;
  void write(const std::filesystem::path& path, const Sequence& sequence, size_t block, std::span<const Token> tokens);
  void read(const std::filesystem::path& path, Sequence& sequence, size_t block, std::span<const Token> tokens) const;
  void drop_beginnings(const Key& parent, std::span<const Token> tokens);
  void touch(std::span<const Token> tokens, size_t n_blocks) const;
  void make_room(uint64_t n_bytes);
  void note(const std::string& text) const;

  const PrefixStoreOptions options_;
  const int n_threads_;
  Sha256Digest identity_;
  Key root_;
  std::map<Key, std::vector<Block>> children_;  // of a parent
  uint64_t bytes_ = 0;
  size_t n_blocks_ = 0;
  bool broken_ = false;
};

}  // namespace duet::server
