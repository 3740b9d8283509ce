// The loop over rows of one to three tokens ("decode"), and how it keeps memory busy.
#pragma once

#include "runtime/kernels/x86_avx512_panel.h"

namespace duet {
namespace {

// Rows computed side by side are more streams than hardware prefetchers follow. While a group of
// rows is computed, the bytes that follow it are fetched into the L2 cache in address order, past
// the end of the call too: the caller's next rows are likely those.
class Ahead {
 public:
  explicit DUET_INLINE Ahead(const std::byte* p) : p_(reinterpret_cast<const char*>(p)) {}

  // Part i of n of a step that reads kBytes; next() after the last.
  template <size_t kBytes, size_t n>
  DUET_INLINE void fetch(size_t i) const {
    constexpr size_t kLines = (kBytes + 63) / 64;
#pragma GCC unroll 32
    for (size_t line = i * kLines / n; line < (i + 1) * kLines / n; ++line)
      _mm_prefetch(p_ + 64 * line, _MM_HINT_T1);
  }
  // The same once v is there, and before it is used: compilers gather prefetches at the start of a
  // step, and a burst of them holds up the loads of the step.
  template <size_t kBytes, size_t n>
  DUET_INLINE void fetch_after(size_t i, __m512i& v) const {
    constexpr size_t kLines = (kBytes + 63) / 64;
#pragma GCC unroll 32
    for (size_t line = i * kLines / n; line < (i + 1) * kLines / n; ++line)
      __asm__ volatile("prefetcht1 %1" : "+v"(v) : "m"(p_[64 * line]));
  }
  DUET_INLINE void next(size_t n_bytes) { p_ += n_bytes; }
  DUET_INLINE void fetch_all(size_t n_bytes) const {
    for (size_t i = 0; i < n_bytes; i += 64) _mm_prefetch(p_ + i, _MM_HINT_T1);
  }

 private:
  const char* p_;
};

// half(block) of sixteen blocks, half-precision bits, as floats. Put together by integer units, which
// have nothing else to do.
template <class Block, class Half>
DUET_INLINE __m512 gather_halves(const Block* const* b, Half half) {
  const auto four = [&](size_t i) {
    const uint64_t low = half(b[i]) | static_cast<uint32_t>(half(b[i + 1])) << 16;
    const uint64_t high = half(b[i + 2]) | static_cast<uint32_t>(half(b[i + 3])) << 16;
    return static_cast<int64_t>(low | high << 32);
  };
  return _mm512_cvtph_ps(_mm256_setr_epi64x(four(0), four(4), four(8), four(12)));
}

// Kernel::decode(rows, x, cols, ahead, y): Kernel::kRows rows with one token. More tokens find the
// weights in the L1 cache.
template <class Kernel>
void matmul_rows(const MatmulArgs& a) noexcept {
  constexpr size_t kRows = Kernel::kRows, kAhead = kRows * Kernel::kGroupsAhead;
  alignas(64) float y[kRows];
  Ahead(a.w).fetch_all(kAhead * a.w_stride);
  for (size_t row = 0; row < a.n_rows; row += kRows) {
    const std::byte* rows[kRows];
    for (size_t r = 0; r < kRows; ++r)
      rows[r] = a.w + (row + r < a.n_rows ? row + r : a.n_rows - 1) * a.w_stride;
    const Ahead ahead(a.w + (row + kAhead) * a.w_stride);
    const size_t n = a.n_rows - row < kRows ? a.n_rows - row : kRows;
    for (size_t t = 0; t < a.n_tokens; ++t) {
      Kernel::decode(rows, a.x + t * a.x_stride, a.cols, ahead, y);
      __builtin_memcpy(a.y + t * a.y_stride + row, y, n * sizeof(float));
    }
  }
}

// Up to here unpacking a panel costs more than going over the rows once per token.
constexpr size_t kRowTokens = 3;

template <class Kernel>
void matmul512(const MatmulArgs& a) noexcept {
  a.n_tokens <= kRowTokens ? matmul_rows<Kernel>(a) : matmul_panels<Kernel>(a);
}

}  // namespace
}  // namespace duet
