// Input: a byte that chooses a reader, then what it reads: configuration, listing of a hub, saved conversation, journal
// of a download. What is accepted keeps its promises, all else is an Error.
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

#include "base/error.h"
#include "cli/config_file.h"
#include "cli/conversation.h"
#include "hub/hub.h"
#include "hub/part_file.h"

namespace {

using namespace duet;
namespace fs = std::filesystem;

fs::path write(const std::string& name, const std::string& text) {
  const fs::path path = fs::temp_directory_path() / concat("duet_fuzz_", ::getpid(), name);
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

void read_config(const std::string& text) {
  for (const cli::ConfigEntry& entry : cli::parse_config(text, "fuzz")) DUET_ASSERT(!entry.key.empty() && entry.line > 0);
}

void read_listing(const std::string& text) {
  const auto files = hub::parse_listing(text, "fuzz");
  for (const hub::HubFile& file : files) DUET_ASSERT(fs::path(file.path).is_relative() && file.path.find("..") != 0 && file.path.find("/.") == std::string::npos);
  const auto choices = hub::choices_of(files);
  for (const hub::Choice& choice : choices) DUET_ASSERT(!choice.parts.empty() && choice.n_missing < 100000);
  (void)hub::choose(choices, "", "fuzz/fuzz");
}

void read_conversation(const std::string& text) {
  for (const ChatMessage& message : cli::load_conversation(write(".json", text)).messages) DUET_ASSERT(message.role == "user" || message.role == "assistant");
}

void read_journal(const std::string& text) {
  const fs::path journal = write(".part.json", text), destination = journal.string().substr(0, journal.string().size() - 10);
  const auto partial = hub::partial_download(destination);
  DUET_ASSERT(!partial || partial->done <= partial->size);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string text(reinterpret_cast<const char*>(data) + 1, size - 1);
  constexpr void (*kReaders[])(const std::string&) = {read_config, read_listing, read_conversation, read_journal};
  try {
    kReaders[data[0] % 4](text);
  } catch (const Error& e) {
    if (e.kind() == ErrorKind::internal) throw;
  }
  return 0;
}
