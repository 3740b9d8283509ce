// Whether guesses made so many layers ahead pay, from what they have brought. A guess that came true saved
// the time that its bytes took, because nothing else was being read; one that did not cost at most that
// of the bytes under way when it was broken off: what had been read before then was read while the disk would have
// idled. Both at the rate of the disk, which therefore does not matter, and whose noise would drown a
// comparison of times.
#pragma once

#include <cstdint>

namespace duet {

class LookaheadGate {
 public:
  static constexpr uint32_t kWindow = 16, kPause = 256;  // chunks of tokens

  bool open() const { return n_pause_ == 0; }
  void gained(uint64_t bytes) { gained_ += bytes; }
  void lost(uint64_t bytes) { lost_ += bytes; }
  // A chunk has been evaluated.
  void passed() {
    if (n_pause_ > 0) --n_pause_;
    else if (++n_ < kWindow) return;
    else if (lost_ > gained_) n_pause_ = kPause;
    n_ = 0;
    gained_ = lost_ = 0;
  }

 private:
  uint32_t n_ = 0, n_pause_ = 0;
  uint64_t gained_ = 0, lost_ = 0;
};

}  // namespace duet
