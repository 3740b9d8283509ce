#include "runtime/chat_template.h"

#include <algorithm>
#include <cctype>

#include "base/error.h"
#include "base/json.h"
#include "runtime/chat_mistral.h"
#include "runtime/unicode.h"

namespace duet {
namespace {

constexpr std::string_view kVicunaSystem =
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, "
    "and polite answers to the user's questions.";

constexpr size_t kMistralV1Vocabulary = 32000, kMistralV3Vocabulary = 32768;

// The formats made of turns. llama2 and Mistral's own are written by code.
struct FormatRow {
  std::string_view name;
  std::string_view system_prefix, system_suffix, user_prefix, user_suffix, assistant_prefix,
      assistant_suffix, generation;
  std::string_view default_system;
  bool trim, alternate;
  std::string_view lead = "";
};

// What Llama 3.1 is told first, with the date that its template falls back on: prompts stay alike
// from day to day.
constexpr std::string_view kLlama31Cutoff = "Cutting Knowledge Date: December 2023";
constexpr std::string_view kLlama31Lead =
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";

constexpr FormatRow kTurnFormats[] = {
    // Dolphin, Nous-Hermes-2, OpenHermes, Qwen, SmolLM2
    {"chatml", "<|im_start|>system\n", "<|im_end|>\n", "<|im_start|>user\n", "<|im_end|>\n",
     "<|im_start|>assistant\n", "<|im_end|>\n", "<|im_start|>assistant\n", "", false, false},
    // WizardLM-2 and Vicuna 1.1, on one line
    {"vicuna", "", " ", "USER: ", " ", "ASSISTANT: ", "</s>", "ASSISTANT:", kVicunaSystem, true,
     true},
    // the same, a line for each turn
    {"vicuna-lines", "", "\n\n", "USER: ", "\n", "ASSISTANT: ", "</s>\n", "ASSISTANT:", "", true,
     true},
    // Synthia and other Orca descendants
    {"vicuna-orca", "SYSTEM: ", "\n", "USER: ", "\n", "ASSISTANT: ", "</s>\n", "ASSISTANT:", "",
     true, true},
    {"zephyr", "<|system|>\n", "</s>\n", "<|user|>\n", "</s>\n", "<|assistant|>\n", "</s>\n",
     "<|assistant|>\n", "", false, false},
    {"alpaca", "", "\n\n", "### Instruction:\n", "\n\n", "### Response:\n", "</s>\n\n",
     "### Response:\n", "", true, true},
    {"openchat", "GPT4 Correct System: ", "<|end_of_turn|>",
     "GPT4 Correct User: ", "<|end_of_turn|>", "GPT4 Correct Assistant: ", "<|end_of_turn|>",
     "GPT4 Correct Assistant:", "", false, false},
    {"llama3", "<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>",
     "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>",
     "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>",
     "<|start_header_id|>assistant<|end_header_id|>\n\n", "", true, false},
    // Llama 3.1 to 3.3
    {"llama3.1", "<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>",
     "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>",
     "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>",
     "<|start_header_id|>assistant<|end_header_id|>\n\n", "", true, false, kLlama31Lead},
};

std::string list_of_names() {
  std::string out;
  for (const std::string& name : ChatTemplate::names()) out += (out.empty() ? "" : ", ") + name;
  return out;
}

// str.strip() of Python.
std::string_view strip(std::string_view text) {
  const auto is_space = [](std::string_view c) {
    const Utf8Char decoded = decode_utf8(c);
    return char_class(decoded.cp) == CharClass::space || (decoded.cp >= 0x1C && decoded.cp <= 0x1F);
  };
  while (!text.empty() && is_space(text)) text.remove_prefix(decode_utf8(text).n_bytes);
  while (!text.empty()) {
    size_t last = text.size() - 1;
    while (last > 0 && (static_cast<unsigned char>(text[last]) & 0xC0u) == 0x80u) --last;
    if (!is_space(text.substr(last))) break;
    text.remove_suffix(text.size() - last);
  }
  return text;
}

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

bool contains_ignoring_case(std::string text, std::string_view lower_part) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return contains(text, lower_part);
}

// ---- recognising a template by what it writes ----

std::string without_spaces(std::string_view text) {
  std::string out;
  std::copy_if(text.begin(), text.end(), std::back_inserter(out),
               [](unsigned char c) { return !std::isspace(c); });
  std::replace(out.begin(), out.end(), '"', '\'');
  return out;
}

// '<|user|>\n' + message['content'] + eos_token; Tulu, which looks alike, has no end after a
// question.
bool writes_zephyr_turns(std::string_view dense) {
  for (const std::string_view role : {"<|user|>", "+'|>"})
    for (const std::string_view line_break : {"\\n'", "'"})
      for (const std::string_view filter : {"", "|trim"})
        if (contains(dense, concat(role, line_break, "+message['content']", filter, "+eos_token")))
          return true;
  return false;
}

std::string_view recognize_vicuna(std::string_view jinja, std::string_view dense) {
  if (contains(jinja, "SYSTEM: ")) return "vicuna-orca";
  for (const std::string_view filter : {"", "|trim"})
    for (const std::string_view line_break :
         {"'\\n'", "''"})  // the line break itself went with the spaces
      if (contains(dense, concat("'USER:'+message['content']", filter, "+", line_break)))
        return "vicuna-lines";
  return "vicuna";
}

// "" when no built-in format writes the same.
std::string_view recognize(std::string_view jinja) {
  const auto has = [&](std::string_view part) { return contains(jinja, part); };
  const std::string dense = without_spaces(jinja);
  if (has("<|im_start|>")) return has("<|im_sep|>") || has("<end_of_utterance>") ? "" : "chatml";
  if (has("[INST]")) {
    if (has("[SYSTEM_PROMPT]") || has("[MODEL_SETTINGS]")) return "";  // Mistral v7 and later
    if (has("<<SYS>>")) return "llama2";
    return has(" [/INST]") ? "mistral-v1" : "mistral-v3";
  }
  if (has("<|start_header_id|>") && has("<|end_header_id|>"))
    return has(kLlama31Cutoff) ? "llama3.1" : "llama3";
  if (has("GPT4 Correct ")) return "openchat";
  if (has("<|assistant|>") && writes_zephyr_turns(dense)) return "zephyr";
  if (has("USER: ") && has("ASSISTANT:")) return recognize_vicuna(jinja, dense);
  if (has("### Instruction:") && has("### Response:") && !has("<|EOT|>")) return "alpaca";
  return "";
}

bool trims_contents(std::string_view dense) {
  for (const std::string_view part :
       {"content']|trim", "content|trim", "content'].strip()", "content.strip()"})
    if (contains(dense, part)) return true;
  return false;
}

// The text of a part of a string literal; nullopt when the literal ends inside it.
std::optional<std::string> unescape_literal(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\'' || text[i] == '"' || text[i] == '{' || text[i] == '}') return std::nullopt;
    if (text[i] != '\\' || i + 1 == text.size()) {
      out += text[i];
      continue;
    }
    ++i;
    out += text[i] == 'n' ? '\n' : text[i] == 't' ? '\t' : text[i];
  }
  return out;
}

