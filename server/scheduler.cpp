#include "server/scheduler.h"

#include <algorithm>
#include <new>

#include "base/error.h"
#include "base/parallel.h"
#include "runtime/memory_plan.h"
#include "server/logprobs.h"

namespace duet::server {
namespace {

// How long pieces of prompts may hold up those who generate, in a batch. Where experts are read from
// the disk a batch takes long anyway, and few large ones read the least.
constexpr double kPromptSeconds = 0.25, kStreamedPromptSeconds = 2;
constexpr size_t kLeastPrompt = 16;
// Tokens of a prompt that another one being evaluated will save: worth waiting for.
constexpr size_t kWorthWaiting = 64;

size_t common_prefix(std::span<const Token> a, std::span<const Token> b) {
  return static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
}

double blend(double old, double fresh) { return old == 0 ? fresh : 0.7 * old + 0.3 * fresh; }

// A row of its own for each sequence that generates.
SchedulerOptions checked(SchedulerOptions options, const Batch& batch) {
  options.n_parallel = std::clamp<uint32_t>(options.n_parallel, 1, batch.n_batch());
  return options;
}

std::unique_ptr<PrefixStore> open_store(const Engine& engine, const Batch& batch, const PrefixStoreOptions& options) {
  if (options.folder.empty()) return nullptr;
  return std::make_unique<PrefixStore>(options, batch.fingerprint(), engine.info().n_threads);
}

}  // namespace

Scheduler::Scheduler(const Engine& engine, const SchedulerOptions& options, Metrics& metrics)
    : engine_(engine),
      metrics_(metrics),
      router_(engine.info().hparams),
      batch_(engine, {.n_ctx = options.n_ctx, .n_batch = options.n_batch, .n_sequences = options.n_parallel, .kv_type = options.kv_type, .cancel = &stop_,
                      .routing = [this](int layer, std::span<const int32_t> experts) { router_.chosen(static_cast<size_t>(layer), experts); }}),
      options_(checked(options, batch_)),
      store_(open_store(engine, batch_, options_.store)),
      pool_(batch_, options_.n_parallel * batch_.sequence_bytes(), store_.get()) {
  router_.evaluated(0, engine_.resident_experts());
  publish_status();
  thread_ = std::thread([this] { loop(); });
}

Scheduler::~Scheduler() {
  stop();
  thread_.join();
}

void Scheduler::stop() {
  const std::lock_guard lock(mutex_);
  stop_ = true;
  work_.notify_all();
}

bool Scheduler::submit(std::span<Job* const> jobs) {
  {
    const std::lock_guard lock(mutex_);
    const size_t room = options_.max_queue + options_.n_parallel - std::min<size_t>(held_.size(), options_.n_parallel);
    if (stop_ || n_waiting_requests() >= room) {
      ++metrics_.refused;
      return false;
    }
    ++n_submitted_;
    for (Job* job : jobs) waiting_.push_back({job, n_submitted_, Clock::now()});
    metrics_.requests += jobs.size();
  }
  work_.notify_all();
  return true;
}

size_t Scheduler::n_held(uint64_t request) const {
  return static_cast<size_t>(std::count_if(held_.begin(), held_.end(), [&](const Held& h) { return h.request == request; }));
}

size_t Scheduler::n_waiting_requests() const {
  size_t n = 0;
  uint64_t last = 0;
  for (const Waiting& w : waiting_) n += std::exchange(last, w.request) != w.request;
  return n;
}

void Scheduler::withdraw(Job& job) {
  std::unique_lock lock(mutex_);
  const size_t n_erased = std::erase_if(waiting_, [&](const Waiting& w) { return w.job == &job; });
  if (n_erased > 0) ++metrics_.cancelled;
  const auto held = [&] { return std::any_of(held_.begin(), held_.end(), [&](const Held& h) { return h.job == &job; }); };
  if (!held()) return;
  withdrawn_.push_back(&job);
  work_.notify_all();
  gone_.wait(lock, [&] { return !held(); });
  std::erase(withdrawn_, &job);
}

Scheduler::Status Scheduler::status() const {
  const std::lock_guard lock(mutex_);
  Status status = status_;
  status.n_waiting = waiting_.size();
  return status;
}

void Scheduler::loop() {
  while (wait_for_work()) {
    drop_withdrawn();
    admit();
    if (!running_.empty()) step();
    if (store_) store_beside();
    publish_status();
  }
  end_all(FinishReason::cancelled, "the server is shutting down");
  pool_.store_all();
}

// What finished sequences leave behind goes to the store meanwhile.
bool Scheduler::wait_for_work() {
  std::unique_lock lock(mutex_);
  const auto is_there = [&] { return stop_ || !running_.empty() || !waiting_.empty(); };
  for (bool more = store_ != nullptr; more && !is_there();) {
    lock.unlock();
    more = pool_.store_next();
    lock.lock();
  }
  work_.wait(lock, is_there);
  return !stop_;
}

// A block now and then, while there is no rest: a tenth of the time at most.
void Scheduler::store_beside() {
  const auto begin = Clock::now();
  if (running_.empty() || begin < next_store_ || !pool_.store_next()) return;
  const auto end = Clock::now();
  next_store_ = end + 9 * (end - begin);
}

void Scheduler::drop_withdrawn() {
  std::vector<Job*> gone;
  {
    const std::lock_guard lock(mutex_);
    gone = withdrawn_;
  }
  for (const auto& running : running_)
    if (std::find(gone.begin(), gone.end(), &running->job()) != gone.end()) end(*running, FinishReason::cancelled);
  remove_finished();
}

void Scheduler::admit() {
  Clock::time_point since;
  while (running_.size() < options_.n_parallel) {
    Job* job = next_waiting(since);
    if (job == nullptr) return;
    start(*job, since);
  }
}

// Of the request of which the fewest are being evaluated, so that one of many sequences does not hold up the others:
// the first that does not wait for another's prompt.
Job* Scheduler::next_waiting(Clock::time_point& since) {
  const std::lock_guard lock(mutex_);
  auto found = waiting_.end();
  for (auto w = waiting_.begin(); w != waiting_.end() && (found == waiting_.end() || n_held(found->request) > 0); ++w)
    if ((found == waiting_.end() || n_held(w->request) < n_held(found->request)) && !shares_running_prompt(*w->job)) found = w;
  if (found == waiting_.end()) return nullptr;
  Job* job = found->job;
  since = found->since;
  held_.push_back({job, found->request});
  waiting_.erase(found);
  return job;
}

// Whether one that is being evaluated is about to hold much more of the job's prompt than it does now.
bool Scheduler::shares_running_prompt(const Job& job) const {
  if (job.params.needs_whole_prompt()) return false;
  return std::any_of(running_.begin(), running_.end(), [&](const auto& running) {
    return running->in_prompt() && common_prefix(running->job().prompt, job.prompt) >= running->n_evaluated() + kWorthWaiting;
  });
}

// An error of a batch ends all that share it: what one job alone could cause is looked for before it joins.
void Scheduler::check(const Job& job) const {
  const size_t n_vocab = std::min<size_t>(engine_.info().hparams.n_vocab, engine_.tokenizer().n_vocab());
  const auto check_id = [&](Token id) {
    if (id < 0 || static_cast<size_t>(id) >= n_vocab) fail(ErrorKind::usage, "token id ", id, " is outside the vocabulary of ", n_vocab);
  };
  for (const Token id : job.prompt) check_id(id);
  for (const auto& [id, bias] : job.params.logit_bias) check_id(id);
  if (job.prompt.empty() || job.prompt.size() > batch_.n_ctx())
    fail(ErrorKind::usage, "a prompt of ", job.prompt.size(), " tokens; it must have 1 to ", batch_.n_ctx(), ", the positions of the context");
}

void Scheduler::start(Job& job, Clock::time_point since) {
  SequencePool::Entry* entry = nullptr;
  try {
    check(job);
    entry = &pool_.acquire(job.prompt, !job.params.needs_whole_prompt());
    auto running = std::make_unique<Running>(job, *entry, engine_.tokenizer(), batch_.n_ctx(), since, expert_counts());
    running->prompt_progress();
    metrics_.cached_tokens += running->n_evaluated();
    running_.push_back(std::move(running));
  } catch (const Error& e) {  // of this job alone: a grammar that is too ambiguous from its start
    end_unstarted(job, entry, FinishReason::refused, e.what());
  } catch (const std::exception& e) {
    end_unstarted(job, entry, FinishReason::failed, e.what());
  }
}

// entry: or null.
void Scheduler::end_unstarted(Job& job, SequencePool::Entry* entry, FinishReason reason, const std::string& error) {
  if (entry != nullptr) pool_.release(*entry, !job.params.needs_whole_prompt());
  ++metrics_.failed;
  job.publish([&](Update& update) { update.finish = Finish{.reason = reason, .error = error}; });
  const std::lock_guard lock(mutex_);
  std::erase_if(held_, [&](const Held& h) { return h.job == &job; });
  gone_.notify_all();
}

void Scheduler::step() {
  const auto begin = Clock::now();
  plan_step();
  try {
    batch_.evaluate(parts_);
    router_.evaluated(n_rows_, engine_.resident_experts());
    deliver();
  } catch (const Error& e) {
    if (e.kind() == ErrorKind::cancelled) return;  // stop_
    return end_all(FinishReason::failed, e.what());
  } catch (const std::bad_alloc&) {
    return end_all(FinishReason::failed, "out of memory");
  } catch (const std::exception& e) {
    return end_all(FinishReason::failed, e.what());
  }
  pool_.trim();
  learn(std::chrono::duration<double>(Clock::now() - begin).count());
  remove_finished();
}

void Scheduler::plan_step() {
  parts_.clear();
  planned_.clear();
  n_rows_ = n_prompt_rows_ = 0;
  for (const auto& running : running_)
    if (!running->in_prompt()) {
      parts_.push_back({&running->entry().sequence, running->pending()});
      planned_.push_back(running.get());
      ++n_rows_;
    }
  plan_prompts(prompt_budget(n_rows_));
}

// Half to the one that has waited longest, so that none waits for ever; the rest to those with the least left, so that
// a short prompt does not wait for the end of a long one.
void Scheduler::plan_prompts(size_t budget) {
  std::vector<Running*> prompts;
  for (const auto& running : running_)
    if (running->in_prompt()) prompts.push_back(running.get());
  if (prompts.empty() || budget == 0) return;
  Running* const oldest = prompts.front();
  size_t of_oldest = std::min(oldest->pending().size(), (budget + 1) / 2);
  budget -= of_oldest;
  std::stable_sort(prompts.begin(), prompts.end(), [](const Running* a, const Running* b) { return a->pending().size() < b->pending().size(); });
  const auto add = [&](Running* running, size_t n) {
    if (n == 0) return;
    const std::span<const Token> pending = running->pending();
    const size_t n_outputs = running->job().params.needs_whole_prompt() ? n : n == pending.size() ? 1 : 0;
    parts_.push_back({&running->entry().sequence, pending.first(n), n_outputs});
    planned_.push_back(running);
    n_rows_ += n;
    n_prompt_rows_ += n;
  };
  for (Running* running : prompts) {
    if (running == oldest) continue;
    const size_t n = std::min(running->pending().size(), budget);
    add(running, n);
    budget -= n;
  }
  of_oldest += std::min(oldest->pending().size() - of_oldest, budget);
  add(oldest, of_oldest);
}

size_t Scheduler::prompt_budget(size_t n_decoding) const {
  const size_t all = batch_.n_batch() - n_decoding;
  if (n_decoding == 0) return all;
  const double time = engine_.plan().streamed ? kStreamedPromptSeconds : kPromptSeconds;
  return std::min(all, std::max(kLeastPrompt, static_cast<size_t>(std::min(time / prompt_token_s_, 1e6))));
}

void Scheduler::learn(double seconds) {
  ++metrics_.steps;
  metrics_.step_rows += n_rows_;
  metrics_.prompt_tokens += n_prompt_rows_;
  const auto n_decoding = static_cast<double>(n_rows_ - n_prompt_rows_);
  if (n_prompt_rows_ == 0) {
    decode_step_s_ = blend(decode_step_s_, seconds);
    decode_rows_ = blend(decode_rows_, n_decoding);
  }
  if (n_prompt_rows_ < kLeastPrompt) return;
  // Rows beyond those of a batch without prompts cost alike, whichever they are.
  const double n_more = static_cast<double>(n_prompt_rows_) + std::max(n_decoding - decode_rows_, 0.0), decode_s = n_decoding > 0 ? decode_step_s_ : 0;
  prompt_token_s_ = std::max(blend(prompt_token_s_, std::max(seconds - decode_s, seconds / 8) / n_more), 1e-6);
}

// Logits are wanted of the last token of a complete prompt and of generated ones; of all tokens of a
// prompt where their probabilities were asked for.
void Scheduler::deliver() {
  wanted_.clear();
  size_t row = 0;
  for (size_t i = 0; i < parts_.size(); ++i) {
    Running& running = *planned_[i];
    const size_t n = parts_[i].tokens.size(), n_done = running.n_evaluated();
    const bool complete = !running.in_prompt();
    const bool in_prompt = n_done <= running.job().prompt.size();
    if (in_prompt && running.job().params.embedding) {
      for (size_t r = 0; r < n; ++r) running.take_hidden(batch_.hidden(row + r));
      if (running.finished()) end(running, running.reason());
      row += n;
      continue;
    }
    const bool all = running.job().params.prompt_logprobs && in_prompt;
    for (size_t r = all ? 0 : n - 1; r < n; ++r)
      if (all || complete) wanted_.push_back({&running, row + r, n_done - n + r});
    if (in_prompt) running.prompt_progress();
    row += n;
  }
  const size_t most = std::min<size_t>(batch_.n_batch(), Batch::kMaxLogitRows);
  for (size_t first = 0; first < wanted_.size(); first += most)
    deliver_rows(std::span(wanted_).subspan(first, std::min(most, wanted_.size() - first)));
}

void Scheduler::deliver_rows(std::span<const Wanted> wanted) {
  std::vector<size_t> rows;
  for (const Wanted& w : wanted) rows.push_back(w.row);
  const std::span<const float> logits = batch_.logits(rows);
  const size_t n_vocab = logits.size() / rows.size();
  const size_t n_tokens = std::min(n_vocab, engine_.tokenizer().n_vocab());  // rows that only pad a matrix are no tokens
  std::vector<TokenRecord> records(wanted.size());
  const auto follows_in_prompt = [](const Wanted& w) { return w.position + 1 < w.running->job().prompt.size(); };
  parallel_for(wanted.size() < 4 ? 1 : engine_.info().n_threads, wanted.size(), 1, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const Wanted& w = wanted[i];
      const auto row = logits.subspan(i * n_vocab, n_tokens);
      if (!follows_in_prompt(w)) w.running->take(row);
      else records[i] = logprob_record(row, w.running->job().prompt[w.position + 1], static_cast<size_t>(std::max(w.running->job().params.n_top, 0)));
    }
  });
  for (size_t i = 0; i < wanted.size(); ++i) {
    Running& running = *wanted[i].running;
    if (follows_in_prompt(wanted[i])) {
      running.job().publish([&](Update& update) { update.prompt.push_back(std::move(records[i])); });
      continue;  // its job may be over, but rows of it follow
    }
    running.tell();  // after the prompt's records
    if (running.token_seconds()) metrics_.next_token.add(*running.token_seconds());
    else metrics_.first_token.add(running.first_token_seconds());
    if (running.finished()) end(running, running.reason());
  }
}

