#include "cli/conversation.h"

#include <algorithm>

#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"

namespace duet::cli {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFormat = "duet-conversation";
constexpr uint64_t kMaxFileBytes = uint64_t{64} << 20;

Json read_document(const fs::path& path) {
  Json json = parse_json(read_file(path, kMaxFileBytes), path.string());
  if (!json.is_object() || json_get_or<std::string>(json, "format", "", path.string()) != kFormat)
    fail(ErrorKind::format, path.string(), ": is not a conversation that duet has saved");
  const uint64_t version = json_get<uint64_t>(json, "version", path.string());
  if (version != 1) fail(ErrorKind::format, path.string(), ": version ", version, " of the format is not known, 1 is");
  return json;
}

bool is_conversation(const fs::path& path) {
  try {
    read_document(path);
    return true;
  } catch (const Error&) {
    return false;
  }
}

std::vector<ChatMessage> read_messages(const Json& json, const std::string& source) {
  const auto found = json.find("messages");
  if (found == json.end()) fail(ErrorKind::format, source, ": key 'messages' is missing");
  if (*found == Json::array()) return {};  // saved before anything was said
  try {
    return parse_messages(*found);
  } catch (const Error& e) {
    fail(ErrorKind::format, source, ": ", e.what());
  }
}

bool starts_with(const std::vector<Token>& ids, const std::vector<Token>& beginning) {
  return ids.size() >= beginning.size() && std::equal(beginning.begin(), beginning.end(), ids.begin());
}

std::vector<Token> joined(const std::vector<Token>& first, const Token* begin, const Token* end) {
  std::vector<Token> out = first;
  out.insert(out.end(), begin, end);
  return out;
}

}  // namespace

std::vector<ChatMessage> Conversation::all() const {
  std::vector<ChatMessage> out;
  if (!system.empty()) out.push_back({.role = "system", .content = system});
  out.insert(out.end(), messages.begin(), messages.end());
  return out;
}

void save_conversation(const Conversation& conversation, const std::string& model, const fs::path& path) {
  std::error_code ec;
  if (fs::exists(path, ec) && !is_conversation(path))
    fail(ErrorKind::usage, path.string(), ": is there and is not a conversation; choose another name");
  Json messages = Json::array();
  for (const ChatMessage& message : conversation.all())
    messages.push_back({{"role", message.role}, {"content", message.content}});
  const Json json{{"format", kFormat}, {"version", 1}, {"model", model}, {"messages", std::move(messages)}};
  const std::string text = json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
  OutputFile file(path, text.size());
  file.write(text);
  file.commit();
}

Conversation load_conversation(const fs::path& path) {
  const Json json = read_document(path);
  Conversation out;
  std::vector<ChatMessage> messages = read_messages(json, path.string());
  for (size_t i = 0; i < messages.size(); ++i) {
    ChatMessage& message = messages[i];
    const bool system = message.role == "system" && i == 0;
    if ((!system && message.role != "user" && message.role != "assistant") || !message.tool_calls.empty() || message.prefix)
      fail(ErrorKind::format, path.string(), ": message ", i, " is neither a user's nor an assistant's text (a system message comes first)");
    if (system)
      out.system = std::move(message.content);
    else
      out.messages.push_back(std::move(message));
  }
  return out;
}

std::vector<Token> ConversationIds::encode(const std::vector<ChatMessage>& messages) const {
  return tokenizer_.encode(chat_.render(messages, Json()), chat_.wants_bos(tokenizer_));
}

std::vector<Token> ConversationIds::prompt(const std::vector<ChatMessage>& messages) const {
  std::vector<Token> ids = encode(messages);
  for (auto known = known_.rbegin(); known != known_.rend(); ++known)
    if (starts_with(ids, known->as_text))
      return joined(known->as_made, ids.data() + known->as_text.size(), ids.data() + ids.size());
  return ids;
}

void ConversationIds::answered(std::vector<ChatMessage> messages, const std::vector<Token>& prompt, const std::vector<Token>& made) {
  messages.back().prefix = true;
  Known known{encode(messages), joined(prompt, made.data(), made.data() + made.size())};
  while (!known_.empty() && !starts_with(known.as_text, known_.back().as_text)) known_.pop_back();
  known_.push_back(std::move(known));
}

}  // namespace duet::cli
