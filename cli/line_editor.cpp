#include "cli/line_editor.h"

#include <histedit.h>
#include <langinfo.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <clocale>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <cwchar>
#include <optional>
#include <string_view>

#include "base/error.h"
#include "cli/console.h"

namespace duet::cli {
namespace {

namespace fs = std::filesystem;

constexpr int kHistoryLines = 1000;
constexpr std::string_view kPasteBegin = "\033[200~", kPasteEnd = "\033[201~";

std::atomic<bool> resized{false}, continued{false};  // written by signal handlers only

// libedit turns characters into bytes by the locale; every terminal of today shows UTF-8.
void use_utf8() {
  std::setlocale(LC_CTYPE, "");
  if (std::strcmp(::nl_langinfo(CODESET), "UTF-8") != 0) std::setlocale(LC_CTYPE, "C.UTF-8");
}

std::string to_utf8(const std::wstring_view text) {
  std::string out;
  for (const wchar_t wide : text) {
    const auto c = static_cast<uint32_t>(wide);
    const auto byte = [&out](uint32_t value) { out += static_cast<char>(static_cast<unsigned char>(value)); };
    const auto tail = [&](int shift) { byte(0x80 | (c >> shift & 0x3f)); };
    if (c < 0x80) {
      byte(c);
    } else if (c < 0x800) {
      byte(0xc0 | c >> 6), tail(0);
    } else if (c < 0x10000) {
      byte(0xe0 | c >> 12), tail(6), tail(0);
    } else {
      byte(0xf0 | c >> 18), tail(12), tail(6), tail(0);
    }
  }
  return out;
}

// Nothing until a whole character is there; a byte that begins none stands for itself.
std::optional<wchar_t> decode(std::string& bytes) {
  const auto first = static_cast<unsigned char>(bytes[0]);
  const size_t length = first < 0xc2 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : first < 0xf5 ? 4 : 1;
  if (bytes.size() < length) return std::nullopt;
  uint32_t value = length == 1 ? first : first & (0x7fu >> length);
  for (size_t i = 1; i < length; ++i) {
    const auto next = static_cast<unsigned char>(bytes[i]);
    if ((next & 0xc0) != 0x80) value = 0xfffd;
    else if (value != 0xfffd) value = value << 6 | (next & 0x3f);
  }
  bytes.erase(0, length);
  if (length == 1 && first >= 0x80) value = 0xfffd;
  return static_cast<wchar_t>(value);
}

// Signals of the terminal wait until ppoll lets them in, so that none is missed between a look at the flags and the wait.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t set;
    sigemptyset(&set);
    for (const int signal : {SIGINT, SIGTERM, SIGWINCH, SIGCONT}) sigaddset(&set, signal);
    ::pthread_sigmask(SIG_BLOCK, &set, &old_);
  }
  ~BlockedSignals() { ::pthread_sigmask(SIG_SETMASK, &old_, nullptr); }
  BlockedSignals(const BlockedSignals&) = delete;
  BlockedSignals& operator=(const BlockedSignals&) = delete;
  const sigset_t& old() const { return old_; }

 private:
  sigset_t old_{};
};

// Watches for another size of the window, and for coming back from the background, while a line is edited.
class TerminalSignals {
 public:
  TerminalSignals() {
    struct sigaction action {};
    sigemptyset(&action.sa_mask);
    action.sa_handler = [](int) { resized.store(true); };
    ::sigaction(SIGWINCH, &action, &old_winch_);
    action.sa_handler = [](int) { continued.store(true); };
    ::sigaction(SIGCONT, &action, &old_cont_);
  }
  ~TerminalSignals() {
    ::sigaction(SIGWINCH, &old_winch_, nullptr);
    ::sigaction(SIGCONT, &old_cont_, nullptr);
  }
  TerminalSignals(const TerminalSignals&) = delete;
  TerminalSignals& operator=(const TerminalSignals&) = delete;

