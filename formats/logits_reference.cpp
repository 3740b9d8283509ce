#include "formats/logits_reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "base/bytes.h"
#include "base/mapped_file.h"
#include "base/parallel.h"
#include "base/zstd_frame.h"

namespace duet {
namespace {

constexpr std::string_view kMagic = "DUETPROB";
constexpr uint32_t kVersion = 1;
constexpr size_t kBlockRows = 32, kPlanes = 3;
constexpr double kSteps = 131072;  // of sqrt(p)
constexpr uint32_t kMaxVocab = 1u << 20, kMaxName = 4096;
constexpr int kLevel = 1;  // more costs much time and saves little: entropy coding does the work

size_t block_bytes(size_t n_rows, size_t n_vocab) { return n_rows * (8 + kPlanes * n_vocab); }

template <class T>
std::string_view raw(const T& value) {
  return {reinterpret_cast<const char*>(&value), sizeof(T)};
}

// Parts of the unpacked form of a block.
struct Block {
  char* data;
  size_t n_rows, n_vocab;
  char* nll(size_t row) const { return data + 4 * row; }
  char* top(size_t row) const { return data + 4 * (n_rows + row); }
  char* plane(size_t p, size_t row) const { return data + 8 * n_rows + (p * n_rows + row) * n_vocab; }
};

void encode_row(std::span<const float> logits, size_t target, const Block& block, size_t row) {
  const auto best = std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float x : logits) sum += std::exp(double{x} - double{*best});
  const double offset = double{*best} + std::log(sum);
  const auto nll = static_cast<float>(offset - double{logits[target]});
  const auto top = static_cast<uint32_t>(best - logits.begin());
  std::memcpy(block.nll(row), &nll, 4);
  std::memcpy(block.top(row), &top, 4);
  for (size_t i = 0; i < logits.size(); ++i) {
    const auto code = static_cast<uint32_t>(std::lround(kSteps * std::exp(0.5 * (double{logits[i]} - offset))));
    for (size_t p = 0; p < kPlanes; ++p) block.plane(p, row)[i] = static_cast<char>(code >> (8 * p));
  }
}

// False when the row holds no probability at all or a field is out of range.
bool decode_row(const Block& block, size_t row, float& nll, uint32_t& top, float* probs) {
  std::memcpy(&nll, block.nll(row), 4);
  std::memcpy(&top, block.top(row), 4);
  double sum = 0;
  for (size_t i = 0; i < block.n_vocab; ++i) {
    uint32_t code = 0;
    for (size_t p = 0; p < kPlanes; ++p) code |= uint32_t{static_cast<uint8_t>(block.plane(p, row)[i])} << (8 * p);
    const auto root = static_cast<float>(code);
    probs[i] = root * root;
    sum += double{probs[i]};
  }
  const auto scale = static_cast<float>(1 / sum);
  for (size_t i = 0; i < block.n_vocab; ++i) probs[i] *= scale;
  return sum > 0 && std::isfinite(nll) && nll > -1e-3f && top < block.n_vocab;
}

}  // namespace

// ---- writer ---------------------------------------------------------------------------------

struct LogitsReferenceWriter::State {
  State(const std::filesystem::path& path, const LogitsReferenceHeader& header) : file(path, 0), n_vocab(header.n_vocab), n_left(header.n_rows()) {
    start_block();
  }
  void start_block() {
    n_in_block = std::min<uint64_t>(kBlockRows, n_left);
    block.resize(block_bytes(n_in_block, n_vocab));
    n_added = 0;
  }
  void write_frame(std::string_view content) {
    const std::string frame = zstd_compress(content, kLevel);
    file.write(raw(static_cast<uint32_t>(frame.size())));
    file.write(frame);
  }

  OutputFile file;
  size_t n_vocab;
  uint64_t n_left;      // rows not yet in a complete block
  size_t n_in_block = 0, n_added = 0;
  std::string block;
};