void Scheduler::end(Running& running, FinishReason reason, const std::string& error) {
  if (reason == FinishReason::cancelled) ++metrics_.cancelled;
  if (reason == FinishReason::failed || reason == FinishReason::refused) ++metrics_.failed;
  running.end(reason, error, metrics_, expert_counts());
  pool_.release(running.entry(), !running.job().params.needs_whole_prompt());
  const std::lock_guard lock(mutex_);
  std::erase_if(held_, [&](const Held& h) { return h.job == &running.job(); });
  running.forget();
  gone_.notify_all();
}

void Scheduler::remove_finished() {
  std::erase_if(running_, [](const auto& running) { return running->ended(); });
}

void Scheduler::end_all(FinishReason reason, const std::string& error) {
  for (const auto& running : running_)
    if (!running->ended()) end(*running, reason, error);
  remove_finished();
  if (!stop_) return;
  const std::lock_guard lock(mutex_);
  for (const Waiting& w : waiting_)
    w.job->publish([&](Update& update) { update.finish = Finish{.reason = reason, .error = error}; });
  waiting_.clear();
}

ExpertCounts Scheduler::expert_counts() const {
  const auto stream = engine_.stream_stats();
  return stream ? ExpertCounts{stream->hits, stream->misses} : ExpertCounts{};
}

void Scheduler::publish_status() {
  auto stream = engine_.stream_stats();
  const std::lock_guard lock(mutex_);
  status_.stream = std::move(stream);
  status_.running.clear();
  for (const auto& running : running_) status_.running.push_back({running->job().prompt.size(), running->n_evaluated(), running->n_generated()});
  status_.n_cached_sequences = pool_.size() - running_.size();
  status_.sequence_bytes = pool_.bytes();
}

}  // namespace duet::server
