// Greedy continuation of argv[2] by the model argv[1], through installed headers only.
#include <cstdio>

#include "converters/convert.h"
#include "runtime/engine.h"

int main(int argc, char** argv) {
  if (argc != 3 || duet::recipe_names().empty()) return 2;
  const duet::Engine engine = duet::Engine::open(argv[1], {});
  duet::Session session = engine.new_session({});
  const std::vector<duet::Token> prompt = engine.tokenizer().encode(argv[2]);
  session.sync(prompt);
  duet::Sampler sampler({.temperature = 0});
  std::vector<duet::Token> answer;
  for (int i = 0; i < 8; ++i) {
    answer.push_back(sampler.sample(session.logits()));
    session.append({&answer.back(), 1});
  }
  const std::string text = engine.tokenizer().decode(answer);
  std::printf("%s\n", text.c_str());
  return text.empty() ? 1 : 0;
}
