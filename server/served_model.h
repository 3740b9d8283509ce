// What the protocols know of the model behind the server.
#pragma once

#include <string>
#include <vector>

#include "grammar/token_trie.h"
#include "runtime/chat_template.h"
#include "runtime/engine.h"

namespace duet::server {

struct ServedModel {
  const Engine& engine;
  const Tokenizer& tokenizer;
  std::optional<ChatTemplate> chat;
  std::string id;                    // as listed
  std::vector<std::string> aliases;  // other names it answers to; "*": any
  uint32_t n_ctx = 0;
  int64_t created = 0;               // seconds since 1970
  std::string file_name, version;
  grammar::TokenTrie vocabulary;     // of the tokenizer

  // Error 404 naming the model that is served, unless this is a name of it; "" is.
  void check_name(const std::string& name) const;
};

}  // namespace duet::server
