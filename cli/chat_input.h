// What a user types in `duet chat`: messages of several lines, and commands.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/generator.h"

namespace duet::cli {

// One message. Only one that was typed as a single line can be a command.
struct ChatInput {
  std::string text;
  bool is_line = true;
};

// Puts a message together from lines. A line that begins with """ opens a block that the next """ at the end of a
// line closes; a line that ends with a backslash goes on in the next; pasted lines go on as they stand.
class MessageAssembler {
 public:
  // `goes_on`: the line came in a paste that has not ended. Gives the message when it is complete.
  std::optional<ChatInput> add(std::string_view line, bool goes_on = false);
  // What has been collected when no more lines come; nothing when that is nothing.
  std::optional<ChatInput> finish();
  bool is_open() const { return in_block_ || !lines_.empty(); }
  void clear() { *this = {}; }

 private:
  ChatInput take();

  std::vector<std::string> lines_;
  bool in_block_ = false, is_line_ = true;
};

struct ChatCommand {
  std::string name;      // "help", without the slash, in lower case
  std::string argument;  // the rest of the line, trimmed
};

// "/name rest"; the name is letters only, or "?". Nothing for a message, "/usr/bin is what?" for example.
std::optional<ChatCommand> parse_command(const ChatInput& input);

// What /set can change, and its values now, one a line.
std::string list_settings(const GenerateOptions& options);
// "top-k 20"; "parameter top_k 20" and other names that users of ollama know do too. Error(usage) with the names or
// the value; then nothing has changed.
void apply_setting(GenerateOptions& options, std::string_view text);

std::string_view trimmed(std::string_view text);

}  // namespace duet::cli
