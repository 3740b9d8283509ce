// A program on a terminal of its own: keys in, what it writes out.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace duet::test {

class Terminal {
 public:
  Terminal(std::vector<std::string> command, std::vector<std::pair<std::string, std::string>> environment, int columns = 80);
  ~Terminal();  // kills what still runs
  Terminal(const Terminal&) = delete;
  Terminal& operator=(const Terminal&) = delete;

  void type(const std::string& keys);
  void resize(int columns);
  void signal(int number);
  // Reads until `text` has come after what earlier calls waited for; false when it does not come in time.
  bool wait_for(const std::string& text, double timeout_s = 60);
  // Reads for so long, whatever comes.
  void read_for(double seconds);
  // The exit code once the program has ended (128 + N for signal N); -1 when it does not end in time.
  int wait_exit(double timeout_s = 60);
  const std::string& output() const { return output_; }  // all of it, escape sequences included
  size_t seen() const { return seen_; }                  // where the last wait_for ended

 private:
  bool read_some(int timeout_ms);
  int fd_ = -1, pid_ = -1;
  std::string output_;
  size_t seen_ = 0;
};

}  // namespace duet::test
