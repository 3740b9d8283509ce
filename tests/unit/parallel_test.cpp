// Teams of threads: everything is done once whatever the number of threads, processors and jobs.
#include "base/parallel.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "tests/support/errors.h"

using namespace duet;
using namespace duet::test;

namespace {

const Placement kAnywhere;

bool each_once(const std::vector<std::atomic<int>>& visits) {
  return std::all_of(visits.begin(), visits.end(), [](const auto& v) { return v == 1; });
}

// Visits n tasks in a loop of each kind.
void check_loops(int n_threads, size_t n) {
  std::vector<std::atomic<int>> a(n), b(n), c(n);
  std::vector<std::atomic<bool>> busy(static_cast<size_t>(n_threads));
  const auto alone = [&](size_t worker, auto& visits, size_t task) {
    REQUIRE(worker < busy.size());
    const bool was = busy[worker].exchange(true);
    ++visits[task];
    busy[worker] = false;
    return !was;
  };
  std::atomic<bool> one_thread_per_worker{true};
  parallel_for(n_threads, n, 3, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) ++a[i];
  });
  parallel_shares(n_threads, n, [&](size_t worker, size_t task) {
    if (!alone(worker, b, task)) one_thread_per_worker = false;
  });
  parallel_tasks(n_threads, n, [&](size_t worker, size_t task) {
    if (!alone(worker, c, task)) one_thread_per_worker = false;
  });
  CHECK(each_once(a));
  CHECK(each_once(b));
  CHECK(each_once(c));
  CHECK(one_thread_per_worker);
}

}  // namespace

TEST_CASE("parallel: chunks cover the range once and keep to the grain") {
  for (const int n_threads : {1, 2, 5})
    for (const size_t n : {0u, 1u, 7u, 64u, 1000u})
      for (const size_t grain : {size_t{0}, size_t{1}, size_t{3}, size_t{64}, SIZE_MAX}) {
        std::vector<std::atomic<int>> visits(n);
        std::atomic<size_t> largest{0};
        parallel_for(n_threads, n, grain, [&](size_t begin, size_t end) {
          for (size_t i = begin; i < end; ++i) ++visits[i];
          for (size_t seen = largest;
               end - begin > seen && !largest.compare_exchange_weak(seen, end - begin);) {
          }
        });
        CHECK(std::all_of(visits.begin(), visits.end(), [](const auto& v) { return v == 1; }));
        CHECK(largest <= std::max<size_t>(grain, 1));
      }
}

TEST_CASE("parallel: the first exception comes out and stops the rest") {
  for (const int n_threads : {1, 3}) {
    std::atomic<int> n_calls{0};
    const auto run = [&] {
      parallel_for(n_threads, 1000, 1, [&](size_t, size_t) {
        ++n_calls;
        fail(ErrorKind::io, "chunk failed");
      });
    };
    check_thrown(thrown_by(run), ErrorKind::io, "chunk failed");
    CHECK(n_calls <= n_threads);
  }
}

TEST_CASE("parallel: every task once, in teams and outside, with more threads than processors") {
  for (const int n_threads : {1, 2, 3, 8})
    for (const size_t n : {0u, 1u, 2u, 7u, 100u, 5000u}) {
      check_loops(n_threads, n);
      run_team(n_threads, kAnywhere, [&] {
        check_loops(n_threads, n);
        if (n_threads > 1) check_loops(n_threads - 1, n);  // fewer than the team has
      });
    }
}

TEST_CASE("parallel: more chunks than a job has units") {
  constexpr size_t kChunks = (size_t{1} << 20) * 3 + 17;
  std::atomic<size_t> n{0}, largest{0};
  parallel_for(2, kChunks * 2 - 1, 2, [&](size_t begin, size_t end) {
    n.fetch_add(end - begin, std::memory_order_relaxed);
    if (end - begin > 2) largest = end - begin;
  });
  CHECK(n == kChunks * 2 - 1);
  CHECK(largest == 0);
}

TEST_CASE("parallel: what a loop wrote is seen after it, through thousands of small jobs") {
  for (const int n_threads : {2, 3, 8}) {
    constexpr size_t kN = 64;
    std::vector<size_t> value(kN), sums;
    run_team(n_threads, kAnywhere, [&] {
      for (size_t round = 0; round < 3000; ++round) {
        parallel_for(n_threads, kN, 4, [&](size_t begin, size_t end) {
          for (size_t i = begin; i < end; ++i) ++value[i];
        });
        if (std::accumulate(value.begin(), value.end(), size_t{0}) != kN * (round + 1)) sums.push_back(round);
      }
    });
    CHECK(sums.empty());
  }
}

