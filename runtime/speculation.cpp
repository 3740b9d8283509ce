#include "runtime/speculation.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>

#include "base/error.h"
#include "base/stopwatch.h"

namespace duet {
namespace {

// Entries of the index, at most 4 MiB: enough for three n-grams per token to seldom overwrite each other.
constexpr size_t kMaxEntries = size_t{1} << 20;
// A longer match is not measured exactly when it is found.
constexpr size_t kMeasuredMatch = 32;

// Of the gate. Times are in plain steps.
constexpr double kAllowance = 0.015;  // share of the time that trials may lose
constexpr double kFirstBalance = 2;   // so that a short text has its trial too
constexpr double kMaxBalance = 16;    // old gains pay for no long loss, old losses are forgiven
constexpr double kMaxDebt = 4;        // lengths known to pay may bring the balance down to minus this
constexpr double kMargin = 1.03;      // gain below which a plain step is preferred
constexpr double kHopedCost = 0.1;    // per further token, of a length not tried lately
constexpr uint64_t kRetryEarly = 16, kRetryLate = 512;  // steps after which what was measured once, often is tried again
constexpr uint64_t kPlainEvery = 32;  // a plain step among so many, to know what it costs
constexpr double kMemory = 1.0 / 64;  // weight of the latest proposed token in what is known of its kind
constexpr double kBlend = 0.125;      // weight of the latest step in a mean time
constexpr double kOutlier = 2;        // times the mean: more is something else's doing (another process, a pause)

size_t table_entries(size_t max_tokens) { return std::bit_ceil(std::clamp<size_t>(16 * max_tokens, 64, kMaxEntries)); }

// Mean over all at first, then over the recent ones.
void blend(double& mean, double value, uint64_t n) {
  const double weight = std::max(kBlend, 1.0 / static_cast<double>(n));
  mean += weight * (n > 3 ? std::min(value, kOutlier * mean) - mean : value - mean);
}

}  // namespace

// ---- PromptLookup ------------------------------------------------------------------------------

PromptLookup::PromptLookup(size_t max_tokens) : ends_(table_entries(max_tokens)) { tokens_.reserve(max_tokens); }

// Of the last n tokens.
size_t PromptLookup::bucket(size_t n) const {
  uint64_t hash = n * 0xD6E8FEB86659FD93;
  for (size_t i = tokens_.size() - n; i < tokens_.size(); ++i)
    hash = (hash ^ static_cast<uint32_t>(tokens_[i])) * 0x9E3779B97F4A7C15;
  return (hash ^ hash >> 32) & (ends_.size() - 1);
}

// The n tokens before `end` are the last n.
bool PromptLookup::ends_alike(size_t end, size_t n) const {
  return end >= n && std::equal(tokens_.end() - static_cast<ptrdiff_t>(n), tokens_.end(), tokens_.begin() + static_cast<ptrdiff_t>(end - n));
}

void PromptLookup::find(size_t at_least) {
  for (size_t n = std::min(kLongestGram, tokens_.size()); n >= at_least; --n) {
    const size_t end = ends_[bucket(n)];
    if (!ends_alike(end, n)) continue;
    next_ = end;
    for (match_ = n; match_ < kMeasuredMatch && ends_alike(end, match_ + 1);) ++match_;
    return;
  }
}

void PromptLookup::push(Token token) {
  const bool goes_on = match_ > 0 && tokens_[next_] == token;
  tokens_.push_back(token);
  match_ = goes_on ? match_ + 1 : 0;
  if (goes_on) ++next_;
  if (match_ < kLongestGram) find(std::max(match_ + 1, kMinMatch));
  for (size_t n = kMinMatch; n <= std::min(kLongestGram, tokens_.size()); ++n)
    ends_[bucket(n)] = static_cast<uint32_t>(tokens_.size());
}

void PromptLookup::propose(size_t n, std::vector<Token>& draft) const {
  draft.clear();
  if (match_ == 0) return;
  for (size_t i = next_; draft.size() < n; ++i)
    draft.push_back(i < tokens_.size() ? tokens_[i] : draft[i - tokens_.size()]);
}

// ---- SpeculationGate ---------------------------------------------------------------------------

SpeculationGate::SpeculationGate(size_t max_draft) : balance_(kFirstBalance) {
  for (size_t n = 1; n < max_draft && n_lengths_ + 1 < lengths_.size(); n *= 2) lengths_[n_lengths_++].n_draft = n;
  if (max_draft > 0) lengths_[n_lengths_++].n_draft = max_draft;
}

// 2, 3, 4..7, 8..15, more.
size_t SpeculationGate::class_of(size_t match_length) {
  if (match_length < 4) return match_length < 3 ? 0 : 1;
  return std::min<size_t>(static_cast<size_t>(std::bit_width(match_length)) - 1, kClasses - 1);
}

// With every right token the match is one longer, and the next one likelier.
double SpeculationGate::expected_tokens(size_t match_length, size_t n_draft) const {
  double tokens = 1, probability = 1;
  for (size_t i = 0; i < n_draft; ++i) {
    const size_t c = class_of(match_length + i);
    probability *= (right_[c] + 1) / (seen_[c] + 2);
    tokens += probability;
  }
  return tokens;
}

bool SpeculationGate::out_of_date(const Length& length) const {
  return n_steps_ - length.last_step >= std::min(kRetryEarly * length.steps, kRetryLate);
}

// Unknown costs are hoped to be little more than those of the next smaller length; only the smallest
// unknown one may be tried, because a trial of many tokens is a dear one where batches are dear.
size_t SpeculationGate::choose(size_t match_length, size_t limit) const {
  return n_plain_ < 3 || n_steps_ - last_plain_ >= kPlainEvery ? 0 : best(match_length, limit);
}

size_t SpeculationGate::best(size_t match_length, size_t limit) const {
  if (match_length == 0) return 0;
  size_t chosen = 0, n_smaller = 0;
  double best_gain = kMargin, cost_smaller = 1;
  bool may_try = balance_ > 0;
  for (const Length& length : lengths()) {
    if (length.n_draft > limit) break;
    const bool known = length.recent >= 2 && !out_of_date(length);
    const double hoped = cost_smaller + kHopedCost * static_cast<double>(length.n_draft - n_smaller);
    cost_smaller = known ? length.cost : hoped;
    n_smaller = length.n_draft;
    if (!(known ? balance_ > -kMaxDebt : may_try)) continue;
    may_try = may_try && known;
    const double gain = expected_tokens(match_length, length.n_draft) / cost_smaller;
    if (gain <= best_gain) continue;
    chosen = length.n_draft;
    best_gain = gain;
  }
  return chosen;
}

void SpeculationGate::learn(const Step& step) {
  if (step.match_length == 0) return;
  const size_t n_seen = std::min(step.n_right + 1, std::max<size_t>(step.n_draft, 1));
  for (size_t i = 0; i < n_seen; ++i) {
    const size_t c = class_of(step.match_length + i);
    right_[c] += (i < step.n_right ? 1 : 0) - kMemory * right_[c];
    seen_[c] += 1 - kMemory * seen_[c];
  }
}

void SpeculationGate::record(const Step& step) {
  learn(step);
  ++n_steps_;
  if (step.n_draft == 0) {
    blend(plain_seconds_, step.seconds, ++n_plain_);
    last_plain_ = n_steps_;
    balance_ = std::min(balance_ + kAllowance, kMaxBalance);
    return;
  }
  if (plain_seconds_ <= 0) return;
  const double cost = step.seconds / plain_seconds_, tokens = static_cast<double>(1 + step.n_right);
  double charged = cost;
  for (Length& length : lengths_) {
    if (length.n_draft != step.n_draft) continue;
    length.recent = out_of_date(length) ? 1 : length.recent + 1;
    if (length.recent > 2) charged = std::min(cost, kOutlier * length.cost);
    blend(length.cost, cost, length.recent);
    length.last_step = n_steps_;
    ++length.steps;
  }
  balance_ = std::clamp(balance_ + tokens * (1 + kAllowance) - charged, -kMaxBalance, kMaxBalance);
}

// ---- Speculator --------------------------------------------------------------------------------

Speculator::Speculator(const Engine& engine, const Session& session, const SpeculationOptions& options)
    : max_draft_(std::min<size_t>(options.max_draft, engine.info().exact_batch - 1)),
      gated_(options.gated),
      lookup_(max_draft_ > 0 ? session.n_ctx() : 0),
      gate_(max_draft_) {
  if (options.max_draft > kMaxDraft)
    fail(ErrorKind::usage, "cannot propose ", options.max_draft, " tokens at once; at most ", kMaxDraft);
  batch_.reserve(kMaxDraft + 1);
  guess_.reserve(kMaxDraft);
}

// Rows of logits in order, as long as what `take` chooses had been proposed.
void Speculator::verify(Session& session, const Take& take) {
  struct Cut {
    Session& session;
    size_t n_before;
    const size_t& n_taken;
    ~Cut() { session.truncate(n_before + n_taken); }
  } const cut{session, session.tokens().size(), n_taken_};
  bool goes_on = true;
  const auto row = [&](std::span<const float> logits) {
    const auto start = std::chrono::steady_clock::now();
    const size_t i = n_taken_++;
    const std::optional<Token> token = take(logits);
    const bool right = token && i < guess_.size() && guess_[i] == *token;
    n_right_ += right ? 1 : 0;
    goes_on = right;
    take_seconds_ += seconds_since(start);
  };
  if (batch_.size() == 1) {
    session.append(batch_);
    return row(session.logits());
  }
  session.append_all_logits(batch_, [&](size_t, size_t n_rows, std::span<const float> logits) {
    const size_t n_vocab = logits.size() / n_rows;
    for (size_t i = 0; goes_on && i < n_rows; ++i) row(logits.subspan(i * n_vocab, n_vocab));
  });
}

// As many as the context and the caller have room for: the last token needs a place too, and each
// batch gives one token more than was proposed.
size_t Speculator::draft_length(const Session& session, size_t limit) const {
  const size_t room = std::min(session.n_ctx() - session.tokens().size(), std::max<size_t>(limit, 1)) - 1;
  const size_t n = std::min(room, max_draft_);
  if (lookup_.match_length() == 0 || n == 0) return 0;
  return gated_ ? gate_.choose(lookup_.match_length(), n) : n;
}

size_t Speculator::step(Session& session, Token last, size_t limit, const Take& take) {
  if (session.tokens().size() >= session.n_ctx())
    fail(ErrorKind::usage, "the context of ", session.n_ctx(), " positions is full");
  n_taken_ = n_right_ = 0;
  take_seconds_ = 0;
  if (max_draft_ > 0) {
    for (size_t i = lookup_.size(); i < session.tokens().size(); ++i) lookup_.push(session.tokens()[i]);
    if (lookup_.size() == session.tokens().size()) lookup_.push(last);  // else an exception ended the step that began with it
  }
  const size_t match = lookup_.match_length(), n_draft = draft_length(session, limit);
  lookup_.propose(std::max<size_t>(n_draft, 1), guess_);
  batch_.assign(1, last);
  batch_.insert(batch_.end(), guess_.begin(), guess_.begin() + static_cast<ptrdiff_t>(n_draft));
  const auto start = std::chrono::steady_clock::now();
  verify(session, take);
  gate_.record({match, n_draft, n_right_, seconds_since(start) - take_seconds_});
  ++stats_.steps;
  stats_.tokens += n_taken_;
  stats_.drafted += n_draft;
  stats_.accepted += n_taken_ - 1;
  return n_taken_;
}

}  // namespace duet
