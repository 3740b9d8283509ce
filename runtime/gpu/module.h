// Finding a card: the module that drives it is a shared library of its own, loaded when it is there.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "runtime/gpu/device.h"

namespace duet::gpu {

struct FoundDevice {
  std::unique_ptr<Device> device;  // null: none
  std::string reason;              // then, in one line
  bool is_broken = false;          // then: a module is there, and it is not that there is no card
};

// Where the module is looked for: the path in the variable DUET_GPU_MODULE and nowhere else, or libduet_cuda.so beside the
// program and in the folder of libraries that it was installed with.
std::vector<std::filesystem::path> module_paths();
bool has_module(const std::vector<std::filesystem::path>& paths = module_paths());

// The first device of the first module that is there. A module stays loaded until the program ends.
FoundDevice find_device(const std::vector<std::filesystem::path>& paths = module_paths());

}  // namespace duet::gpu