LogitsReferenceWriter::LogitsReferenceWriter(const std::filesystem::path& path, const LogitsReferenceHeader& header)
    : state_(std::make_unique<State>(path, header)) {
  DUET_ASSERT(header.tokens.size() == uint64_t{header.n_chunks} * header.n_ctx);
  if (header.n_vocab > kMaxVocab) fail(ErrorKind::unsupported, "a vocabulary of ", header.n_vocab, " is too large for a reference file; at most ", kMaxVocab);
  std::string start(kMagic);
  for (const uint32_t v : {kVersion, header.n_vocab, header.n_ctx, header.n_chunks}) start += raw(v);
  state_->file.write(start);
  const std::string name = header.model.substr(0, kMaxName);
  std::string content(raw(static_cast<uint32_t>(name.size())));
  content += name;
  content.append(reinterpret_cast<const char*>(header.tokens.data()), header.tokens.size() * sizeof(int32_t));
  state_->write_frame(content);
}

LogitsReferenceWriter::~LogitsReferenceWriter() = default;

void LogitsReferenceWriter::add(std::span<const float> logits, std::span<const int32_t> targets, int n_threads) {
  State& s = *state_;
  for (size_t row = 0; row < targets.size();) {
    const size_t n = std::min(s.n_in_block - s.n_added, targets.size() - row);
    DUET_ASSERT(n > 0);
    const Block block{s.block.data(), s.n_in_block, s.n_vocab};
    parallel_for(n_threads, n, 1, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i)
        encode_row(logits.subspan((row + i) * s.n_vocab, s.n_vocab), static_cast<size_t>(targets[row + i]), block, s.n_added + i);
    });
    s.n_added += n;
    row += n;
    if (s.n_added < s.n_in_block) continue;
    s.write_frame(s.block);
    s.n_left -= s.n_in_block;
    s.start_block();
  }
}

void LogitsReferenceWriter::finish() {
  DUET_ASSERT(state_->n_left == 0);
  state_->file.commit();
}

// ---- reader ---------------------------------------------------------------------------------

struct LogitsReferenceReader::State {
  State(std::span<const std::byte> bytes, std::string name) : source(std::move(name)), in(bytes, source), n_bytes(bytes.size()) {}
  void read_header();
  std::string read_frame(uint64_t max_bytes, std::string_view what);
  void read_tokens(std::string_view content);
  void next_block();

  std::optional<MappedFile> file;
  std::string source;
  ByteReader in;
  uint64_t n_bytes;
  LogitsReferenceHeader header;
  uint64_t n_left = 0;  // rows of blocks not yet unpacked
  std::string block;
  size_t n_in_block = 0, n_taken = 0;
};

std::string LogitsReferenceReader::State::read_frame(uint64_t max_bytes, std::string_view what) {
  const auto n = in.read<uint32_t>(what);
  return zstd_decompress(in.text(n, what), max_bytes, source);
}

// A frame takes more than 8 bytes, so the length of the file bounds all counts.
void LogitsReferenceReader::State::read_header() {
  if (in.remaining() < kMagic.size() || in.text(kMagic.size(), "the header") != kMagic)
    fail(ErrorKind::format, source, ": not a reference of predictions; make one by duet perplexity --save-logits");
  const auto version = in.read<uint32_t>("the version");
  if (version != kVersion) fail(ErrorKind::unsupported, source, ": version ", version, " of reference files is unknown, this program reads ", kVersion);
  header.n_vocab = in.read<uint32_t>("the header");
  header.n_ctx = in.read<uint32_t>("the header");
  header.n_chunks = in.read<uint32_t>("the header");
  if (header.n_vocab < 2 || header.n_vocab > kMaxVocab || header.n_ctx < 4 || header.n_ctx > (1u << 24) || header.n_chunks == 0)
    in.bad("impossible counts: ", header.n_vocab, " tokens in the vocabulary, ", header.n_chunks, " chunks of ", header.n_ctx);
  n_left = header.n_rows();
  if (n_left / kBlockRows > n_bytes / 8)
    in.bad("the header tells of ", n_left, " rows, more than the file can hold; it is truncated or damaged");
  read_tokens(read_frame(uint64_t{header.n_chunks} * header.n_ctx * 4 + 4 + kMaxName, "the tokens"));
}

