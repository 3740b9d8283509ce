#include "server/tools.h"

#include "grammar/json_schema.h"
#include "grammar/json_text.h"
#include "runtime/chat_tools.h"
#include "server/api_error.h"
#include "server/structured.h"
#include "server/text.h"

namespace duet::server {
namespace {

constexpr size_t kMaxTools = 128, kMaxToolsBytes = size_t{256} << 10, kMaxCalls = 16, kMaxName = 256;

const Json& function_of(const Json& tool) { return tool.at("function"); }
std::string name_of(const Json& tool) { return function_of(tool).at("name").get<std::string>(); }

void check_tool(const Json& tool, size_t index) {
  const std::string where = concat("tools[", index, "]");
  const Fields f(tool, where + ".");
  if (const std::string type = f.string("type", "function"); type != "function") bad_request(where, "'", where, ".type' is ", quote(type), "; only functions can be called");
  const Json* function = f.find("function");
  if (function == nullptr) bad_request(where, "'", where, ".function' is missing");
  const Fields of(*function, where + ".function.");
  const std::string name = of.string("name");
  if (name.empty() || name.size() > kMaxName) bad_request(where, "'", where, ".function.name' must be a text of 1 to ", kMaxName, " bytes");
  static_cast<void>(of.string("description"));
  static_cast<void>(of.boolean("strict", false));
  if (const Json* parameters = of.find("parameters"); parameters != nullptr && !parameters->is_object()) bad_request(where, "'", where, ".function.parameters' must be a JSON schema");
}

Tools checked_list(const Fields& f) {
  Tools out;
  const Json* list = f.find("tools");
  if (list == nullptr) return out;
  if (!list->is_array() || list->size() > kMaxTools) bad_request("tools", "'tools' must be an array of at most ", kMaxTools, " tools");
  if (dump(*list).size() > kMaxToolsBytes) bad_request("tools", "'tools' is larger than ", kMaxToolsBytes, " bytes");
  for (size_t i = 0; i < list->size(); ++i) {
    check_tool((*list)[i], i);
    if (!out.names.insert(name_of((*list)[i])).second) bad_request("tools", "'tools' has two functions of the name ", quote(name_of((*list)[i])));
  }
  out.list = *list;
  if (!out.list.empty()) out.choice = Tools::Choice::automatic;
  return out;
}

void choose_one(Tools& tools, const Json& choice) {
  const Fields f(choice, "tool_choice.");
  const Json* function = f.find("function");
  if (f.string("type") != "function" || function == nullptr) bad_request("tool_choice", "'tool_choice' must be none, auto, required, or {\"type\": \"function\", \"function\": {\"name\": ...}}");
  const std::string name = Fields(*function, "tool_choice.function.").string("name");
  if (!tools.names.contains(name)) bad_request("tool_choice", "'tool_choice' names ", quote(name), ", which is not among the tools");
  Json list = Json::array();
  for (const Json& tool : tools.list)
    if (name_of(tool) == name) list.push_back(tool);
  tools.list = std::move(list);
  tools.names = {name};
  tools.choice = Tools::Choice::required;
}

// Arguments have names, whether their schema says so or not.
Json of_objects(Json parameters) {
  if (!parameters.contains("type")) parameters["type"] = "object";
  return parameters;
}

bool can_be_kept_to(const Json& schema) {
  try {
    grammar::Grammar::parse(grammar::schema_grammar(schema, "parameters"));
    return true;
  } catch (const Error&) {
    return false;
  }
}

// each_alone: a schema that cannot be kept to is any object, unless it is strict.
std::string arguments_rule(const Json& tool, bool each_alone, grammar::GrammarWriter& writer) {
  const Json& function = function_of(tool);
  const auto parameters = function.find("parameters");
  if (parameters == function.end() || parameters->empty()) return writer.any_object();
  const bool strict = function.contains("strict") && function["strict"] == Json(true);
  const Json schema = of_objects(*parameters);
  if (each_alone && !strict && !can_be_kept_to(schema)) return writer.any_object();
  return writer.add_schema(schema, concat("the parameters of the tool ", quote(name_of(tool))));
}

// The rule "calls": an array of calls. Only "ws" stands where models put a space.
void add_calls(const Tools& tools, bool each_alone, grammar::GrammarWriter& writer) {
  std::string call;
  for (const Json& tool : tools.list) {
    const std::string name = grammar::gbnf_literal(dump(Json(name_of(tool))));
    call += concat(call.empty() ? "" : " | ", R"("{" ws "\"name\"" ws ":" ws )", name, R"( ws "," ws "\"arguments\"" ws ":" ws )", arguments_rule(tool, each_alone, writer), R"( ws "}")");
  }
  writer.add_rule("call", call);
  const std::string more = tools.parallel ? concat("(\",\" ws call ws){0,", kMaxCalls - 1, "}") : "";
  writer.add_rule("calls", concat("\" \"? \"[\" ws call ws ", more, " \"]\""));
}

grammar::Grammar calls_grammar(const Tools& tools, bool each_alone) {
  grammar::GrammarWriter writer;
  add_calls(tools, each_alone, writer);
  writer.add_rule("root", "calls");
  return grammar::Grammar::parse(writer.text());
}

grammar::Grammar calls_grammar(const Tools& tools) {
  try {
    return calls_grammar(tools, false);
  } catch (const Error&) {
    // One of them, most likely: made again with each tried alone.
  }
  try {
    return calls_grammar(tools, true);
  } catch (const Error& e) {
    bad_request("tools", e.what());
  }
}

std::optional<Token> call_token(const ServedModel& model) {
  const std::optional<Token> token = model.tokenizer.find(kCallMarker);
  return model.chat->has_tools() && token && model.tokenizer.is_control(*token) ? token : std::nullopt;
}

}  // namespace

Tools parse_tools(const Fields& f) {
  f.refuse("functions", "it has become 'tools'");
  f.refuse("function_call", "it has become 'tool_choice'");
  Tools out = checked_list(f);
  out.parallel = f.boolean("parallel_tool_calls", true);
  const Json* choice = f.find("tool_choice");
  if (choice == nullptr || *choice == Json("auto")) return out;
  if (*choice == Json("none")) {
    out.choice = Tools::Choice::none;
    return out;
  }
  if (out.list.empty()) bad_request("tool_choice", "'tool_choice' needs 'tools'");
  if (*choice == Json("required")) out.choice = Tools::Choice::required;
  else if (choice->is_object()) choose_one(out, *choice);
  else bad_request("tool_choice", "'tool_choice' must be none, auto, required, or {\"type\": \"function\", \"function\": {\"name\": ...}}");
  return out;
}

Tools parse_ollama_tools(const Fields& f) { return checked_list(f); }

CallForm prepare_chat(const Json* messages, const Tools& tools, const std::string& gbnf, const ServedModel& model, TextRequest& r) {
  const bool may_call = tools.choice != Tools::Choice::none, must_call = tools.choice == Tools::Choice::required;
  r.prompts = {chat_prompt(messages, may_call ? tools.list : Json(), model, must_call)};
  r.params.is_answer = true;
  r.constraint = text_constraint(must_call ? "" : gbnf, model);
  if (!may_call) return CallForm::none;
  grammar::Constraint constraint = r.constraint ? *r.constraint : grammar::Constraint{.vocabulary = &model.vocabulary};
  const std::optional<Token> token = call_token(model);
  if (must_call) {
    if (token) r.prompts[0].ids.push_back(*token);
    constraint.grammar = calls_grammar(tools);
  } else if (token) {
    constraint.trigger = token;
    constraint.triggered = calls_grammar(tools);
    r.params.shown_control = token;
  } else {
    if (!constraint.grammar) return CallForm::guess;
    constraint.grammar = grammar::Grammar::either(*constraint.grammar, calls_grammar(tools));
  }
  r.constraint = std::make_unique<grammar::Constraint>(std::move(constraint));
  return must_call ? CallForm::calls : token ? CallForm::marked : CallForm::guess;
}

}  // namespace duet::server
