// Loops over all cores. The only module that uses OpenMP, so that one team of threads serves the
// whole process (oneDNN runs on the same runtime).
#pragma once

#include <cstddef>
#include <type_traits>

namespace duet {

// Calls body(begin, end) for disjoint chunks of at most `grain` that cover [0, n), on up to
// n_threads threads (chunks are handed out dynamically). Returns when all are done. The first
// exception thrown by a body is rethrown here after the loop; remaining chunks are then skipped.
// Not to be nested.
template <class Body>
void parallel_for(int n_threads, size_t n, size_t grain, Body&& body);

namespace detail {
using ChunkFn = void (*)(void* context, size_t begin, size_t end);
void run_parallel(int n_threads, size_t n, size_t grain, ChunkFn fn, void* context);
}  // namespace detail

template <class Body>
void parallel_for(int n_threads, size_t n, size_t grain, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  detail::run_parallel(
      n_threads, n, grain,
      [](void* context, size_t begin, size_t end) { (*static_cast<Plain*>(context))(begin, end); },
      const_cast<std::remove_const_t<Plain>*>(&body));
}

// Threads that libraries on the same OpenMP runtime (oneDNN) use when called from this thread.
void set_library_threads(int n_threads);

}  // namespace duet
