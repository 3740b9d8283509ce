// Loops over all cores. The only module that starts threads or knows of OpenMP.
//
// Threads work in teams: the calling thread (member 0) runs straight code, and each loop in it is a
// job that the other members share. Members without work spin for some microseconds, then sleep;
// nobody waits for a member that has not begun on a job, so that a machine whose cores are busy with
// other programs only loses the speed it lacks. Each thread that runs loops has a team of its own,
// kept until it ends. Not OpenMP regions: all their threads meet at the end of each, spinning there
// for milliseconds, which nothing but environment variables can change.
#pragma once

#include <atomic>
#include <cstddef>
#include <type_traits>

#include "base/topology.h"

namespace duet {

// Runs body() on this thread with n_threads - 1 others at hand for the loops in it. An exception of
// the body comes out. Inside another team it is only a call. Meanwhile members stay where `placement`
// says (what the system refuses is left as it is: only speed is lost), and OpenMP libraries (oneDNN)
// use one thread wherever they are called. Error(memory) when threads cannot be started.
template <class Body>
void run_team(int n_threads, const Placement& placement, Body&& body);

// Calls body(begin, end) for disjoint chunks of at most `grain` that cover [0, n), on up to
// n_threads threads: those of the team, or of one made for this loop. Returns when all are done.
// The first exception thrown by a body is rethrown here after the loop; remaining chunks are then
// skipped. A loop inside the body of a loop runs on its caller's thread alone.
template <class Body>
void parallel_for(int n_threads, size_t n, size_t grain, Body&& body);

// Calls body(worker, task) for every task in [0, n_tasks). A worker in [0, n_threads) is one thread
// at a time, so that scratch can be kept per worker. Each thread begins with its own contiguous
// share of the tasks, the same in every loop of as many tasks: what it touched first is on its own
// memory node. Who is done takes from the others. As parallel_for otherwise; not to be nested.
template <class Body>
void parallel_shares(int n_threads, size_t n_tasks, const Body& body);

// The same with tasks begun in ascending order whoever runs them: for tasks of different length,
// longest first.
template <class Body>
void parallel_tasks(int n_threads, size_t n_tasks, const Body& body);

// Threads that OpenMP libraries use when called from this thread, outside teams.
void set_library_threads(int n_threads);

namespace detail {
using BodyFn = void (*)(void* context);
using ChunkFn = void (*)(void* context, size_t worker, size_t begin, size_t end);
void run_team(int n_threads, const Placement* placement, BodyFn fn, void* context);
void run_parallel(int n_threads, size_t n, size_t grain, ChunkFn fn, void* context);

template <class T>
void* erase(T& body) {
  return const_cast<std::remove_const_t<T>*>(&body);
}
}  // namespace detail

template <class Body>
void run_team(int n_threads, const Placement& placement, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  detail::run_team(
      n_threads, &placement, [](void* context) { (*static_cast<Plain*>(context))(); },
      detail::erase<Plain>(body));
}

template <class Body>
void parallel_for(int n_threads, size_t n, size_t grain, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  detail::run_parallel(
      n_threads, n, grain,
      [](void* context, size_t, size_t begin, size_t end) {
        (*static_cast<Plain*>(context))(begin, end);
      },
      detail::erase<Plain>(body));
}

template <class Body>
void parallel_shares(int n_threads, size_t n_tasks, const Body& body) {
  detail::run_parallel(
      n_threads, n_tasks, 1,
      [](void* context, size_t worker, size_t task, size_t) {
        (*static_cast<const Body*>(context))(worker, task);
      },
      detail::erase(body));
}

template <class Body>
void parallel_tasks(int n_threads, size_t n_tasks, const Body& body) {
  std::atomic<size_t> next{0};
  parallel_shares(n_threads, n_tasks, [&](size_t worker, size_t) {
    body(worker, next.fetch_add(1, std::memory_order_relaxed));
  });
}

}  // namespace duet
