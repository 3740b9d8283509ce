// One thread that evaluates all sequences being generated, in common batches: a token of each that
// generates and pieces of prompts, so that neither waits for the other. Requests beyond the sequences
// that fit wait in a bounded queue.
//
// A greedy or seeded stream has the same text whatever runs beside it (runtime/batch.h).
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "runtime/batch.h"
#include "server/generation.h"
#include "server/metrics.h"
#include "server/router_watch.h"
#include "server/running.h"
#include "server/sequence_pool.h"

namespace duet::server {

struct SchedulerOptions {
  uint32_t n_parallel = 8;  // sequences generated at once
  size_t max_queue = 256;   // requests that wait, of any number of sequences
  uint32_t n_ctx = 0, n_batch = 0;  // as BatchOptions
  KvType kv_type = KvType::f16;
  PrefixStoreOptions store = {};
};

class Scheduler {
 public:
  // Error(memory) when n_parallel sequences do not fit; as PrefixStore. The engine must outlive it.
  Scheduler(const Engine& engine, const SchedulerOptions& options, Metrics& metrics);
  ~Scheduler();
  void stop();  // running and waiting jobs end as cancelled, no more are taken

  uint32_t n_ctx() const { return batch_.n_ctx(); }
  const SchedulerOptions& options() const { return options_; }

  // Queues the jobs of one request, or none: false when too many requests wait. Each must then be withdrawn.
  bool submit(std::span<Job* const> jobs);
  // Ends a job, if it has not ended, and returns when it will not be touched again: at the end of the
  // batch at hand.
  void withdraw(Job& job);

  struct Slot {  // a job being processed
    size_t n_prompt = 0, n_evaluated = 0, n_generated = 0;
  };
  struct Status {
    std::vector<Slot> running;
    size_t n_waiting = 0, n_cached_sequences = 0, sequence_bytes = 0;
    std::optional<StreamStats> stream = {};  // after the last batch; nothing where all experts are in memory
  };
  Status status() const;
  RouterWatch& router() { return router_; }

 private:
  using Clock = std::chrono::steady_clock;
  struct Wanted {  // logits of a row of the batch
    Running* running;
    size_t row, position;  // of the token evaluated
  };
  struct Waiting {
    Job* job;
    uint64_t request;  // jobs submitted together
    Clock::time_point since;
  };
  struct Held {
    Job* job;
    uint64_t request;
  };

  void loop();
  bool wait_for_work();
  void admit();
  Job* next_waiting(Clock::time_point& since);
  bool shares_running_prompt(const Job& job) const;
  void check(const Job& job) const;
  size_t n_held(uint64_t request) const;
  size_t n_waiting_requests() const;
  void start(Job& job, Clock::time_point since);
  void drop_withdrawn();
  void step();
  void store_beside();
  void plan_step();
  void plan_prompts(size_t budget);
  size_t prompt_budget(size_t n_decoding) const;
  void learn(double seconds);
  void deliver();
  void deliver_rows(std::span<const Wanted> wanted);
  void remove_finished();
  void end_unstarted(Job& job, SequencePool::Entry* entry, FinishReason reason, const std::string& error);
  void end(Running& running, FinishReason reason, const std::string& error = {});
  void end_all(FinishReason reason, const std::string& error);
  void publish_status();
  ExpertCounts expert_counts() const;

  const Engine& engine_;
  Metrics& metrics_;
  std::atomic<bool> stop_{false};
  RouterWatch router_;
  Batch batch_;
  const SchedulerOptions options_;
  std::unique_ptr<PrefixStore> store_;  // or null
  SequencePool pool_;

  // Of the inference thread.
  std::vector<std::unique_ptr<Running>> running_;
  std::vector<Batch::Part> parts_;
  std::vector<Running*> planned_;  // of parts_
  std::vector<Wanted> wanted_;
  size_t n_rows_ = 0, n_prompt_rows_ = 0;  // of the batch at hand
  Clock::time_point next_store_{};      // while there is other work
  double prompt_token_s_ = 0.01;                   // time of a prompt's token in a batch, about
  double decode_step_s_ = 0, decode_rows_ = 0;     // time and rows of a batch without

  mutable std::mutex mutex_;
  std::condition_variable work_, gone_;
  uint64_t n_submitted_ = 0;
  std::deque<Waiting> waiting_;   // by request
  std::vector<Held> held_;        // running_'s, for those who wait to withdraw
  std::vector<Job*> withdrawn_;   // of held_, to be ended
  Status status_;
  std::thread thread_;
};

// A job's stay with the scheduler.
class Ticket {
 public:
  Ticket(Scheduler& scheduler, std::vector<Job*> jobs) : scheduler_(scheduler), jobs_(std::move(jobs)), queued_(scheduler.submit(jobs_)) {}
  ~Ticket() {
    if (queued_)
      for (Job* job : jobs_) scheduler_.withdraw(*job);
  }
  Ticket(const Ticket&) = delete;
  Ticket& operator=(const Ticket&) = delete;
  bool queued() const { return queued_; }

 private:
  Scheduler& scheduler_;
  std::vector<Job*> jobs_;
  bool queued_;
};

}  // namespace duet::server
