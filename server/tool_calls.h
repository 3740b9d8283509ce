// Tool calls in the text that a model writes: [{"name": ..., "arguments": {...}}, ...].
#pragma once

#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "grammar/matcher.h"
#include "runtime/chat_template.h"
#include "server/generation.h"

namespace duet::server {

// What is new of a call. Its first piece has an id and a name.
struct CallPiece {
  size_t index = 0;  // of the call
  std::string id = {}, name = {};
  std::string arguments = {};  // more JSON text
};

// Reads calls as they are written, JSON objects in an array or one after the other; what stands between them is
// passed over.
class CallReader {
 public:
  std::vector<CallPiece> push(std::string_view text);

 private:
  void read(char c, std::vector<CallPiece>& out);
  void begin_call();
  void read_key(char c);
  void read_value(char c, std::vector<CallPiece>& out);
  void end_value(std::vector<CallPiece>& out);
  void give(std::vector<CallPiece>& out);

  enum class At { outside, key, colon, value } at_ = At::outside;
  size_t n_calls_ = 0;
  int depth_ = 0;                            // of the value at hand
  bool in_string_ = false, escaped_ = false;
  bool told_ = false;                        // the call's name
  std::string key_, value_, pending_;        // pending_: arguments not yet given
};

// How an answer may hold tool calls.
enum class CallForm {
  none,
  calls,   // it is calls, from the start
  marked,  // behind kControlMark
  guess,   // if all of it looks like calls of known tools
};
inline constexpr std::string_view kCallMarker = "[TOOL_CALLS]";  // the control token that opens calls

// Parts an answer, as it comes, into what is said and what is called.
class AnswerParts {
 public:
  // names: of the tools there are. single: only the first call counts.
  AnswerParts(CallForm form, std::set<std::string> names, bool single);

  struct Piece {
    std::string content = {};
    std::vector<CallPiece> calls = {};
  };
  Piece push(std::string_view text, bool last);
  bool has_calls() const { return has_calls_; }

 private:
  Piece push_marked(std::string_view text);
  Piece push_guess(std::string_view text, bool last);
  std::vector<CallPiece> counted(std::vector<CallPiece> pieces);
  std::optional<std::vector<CallPiece>> known_calls() const;

  CallForm form_;
  std::set<std::string> names_;
  bool single_, has_calls_ = false;
  CallReader reader_;
  std::string held_;
  std::optional<grammar::Matcher> matcher_;  // of guess: while the text may still be calls
  grammar::Matcher::State state_ = grammar::Matcher::kDead;
};

// Calls and text of a whole answer.
struct WholeAnswer {
  std::string content;
  std::vector<ToolCall> calls;
};
WholeAnswer whole_answer(AnswerParts parts, std::string_view text);
void add_pieces(std::vector<ToolCall>& calls, const std::vector<CallPiece>& pieces);

// What identifies a call: nine letters and digits, which is what Mistral's templates take.
std::string new_call_id();

}  // namespace duet::server