void LogitsReferenceReader::State::read_tokens(std::string_view content) {
  ByteReader tokens(std::as_bytes(std::span(content)), source);
  const auto n_name = tokens.read<uint32_t>("the model's name");
  if (n_name > kMaxName) tokens.bad("a name of ", n_name, " bytes");
  header.model = tokens.text(n_name, "the model's name");
  const uint64_t n = uint64_t{header.n_chunks} * header.n_ctx;
  if (tokens.remaining() != n * 4) tokens.bad(tokens.remaining() / 4, " tokens, expected ", n);
  header.tokens.resize(n);
  std::memcpy(header.tokens.data(), tokens.take(n * 4, "the tokens").data(), n * 4);
  for (const int32_t t : header.tokens)
    if (t < 0 || static_cast<uint32_t>(t) >= header.n_vocab) tokens.bad("token ", t, " is outside the vocabulary of ", header.n_vocab);
}

void LogitsReferenceReader::State::next_block() {
  n_in_block = static_cast<size_t>(std::min<uint64_t>(kBlockRows, n_left));
  if (n_in_block == 0) in.bad("more rows wanted than the ", header.n_rows(), " there are");
  const size_t wanted = block_bytes(n_in_block, header.n_vocab);
  block = read_frame(wanted, "a block of rows");
  if (block.size() != wanted) in.bad("a block of ", block.size(), " bytes, expected ", wanted);
  n_left -= n_in_block;
  n_taken = 0;
}

LogitsReferenceReader::LogitsReferenceReader(std::unique_ptr<State> state) : state_(std::move(state)) {}
LogitsReferenceReader::LogitsReferenceReader(LogitsReferenceReader&&) noexcept = default;
LogitsReferenceReader::~LogitsReferenceReader() = default;

LogitsReferenceReader LogitsReferenceReader::parse(std::span<const std::byte> bytes, const std::string& source) {
  auto state = std::make_unique<State>(bytes, source);
  state->read_header();
  return LogitsReferenceReader(std::move(state));
}

LogitsReferenceReader LogitsReferenceReader::open(const std::filesystem::path& path) {
  MappedFile file = MappedFile::open(path);
  LogitsReferenceReader reader = parse(file.bytes(), path.string());
  reader.state_->file = std::move(file);
  return reader;
}

const LogitsReferenceHeader& LogitsReferenceReader::header() const { return state_->header; }
const std::string& LogitsReferenceReader::source() const { return state_->source; }

void LogitsReferenceReader::read(size_t n, int n_threads, ReferenceRows& out) {
  State& s = *state_;
  const size_t n_vocab = s.header.n_vocab;
  out.nll.resize(n);
  out.top.resize(n);
  out.probs.resize(n * n_vocab);
  for (size_t row = 0; row < n;) {
    if (s.n_taken == s.n_in_block) s.next_block();
    const size_t part = std::min(s.n_in_block - s.n_taken, n - row);
    const Block block{s.block.data(), s.n_in_block, n_vocab};
    parallel_for(n_threads, part, 1, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i)
        if (!decode_row(block, s.n_taken + i, out.nll[row + i], out.top[row + i], out.probs.data() + (row + i) * n_vocab))
          fail(ErrorKind::format, s.source, ": row ", s.header.n_rows() - s.n_left - s.n_in_block + s.n_taken + i, " holds no prediction; the file is damaged");
    });
    s.n_taken += part;
    row += part;
  }
}

}  // namespace duet
