// Holds text back as long as a stop string may still come of it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace duet::server {

class StopMatcher {
 public:
  explicit StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)) {}

  // What of the text so far can be shown. Once a stop string is complete: what stood before it, and
  // nothing ever after. Of several, the one that begins first, the longer of those.
  std::string push(std::string_view text);
  std::string finish();  // what was held back, when the text ends here
  const std::string& matched() const { return matched_; }  // "" until one is complete

 private:
  std::vector<std::string> stops_;
  std::string held_, matched_;
};

}  // namespace duet::server