 private:
  struct sigaction old_winch_ {}, old_cont_ {};
};

int terminal_columns() {
  struct winsize size {};
  return ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

void write_terminal(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

}  // namespace

struct LineEditor::State {
  fs::path history_file;
  EditLine* editor = nullptr;
  HistoryW* history = nullptr;
  std::string bytes;  // typed, not yet taken
  bool in_paste = false;
  std::wstring prompt;

  ~State() {
    if (editor != nullptr) el_end(editor);
    if (history != nullptr) history_wend(history);
  }

  static State& of(EditLine* editor) {
    void* self = nullptr;
    el_wget(editor, EL_CLIENTDATA, &self);
    return *static_cast<State*>(self);
  }
  static wchar_t* prompt_of(EditLine* editor) { return of(editor).prompt.data(); }
  static int next_char(EditLine* editor, wchar_t* out) { return of(editor).next(out); }

  int next(wchar_t* out);
  bool take_marker();
  int wait(int timeout_ms);
  void settle();
  int columns_before_cursor() const;
};

int LineEditor::State::columns_before_cursor() const {
  const LineInfoW* line = el_wline(editor);
  int columns = 0;
  for (const wchar_t c : prompt + std::wstring(line->buffer, line->cursor)) columns += std::max(0, ::wcwidth(c));
  return columns;
}

// The terminal has another size, or had been taken away.
void LineEditor::State::settle() {
  if (resized.exchange(false)) {
    // libedit begins anew where the cursor is: bring it to where the prompt stands after the terminal has wrapped the
    // line by the new width, and clear what was drawn.
    const int rows = columns_before_cursor() / terminal_columns();
    if (rows > 0) write_terminal(concat("\033[", rows, "A"));
    // Not \033[J alone: erased from the top left on, a screen goes into tmux's history, and a copy of the line with it.
    write_terminal("\r\033[K\0337\033[B\033[J\0338");
    el_resize(editor);
    el_wset(editor, EL_REFRESH);
  }
  if (continued.exchange(false)) {
    el_wset(editor, EL_PREP_TERM, 0);
    el_wset(editor, EL_PREP_TERM, 1);
    write_terminal("\033[?2004h");
    el_wset(editor, EL_REFRESH);
  }
}

// Appends what is typed to `bytes`; 0 when the time is over or the input at its end, -1 when interrupted.
int LineEditor::State::wait(int timeout_ms) {
  const BlockedSignals blocked;
  const timespec time{timeout_ms / 1000, long{timeout_ms % 1000} * 1000000};
  for (;;) {
    if (interrupted()) return -1;
    settle();
    struct pollfd input {STDIN_FILENO, POLLIN, 0};
    const int ready = ::ppoll(&input, 1, timeout_ms < 0 ? nullptr : &time, &blocked.old());
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) return 0;
    std::array<char, 4096> buffer;
    const ssize_t n = ::read(STDIN_FILENO, buffer.data(), buffer.size());
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (n <= 0) return 0;
    bytes.append(buffer.data(), static_cast<size_t>(n));
    return 1;
  }
}

// Removes a mark of a paste's begin or end. An escape sequence arrives in one piece, or nearly.
bool LineEditor::State::take_marker() {
  while (bytes.size() < kPasteBegin.size() &&
         (kPasteBegin.starts_with(bytes) || kPasteEnd.starts_with(bytes)) && bytes[0] == '\033')
    if (wait(20) <= 0) break;
  for (const bool begin : {true, false}) {
    const std::string_view marker = begin ? kPasteBegin : kPasteEnd;
    if (!bytes.starts_with(marker)) continue;
    bytes.erase(0, marker.size());
    in_paste = begin;
    return true;
  }
  return false;
}

