#include "runtime/expert_trace.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>
#include <utility>

#include "base/error.h"
#include "base/json.h"
#include "runtime/memory_plan.h"

namespace duet {
namespace {

constexpr size_t kMaxLayers = 1024, kMaxExperts = 1024;

template <class T>
std::vector<T> numbers(const Json& json, const char* what, const std::string& source) {
  if (!json.is_array()) fail(ErrorKind::format, source, ": '", what, "' is no list");
  std::vector<T> out;
  out.reserve(json.size());
  for (const Json& value : json) {
    if (!value.is_number_unsigned() || value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<T>::max()))
      fail(ErrorKind::format, source, ": '", what, "' holds something else than numbers of its kind");
    out.push_back(value.get<T>());
  }
  return out;
}

const Json& member(const Json& json, const char* name, const std::string& source) {
  if (!json.is_object() || !json.contains(name)) fail(ErrorKind::format, source, ": '", name, "' is missing");
  return json[name];
}

uint32_t count(const Json& json, const char* name, const std::string& source) {
  const uint64_t value = json_get<uint64_t>(json, name, source);
  if (value == 0 || value > kMaxExperts) fail(ErrorKind::format, source, ": '", name, "' is ", value);
  return static_cast<uint32_t>(value);
}

void check_slots(const std::vector<uint32_t>& slots, const ExpertTraceHeader& header, const std::string& source) {
  if (slots.size() != header.expert_bytes.size()) fail(ErrorKind::format, source, ": slots of ", slots.size(), " layers, not ", header.expert_bytes.size());
  for (const uint32_t n : slots)
    if (n > header.n_expert) fail(ErrorKind::format, source, ": ", n, " slots for ", header.n_expert, " experts");
}

ExpertTraceHeader parse_header(const Json& json, const std::string& source) {
  ExpertTraceHeader header;
  header.expert_bytes = numbers<uint64_t>(member(json, "expert_bytes", source), "expert_bytes", source);
  header.slots = numbers<uint32_t>(member(json, "slots", source), "slots", source);
  header.n_expert = count(json, "n_expert", source);
  header.n_used = count(json, "n_used", source);
  const size_t n_layer = header.expert_bytes.size();
  if (n_layer == 0 || n_layer > kMaxLayers || header.n_used > header.n_expert)
    fail(ErrorKind::format, source, ": sizes that do not fit each other");
  check_slots(header.slots, header, source);
  return header;
}

std::vector<int32_t> parse_layer(const Json& json, const ExpertTraceHeader& header, const std::string& source) {
  std::vector<int32_t> experts = numbers<int32_t>(json, "layers", source);
  if (experts.empty() || experts.size() % header.n_used != 0)
    fail(ErrorKind::format, source, ": ", experts.size(), " choices, but ", header.n_used, " for each token");
  for (const int32_t e : experts)
    if (static_cast<uint32_t>(e) >= header.n_expert) fail(ErrorKind::format, source, ": expert ", e, " of ", header.n_expert);
  return experts;
}

ExpertTrace::Chunk parse_chunk(const Json& json, const ExpertTraceHeader& header, const std::string& source) {
  const Json& layers = member(json, "layers", source);
  if (!layers.is_array() || layers.empty() || layers.size() > header.expert_bytes.size())
    fail(ErrorKind::format, source, ": expected 1 to ", header.expert_bytes.size(), " layers");
  ExpertTrace::Chunk chunk;
  for (const Json& layer : layers) {
    chunk.layers.push_back(parse_layer(layer, header, source));
    if (chunk.layers.back().size() > chunk.layers.front().size())
      fail(ErrorKind::format, source, ": a layer of more tokens than the first");
  }
  return chunk;
}

// Slots that became fewer: never more than before, which a policy could not follow.
std::vector<uint32_t> parse_slots(const Json& json, const std::vector<uint32_t>& before, const ExpertTraceHeader& header, const std::string& source) {
  std::vector<uint32_t> slots = numbers<uint32_t>(json["slots"], "slots", source);
  check_slots(slots, header, source);
  for (size_t layer = 0; layer < slots.size(); ++layer)
    if (slots[layer] > before[layer]) fail(ErrorKind::format, source, ": layer ", layer, " gets ", slots[layer], " slots, more than its ", before[layer]);
  return slots;
}

// slots: of the lines before; those of a line of their own go to the next chunk.
void parse_line(const Json& json, const std::string& source, ExpertTrace& trace, std::vector<uint32_t>& slots, bool& is_new) {
  if (trace.engine) fail(ErrorKind::format, source, ": follows the end of the trace");
  if (json.is_object() && json.contains("hits"))
    trace.engine = {.hits = json_get<uint64_t>(json, "hits", source),
                    .misses = json_get<uint64_t>(json, "misses", source),
                    .disk_bytes = json_get<uint64_t>(json, "disk_bytes", source),
                    .padding_bytes = json_get<uint64_t>(json, "padding_bytes", source),
                    .wasted_bytes = json_get<uint64_t>(json, "wasted_bytes", source)};
  else if (json.is_object() && json.contains("slots")) {
    slots = parse_slots(json, slots, trace.header, source);
    is_new = true;
  } else {
    trace.chunks.push_back(parse_chunk(json, trace.header, source));
    if (std::exchange(is_new, false)) trace.chunks.back().slots = slots;
  }
}

}  // namespace

