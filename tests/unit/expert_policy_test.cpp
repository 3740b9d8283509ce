#include "runtime/expert_policy.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <list>
#include <numeric>
#include <random>

#include "base/error.h"

using namespace duet;

namespace {

using Ids = std::vector<int32_t>;

// One layer, two experts a token.
struct Cache {
  explicit Cache(uint32_t slots, size_t n_expert = 8) : policy(n_expert, {slots}) {}

  const ExpertPolicy::Step& use(const Ids& chosen) {
    policy.use(0, chosen, 2, step);
    return step;
  }
  Ids held() const {
    Ids experts;
    for (int32_t e = 0; e < 8; ++e)
      if (policy.slot_of(0, e) != ExpertPolicy::kStaging) experts.push_back(e);
    return experts;
  }
  Ids loaded() const {
    Ids experts;
    for (const auto& load : step.loads) experts.push_back(load.expert);
    return experts;
  }
  size_t staged() const {
    return static_cast<size_t>(std::count_if(step.loads.begin(), step.loads.end(), [](const auto& load) {
      return load.slot == ExpertPolicy::kStaging;
    }));
  }

  ExpertPolicy policy;
  ExpertPolicy::Step step;
};

Ids random_tokens(std::mt19937& random, size_t n_tokens, int32_t n_expert) {
  Ids all(static_cast<size_t>(n_expert)), chosen;
  std::iota(all.begin(), all.end(), 0);
  for (size_t t = 0; t < n_tokens; ++t) {
    std::shuffle(all.begin(), all.end(), random);
    chosen.push_back(all[0]);
    chosen.push_back(all[1]);
  }
  return chosen;
}

// Least recently used, written as a list, for one token at a time.
struct PlainLru {
  size_t capacity;
  std::list<int32_t> recent;  // latest first

  size_t use(int32_t first, int32_t second) {
    size_t hits = 0;
    for (const int32_t e : {first, second}) hits += static_cast<size_t>(std::count(recent.begin(), recent.end(), e));
    for (const int32_t e : {second, first}) {
      recent.remove(e);
      recent.push_front(e);
    }
    while (recent.size() > capacity) recent.pop_back();
    return hits;
  }
};

}  // namespace

TEST_CASE("expert policy: misses fill free slots, then take those least recently used") {
  Cache cache(3);
  const auto& step = cache.use({5, 1});
  CHECK(step.hits.empty());
  CHECK(cache.loaded() == Ids{1, 5});
  CHECK(cache.staged() == 0);
  CHECK(cache.policy.slot_of(0, 5) == 0);  // the better rank chooses first
  CHECK(cache.policy.slot_of(0, 1) == 1);

  cache.use({1, 2});
  CHECK(step.hits == Ids{1});
  CHECK(cache.loaded() == Ids{2});
  CHECK(cache.held() == Ids{1, 2, 5});

  cache.use({1, 7});  // 5 is the oldest
  CHECK(cache.held() == Ids{1, 2, 7});
  CHECK(cache.policy.slot_of(0, 7) == 0);
  cache.use({3, 4});  // 2, then 7: the worse rank is older than 1
  CHECK(cache.held() == Ids{1, 3, 4});
  CHECK(cache.policy.hits() == 2);
  CHECK(cache.policy.misses() == 6);
}

TEST_CASE("expert policy: within a token the better rank stays longer") {
  Cache cache(2);
  cache.use({3, 6});
  cache.use({3, 0});
  CHECK(cache.held() == Ids{0, 3});
  Cache other(3);
  other.use({6, 3});
  other.use({1, 2});  // takes the free slot and that of 3
  CHECK(other.held() == Ids{1, 2, 6});
}

TEST_CASE("expert policy: one token at a time equals a plain list, at any number of slots") {
  std::mt19937 random(7);
  for (uint32_t slots = 2; slots <= 8; ++slots) {
    Cache cache(slots);
    PlainLru plain{slots, {}};
    for (int i = 0; i < 2000; ++i) {
      const Ids token = random_tokens(random, 1, 8);
      CHECK(cache.use(token).hits.size() == plain.use(token[0], token[1]));
      CHECK(cache.staged() == 0);
    }
    Ids expected(plain.recent.begin(), plain.recent.end());
    std::sort(expected.begin(), expected.end());
    CHECK(cache.held() == expected);
    CHECK(cache.policy.hits() + cache.policy.misses() == 4000);
  }
}

TEST_CASE("expert policy: uniform use hits as often as there are slots") {
  std::mt19937 random(3);
  Cache cache(4);
  for (int i = 0; i < 20000; ++i) cache.use(random_tokens(random, 1, 8));
  const double rate = static_cast<double>(cache.policy.hits()) / 40000;
  CHECK(rate > 0.48);
  CHECK(rate < 0.52);
}