TEST_CASE("parallel: members that sleep between jobs wake up, and the leader waits for slow ones") {
  std::atomic<int> n{0};
  run_team(3, kAnywhere, [&] {
    for (int round = 0; round < 10; ++round) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));  // beyond the time they spin
      parallel_shares(3, 9, [&](size_t worker, size_t) {
        if (worker != 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
        ++n;
      });
      CHECK(n == (round + 1) * 9);
    }
  });
}

TEST_CASE("parallel: loops in loops and teams in teams run where they are met") {
  std::vector<std::atomic<int>> visits(400);
  run_team(3, kAnywhere, [&] {
    run_team(2, kAnywhere, [&] {
      parallel_for(3, 20, 1, [&](size_t i, size_t) {
        const auto thread = std::this_thread::get_id();
        run_team(2, kAnywhere, [&] {
          parallel_for(2, 20, 1, [&](size_t j, size_t) {
            if (std::this_thread::get_id() == thread) ++visits[i * 20 + j];
          });
        });
      });
    });
  });
  CHECK(each_once(visits));
}

TEST_CASE("parallel: exceptions of tasks and of the straight code come out; the team goes on") {
  for (const int n_threads : {1, 2, 8}) {
    std::atomic<int> n{0};
    run_team(n_threads, kAnywhere, [&] {
      for (int round = 0; round < 200; ++round) {
        const auto run = [&] {
          parallel_shares(n_threads, 50, [&](size_t, size_t task) {
            if (task % 10 == 3) fail(ErrorKind::io, "task failed");
          });
        };
        check_thrown(thrown_by(run), ErrorKind::io, "task failed");
        parallel_for(n_threads, 10, 1, [&](size_t, size_t) { ++n; });
      }
    });
    CHECK(n == 2000);
    const auto straight = [&] { run_team(n_threads, kAnywhere, [] { fail(ErrorKind::format, "straight"); }); };
    check_thrown(thrown_by(straight), ErrorKind::format, "straight");
    CHECK_THROWS_AS(run_team(n_threads, kAnywhere, [] { throw std::runtime_error("other"); }), std::runtime_error);
    check_loops(n_threads, 100);
  }
}

TEST_CASE("parallel: threads that lead teams at the same time do not disturb each other") {
  std::atomic<int> n_bad{0};
  const auto lead = [&] {
    for (int round = 0; round < 200; ++round) {
      std::vector<std::atomic<int>> visits(40);
      run_team(3, kAnywhere, [&] { parallel_for(3, 40, 1, [&](size_t i, size_t) { ++visits[i]; }); });
      if (!each_once(visits)) ++n_bad;
    }
  };
  std::thread other(lead);
  lead();
  other.join();
  CHECK(n_bad == 0);
}

TEST_CASE("parallel: shares are contiguous and the same in each loop when all keep pace") {
  // One thread alone: it takes its own share first, then the others' in turn.
  std::vector<size_t> order;
  run_team(1, kAnywhere, [&] { parallel_shares(4, 8, [&](size_t, size_t task) { order.push_back(task); }); });
  CHECK(order == std::vector<size_t>{0, 1, 2, 3, 4, 5, 6, 7});
  std::vector<std::atomic<int>> begun_by(2);
  run_team(2, kAnywhere, [&] {
    std::atomic<int> n_begun{0};
    parallel_shares(2, 2, [&](size_t worker, size_t task) {
      begun_by[task] = static_cast<int>(worker);
      ++n_begun;
      while (n_begun < 2) std::this_thread::yield();  // so that each takes one
    });
  });
  CHECK(begun_by[0] == 0);
  CHECK(begun_by[1] == 1);
}

TEST_CASE("parallel: members stay on their CPUs, the caller gets its own back") {
  const CpuSet before = allowed_cpus();
  const size_t n = before.size();
  Placement placement;
  for (const int cpu : before) placement.cpus.push_back({cpu});
  const auto cpus_of_members = [&](const Placement& where) {
    std::vector<CpuSet> seen(n);
    run_team(static_cast<int>(n), where, [&] {
      std::atomic<size_t> n_begun{0};
      parallel_shares(static_cast<int>(n), n, [&](size_t worker, size_t) {
        seen[worker] = allowed_cpus();
        ++n_begun;
        while (n_begun < n) std::this_thread::yield();  // so that each takes one
      });
    });
    return seen;
  };
  for (int round = 0; round < 2; ++round) {
    CHECK(cpus_of_members(placement) == placement.cpus);
    CHECK(allowed_cpus() == before);
  }
  CHECK(cpus_of_members(kAnywhere) == std::vector<CpuSet>(n, before));
}
