#include "server/generation.h"

#include <algorithm>

namespace duet::server {

std::optional<size_t> Job::wait_any(Inbox& inbox, std::span<const std::unique_ptr<Job>> jobs, std::chrono::milliseconds wait) {
  std::unique_lock lock(inbox.mutex);
  const auto found = [&] { return std::find_if(jobs.begin(), jobs.end(), [](const auto& job) { return job->news_; }); };
  if (!inbox.changed.wait_for(lock, wait, [&] { return found() != jobs.end(); })) return std::nullopt;
  return static_cast<size_t>(found() - jobs.begin());
}

Update Job::take() {
  const std::lock_guard lock(inbox_->mutex);
  news_ = false;
  Update out = std::move(pending_);
  pending_ = {.n_prompt_done = out.n_prompt_done, .n_cached = out.n_cached};
  return out;
}

}  // namespace duet::server
