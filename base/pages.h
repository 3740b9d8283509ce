// Anonymous memory in whole pages, from a huge page's border on. Physical pages come when they are
// first written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace duet {

class PageArray {
 public:
  PageArray() = default;
  // huge: in huge pages where the system gives them; else not even there. Error(memory).
  explicit PageArray(uint64_t n_bytes, bool huge = true);
  PageArray(PageArray&& other) noexcept
      : n_bytes_(std::exchange(other.n_bytes_, 0)), data_(std::exchange(other.data_, nullptr)) {}
  PageArray& operator=(PageArray&& other) noexcept {
    std::swap(n_bytes_, other.n_bytes_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~PageArray();

  std::byte* data() const { return static_cast<std::byte*>(data_); }
  uint64_t size() const { return n_bytes_; }
  // These whole pages go back to the system; what is read there later is zero.
  void give_back(std::byte* first, uint64_t n_bytes) const;

 private:
  uint64_t n_bytes_ = 0;
  void* data_ = nullptr;
};

}  // namespace duet
