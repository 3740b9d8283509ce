#include "server/tool_calls.h"

#include <algorithm>

#include "base/error.h"
#include "base/json.h"
#include "server/text.h"

namespace duet::server {
namespace {

// Calls as models write them that were told to: an object or an array of them, perhaps fenced or tagged. What is read
// is any JSON: a grammar to write by would have shorter numbers and less white space.
constexpr const char* kCalls = R"(
root ::= space ("[TOOL_CALLS]" space)? (calls | fenced | tagged) space
fenced ::= "```" "json"? space calls space "```"
tagged ::= ("<tool_call>" space object space "</tool_call>" space)+
calls ::= object | "[" space object (space "," space object)* space "]"
value ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" space (member (space "," space member)* space)? "}"
member ::= string space ":" space value
array ::= "[" space (value (space "," space value)* space)? "]"
string ::= "\"" ([^"\\\x00-\x1f] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))* "\""
number ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [-+]? [0-9]+)?
space ::= [ \t\r\n]*
)";

const grammar::Grammar& call_grammar() {
  static const grammar::Grammar made = grammar::Grammar::parse(kCalls);
  return made;
}

std::optional<Json> parsed(std::string_view text) {
  try {
    return parse_json(text, "arguments");
  } catch (const Error&) {
    return std::nullopt;
  }
}

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

}  // namespace

// ---- CallReader --------------------------------------------------------------------------------

std::vector<CallPiece> CallReader::push(std::string_view text) {
  std::vector<CallPiece> out;
  for (const char c : text) read(c, out);
  if (told_) give(out);
  return out;
}

void CallReader::read(char c, std::vector<CallPiece>& out) {
  switch (at_) {
    case At::outside:
      if (c == '{') begin_call();
      return;
    case At::key:
      return read_key(c);
    case At::colon:
      if (c == ':') at_ = At::value;
      return;
    case At::value:
      return read_value(c, out);
  }
}

void CallReader::begin_call() {
  at_ = At::key;
  told_ = false;
  for (std::string* text : {&key_, &value_, &pending_}) text->clear();
}

void CallReader::read_key(char c) {
  if (!in_string_) {
    if (c == '}') at_ = At::outside;  // without a name: no call
    if (c != '"') return;
    in_string_ = true;
    key_.clear();
    return;
  }
  if (escaped_) escaped_ = false;
  else if (c == '\\') escaped_ = true;
  else if (c == '"') {
    in_string_ = false;
    at_ = At::colon;
    return;
  }
  key_ += c;
}

// Up to the comma or brace behind it.
void CallReader::read_value(char c, std::vector<CallPiece>& out) {
  if (!in_string_ && depth_ == 0 && (c == ',' || c == '}')) {
    end_value(out);
    if (c == ',') {
      at_ = At::key;
      return;
    }
    if (told_) {
      give(out);
      ++n_calls_;
      told_ = false;
    }
    at_ = At::outside;
    return;
  }
  const bool arguments = key_ == "arguments" || key_ == "parameters";
  if (in_string_) {
    if (escaped_) escaped_ = false;
    else if (c == '\\') escaped_ = true;
    else if (c == '"') in_string_ = false;
  } else {
    if (depth_ == 0 && is_space(c)) return;
    if (c == '"') in_string_ = true;
    if (c == '{' || c == '[') ++depth_;
    if (c == '}' || c == ']') --depth_;
  }
  (arguments ? pending_ : value_) += c;
}

void CallReader::end_value(std::vector<CallPiece>& out) {
  if (key_ == "name" && !told_) {
    const std::optional<Json> name = parsed(value_);
    if (name && name->is_string() && *name != Json("")) {  // a first piece is known by its name
      told_ = true;
      out.push_back({.index = n_calls_, .id = new_call_id(), .name = name->get<std::string>()});
    }
  }
  value_.clear();
}

void CallReader::give(std::vector<CallPiece>& out) {
  if (!pending_.empty()) out.push_back({.index = n_calls_, .arguments = std::move(pending_)});
  pending_.clear();
}

// ---- AnswerParts -------------------------------------------------------------------------------

AnswerParts::AnswerParts(CallForm form, std::set<std::string> names, bool single) : form_(form), names_(std::move(names)), single_(single) {
  if (form != CallForm::guess) return;
  matcher_.emplace(call_grammar());
  state_ = matcher_->start();
}

AnswerParts::Piece AnswerParts::push(std::string_view text, bool last) {
  switch (form_) {
    case CallForm::none: return {.content = std::string(text)};
    case CallForm::calls: return {.calls = counted(reader_.push(text))};
    case CallForm::marked: return push_marked(text);
    case CallForm::guess: return push_guess(text, last);
  }
  return {};
}

AnswerParts::Piece AnswerParts::push_marked(std::string_view text) {
  const size_t at = text.find(kControlMark);
  if (at == std::string_view::npos) return {.content = std::string(text)};
  form_ = CallForm::calls;
  return {.content = std::string(text.substr(0, at)), .calls = counted(reader_.push(text.substr(at + kControlMark.size())))};
}

AnswerParts::Piece AnswerParts::push_guess(std::string_view text, bool last) {
  held_ += text;
  matcher_->allow_work();
  for (const char c : text) state_ = matcher_->next(state_, static_cast<uint8_t>(c));
  if (state_ == grammar::Matcher::kDead) {
    form_ = CallForm::none;
    return {.content = std::move(held_)};
  }
  if (!last) return {};
  form_ = CallForm::none;
  if (matcher_->may_end(state_))
    if (auto calls = known_calls()) return {.calls = counted(std::move(*calls))};
  return {.content = std::move(held_)};
}

// Nothing unless all are calls of tools that there are, with an object of arguments.
std::optional<std::vector<CallPiece>> AnswerParts::known_calls() const {
  std::vector<CallPiece> out;
  for (CallPiece& piece : CallReader().push(held_)) {
    if (!piece.name.empty()) out.push_back(std::move(piece));
    else if (!out.empty()) out.back().arguments += piece.arguments;
  }
  for (CallPiece& call : out) {
    if (call.arguments.empty()) call.arguments = "{}";
    std::optional<Json> arguments = parsed(call.arguments);
    if (arguments && arguments->is_string()) {  // some write them as OpenAI's clients do
      call.arguments = arguments->get<std::string>();
      arguments = parsed(call.arguments);
    }
    if (!names_.contains(call.name) || !arguments || !arguments->is_object()) return std::nullopt;
  }
  return out.empty() ? std::nullopt : std::optional(std::move(out));
}

std::vector<CallPiece> AnswerParts::counted(std::vector<CallPiece> pieces) {
  if (single_) std::erase_if(pieces, [](const CallPiece& piece) { return piece.index > 0; });
  has_calls_ = has_calls_ || !pieces.empty();
  return pieces;
}

WholeAnswer whole_answer(AnswerParts parts, std::string_view text) {
  AnswerParts::Piece piece = parts.push(text, true);
  WholeAnswer out{std::move(piece.content), {}};
  add_pieces(out.calls, piece.calls);
  return out;
}

void add_pieces(std::vector<ToolCall>& calls, const std::vector<CallPiece>& pieces) {
  for (const CallPiece& piece : pieces) {
    if (!piece.name.empty()) calls.push_back({.id = piece.id, .name = piece.name, .arguments = piece.arguments});
    else calls.back().arguments += piece.arguments;
  }
}

std::string new_call_id() { return random_text("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", 9); }

}  // namespace duet::server
