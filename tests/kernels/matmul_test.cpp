// Every format on every table: against doubles, against scalar, at odd sizes and page ends.
#include <doctest/doctest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "quant/f16.h"
#include "tests/support/blocks.h"
#include "tests/support/close.h"
#include "tests/support/isa.h"

namespace duet::test {
namespace {

// Weights, activations and their exact product, all buffers ending at inaccessible pages.
struct Problem {
  const Format& format;
  size_t n_rows, cols, n_tokens, w_stride, x_stride;
  GuardedBuffer w, x;

  Problem(const Format& f, size_t rows, size_t n_cols, size_t tokens,
          GuardedBuffer::Side side = GuardedBuffer::Side::after)
      : format(f),
        n_rows(rows),
        cols(n_cols),
        n_tokens(tokens),
        w_stride(row_bytes(f, n_cols)),
        x_stride(act_row_bytes(f.act, n_cols)),
        w(rows * w_stride, side),
        x(tokens * x_stride, side) {}

  void randomize(Rng& rng) {
    for (size_t r = 0; r < n_rows; ++r)
      fill_random_weights(format, w.data() + r * w_stride, cols, rng);
    std::vector<float> values(cols);
    for (size_t t = 0; t < n_tokens; ++t) {
      for (float& v : values) v = rng.symmetric();
      set_token(t, values);
    }
  }

  void set_token(size_t t, const std::vector<float>& values) {
    std::byte* dst = x.data() + t * x_stride;
    const KernelTable& scalar = select_kernels("scalar");
    if (format.act == ActFormat::f32) std::memcpy(dst, values.data(), x_stride);
    if (format.act == ActFormat::act32) scalar.quantize_act32(values.data(), dst, cols);
    if (format.act == ActFormat::act256) scalar.quantize_act256(values.data(), dst, cols);
  }

  // y[n_tokens, n_rows] of the rows and tokens asked for.
  std::vector<float> run(const KernelTable& table, size_t r0, size_t rows, size_t t0,
                         size_t tokens) const {
    GuardedBuffer y(rows * tokens * sizeof(float));
    table.matmul[static_cast<size_t>(format.dtype)]({.w = w.data() + r0 * w_stride,
                                                     .w_stride = w_stride,
                                                     .n_rows = rows,
                                                     .cols = cols,
                                                     .x = x.data() + t0 * x_stride,
                                                     .x_stride = x_stride,
                                                     .n_tokens = tokens,
                                                     .y = y.as<float>(),
                                                     .y_stride = rows});
    return {y.as<float>(), y.as<float>() + rows * tokens};
  }
  std::vector<float> run(const KernelTable& table) const {
    return run(table, 0, n_rows, 0, n_tokens);
  }

