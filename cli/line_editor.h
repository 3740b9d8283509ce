// Lines from a terminal with editing and history (libedit).
#pragma once

#include <filesystem>
#include <memory>
#include <string>

namespace duet::cli {

class LineEditor {
 public:
  // The history is read from `history_file` and kept there, readable by its owner alone. Error(internal) when the
  // terminal cannot be used.
  explicit LineEditor(std::filesystem::path history_file);
  ~LineEditor();
  LineEditor(const LineEditor&) = delete;
  LineEditor& operator=(const LineEditor&) = delete;

  struct Line {
    enum class Kind { text, interrupted, end } kind = Kind::text;  // end: Ctrl-D, or the terminal has gone
    std::string text;      // UTF-8, without the newline
    bool goes_on = false;  // it came in a paste that has not ended
  };
  // Interrupted by SIGINT or SIGTERM, whose flag (cli/console.h) stays set.
  Line read(const std::string& prompt);
  // Appends a line to the history and saves it; a history that cannot be saved is lost without a word.
  void remember(const std::string& line);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace duet::cli
