// Files of what a model predicted for a text, to measure others by (duet perplexity --save-logits,
// --kld).
//
//   "DUETPROB"  u32 version (1)  u32 n_vocab  u32 n_ctx  u32 n_chunks
//   frame: the model's name, then i32 tokens [n_chunks][n_ctx] as evaluated, BOS first
//   frames of 32 rows each (the last may have fewer) of the n_chunks * (n_ctx - 1 - n_ctx / 2)
//   scored positions, in text order:
//     f32 nll[rows]  -log p(next token)    u32 top[rows]  the most probable token
//     u8 plane[3][rows][n_vocab]  bytes 0 to 2 of code = sqrt(p) * 2^17 to the nearest
// little-endian; a frame is u32 bytes, then a zstd frame (the first: of u32 length, name, tokens).
//
// Steps that are even in sqrt(p) spread the error of a divergence evenly: moving every sqrt(p) by an
// error e changes the divergence by 2 sum(e^2), here at most n_vocab * 2^-34 / 6 (3e-7 for 32000).
// Most codes of a sure prediction are 0 or 1, so a row is a fraction of its 16-bit log-probabilities.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace duet {

struct LogitsReferenceHeader {
  std::string model;
  uint32_t n_vocab = 0, n_ctx = 0, n_chunks = 0;
  std::vector<int32_t> tokens;  // [n_chunks, n_ctx]

  uint64_t rows_per_chunk() const { return n_ctx - 1 - n_ctx / 2; }
  uint64_t n_rows() const { return n_chunks * rows_per_chunk(); }
};

// Rows of predictions as stored.
struct ReferenceRows {
  std::vector<float> nll;      // [n_rows]
  std::vector<uint32_t> top;   // [n_rows]
  std::vector<float> probs;    // [n_rows, n_vocab], each row of sum 1
};

// Appears when complete (base/mapped_file.h). Error(io).
class LogitsReferenceWriter {
 public:
  LogitsReferenceWriter(const std::filesystem::path& path, const LogitsReferenceHeader& header);
  ~LogitsReferenceWriter();
  // The next rows: logits [n_rows, n_vocab] and the tokens that followed [n_rows].
  void add(std::span<const float> logits, std::span<const int32_t> targets, int n_threads);
  void finish();  // all rows of the header have been added

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Checks everything as it is read: Error(format) for damage, unsupported for another version, io.
class LogitsReferenceReader {
 public:
  static LogitsReferenceReader open(const std::filesystem::path& path);
  // `bytes` must outlive the reader.
  static LogitsReferenceReader parse(std::span<const std::byte> bytes, const std::string& source);
  LogitsReferenceReader(LogitsReferenceReader&&) noexcept;
  ~LogitsReferenceReader();

  const LogitsReferenceHeader& header() const;
  const std::string& source() const;
  // The next n rows; Error(format) when there are not so many.
  void read(size_t n, int n_threads, ReferenceRows& out);

 private:
  struct State;
  explicit LogitsReferenceReader(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace duet