  // Activations as the kernels see them: after their rounding to 8 bits.
  std::vector<double> token(size_t t) const {
    const std::byte* src = x.data() + t * x_stride;
    std::vector<double> out(cols);
    for (size_t i = 0; i < cols; ++i) {
      if (format.act == ActFormat::f32) out[i] = reinterpret_cast<const float*>(src)[i];
      if (format.act == ActFormat::act32) {
        const auto& block = reinterpret_cast<const BlockAct32*>(src)[i / 32];
        out[i] = double{block.d} * block.qs[i % 32];
      }
      if (format.act == ActFormat::act256) {
        const auto& block = reinterpret_cast<const BlockAct256*>(src)[i / 256];
        out[i] = double{block.d} * block.qs[i % 256];
      }
    }
    return out;
  }
};

// Largest |d * q| + |m| of a weight in the row over the largest |weight|: how far a difference of
// the two cancels; the bound is on the terms, not on the difference. 8 is generous for one scale.
double cancellation(const Format& format) {
  return scale_fields(format.dtype).dmin >= 0 ? 8.0 : 1.0;
}

void check_close(const Problem& p, const std::vector<float>& y) {
  std::vector<float> w(p.cols);
  for (size_t r = 0; r < p.n_rows; ++r) {
    p.format.decode_row(p.w.data() + r * p.w_stride, w.data(), p.cols);
    for (size_t t = 0; t < p.n_tokens; ++t) {
      const std::vector<double> x = p.token(t);
      double exact = 0.0, abs_sum = 0.0;
      for (size_t i = 0; i < p.cols; ++i) {
        exact += double{w[i]} * x[i];
        abs_sum += std::abs(double{w[i]} * x[i]);
      }
      const double error = std::abs(double{y[t * p.n_rows + r]} - exact);
      INFO(p.format.name, " rows ", p.n_rows, " cols ", p.cols, " tokens ", p.n_tokens, " at ", r,
           ",", t);
      CHECK(error <= sum_bound(cancellation(p.format) * abs_sum));
    }
  }
}

std::vector<size_t> column_counts(const Format& f) {
  if (f.block_elems == 1) return {1, 2, 7, 16, 31, 33, 64, 97, 131, 256};
  if (f.block_elems == 32) return {32, 64, 96, 160, 256, 288};
  return {256, 512, 768, 1280};
}

void check_against_double(const KernelTable& table) {
  Rng rng(1);
  for (const Format& format : all_formats()) {
    for (size_t cols : column_counts(format)) {
      for (size_t rows = 1; rows <= 9; ++rows) {
        Problem p(format, rows, cols, 1 + rng.below(9));
        p.randomize(rng);
        check_close(p, p.run(table));
      }
    }
  }
}
TEST_CASE("matmul within bounds: scalar") { with_isa("scalar", check_against_double); }
TEST_CASE("matmul within bounds: avx2") { with_isa("avx2", check_against_double); }
TEST_CASE("matmul within bounds: avxvnni") { with_isa("avxvnni", check_against_double); }
TEST_CASE("matmul within bounds: avx512vnni256") {
  with_isa("avx512vnni256", check_against_double);
}
TEST_CASE("matmul within bounds: avx512") { with_isa("avx512", check_against_double); }

void check_long_rows(const KernelTable& table) {
  Rng rng(2);
  for (const Format& format : all_formats()) {
    Problem p(format, 3, 14336, 5);
    p.randomize(rng);
    check_close(p, p.run(table));
  }
}
TEST_CASE("matmul of 14336 columns within bounds: scalar") { with_isa("scalar", check_long_rows); }
TEST_CASE("matmul of 14336 columns within bounds: avx2") { with_isa("avx2", check_long_rows); }
TEST_CASE("matmul of 14336 columns within bounds: avxvnni") {
  with_isa("avxvnni", check_long_rows);
}
TEST_CASE("matmul of 14336 columns within bounds: avx512vnni256") {
  with_isa("avx512vnni256", check_long_rows);
}
TEST_CASE("matmul of 14336 columns within bounds: avx512") { with_isa("avx512", check_long_rows); }

// Scales 1 and 1/2, activations -1, 0, 1 and one 127 per block: every partial sum is exact in
// float, so all tables must agree to the bit.
void check_exact(const KernelTable& table) {
  Rng rng(3);
  for (const Format& format : all_formats()) {
    const size_t cols = format.block_elems == 1 ? 333 : 3 * 256;
    Problem p(format, 9, cols, 33);
    std::vector<float> values(cols);
    for (size_t r = 0; r < p.n_rows; ++r) {
      std::byte* row = p.w.data() + r * p.w_stride;
      for (float& v : values) v = static_cast<float>(static_cast<int>(rng.below(255)) - 127);
      if (format.block_elems == 1)
        format.encode_row(values.data(), row, cols, nullptr);
      else
        fill_weights_with_scale(format, row, cols, f32_to_f16(1.0f), f32_to_f16(0.5f), rng);
    }
    for (size_t t = 0; t < p.n_tokens; ++t) {
      for (float& v : values) v = static_cast<float>(static_cast<int>(rng.below(3)) - 1);
      const size_t block = format.act == ActFormat::act256 ? 256 : 32;
      for (size_t b = 0; b < cols / block; ++b) values[b * block + rng.below(block)] = 127.0f;
      p.set_token(t, values);
    }
    INFO(format.name);
    CHECK(p.run(table) == p.run(select_kernels("scalar")));
    check_close(p, p.run(table));
  }
}
TEST_CASE("matmul of exact inputs is bit-equal: scalar") { with_isa("scalar", check_exact); }
TEST_CASE("matmul of exact inputs is bit-equal: avx2") { with_isa("avx2", check_exact); }
TEST_CASE("matmul of exact inputs is bit-equal: avxvnni") { with_isa("avxvnni", check_exact); }
TEST_CASE("matmul of exact inputs is bit-equal: avx512vnni256") {
  with_isa("avx512vnni256", check_exact);
}
TEST_CASE("matmul of exact inputs is bit-equal: avx512") { with_isa("avx512", check_exact); }

// Quantized weights: one result, whatever the instruction set.
void check_bits_of_scalar(const KernelTable& table) {
  Rng rng(10);
  for (const Format& format : all_formats()) {
    if (format.block_elems == 1) continue;
    for (size_t cols : column_counts(format)) {
      for (size_t tokens = 1; tokens <= 13; ++tokens) {
        Problem p(format, 1 + rng.below(70), cols, tokens);
        p.randomize(rng);
        INFO(format.name, " rows ", p.n_rows, " cols ", cols, " tokens ", tokens);
        CHECK(p.run(table) == p.run(select_kernels("scalar")));
      }
    }
  }
}
TEST_CASE("matmul of quantized weights equals scalar to the bit: scalar") {
  with_isa("scalar", check_bits_of_scalar);
}
TEST_CASE("matmul of quantized weights equals scalar to the bit: avx2") {
  with_isa("avx2", check_bits_of_scalar);
}
TEST_CASE("matmul of quantized weights equals scalar to the bit: avxvnni") {
  with_isa("avxvnni", check_bits_of_scalar);
}
TEST_CASE("matmul of quantized weights equals scalar to the bit: avx512vnni256") {
  with_isa("avx512vnni256", check_bits_of_scalar);
}

TEST_CASE("matmul of quantized weights equals scalar to the bit: avx512") {
  with_isa("avx512", check_bits_of_scalar);
}

// The largest sums that blocks and activations can make: no integer of a kernel may overflow.
void check_largest_sums(const KernelTable& table) {
  constexpr int kPatterns[] = {0x00, 0xff, 0x55, 0xaa, 0x0f, 0xf0, 0x33, 0xcc, 0x7f, 0x80};
  constexpr uint16_t kOne = 0x3c00;
  for (const Format& format : all_formats()) {
    const ScaleFields fields = scale_fields(format.dtype);
    if (format.block_elems == 1 || fields.d < 0) continue;
    const size_t cols = 512;
    Problem p(format, std::size(kPatterns) * 4, cols, 17);
    for (size_t r = 0; r < p.n_rows; ++r) {
      std::byte* row = p.w.data() + r * p.w_stride;
      std::memset(row, kPatterns[r % std::size(kPatterns)], p.w_stride);
      for (size_t b = 0; b < cols / format.block_elems; ++b)
        for (const int at : {fields.d, fields.dmin})
          if (at >= 0) std::memcpy(row + b * format.block_bytes + at, &kOne, 2);
    }
    // All as large as can be, of one sign or of signs that change with every 2^t-th.
    for (size_t t = 0; t < p.n_tokens; ++t) {
      std::vector<float> values(cols);
      for (size_t i = 0; i < cols; ++i) values[i] = (t % 2 == 0 ? 1.0f : -1.0f) * ((i >> t / 2 & 1) == 0 ? 1.0f : -1.0f);
      p.set_token(t, values);
    }
    for (size_t n = 1; n <= p.n_tokens; ++n) {
      INFO(format.name, " tokens ", n);
      CHECK(p.run(table, 0, p.n_rows, p.n_tokens - n, n) == p.run(select_kernels("scalar"), 0, p.n_rows, p.n_tokens - n, n));
    }
  }
}
TEST_CASE("matmul of the largest sums equals scalar: scalar") { with_isa("scalar", check_largest_sums); }
TEST_CASE("matmul of the largest sums equals scalar: avx2") { with_isa("avx2", check_largest_sums); }
TEST_CASE("matmul of the largest sums equals scalar: avxvnni") { with_isa("avxvnni", check_largest_sums); }
TEST_CASE("matmul of the largest sums equals scalar: avx512vnni256") { with_isa("avx512vnni256", check_largest_sums); }
TEST_CASE("matmul of the largest sums equals scalar: avx512") { with_isa("avx512", check_largest_sums); }

// The bits of a (row, token) pair do not depend on what else is in the call.
void check_batch_invariance(const KernelTable& table) {
  Rng rng(4);
  for (const Format& format : all_formats()) {
    const size_t cols = format.block_elems == 1    ? 515
                        : format.block_elems == 32 ? 15 * 32
                                                   : 5 * 256;
    Problem p(format, 37, cols, 33);
    p.randomize(rng);
    const std::vector<float> all = p.run(table);
    const auto check_part = [&](size_t r0, size_t rows, size_t t0, size_t tokens) {
      const std::vector<float> part = p.run(table, r0, rows, t0, tokens);
      bool same = true;
      for (size_t t = 0; t < tokens; ++t)
        for (size_t r = 0; r < rows; ++r)
          same = same && std::memcmp(&part[t * rows + r], &all[(t0 + t) * p.n_rows + r0 + r],
                                     sizeof(float)) == 0;
      INFO(format.name, " rows ", r0, "+", rows, " tokens ", t0, "+", tokens);
      CHECK(same);
    };
    for (size_t r = 0; r < p.n_rows; ++r) check_part(r, 1, r % p.n_tokens, 1);
    for (size_t n = 1; n <= 9; ++n) {
      check_part(rng.below(p.n_rows - n), n, rng.below(p.n_tokens - n), 1);
      check_part(rng.below(p.n_rows - 1), 1, rng.below(p.n_tokens - n), n);
      check_part(rng.below(p.n_rows - n), n, rng.below(p.n_tokens - n), n);
    }
    check_part(0, p.n_rows, 1, 32);
    check_part(1, 32, 0, p.n_tokens);
  }
}
TEST_CASE("matmul bits do not depend on the batch: scalar") {
  with_isa("scalar", check_batch_invariance);
}
TEST_CASE("matmul bits do not depend on the batch: avx2") {
  with_isa("avx2", check_batch_invariance);
}
TEST_CASE("matmul bits do not depend on the batch: avxvnni") {
  with_isa("avxvnni", check_batch_invariance);
}
TEST_CASE("matmul bits do not depend on the batch: avx512vnni256") {
  with_isa("avx512vnni256", check_batch_invariance);
}
TEST_CASE("matmul bits do not depend on the batch: avx512") {
  with_isa("avx512", check_batch_invariance);
}

// No byte before the first row or after the last is touched; weights at odd multiples of 2 bytes.
void check_page_ends(const KernelTable& table) {
  Rng rng(5);
  for (const Format& format : all_formats()) {
    const size_t one = format.block_elems;
    for (size_t cols : {one, 3 * one, 5 * one}) {
      for (size_t tokens : {size_t{1}, size_t{3}, size_t{4}}) {
        Problem before(format, 5, cols, tokens, GuardedBuffer::Side::before);
        before.randomize(rng);
        check_close(before, before.run(table));
        Problem after(format, 5, cols, tokens);
        after.randomize(rng);
        check_close(after, after.run(table));
      }
    }
  }
}
TEST_CASE("matmul stays inside its buffers: scalar") { with_isa("scalar", check_page_ends); }
TEST_CASE("matmul stays inside its buffers: avx2") { with_isa("avx2", check_page_ends); }
TEST_CASE("matmul stays inside its buffers: avxvnni") { with_isa("avxvnni", check_page_ends); }
TEST_CASE("matmul stays inside its buffers: avx512vnni256") {
  with_isa("avx512vnni256", check_page_ends);
}
TEST_CASE("matmul stays inside its buffers: avx512") { with_isa("avx512", check_page_ends); }

void check_misaligned(const KernelTable& table) {
  Rng rng(6);
  for (const Format& format : all_formats()) {
    const size_t cols = format.block_elems == 1 ? 96 : 512;
    Problem p(format, 4, cols, 3);
    p.randomize(rng);
    const std::vector<float> expected = p.run(table);
    for (size_t offset = 2; offset <= 64; offset += 6) {
      std::vector<std::byte> w(p.w.size() + offset);
      std::memcpy(w.data() + offset, p.w.data(), p.w.size());
      std::vector<float> y(12);
      table.matmul[static_cast<size_t>(format.dtype)]({.w = w.data() + offset,
                                                       .w_stride = p.w_stride,
                                                       .n_rows = 4,
                                                       .cols = cols,
                                                       .x = p.x.data(),
                                                       .x_stride = p.x_stride,
                                                       .n_tokens = 3,
                                                       .y = y.data(),
                                                       .y_stride = 4});
      INFO(format.name, " offset ", offset);
      CHECK(y == expected);
    }
  }
}
TEST_CASE("matmul reads weights at any 2-byte alignment: scalar") {
  with_isa("scalar", check_misaligned);
}
TEST_CASE("matmul reads weights at any 2-byte alignment: avx2") {
  with_isa("avx2", check_misaligned);
}
TEST_CASE("matmul reads weights at any 2-byte alignment: avxvnni") {
  with_isa("avxvnni", check_misaligned);
}
TEST_CASE("matmul reads weights at any 2-byte alignment: avx512vnni256") {
  with_isa("avx512vnni256", check_misaligned);
}
TEST_CASE("matmul reads weights at any 2-byte alignment: avx512") {
  with_isa("avx512", check_misaligned);
}

// Row and token strides larger than the rows; y between the rows of the result stays as it was.
void check_strides(const KernelTable& table) {
  Rng rng(7);
  for (const Format& format : all_formats()) {
    const size_t cols = format.block_elems == 1 ? 80 : 256;
    Problem p(format, 8, cols, 6);
    p.randomize(rng);
    const std::vector<float> all = p.run(table);
    std::vector<float> y(3 * 10, -7.0f);
    table.matmul[static_cast<size_t>(format.dtype)]({.w = p.w.data(),
                                                     .w_stride = 2 * p.w_stride,
                                                     .n_rows = 4,
                                                     .cols = cols,
                                                     .x = p.x.data(),
                                                     .x_stride = 2 * p.x_stride,
                                                     .n_tokens = 3,
                                                     .y = y.data(),
                                                     .y_stride = 10});
    INFO(format.name);
    for (size_t t = 0; t < 3; ++t) {
      for (size_t r = 0; r < 10; ++r)
        CHECK(y[t * 10 + r] == (r < 4 ? all[2 * t * 8 + 2 * r] : -7.0f));
    }
  }
}
TEST_CASE("matmul honours strides: scalar") { with_isa("scalar", check_strides); }
TEST_CASE("matmul honours strides: avx2") { with_isa("avx2", check_strides); }
TEST_CASE("matmul honours strides: avxvnni") { with_isa("avxvnni", check_strides); }
TEST_CASE("matmul honours strides: avx512vnni256") { with_isa("avx512vnni256", check_strides); }
TEST_CASE("matmul honours strides: avx512") { with_isa("avx512", check_strides); }

// Damaged weights: scales of any bits. Rows stay independent, a NaN scale shows in the result.
void check_random_bytes(const KernelTable& table) {
  Rng rng(8);
  constexpr uint16_t kExtremes[] = {0x7e00, 0x7c00, 0xfc00, 0x7bff, 0x0001, 0x8000, 0xfdff};
  for (const Format& format : all_formats()) {
    const size_t cols = 512;
    Problem p(format, 9, cols, 5);
    p.randomize(rng);
    const std::vector<float> clean = p.run(table);
    for (size_t r = 0; r < 8; ++r) rng.fill({p.w.data() + r * p.w_stride, p.w_stride});
    const ScaleFields fields = scale_fields(format.dtype);
    for (size_t r = 0; r < 7 && fields.d >= 0; ++r) {
      std::memcpy(p.w.data() + r * p.w_stride + fields.d, &kExtremes[r], 2);
    }
    const std::vector<float> y = p.run(table);
    INFO(format.name);
    for (size_t t = 0; t < 5; ++t) {
      CHECK(y[t * 9 + 8] == clean[t * 9 + 8]);
      if (fields.d >= 0) CHECK(std::isnan(y[t * 9]));
      if (fields.d >= 0) CHECK(!std::isfinite(y[t * 9 + 1]));
    }
  }
}
TEST_CASE("matmul survives damaged weights: scalar") { with_isa("scalar", check_random_bytes); }
TEST_CASE("matmul survives damaged weights: avx2") { with_isa("avx2", check_random_bytes); }
TEST_CASE("matmul survives damaged weights: avxvnni") { with_isa("avxvnni", check_random_bytes); }
TEST_CASE("matmul survives damaged weights: avx512vnni256") {
  with_isa("avx512vnni256", check_random_bytes);
}
TEST_CASE("matmul survives damaged weights: avx512") { with_isa("avx512", check_random_bytes); }

void check_nan_activation(const KernelTable& table) {
  Rng rng(9);
  for (const Format& format : all_formats()) {
    Problem p(format, 3, 512, 2);
    p.randomize(rng);
    std::vector<float> values(512, 1.0f);
    values[300] = std::numeric_limits<float>::quiet_NaN();
    p.set_token(1, values);
    const std::vector<float> y = p.run(table);
    INFO(format.name);
    for (size_t r = 0; r < 3; ++r) {
      CHECK(std::isfinite(y[r]));
      CHECK(std::isnan(y[3 + r]));
    }
  }
}
TEST_CASE("a NaN activation shows in its token only: scalar") {
  with_isa("scalar", check_nan_activation);
}
TEST_CASE("a NaN activation shows in its token only: avx2") {
  with_isa("avx2", check_nan_activation);
}
TEST_CASE("a NaN activation shows in its token only: avxvnni") {
  with_isa("avxvnni", check_nan_activation);
}
TEST_CASE("a NaN activation shows in its token only: avx512vnni256") {
  with_isa("avx512vnni256", check_nan_activation);
}
TEST_CASE("a NaN activation shows in its token only: avx512") {
  with_isa("avx512", check_nan_activation);
}

#if defined(__aarch64__)
TEST_CASE("matmul within bounds: neon") { with_isa("neon", check_against_double); }
TEST_CASE("matmul of 14336 columns within bounds: neon") { with_isa("neon", check_long_rows); }
TEST_CASE("matmul of exact inputs is bit-equal: neon") { with_isa("neon", check_exact); }
TEST_CASE("matmul of quantized weights equals scalar to the bit: neon") {
  with_isa("neon", check_bits_of_scalar);
}
TEST_CASE("matmul bits do not depend on the batch: neon") {
  with_isa("neon", check_batch_invariance);
}
TEST_CASE("matmul stays inside its buffers: neon") { with_isa("neon", check_page_ends); }
TEST_CASE("matmul reads weights at any 2-byte alignment: neon") {
  with_isa("neon", check_misaligned);
}
TEST_CASE("matmul honours strides: neon") { with_isa("neon", check_strides); }
TEST_CASE("matmul survives damaged weights: neon") { with_isa("neon", check_random_bytes); }
TEST_CASE("a NaN activation shows in its token only: neon") {
  with_isa("neon", check_nan_activation);
}
#endif

}  // namespace
}  // namespace duet::test
