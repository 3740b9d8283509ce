// A file that one process at a time writes and then gives another name.
#pragma once

#include <filesystem>
#include <functional>

#include "base/file_descriptor.h"

namespace duet {

// Open for reading and writing, made where it is missing, and locked until it is closed. What it gives is what has the
// name now: a file that got another name before the lock was had is left alone. Not open: another process has the lock.
// Error(io). opened: called before each attempt to lock; tests only.
FileDescriptor open_locked(const std::filesystem::path& path, const std::function<void()>& opened = {});

}  // namespace duet
