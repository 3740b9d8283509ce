#include "runtime/sampler.h"
#include "runtime/chat_template.h"
#include "base/error.h"
#include <algorithm>
namespace duet {
Sampler::Sampler(const SamplerParams& p) : params_(p), rng_(p.seed) {}
Token Sampler::sample(std::span<const float> l) { return Token(std::max_element(l.begin(), l.end())-l.begin()); }
void Sampler::accept(Token t) { history_.push_back(t); }
std::vector<ChatMessage> parse_messages(const Json&) { return {}; }
const std::vector<std::string>& ChatTemplate::names() { static const std::vector<std::string> n{"chatml"}; return n; }
ChatTemplate ChatTemplate::named(std::string_view n) { return ChatTemplate(std::string(n)); }
std::optional<ChatTemplate> ChatTemplate::of_model(const GgufFile&, const NoticeFn&) { return std::nullopt; }
std::vector<Segment> ChatTemplate::render(const std::vector<ChatMessage>&, const Json&, bool) const { return {}; }
}
