#include "runtime/gpu/module.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdlib>

#include "base/error.h"

namespace duet::gpu {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFileName = "libduet_cuda.so";

// What the loader says, on one line.
std::string loader_error() {
  const char* text = ::dlerror();
  std::string out = text != nullptr ? text : "unknown error";
  for (char& c : out)
    if (c == '\n') c = ' ';
  return out;
}

FoundDevice none(std::string reason) { return {nullptr, std::move(reason), false}; }
FoundDevice broken(std::string reason) { return {nullptr, std::move(reason), true}; }

FoundDevice open_module(const fs::path& path) {
  void* const library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return broken(concat("the module cannot be loaded: ", loader_error()));
  void* const entry = ::dlsym(library, kOpenName);
  if (entry == nullptr) return broken(concat(path.string(), ": has no ", kOpenName, ": not a module of duet"));
  std::array<char, 512> message{};
  Device* const device = reinterpret_cast<OpenFn>(entry)(kModuleVersion, 0, message.data(), message.size());
  message.back() = '\0';
  if (device != nullptr) return {std::unique_ptr<Device>(device), "", false};
  const std::string reason = message.data();
  return reason == kNoDriver || reason == kNoDevice ? none(reason) : broken(reason.empty() ? "unknown error" : reason);
}

}  // namespace

std::vector<fs::path> module_paths() {
  if (const char* path = std::getenv("DUET_GPU_MODULE"); path != nullptr && *path != '\0') return {path};
  std::error_code ec;
  const fs::path program = fs::read_symlink("/proc/self/exe", ec);
  if (ec) return {};
  const fs::path folder = program.parent_path();
  return {folder / kFileName, folder.parent_path() / DUET_LIBRARY_FOLDER / "duet" / kFileName};
}

bool has_module(const std::vector<fs::path>& paths) {
  std::error_code ec;
  return std::any_of(paths.begin(), paths.end(), [&](const fs::path& path) { return fs::exists(path, ec); });
}

FoundDevice find_device(const std::vector<fs::path>& paths) {
  std::error_code ec;
  for (const fs::path& path : paths)
    if (fs::exists(path, ec)) return open_module(path);
  if (paths.size() == 1) return none(concat(paths[0].string(), ": no such module"));
  return none("this installation has no module for cards (built with -DDUET_CUDA=ON)");
}

}  // namespace duet::gpu
