#include "server/answer.h"

#include <algorithm>

#include "server/api_error.h"

namespace duet::server {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds kLook{250};  // how often a silent client is looked after
constexpr std::chrono::seconds kPing{15};

class Answer : public ReplyStream {
 public:
  Answer(Scheduler& scheduler, TextRequest request, std::unique_ptr<Renderer> renderer, const HttpRequest& http, const AnswerOptions& options)
      : request_(std::move(request)), renderer_(std::move(renderer)), client_gone_(http.client_gone), options_(options), jobs_(make_jobs()), ticket_(scheduler, pointers()) {
    if (!ticket_.queued()) throw ApiError(503, "the server is busy: its queue is full; try again later");
  }

  ReplyUsage usage() const override {
    ReplyUsage out;
    for (const Choice& choice : choices_) {
      ++out.n_choices;
      out.n_prompt += choice.n_prompt;
      out.n_cached += choice.n_cached;
      out.n_generated += std::max(choice.finish.n_generated, choice.tokens.size());
      out.queue_s = std::max(out.queue_s, choice.finish.queue_s);
      out.prompt_s = std::max(out.prompt_s, choice.finish.prompt_s);
    }
    out.complete = n_open_ == 0;
    return out;
  }

  // Not a stream.
  std::string whole() {
    const bool complete = pump([](size_t, const Update&) { return true; }, [] { return true; });
    if (!complete) throw ApiError(499, "the client has left");
    for (const Choice& choice : choices_) check_end(choice.finish);
    return renderer_->whole(choices_);
  }

  void run(const Write& write) override {
    write(renderer_->begin(choices_));
    try {
      const bool complete = pump([&](size_t i, const Update& update) { return piece(i, update, write); },
                                 [&] { return ping(write); });
      if (complete) write(renderer_->end(choices_));
    } catch (const ApiError& e) {
      write(renderer_->failure(e.what()));
    }
  }

 private:
  std::vector<std::unique_ptr<Job>> make_jobs() {
    std::vector<std::unique_ptr<Job>> jobs;
    for (const PromptInput& prompt : request_.prompts)
      for (size_t i = 0; i < request_.n; ++i) {
        GenerationParams params = request_.params;
        params.sampling.seed += i;
        params.constraint = request_.constraint.get();
        jobs.push_back(std::make_unique<Job>(inbox_, prompt.ids, std::move(params)));
        choices_.push_back({.input = &prompt, .n_prompt = prompt.ids.size()});
      }
    return jobs;
  }

  std::vector<Job*> pointers() const {
    std::vector<Job*> out;
    for (const auto& job : jobs_) out.push_back(job.get());
    return out;
  }

  // Until all jobs have ended (true) or the client has left.
  template <class OnUpdate, class OnSilence>
  bool pump(const OnUpdate& on_update, const OnSilence& on_silence) {
    const auto start = Clock::now();
    while (n_open_ > 0) {
      const auto index = Job::wait_any(inbox_, jobs_, kLook);
      if (client_gone_()) return false;
      if (options_.timeout.count() > 0 && Clock::now() - start > options_.timeout) throw ApiError(504, "the request took longer than the server allows");
      if (!index) {
        if (!on_silence()) return false;
        continue;
      }
      const Update update = jobs_[*index]->take();
      add(choices_[*index], update);
      if (update.finish) --n_open_;
      if (!on_update(*index, update)) return false;
    }
    return true;
  }

  static void add(Choice& choice, const Update& update) {
    choice.n_prompt_done = update.n_prompt_done;
    choice.n_cached = update.n_cached;
    choice.text += update.text;
    choice.prompt.insert(choice.prompt.end(), update.prompt.begin(), update.prompt.end());
    choice.tokens.insert(choice.tokens.end(), update.tokens.begin(), update.tokens.end());
    if (!update.embedding.empty()) choice.embedding = update.embedding;
    if (update.finish) choice.finish = *update.finish;
  }

  static void check_end(const Finish& finish) {
    if (finish.reason == FinishReason::refused) throw ApiError(400, finish.error);
    if (finish.reason == FinishReason::failed) throw ApiError(500, finish.error);
    if (finish.reason == FinishReason::cancelled) throw ApiError(503, finish.error.empty() ? "cancelled" : finish.error);
  }

  bool piece(size_t index, const Update& update, const Write& write) {
    if (update.finish) check_end(*update.finish);
    last_written_ = Clock::now();
    const std::string text = renderer_->piece(index, choices_[index], update);
    return text.empty() || write(text);
  }

  bool ping(const Write& write) {
    if (Clock::now() - last_written_ < kPing) return true;
    last_written_ = Clock::now();
    const std::string text = renderer_->ping();
    return text.empty() || write(text);
  }

  TextRequest request_;
  std::unique_ptr<Renderer> renderer_;
  std::function<bool()> client_gone_;
  AnswerOptions options_;
  Inbox inbox_;
  std::vector<Choice> choices_;
  std::vector<std::unique_ptr<Job>> jobs_;
  size_t n_open_ = jobs_.size();
  Clock::time_point last_written_ = Clock::now();
  Ticket ticket_;  // last: gives the jobs back before they go
};

}  // namespace

HttpReply answer(Scheduler& scheduler, TextRequest request, std::unique_ptr<Renderer> renderer, const HttpRequest& http, const AnswerOptions& options) {
  const bool stream = request.stream;
  const std::string content_type = renderer->content_type();
  auto made = std::make_unique<Answer>(scheduler, std::move(request), std::move(renderer), http, options);
  if (!stream) {
    HttpReply reply{.body = made->whole()};
    reply.usage = made->usage();
    return reply;
  }
  return {.content_type = content_type, .headers = {{"Cache-Control", "no-cache"}, {"X-Accel-Buffering", "no"}}, .stream = std::move(made)};
}

}  // namespace duet::server
