// What run and chat have generated, and how they tell of it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/json_fwd.h"
#include "cli/streaming.h"
#include "runtime/engine.h"
#include "runtime/speculation.h"

namespace duet::cli {

// Why generation ended; in --json under "stop".
enum class Stop { eos, length, context, interrupted };

struct Generation {
  std::string text;
  std::vector<Token> ids;  // without the end-of-generation token
  size_t n_prompt = 0;
  size_t n_reused = 0;  // tokens of the prompt that the session had evaluated before
  double prefill_seconds = 0, decode_seconds = 0;
  size_t n_decoded = 0;  // tokens that decode_seconds evaluated
  StreamStats before_decode;
  uint64_t major_faults = 0;  // of the process while they were
  Stop stop = Stop::length;
  uint64_t seed = 0;
};

// What its experts cost while tokens were made; nothing when all weights are in memory.
std::optional<StreamUse> streaming(const Engine& engine, const Generation& g);

Json to_json(const Generation& g, const std::optional<StreamUse>& stream);
Json to_json(const Speculator& speculator);

// All to stderr: before the first token, and at the end.
void print_status(const Engine& engine, const Session& session);
void print_statistics(const Generation& g);
void print_streaming(const StreamUse& stream);
// Nothing where there were few.
void print_faults(const Engine& engine, const Generation& g);
// The one line after an answer of chat.
std::string answer_statistics(const Generation& g, const std::optional<StreamUse>& stream, const Session& session);
void print_speculation(const Speculator& speculator);

}  // namespace duet::cli