TEST_CASE("expert policy: a long prompt fills free slots and leaves the rest as it was") {
  std::mt19937 random(11);
  Cache cache(4);
  cache.use({2, 4});
  const Ids prompt = random_tokens(random, 500, 8);
  cache.use(prompt);
  CHECK(cache.step.hits == Ids{2, 4});
  CHECK(cache.loaded() == Ids{0, 1, 3, 5, 6, 7});
  CHECK(cache.staged() == 4);
  const Ids held = cache.held();
  CHECK(held.size() == 4);
  cache.use(random_tokens(random, 500, 8));
  CHECK(cache.held() == held);
  CHECK(cache.staged() == 4);
}

TEST_CASE("expert policy: the most recent misses of a chunk get the slots") {
  Cache cache(3);
  cache.use({0, 1, 2, 3, 4, 5});
  CHECK(cache.held() == Ids{2, 4, 5});
  CHECK(cache.staged() == 3);
}

TEST_CASE("expert policy: a chunk displaces only what it does not use; recency is the last token's") {
  Cache cache(4);
  cache.use({0, 1, 2, 3});  // 3 < 2 in rank, both later than 0 and 1
  cache.use({1, 0, 5, 6, 0, 1});
  CHECK(cache.step.hits == Ids{0, 1});
  CHECK(cache.held() == Ids{0, 1, 5, 6});
  cache.use({7, 4});  // 6, then 5: 0 and 1 were chosen once more by the last token
  CHECK(cache.held() == Ids{0, 1, 4, 7});
}

TEST_CASE("expert policy: one slot holds the best expert of the last token that missed it") {
  Cache one(1);
  one.use({6, 2});
  CHECK(one.held() == Ids{6});
  CHECK(one.staged() == 1);
  one.use({1, 0});
  CHECK(one.held() == Ids{1});
  CHECK(one.staged() == 1);
  one.use({3, 1});
  CHECK(one.step.hits == Ids{1});
  CHECK(one.held() == Ids{1});
  CHECK(one.staged() == 1);

  Cache none(0);
  none.use({6, 2});
  none.use({6, 2});
  CHECK(none.held().empty());
  CHECK(none.policy.misses() == 4);
}

TEST_CASE("expert policy: layers are independent and may differ in size") {
  ExpertPolicy policy(8, {2, 0, 8});
  ExpertPolicy::Step step;
  const Ids token{1, 2};
  for (size_t layer = 0; layer < 3; ++layer) policy.use(layer, token, 2, step);
  CHECK(policy.slots(2) == 8);
  CHECK(policy.slot_of(0, 1) == 0);
  CHECK(policy.slot_of(1, 1) == ExpertPolicy::kStaging);
  policy.use(2, Ids{3, 4, 5, 6, 7, 0}, 2, step);
  policy.use(2, Ids{3, 4, 5, 6, 7, 0, 1, 2}, 2, step);
  CHECK(step.hits.size() == 8);
}

TEST_CASE("expert policy: a failed load leaves its slot free for the next one") {
  Cache cache(2);
  cache.use({1, 2});
  const int32_t slot = cache.policy.slot_of(0, 2);
  cache.policy.forget(0, 2);
  cache.policy.forget(0, 7);  // has none
  CHECK(cache.held() == Ids{1});
  cache.use({1, 5});
  CHECK(cache.policy.slot_of(0, 5) == slot);
  CHECK(cache.held() == Ids{1, 5});
}

TEST_CASE("expert policy: shrinking frees free slots first, then the least recently used") {
  Cache cache(6);
  cache.use({0, 1});
  cache.use({2, 3});
  cache.use({4, 0});
  REQUIRE(cache.held() == Ids{0, 1, 2, 3, 4});  // slots 0..4 in order of use, 5 free
  Ids freed;
  cache.policy.shrink(0, 4, freed);
  CHECK(freed == Ids{5, 1});
  CHECK(cache.held() == Ids{0, 2, 3, 4});
  CHECK(cache.policy.slots(0) == 4);
  cache.policy.shrink(0, 4, freed);
  cache.policy.shrink(0, 5, freed);  // never grows
  CHECK(freed.size() == 2);
  CHECK(cache.policy.slots(0) == 4);

  cache.use({6, 7});  // not into retired slots
  CHECK(cache.held().size() == 4);
  for (const int32_t e : cache.held()) CHECK(std::count(freed.begin(), freed.end(), cache.policy.slot_of(0, e)) == 0);

  cache.policy.shrink(0, 1, freed);
  CHECK(cache.held() == Ids{6});
  cache.use({1, 2});
  CHECK(cache.held() == Ids{1});
  cache.policy.shrink(0, 0, freed);
  CHECK(cache.held().empty());
  CHECK(freed.size() == 6);
  cache.use({1, 2});
  CHECK(cache.staged() == 2);
}

TEST_CASE("expert policy: `step` keeps its memory") {
  std::mt19937 random(5);
  Cache cache(3);
  cache.step.hits.reserve(8);
  cache.step.loads.reserve(8);
  const auto* hits = cache.step.hits.data();
  const auto* loads = cache.step.loads.data();
  for (int i = 0; i < 50; ++i) cache.use(random_tokens(random, 1 + static_cast<size_t>(i) * 7, 8));
  CHECK(cache.step.hits.data() == hits);
  CHECK(cache.step.loads.data() == loads);
}
