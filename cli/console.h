// What the commands share towards the terminal: results on stdout, remarks and progress on stderr,
// and the interrupt flag.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <string_view>

#include "base/json_fwd.h"
#include "formats/schema.h"

namespace duet::cli {

// Ends the program with this exit code and no message (it has been said, or there is nobody left to
// read it).
struct Quit {
  int code;
};
inline constexpr int kExitInterrupted = 130;
inline constexpr int kExitBrokenPipe = 141;  // as a shell shows death by SIGPIPE

// Appends to stdout. A reader that went away (`duet tokenize ... | head`) throws Quit(141), so that
// destructors remove temporary files; any other failure, a full disk for instance, Error(io).
void print(std::string_view text);
void flush_stdout();
// As printf writes it, however long.
template <class... Args>
std::string formatted(const char* format, Args... args) {
  std::string text(static_cast<size_t>(std::snprintf(nullptr, 0, format, args...)), '\0');
  std::snprintf(text.data(), text.size() + 1, format, args...);
  return text;
}
std::string fixed(double value, int digits);  // "3.14"
// One JSON document and a newline. Bytes that are not UTF-8 become U+FFFD.
void print_json(const Json& json);
std::string to_line(const Json& json);  // the same without the newline
// Text that a model has written, at once: on a terminal without_controls, elsewhere as it is.
void print_generated(const std::string& text);

// File names and metadata may hold anything, and a terminal acts on control characters: here they are spaces.
std::string one_line(std::string_view text);
// For text of several lines, such as a model writes: newlines and tabs stay, other control characters are left out.
std::string without_controls(std::string_view text);

// "note: text" on stderr, one line whatever the text holds.
void note(const std::string& text);
NoticeFn notices();  // note(), as the library wants it
// "error: text" on stderr, one line.
void print_error(const std::string& text);

bool stderr_is_terminal();
bool stderr_has_colour();  // and NO_COLOR is not set
// Nothing but a file takes what goes to stdout: no terminal, and no pipe, which `| tee` or a pager
// may show on the same terminal.
bool stdout_is_file();

// Turns SIGINT and SIGTERM into a flag (a second signal kills), and SIGPIPE into a failed write.
void install_signal_handlers();
// True once SIGINT or SIGTERM has arrived. Hand its address to the library as `cancel`.
const std::atomic<bool>& interrupted();
// For a program that goes on after Ctrl-C: from now on no number of SIGINTs kills. SIGTERM and SIGHUP set the flag, too.
void survive_interrupts();
// Takes the flag back and says whether it was SIGINT; after SIGTERM or SIGHUP it stays set: it is time to leave.
bool forget_interrupt();

// A line on stderr that is drawn over itself; nothing at all when stderr is not a terminal. The
// destructor removes it. What is printed meanwhile must begin by removing it, as note() does.
class StatusLine {
 public:
  using Clock = std::chrono::steady_clock;
  explicit StatusLine(std::chrono::milliseconds interval);
  StatusLine(const StatusLine&) = delete;
  StatusLine& operator=(const StatusLine&) = delete;
  ~StatusLine() { clear(); }

  bool due() const { return enabled_ && Clock::now() - last_draw_ >= interval_; }
  void draw(std::string_view text);
  void clear();

 private:
  std::chrono::milliseconds interval_;
  bool enabled_, drawn_ = false;
  Clock::time_point last_draw_;
};

// A status line with percentage, rate and remaining time.
class ProgressBar {
 public:
  enum class Unit { bytes, tokens, chunks };
  ProgressBar(std::string label, Unit unit);

  // `detail` (the tensor being converted, say) follows the figures. What was done at the first call counts
  // as found, not as done since.
  void update(uint64_t done, uint64_t total, std::string_view detail = {});

 private:
  std::string label_;
  Unit unit_;
  StatusLine line_{std::chrono::milliseconds(100)};
  StatusLine::Clock::time_point start_;
  std::optional<uint64_t> found_;
};

}  // namespace duet::cli