int LineEditor::State::next(wchar_t* out) {
  for (;;) {
    if (bytes.empty()) {
      const int got = wait(-1);
      if (got <= 0) return got;
      continue;
    }
    if (bytes[0] == '\033' && take_marker()) continue;
    if (const std::optional<wchar_t> c = decode(bytes)) {
      // A terminal sends a carriage return for each line end in a paste; a tab would be a key there.
      *out = *c == L'\r' ? L'\n' : *c == L'\t' && in_paste ? L' ' : *c;
      return 1;
    }
    if (wait(100) <= 0) bytes.clear();  // half a character
  }
}

LineEditor::LineEditor(fs::path history_file) : state_(std::make_unique<State>()) {
  use_utf8();
  state_->history_file = std::move(history_file);
  state_->editor = el_init("duet", stdin, stdout, stderr);
  state_->history = history_winit();
  if (state_->editor == nullptr || state_->history == nullptr)
    fail(ErrorKind::internal, "the terminal cannot be used for editing; pipe messages in instead");
  EditLine* editor = state_->editor;
  el_wset(editor, EL_CLIENTDATA, state_.get());
  el_wset(editor, EL_PROMPT, &State::prompt_of);
  el_wset(editor, EL_EDITOR, L"emacs");
  el_wset(editor, EL_SIGNAL, 0);
  el_wset(editor, EL_GETCFN, &State::next_char);
  el_wset(editor, EL_HIST, history_w, state_->history);
  constexpr std::array<std::array<const wchar_t*, 2>, 8> kKeys{{{L"^W", L"ed-delete-prev-word"},
                                                                {L"^R", L"em-inc-search-prev"},
                                                                {L"\\e[1;5C", L"em-next-word"},
                                                                {L"\\e[1;5D", L"ed-prev-word"},
                                                                {L"\\e[3~", L"ed-delete-next-char"},
                                                                {L"\\e[H", L"ed-move-to-beg"},
                                                                {L"\\e[F", L"ed-move-to-end"},
                                                                {L"^L", L"ed-clear-screen"}}};
  for (const auto& key : kKeys) el_wset(editor, EL_BIND, key[0], key[1], nullptr);
  HistEventW event{};
  history_w(state_->history, &event, H_SETSIZE, kHistoryLines);
  history_w(state_->history, &event, H_SETUNIQUE, 1);
  history_w(state_->history, &event, H_LOAD, state_->history_file.c_str());
}

LineEditor::~LineEditor() = default;

LineEditor::Line LineEditor::read(const std::string& prompt) {
  State& s = *state_;
  s.prompt.assign(prompt.begin(), prompt.end());
  const TerminalSignals signals;
  el_wset(s.editor, EL_PREP_TERM, 1);  // before the prompt: what is typed after it is for the editor
  write_terminal("\033[?2004h");
  int n = 0;
  const wchar_t* text = el_wgets(s.editor, &n);
  write_terminal("\033[?2004l");
  if (interrupted()) {
    s.in_paste = false;
    s.bytes.clear();
    return {Line::Kind::interrupted, "", false};
  }
  if (text == nullptr || n <= 0) return {Line::Kind::end, "", false};
  std::wstring_view line(text, static_cast<size_t>(n));
  if (line.ends_with(L'\n')) line.remove_suffix(1);
  return {Line::Kind::text, to_utf8(line), s.in_paste};
}

void LineEditor::remember(const std::string& line) {
  State& s = *state_;
  std::wstring wide;
  for (std::string bytes = line; !bytes.empty();) {
    const std::optional<wchar_t> c = decode(bytes);
    if (!c) break;
    wide += *c;
  }
  HistEventW event{};
  history_w(s.history, &event, H_ENTER, wide.c_str());
  std::error_code ec;
  fs::create_directories(s.history_file.parent_path(), ec);
  const fs::path temp = s.history_file.string() + concat(".tmp", ::getpid());
  if (history_w(s.history, &event, H_SAVE, temp.c_str()) < 0 || (fs::rename(temp, s.history_file, ec), ec)) fs::remove(temp, ec);
}

}  // namespace duet::cli
