// Input: a grammar, a zero byte, a text. What is not a grammar is Error(format); a text is followed the same way
// with and without what had been remembered, and no way of reading it takes more than the limits allow.
#include <algorithm>
#include <cstdint>
#include <string_view>

#include "base/error.h"
#include "grammar/matcher.h"

namespace {

using namespace duet;
using namespace duet::grammar;

void follow(const Grammar& grammar, std::string_view text) {
  const MatcherLimits limits{.max_work = 1 << 18, .max_places = 1 << 12};
  Matcher one(grammar, limits), other(grammar, limits);
  Matcher::State a = one.start(), b = other.start();
  for (size_t i = 0; i < text.size() && a != Matcher::kDead; ++i) {
    DUET_ASSERT(one.may_end(a) || one.may_go_on(a));
    const auto byte = static_cast<uint8_t>(text[i]);
    a = one.next(a, byte);
    b = other.next(b, byte);
    if (i % 7 == 3) b = other.forget(b);
    DUET_ASSERT((a == Matcher::kDead) == (b == Matcher::kDead));
    DUET_ASSERT(one.may_end(a) == other.may_end(b) && one.may_go_on(a) == other.may_go_on(b));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t end = std::min(input.find('\0'), input.size());
  try {
    const Grammar grammar = Grammar::parse(input.substr(0, end), {.max_bytes = 1 << 16, .max_states = 1 << 14});
    follow(grammar, input.substr(std::min(end + 1, input.size())));
  } catch (const Error& e) {
    DUET_ASSERT(e.kind() == ErrorKind::format || e.kind() == ErrorKind::unsupported);
  }
  return 0;
}