// The literal system turn of a ChatML template, which stands for a missing system message; "" when
// the template has none or puts it together from parts.
std::string literal_system(std::string_view jinja) {
  constexpr std::string_view kOpen = "<|im_start|>system", kClose = "<|im_end|>";
  for (size_t at = jinja.find(kOpen); at != std::string_view::npos;
       at = jinja.find(kOpen, at + 1)) {
    std::string_view text = jinja.substr(at + kOpen.size());
    if (text.starts_with("\\n"))
      text.remove_prefix(2);
    else if (text.starts_with("\n"))
      text.remove_prefix(1);
    else
      continue;
    const size_t end = text.find(kClose);
    if (end == std::string_view::npos) return {};
    if (const auto literal = unescape_literal(text.substr(0, end))) return *literal;
  }
  return {};
}

}  // namespace

const std::vector<std::string>& ChatTemplate::names() {
  static const std::vector<std::string> kNames = [] {
    std::vector<std::string> names = {"mistral-v1", "mistral-v3", "llama2"};
    for (const FormatRow& row : kTurnFormats) names.emplace_back(row.name);
    return names;
  }();
  return kNames;
}

ChatTemplate ChatTemplate::named(std::string_view name) {
  if (std::find(names().begin(), names().end(), name) == names().end())
    fail(ErrorKind::usage, "unknown chat template '", name, "'; the choices are ", list_of_names());
  ChatTemplate out{std::string(name)};
  for (const FormatRow& row : kTurnFormats) {
    if (row.name != name) continue;
    out.system_ = {std::string(row.system_prefix), std::string(row.system_suffix)};
    out.user_ = {std::string(row.user_prefix), std::string(row.user_suffix)};
    out.assistant_ = {std::string(row.assistant_prefix), std::string(row.assistant_suffix)};
    out.generation_ = row.generation;
    out.default_system_ = row.default_system;
    out.lead_ = row.lead;
    out.trim_ = row.trim;
    out.alternate_ = row.alternate;
  }
  return out;
}

ChatTemplate ChatTemplate::recognized(std::string_view jinja, const std::string& source) {
  const std::string_view name = recognize(jinja);
  if (name.empty())
    fail(ErrorKind::unsupported, source,
         ": the chat template of the file is not one that duet knows; choose one with --template "
         "NAME: ",
         list_of_names());
  ChatTemplate out = named(name);
  if (name == "chatml") out.default_system_ = literal_system(jinja);
  if (name == "vicuna" && !contains(jinja, "A chat between a curious")) out.default_system_.clear();
  out.trim_ = trims_contents(without_spaces(jinja));
  return out;
}

