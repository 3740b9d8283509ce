// Whether looking ahead pays, from what it has brought. A guess that came true saved the time that its
// bytes took, because nothing else was being read; one that did not cost that of the bytes that were
// under way. Both at the rate of the disk, which therefore does not matter, and whose noise would
// drown a comparison of times.
#pragma once

#include <cstdint>

namespace duet {

class LookaheadGate {
 public:
  static constexpr uint32_t kWindow = 16, kPause = 256;  // chunks of tokens

  bool open() const { return n_pause_ == 0; }
  // A chunk has been evaluated; bytes read for guesses in it that came true, and for the others.
  void passed(uint64_t used_bytes, uint64_t wasted_bytes) {
    if (n_pause_ > 0) {
      --n_pause_;
      return;
    }
    used_ += used_bytes;
    wasted_ += wasted_bytes;
    if (++n_ < kWindow) return;
    if (wasted_ > used_) n_pause_ = kPause;
    n_ = 0;
    used_ = wasted_ = 0;
  }

 private:
  uint32_t n_ = 0, n_pause_ = 0;
  uint64_t used_ = 0, wasted_ = 0;
};

}  // namespace duet
