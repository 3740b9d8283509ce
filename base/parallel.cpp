#include "base/parallel.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <exception>

namespace duet {

void detail::run_parallel(int n_threads, size_t n, size_t grain, ChunkFn fn, void* context) {
  grain = std::max<size_t>(grain, 1);
  const size_t n_chunks = n / grain + (n % grain != 0);
  const auto run_chunk = [&](size_t i) {
    fn(context, i * grain, i * grain + std::min(grain, n - i * grain));
  };
  if (n_threads <= 1 || n_chunks <= 1) {
    // Chunk by chunk here too: bodies size their scratch by the grain.
    for (size_t i = 0; i < n_chunks; ++i) run_chunk(i);
    return;
  }
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const int team = static_cast<int>(std::min<size_t>(static_cast<size_t>(n_threads), n_chunks));
#pragma omp parallel num_threads(team)
  {
    // An exception must not leave an OpenMP region: keep the first, stop handing out chunks.
    for (size_t i; !failed.load(std::memory_order_relaxed) && (i = next.fetch_add(1)) < n_chunks;) {
      try {
        run_chunk(i);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }
  if (error) std::rethrow_exception(error);
}

void set_library_threads(int n_threads) { omp_set_num_threads(std::max(n_threads, 1)); }

}  // namespace duet
