#include "tests/support/npy.h"

#include <charconv>
#include <cstring>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/mapped_file.h"

namespace duet::test {

NpyArray read_npy(const std::filesystem::path& path) {
  const std::string file = read_file(path, uint64_t{64} << 20);
  const auto expect = [&](bool ok, const char* what) {
    if (!ok) fail(ErrorKind::format, path.string(), ": not a float32 .npy file: ", what);
  };
  expect(file.size() > 10 && file.compare(0, 7, std::string("\x93NUMPY\x01", 7)) == 0, "magic");
  const size_t header_size = static_cast<size_t>(static_cast<unsigned char>(file[8]) + 256 * static_cast<unsigned char>(file[9]));
  expect(file.size() >= 10 + header_size, "header");
  const std::string_view header(file.data() + 10, header_size);
  expect(header.find("'<f4'") != header.npos && header.find("False") != header.npos, "type or order");
  NpyArray out;
  size_t n = 1;
  for (size_t i = header.find('(') + 1; i < header.size() && header[i] != ')';) {
    size_t dim = 0;
    const auto result = std::from_chars(header.data() + i, header.data() + header.size(), dim);
    if (result.ec == std::errc()) {
      out.shape.push_back(dim);
      n *= dim;
      i = static_cast<size_t>(result.ptr - header.data());
    } else {
      ++i;  // ", "
    }
  }
  expect(file.size() == 10 + header_size + n * sizeof(float), "size");
  out.data.resize(n);
  std::memcpy(out.data.data(), file.data() + 10 + header_size, n * sizeof(float));
  return out;
}

}  // namespace duet::test
