// oneDNN products against doubles.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/parallel.h"
#include "runtime/kernels/onednn_gemm.h"
#include "tests/support/blocks.h"
#include "tests/support/close.h"
#include "tests/support/skip.h"

namespace duet::test {
namespace {

std::vector<float> random_floats(size_t n, Rng& rng) {
  std::vector<float> out(n);
  for (float& v : out) v = rng.symmetric();
  return out;
}

TEST_CASE("sgemm multiplies row-major matrices with leading dimensions") {
  Rng rng(1);
  for (bool transposed : {false, true}) {
    const size_t m = 17, n = 23, k = 31, lda = 35, ldb = 40, ldc = 29;
    const std::vector<float> a = random_floats(m * lda, rng),
                             b = random_floats(ldb * std::max(n, k), rng);
    std::vector<float> c(m * ldc, -5.0f);
    sgemm({.m = m,
           .n = n,
           .k = k,
           .a = a.data(),
           .lda = lda,
           .b = b.data(),
           .ldb = ldb,
           .b_transposed = transposed,
           .c = c.data(),
           .ldc = ldc,
           .alpha = 0.5f});
    for (size_t i = 0; i < m; ++i) {
      for (size_t j = 0; j < ldc; ++j) {
        double exact = 0.0, abs_sum = 0.0;
        for (size_t l = 0; l < k && j < n; ++l) {
          const double product =
              0.5 * double{a[i * lda + l]} * double{transposed ? b[j * ldb + l] : b[l * ldb + j]};
          exact += product;
          abs_sum += std::abs(product);
        }
        if (j < n)
          CHECK(std::abs(double{c[i * ldc + j]} - exact) <= sum_bound(abs_sum));
        else
          CHECK(c[i * ldc + j] == -5.0f);
      }
    }
  }
}

// Weights [n_rows, cols] and tokens, by try_gemm and by the kernels.
void check_gemm(DType dtype, size_t panel_rows, int n_threads) {
  const size_t n_rows = 301, cols = 96, n_tokens = 40, y_stride = 310;
  const Format& format = format_of(dtype);
  const KernelTable& kernels = select_kernels("");
  Rng rng(2);
  std::vector<float> w_storage(n_rows * cols), x = random_floats(n_tokens * cols, rng);
  auto* w = reinterpret_cast<std::byte*>(w_storage.data());
  fill_random_weights(format, w, n_rows * cols, rng);
  std::vector<float> got(n_tokens * y_stride, -3.0f), want = got, panel(panel_rows * cols);
  MatmulArgs args{.w = w,
                  .w_stride = row_bytes(format, cols),
                  .n_rows = n_rows,
                  .cols = cols,
                  .x = reinterpret_cast<const std::byte*>(x.data()),
                  .x_stride = cols * sizeof(float),
                  .n_tokens = n_tokens,
                  .y = got.data(),
                  .y_stride = y_stride};
  REQUIRE(try_gemm(kernels, dtype, args, n_threads, panel));
  args.y = want.data();
  kernels.matmul[static_cast<size_t>(dtype)](args);
  for (size_t i = 0; i < got.size(); ++i) CHECK(std::abs(got[i] - want[i]) <= 1e-5f);
}

TEST_CASE("try_gemm equals the kernels for F32, F16 and BF16, whole and partial panels") {
  if (select_kernels("").needs == 0)
    DUET_SKIP("only the scalar table is usable, which never uses oneDNN");
  for (int n_threads : {1, 2}) {
    set_library_threads(n_threads);
    check_gemm(DType::F32, 0, n_threads);
    for (DType dtype : {DType::F16, DType::BF16}) {
      check_gemm(dtype, 256, n_threads);
      check_gemm(dtype, 10, n_threads);
      check_gemm(dtype, 512, n_threads);
    }
  }
}

TEST_CASE("try_gemm declines what it does not do, leaving y alone") {
  const KernelTable& kernels = *usable_kernels().front();
  std::vector<float> w(64 * 32), x(64 * 32), y(64 * 64, -3.0f), panel(64 * 32);
  MatmulArgs args{.w = reinterpret_cast<const std::byte*>(w.data()),
                  .w_stride = 128,
                  .n_rows = 64,
                  .cols = 32,
                  .x = reinterpret_cast<const std::byte*>(x.data()),
                  .x_stride = 128,
                  .n_tokens = 64,
                  .y = y.data(),
                  .y_stride = 64};
  CHECK_FALSE(try_gemm(kernels, DType::Q8_0, args, 1, panel));
  CHECK_FALSE(try_gemm(kernels, DType::F16, args, 1, {}));
  CHECK_FALSE(try_gemm(select_kernels("scalar"), DType::F32, args, 1, panel));
  MatmulArgs few = args;
  few.n_tokens = kGemmMinTokens - 1;
  CHECK_FALSE(try_gemm(kernels, DType::F32, few, 1, panel));
  MatmulArgs odd = args;
  odd.w += 2;
  CHECK_FALSE(try_gemm(kernels, DType::F32, odd, 1, panel));
  for (float v : y) CHECK(v == -3.0f);
}

}  // namespace
}  // namespace duet::test
