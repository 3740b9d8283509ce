// Typed, checked access to the fields of a request. What does not fit is ApiError 400 naming the field.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json_fwd.h"
#include "runtime/engine.h"
#include "server/generation.h"

namespace duet::server {

// A request's JSON object, which must outlive this. Absent and null are the same.
class Fields {
 public:
  // `path` precedes names in messages: "options.".
  explicit Fields(const Json& object, std::string path = {});

  const Json* find(const char* name) const;
  std::string name(const char* field) const { return path_ + field; }
  std::string string(const char* name, const std::string& fallback = {}) const;
  bool boolean(const char* name, bool fallback) const;
  double number(const char* name, double fallback, double least, double most) const;
  int64_t integer(const char* name, int64_t fallback, int64_t least, int64_t most) const;
  // A string or an array of strings, no more than `most`.
  std::vector<std::string> strings(const char* name, size_t most) const;
  // Fields that would change the result and that nothing here implements: 400 when present with another
  // value than null, false, an empty text, array or object. `why` ends the message; "": nothing to add.
  void refuse(const char* name, const char* why) const;

 private:
  const Json& object_;
  std::string path_;
};

// The body of a request: an object. ApiError 400.
Json parse_body(std::string_view body);

// temperature, top_k, top_p, min_p, seed, repeat_penalty, presence_penalty, frequency_penalty, repeat_last_n:
// the names that all protocols share, defaults of SamplerParams; llama-server's list "samplers". Without a seed: a
// random one.
SamplerParams sampling_params(const Fields& fields);
// Samplers and limits of other servers that nothing here implements: 400 naming one that is given a value with which it
// would do something.
void refuse_other_samplers(const Fields& fields);
// Other prompts made of the same messages than the model's template makes: 400.
void refuse_other_templates(const Fields& fields);
// "stop": at most 16 strings, none empty.
std::vector<std::string> stop_strings(const Fields& fields);
// An object {"id": bias} or llama-server's array [[id or text, bias or false], ...].
std::vector<std::pair<Token, float>> logit_bias(const Fields& fields, const Tokenizer& tokenizer);

// Prompts as /v1/completions, /completion and embeddings take them: a text, ids, or a list of at most `most` texts
// and lists of ids. parse_special: names of control tokens in a text are those tokens, since its writer has put the
// whole prompt together. ApiError 400 for ids outside the vocabulary.
struct PromptInput {
  std::string text;         // as echoed; of ids: their text; of messages: what the template makes of them
  std::vector<Token> ids;   // with BOS where the vocabulary wants it, for texts
};
std::vector<PromptInput> prompt_inputs(const Json& prompt, const char* field, const Tokenizer& tokenizer, size_t most, bool parse_special);
// One list of ids.
PromptInput id_input(const Json& ids, const char* field, const Tokenizer& tokenizer);

// ApiError 400 when it leaves no room for an answer in the context, naming all numbers.
void check_length(size_t n_prompt, size_t n_ctx, const char* field);
// ApiError 400 naming what is out of range.
void check_sampling(const SamplerParams& params);

}  // namespace duet::server
