// The HTTP server of one model: OpenAI, Ollama and llama-server routes on one port.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/access.h"
#include "server/answer.h"
#include "server/http.h"
#include "server/scheduler.h"

namespace duet::server {

struct ServerOptions {
  AccessOptions access;
  int port = 8080;
  HttpLimits http;
  SchedulerOptions scheduler;
  AnswerOptions answer;
  std::string file_name;             // of the model, for its id
  std::vector<std::string> aliases;  // other names it answers to; "*": any
  std::optional<ChatTemplate> chat;
  std::string version;
  TlsFiles tls;                      // empty: plain HTTP
  // Told of each request when its reply is complete or, a stream, has ended. May be null; any thread.
  struct Access {
    std::string id, method, path, remote;
    int status = 0;
    double seconds = 0;
    bool stream = false;
    ReplyUsage usage = {};
  };
  std::function<void(const Access&)> log;
};

class Server {
 public:
  // Error(memory) when the sequences do not fit. The engine must outlive it.
  Server(const Engine& engine, ServerOptions options);
  ~Server();

  uint32_t n_ctx() const;
  int bind();   // the port; Error(io)
  void run();   // until stop(), and all connections have ended
  // From another thread: takes no more requests; streams may go on for `grace`, then they are ended with an
  // error. Returns when run() is about to.
  void stop(std::chrono::milliseconds grace);

  HttpReply handle(const HttpRequest& request);  // what HTTP calls; for tests

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace duet::server