std::optional<ChatTemplate> ChatTemplate::of_model(const GgufFile& file, const NoticeFn& notice) {
  const std::string* jinja = file.get_string("tokenizer.chat_template");
  const auto* tokens = file.get_strings("tokenizer.ggml.tokens");
  const size_t n_vocab = tokens ? tokens->size() : 0;
  const bool v3_vocabulary = n_vocab == kMistralV3Vocabulary && (*tokens)[3] == "[INST]";
  if (jinja && !jinja->empty()) {
    ChatTemplate out = recognized(*jinja, file.source());
    if (out.name_ != "mistral-v1" || !v3_vocabulary) return out;
    // The first template published for 8x22B-Instruct; the model was trained on the v3 form.
    if (notice)
      notice("the file's chat template is Mistral's v1 form, its vocabulary v3: mistral-v3 taken");
    return named("mistral-v3");
  }
  bool instruct = false;
  for (const char* key : {"general.name", "general.basename", "general.finetune"})
    if (const std::string* text = file.get_string(key))
      instruct = instruct || contains_ignoring_case(*text, "instruct");
  const std::string_view name = n_vocab == kMistralV1Vocabulary   ? "mistral-v1"
                                : n_vocab == kMistralV3Vocabulary ? "mistral-v3"
                                                                  : "";
  if (!instruct || name.empty()) return std::nullopt;
  if (notice)
    notice(concat("the file has no chat template: ", name, " taken, for an Instruct model with ",
                  n_vocab, " tokens"));
  return named(name);
}

bool ChatTemplate::wants_bos(const Tokenizer& tokenizer) const {
  const bool own =
      name_ == "mistral-v1" || name_ == "mistral-v3" || name_ == "llama2" || name_ == "llama3" ||
      name_ == "llama3.1";
  return tokenizer.bos().has_value() && (own || tokenizer.add_bos());
}

std::vector<Segment> ChatTemplate::render(const std::vector<ChatMessage>& messages,
                                          const Json& tools, bool add_generation_prompt) const {
  if (name_ == "mistral-v1") return render_mistral_v1(messages, tools);
  if (name_ == "mistral-v3") return render_mistral_v3(messages, tools);
  if (!tools.empty())
    fail(ErrorKind::usage, "the template ", name_, " has no tools; mistral-v3 has");
  for (size_t i = 0; i < messages.size(); ++i) {
    if (messages[i].role == "tool" || !messages[i].tool_calls.empty())
      fail(ErrorKind::usage, "message ", i, ": the template ", name_,
           " has no tool calls or results; mistral-v3 has");
    if (messages[i].prefix && i + 1 < messages.size())
      fail(ErrorKind::usage, "message ", i,
           ": only the last message can be continued (\"prefix\")");
  }
  return name_ == "llama2" ? render_llama2(messages)
                           : render_turns(messages, add_generation_prompt);
}

std::vector<Segment> ChatTemplate::render_turns(const std::vector<ChatMessage>& messages,
                                                bool add_generation_prompt) const {
  std::vector<ChatMessage> turns = alternate_ ? merge_neighbours(messages) : messages;
  const std::string system = system_prompt(messages);
  if (alternate_ && !system.empty())
    turns.insert(turns.begin(), ChatMessage{.role = "system", .content = system});
  const bool has_system = !turns.empty() && turns.front().role == "system";
  if (!has_system && (!default_system_.empty() || !lead_.empty()))
    turns.insert(turns.begin(), ChatMessage{.role = "system", .content = default_system_});
  std::vector<Segment> out;
  for (const ChatMessage& turn : turns) {
    const TurnFormat& format = turn.role == "system" ? system_
                               : turn.role == "user" ? user_
                                                     : assistant_;
    out.push_back({format.prefix + (&turn == turns.data() ? lead_ : ""), true});
    out.push_back({std::string(trim_ ? strip(turn.content) : turn.content), false});
    if (!turn.prefix) out.push_back({format.suffix, true});
  }
  const bool open = !turns.empty() && turns.back().prefix;
  if (add_generation_prompt && !open) out.push_back({generation_, true});
  return out;
}

// "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nq [/INST] a </s><s>[INST] q2 [/INST]"; the first <s> is the
// BOS that Tokenizer::encode adds.
std::vector<Segment> ChatTemplate::render_llama2(const std::vector<ChatMessage>& messages) const {
  const std::string system = system_prompt(messages);
  std::vector<ChatMessage> turns = merge_neighbours(messages);
  if (turns.empty() || turns.front().role != "user")
    turns.insert(turns.begin(), ChatMessage{.role = "user"});
  std::vector<Segment> out;
  for (size_t i = 0; i < turns.size(); ++i) {
    const std::string content(strip(turns[i].content));
    if (turns[i].role == "assistant") {
      out.push_back({" ", true});
      out.push_back({content, false});
      if (!turns[i].prefix) out.push_back({" </s>", true});
      continue;
    }
    out.push_back({i == 0 ? "[INST] " : "<s>[INST] ", true});
    if (i == 0 && !system.empty()) {
      out.push_back({"<<SYS>>\n", true});
      out.push_back({system, false});
      out.push_back({"\n<</SYS>>\n\n", true});
    }
    out.push_back({content, false});
    out.push_back({" [/INST]", true});
  }
  return out;
}

}  // namespace duet