ExpertTraceHeader trace_header(const Engine& engine) {
  const ModelInfo& info = engine.info();
  if (info.hparams.n_expert == 0) fail(ErrorKind::usage, "the model has no experts whose use could be traced");
  const MemoryPlan& plan = engine.plan();
  return {.n_expert = info.hparams.n_expert,
          .n_used = info.hparams.n_expert_used,
          .expert_bytes = info.expert_bytes,
          .slots = plan.streamed ? engine.stream_stats()->slots : std::vector<uint32_t>(info.hparams.n_layer, info.hparams.n_expert)};
}

ExpertTraceWriter::ExpertTraceWriter(const std::filesystem::path& path, ExpertTraceHeader header)
    : header_(std::move(header)), file_(path, 0) {
  const Json json{{"n_expert", header_.n_expert},
                  {"n_used", header_.n_used},
                  {"expert_bytes", header_.expert_bytes},
                  {"slots", header_.slots}};
  file_.write(json.dump() + "\n");
}

void ExpertTraceWriter::add(int layer, std::span<const int32_t> experts) {
  if (layer == 0) write_chunk();  // one that was broken off
  DUET_ASSERT(static_cast<size_t>(layer) == layers_.size());
  layers_.emplace_back(experts.begin(), experts.end());
  if (layers_.size() == header_.expert_bytes.size()) write_chunk();
}

void ExpertTraceWriter::set_slots(const std::vector<uint32_t>& slots) {
  if (slots == header_.slots) return;
  write_chunk();  // one that was broken off
  header_.slots = slots;
  file_.write(Json{{"slots", slots}}.dump() + "\n");
}

void ExpertTraceWriter::write_chunk() {
  if (layers_.empty()) return;
  file_.write(Json{{"layers", layers_}}.dump() + "\n");
  layers_.clear();
}

void ExpertTraceWriter::commit(const std::optional<StreamStats>& stats) {
  write_chunk();
  if (stats)
    file_.write(Json{{"hits", stats->hits}, {"misses", stats->misses}, {"disk_bytes", stats->reads.bytes},
                     {"padding_bytes", stats->padding_bytes}, {"wasted_bytes", stats->wasted_bytes}}.dump() + "\n");
  file_.commit();
}

RoutingFn trace_routing(ExpertTraceWriter& writer, const Engine& engine) {
  return [&writer, &engine](int layer, std::span<const int32_t> experts) {
    if (layer == 0 && engine.plan().streamed) writer.set_slots(engine.stream_stats()->slots);
    writer.add(layer, experts);
  };
}

ExpertTrace read_expert_trace(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(ErrorKind::io, path.string(), ": cannot open");
  ExpertTrace trace;
  size_t n = 0;
  std::vector<uint32_t> slots;
  bool is_new = false;
  for (std::string line; std::getline(file, line);) {
    const std::string source = concat(path.string(), ", line ", ++n);
    const Json json = parse_json(line, source);
    if (n > 1) {
      parse_line(json, source, trace, slots, is_new);
    } else {
      trace.header = parse_header(json, source);
      slots = trace.header.slots;
    }
  }
  if (file.bad()) fail(ErrorKind::io, path.string(), ": cannot read");
  if (n == 0) fail(ErrorKind::format, path.string(), ": empty");
  return trace;
}

}  // namespace duet
