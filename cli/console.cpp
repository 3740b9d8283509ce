#include "cli/console.h"

#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "base/json.h"
#include "base/units.h"

namespace duet::cli {
namespace {

std::atomic<bool> interrupt_flag{false};    // set by the signal handlers only
std::atomic<bool> termination_flag{false};  // the same; it was no SIGINT
static_assert(std::atomic<bool>::is_always_lock_free);

[[noreturn]] void fail_stdout() {
  if (errno == EPIPE) throw Quit{kExitBrokenPipe};
  fail(ErrorKind::io, "cannot write to standard output: ", std::strerror(errno));
}

bool has_value(const char* variable) {
  const char* value = std::getenv(variable);
  return value != nullptr && *value != '\0';
}

// Bytes of the control character at i: C0, DEL, or C1 in UTF-8 (U+009B begins sequences, too); 0: there is none.
size_t control_size(std::string_view text, size_t i) {
  const auto byte = [&](size_t at) { return at < text.size() ? static_cast<unsigned char>(text[at]) : 0xff; };
  if (byte(i) < 0x20 || byte(i) == 0x7f) return 1;
  return byte(i) == 0xc2 && byte(i + 1) >= 0x80 && byte(i + 1) < 0xa0 ? 2 : 0;
}

std::string replace_controls(std::string_view text, std::string_view kept, std::string_view by) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const size_t n = kept.find(text[i]) == std::string_view::npos ? control_size(text, i) : 0;
    if (n > 0) out += by;
    else out += text[i];
    i += std::max<size_t>(n, 1);
  }
  return out;
}

// What stands in the terminal's current line.
struct TerminalLine {
  bool is_status = false;  // to be erased
  bool is_text = false;    // of stdout, unfinished: to be left alone
};
TerminalLine& terminal_line() {
  static TerminalLine line;
  return line;
}

void print_remark(const char* prefix, const char* colour, const std::string& text) {
  const bool coloured = stderr_has_colour();
  TerminalLine& line = terminal_line();
  const char* before = !stderr_is_terminal() ? "" : line.is_status ? "\r\033[K" : line.is_text ? "\n" : "";
  line = {};
  std::fprintf(stderr, "%s%s%s%s %s\n", before, coloured ? colour : "", prefix,
               coloured ? "\033[0m" : "", one_line(text).c_str());
}

// A longer line would wrap, and \r would not reach its start.
int terminal_columns() {
  struct winsize size {};
  return ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

std::string rate_text(ProgressBar::Unit unit, double per_second) {
  if (unit == ProgressBar::Unit::bytes)
    return format_size(static_cast<uint64_t>(per_second)) + "/s";
  std::array<char, 48> text{};
  std::snprintf(text.data(), text.size(), "%.1f %s/s", per_second,
                unit == ProgressBar::Unit::tokens ? "tok" : "chunks");
  return text.data();
}

}  // namespace

void print(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) fail_stdout();
  if (!text.empty()) terminal_line().is_text = text.back() != '\n' && ::isatty(STDOUT_FILENO) != 0;
}

std::string fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.*f", digits, value);
  return text;
}

void flush_stdout() {
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) fail_stdout();
}

std::string to_line(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

void print_json(const Json& json) { print(to_line(json) + "\n"); }

void print_generated(const std::string& text) {
  print(::isatty(STDOUT_FILENO) != 0 ? without_controls(text) : text);
  flush_stdout();
}

std::string one_line(std::string_view text) { return replace_controls(text, "", " "); }
std::string without_controls(std::string_view text) { return replace_controls(text, "\n\t", ""); }

void note(const std::string& text) { print_remark("note:", "\033[33m", text); }

NoticeFn notices() {
  return [](const std::string& text) { note(text); };
}

void print_error(const std::string& text) { print_remark("error:", "\033[1;31m", text); }

bool stderr_is_terminal() {
  const char* term = std::getenv("TERM");
  return ::isatty(STDERR_FILENO) != 0 && (term == nullptr || std::strcmp(term, "dumb") != 0);
}

bool stderr_has_colour() { return stderr_is_terminal() && !has_value("NO_COLOR"); }

bool stdout_is_file() {
  struct stat info {};
  if (::fstat(STDOUT_FILENO, &info) != 0) return false;
  return S_ISREG(info.st_mode) || (S_ISCHR(info.st_mode) && ::isatty(STDOUT_FILENO) == 0);
}

void install_signal_handlers() {
  struct sigaction action {};
  action.sa_handler = [](int) { interrupt_flag.store(true); };
  action.sa_flags = static_cast<int>(SA_RESETHAND);  // a second signal takes its default: kills
  sigemptyset(&action.sa_mask);
  ::sigaction(SIGINT, &action, nullptr);
  ::sigaction(SIGTERM, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);  // a file-size limit is a failed write, not a death
}

const std::atomic<bool>& interrupted() { return interrupt_flag; }

void survive_interrupts() {
  struct sigaction action {};
  sigemptyset(&action.sa_mask);
  action.sa_handler = [](int) { interrupt_flag.store(true); };
  ::sigaction(SIGINT, &action, nullptr);
  action.sa_handler = [](int) {
    termination_flag.store(true);
    interrupt_flag.store(true);
  };
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  ::sigaction(SIGTERM, &action, nullptr);
  ::sigaction(SIGHUP, &action, nullptr);
}

bool forget_interrupt() {
  interrupt_flag.store(false);
  if (!termination_flag) return true;
  interrupt_flag.store(true);
  return false;
}

StatusLine::StatusLine(std::chrono::milliseconds interval)
    : interval_(interval), enabled_(stderr_is_terminal()), last_draw_(Clock::now()) {}

void StatusLine::draw(std::string_view text) {
  if (!enabled_) return;
  last_draw_ = Clock::now();
  drawn_ = terminal_line().is_status = true;
  std::fprintf(stderr, "\r\033[K%s", one_line(text.substr(0, static_cast<size_t>(terminal_columns() - 1))).c_str());
}

void StatusLine::clear() {
  if (std::exchange(drawn_, false) && std::exchange(terminal_line().is_status, false)) std::fputs("\r\033[K", stderr);
}

ProgressBar::ProgressBar(std::string label, Unit unit)
    : label_(std::move(label)), unit_(unit), start_(StatusLine::Clock::now()) {}

void ProgressBar::update(uint64_t done, uint64_t total, std::string_view detail) {
  if (!found_) {
    found_ = done;
    start_ = StatusLine::Clock::now();
  }
  if (total == 0 || !line_.due()) return;
  const double seconds = std::chrono::duration<double>(StatusLine::Clock::now() - start_).count();
  const double per_second = static_cast<double>(done - std::min(done, *found_)) / std::max(seconds, 1e-9);
  const double fraction = std::min(1.0, static_cast<double>(done) / static_cast<double>(total));
  constexpr int kWidth = 24;
  const int filled = static_cast<int>(fraction * kWidth);
  const std::string bar = std::string(static_cast<size_t>(filled), '#') +
                          std::string(static_cast<size_t>(kWidth - filled), '.');
  const std::string eta =
      done <= *found_ ? "?"
                : format_duration(static_cast<double>(total - std::min(done, total)) / per_second);
  std::array<char, 256> line{};
  std::snprintf(line.data(), line.size(), "%s [%s] %3.0f%%  %s  ETA %s  %.*s", label_.c_str(),
                bar.c_str(), 100 * fraction, rate_text(unit_, per_second).c_str(), eta.c_str(),
                static_cast<int>(std::min<size_t>(detail.size(), 100)), detail.data());
  line_.draw(line.data());
}

}  // namespace duet::cli
