// doctor: what this machine offers duet, and what to do where that is little.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <optional>

#include "base/cpu_features.h"
#include "base/error.h"
#include "base/host.h"
#include "base/json.h"
#include "base/units.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/measure.h"
#include "cli/options.h"
#include "runtime/gpu/module.h"
#include "runtime/kernels/kernels.h"

namespace duet::cli {
namespace {

struct DoctorOptions {
  std::string path = ".", isa;
  int n_threads = 0;
  PinMode pin = PinMode::automatic;
  NumaMode numa = NumaMode::automatic;
  bool json = false;
};

struct Warning {
  std::string text, fix;
};

struct Report {
  std::string cpu, features, isa;
  std::vector<std::string> compiled, usable;
  HostCores cores;
  HostMemory memory;
  int n_threads = 1;
  Placement placement;           // of the threads
  double memory_rate = 0;        // bytes per second
  std::optional<ReadRate> disk;  // absent: could not be measured
  std::optional<gpu::DeviceInfo> card;
  uint64_t card_free_bytes = 0;
  std::string card_reason;       // why there is none
  std::vector<Warning> warnings;
};

// What a process may still use: the machine's and the cgroup's room, whichever is less.
uint64_t usable_memory(const HostMemory& memory) {
  if (!memory.cgroup_limit_bytes) return memory.available_bytes;
  const uint64_t used = memory.cgroup_used_bytes.value_or(0);
  const uint64_t room = *memory.cgroup_limit_bytes - std::min(used, *memory.cgroup_limit_bytes);
  return std::min(memory.available_bytes, room);
}

void examine_processor(Report& r, const DoctorOptions& options) {
  r.cpu = cpu_model_name();
  r.features = cpu_feature_names(detect_cpu_features());
  r.compiled = compiled_isas();
  for (const KernelTable* table : usable_kernels()) r.usable.emplace_back(table->isa);
  r.isa = select_kernels(options.isa).isa;
  r.cores = read_host_cores();
  r.n_threads = options.n_threads > 0 ? options.n_threads : r.cores.usable();
  r.placement = place_threads(r.cores.topology, r.n_threads, options.pin, options.numa);
  if (r.usable.size() == 1)
    r.warnings.push_back(
        {"no SIMD instruction set is usable: generation will be many times slower",
         "use a processor with AVX2; in a virtual machine set the CPU type to 'host'"});
  else if (r.isa != r.usable.front())
    r.warnings.push_back(
        {concat("instruction set ", r.isa, " is forced although ", r.usable.front(), " is usable"),
         "unset DUET_ISA"});
  if (r.cores.cgroup_quota && *r.cores.cgroup_quota < r.cores.physical)
    r.warnings.push_back(
        {concat("the cgroup grants ", *r.cores.cgroup_quota, " CPUs of ", r.cores.physical,
                " cores"),
         "raise the container's CPU limit (docker run --cpus, or cpu.max of the cgroup)"});
  if (r.n_threads > r.cores.logical)
    r.warnings.push_back(
        {concat(r.n_threads, " threads on ", r.cores.logical, " CPUs"), "unset DUET_THREADS"});
}

void examine_memory(Report& r) {
  r.memory = read_host_memory();
  const uint64_t usable = usable_memory(r.memory);
  r.memory_rate = measure_memory(r.n_threads, std::min<uint64_t>(uint64_t{256} << 20, usable / 4));
  const bool limited =
      r.memory.cgroup_limit_bytes && *r.memory.cgroup_limit_bytes < r.memory.total_bytes;
  if (usable < (uint64_t{4} << 30))
    r.warnings.push_back({concat("only ", format_size(usable), " of memory can be used"),
                          limited
                              ? "raise the container's memory limit (docker run --memory, or "
                                "memory.max of the cgroup)"
                              : "close other programs, or choose a smaller model or quantization"});
}

void examine_card(Report& r) {
  const gpu::FoundDevice found = gpu::find_device();
  r.card_reason = found.reason;
  if (found.device == nullptr) return;
  r.card = found.device->info();
  r.card_free_bytes = found.device->free_bytes();
}

void examine_disk(Report& r, const std::string& path) {
  try {
    r.disk = measure_disk(path);
  } catch (const Error& e) {
    r.warnings.push_back({concat("disk not measured: ", e.what()),
                          "name the folder of your models, or one of them, with --path"});
    return;
  }
  constexpr double kSlow = 400e6;  // bytes per second: an 8x7B file of 26 GB takes over a minute
  if (r.disk->direct && r.disk->bytes_per_second < kSlow)
    r.warnings.push_back(
        {concat(path, " reads ", static_cast<uint64_t>(r.disk->bytes_per_second / 1e6),
                " MB/s: large models load slowly"),
         "keep models on a local NVMe disk, and measure it with --path"});
  if (!r.disk->direct)
    r.warnings.push_back(
        {concat(path, " allows no direct reads: the disk rate may be that of memory"),
         "measure another folder with --path"});
}

template <class T>
Json or_null(const std::optional<T>& value) {
  return value ? Json(*value) : Json();
}

Json to_json(const Report& r, const std::string& path) {
  Json warnings = Json::array();
  for (const Warning& w : r.warnings) warnings.push_back({{"text", w.text}, {"fix", w.fix}});
  Json disk = {{"path", path}, {"read_bytes_per_s", nullptr}};
  if (r.disk)
    disk = {
        {"path", path}, {"read_bytes_per_s", r.disk->bytes_per_second}, {"direct", r.disk->direct}, {"reader", r.disk->reader}};
  Json card = {{"name", nullptr}, {"reason", r.card_reason}};
  if (r.card)
    card = {{"name", r.card->name}, {"compute_capability", concat(r.card->major, ".", r.card->minor)}, {"processors", r.card->n_processors},
            {"total_bytes", r.card->total_bytes}, {"free_bytes", r.card_free_bytes}, {"memory_bytes_per_s", r.card->memory_bytes_per_s}};
  return {{"version", DUET_VERSION},
          {"cpu", {{"model", r.cpu}, {"features", r.features}}},
          {"isa", {{"chosen", r.isa}, {"usable", r.usable}, {"compiled", r.compiled}}},
          {"cores",
           {{"logical", r.cores.logical},
            {"physical", r.cores.physical},
            {"performance", r.cores.performance},
            {"nodes", r.cores.topology.nodes()},
            {"pinned", r.placement.cpus},
            {"interleave", r.placement.interleave},
            {"cgroup_quota", or_null(r.cores.cgroup_quota)},
            {"threads", r.n_threads}}},
          {"memory",
           {{"total_bytes", r.memory.total_bytes},
            {"available_bytes", r.memory.available_bytes},
            {"cgroup_version", r.memory.cgroup_version},
            {"cgroup_limit_bytes", or_null(r.memory.cgroup_limit_bytes)},
            {"cgroup_used_bytes", or_null(r.memory.cgroup_used_bytes)},
            {"usable_bytes", usable_memory(r.memory)},
            {"read_bytes_per_s", r.memory_rate}}},
          {"disk", disk},
          {"card", card},
          {"warnings", warnings}};
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : " ") + name;
  return text;
}

std::string numbers(const std::vector<int>& values) {
  std::string text;
  for (const int value : values) text += (text.empty() ? "" : ",") + std::to_string(value);
  return text;
}

// "2; not pinned" or "2; pinned to 0 1 2,3; memory interleaved over nodes 0,1"
std::string threads_text(const Report& r) {
  std::string text = concat(r.n_threads, "; ", r.placement.cpus.empty() ? "not pinned" : "pinned to");
  for (const CpuSet& set : r.placement.cpus) text += " " + numbers(set);
  if (!r.placement.interleave.empty()) text += "; memory interleaved over nodes " + numbers(r.placement.interleave);
  return text;
}

std::string rate(double bytes_per_second) {
  return concat(static_cast<uint64_t>(bytes_per_second / 1e6), " MB/s");
}

std::string memory_text(const HostMemory& memory) {
  std::string text = concat(format_size(memory.available_bytes), " available of ",
                            format_size(memory.total_bytes));
  if (memory.cgroup_limit_bytes)
    text += concat("; cgroup v", memory.cgroup_version, " limit ",
                   format_size(*memory.cgroup_limit_bytes), ", ",
                   format_size(memory.cgroup_used_bytes.value_or(0)), " used");
  else
    text += memory.cgroup_version > 0 ? concat("; cgroup v", memory.cgroup_version, ", no limit")
                                      : "; no cgroup";
  return text;
}

std::string card_text(const Report& r) {
  if (!r.card) return concat("none used: ", r.card_reason);
  return concat(r.card->name, ", ", format_size(r.card_free_bytes), " free of ", format_size(r.card->total_bytes), ", compute capability ", r.card->major, ".", r.card->minor,
                ", ", r.card->n_processors, " processors", r.card->memory_bytes_per_s > 0 ? concat(", ", rate(r.card->memory_bytes_per_s)) : "");
}

void print_report(const Report& r, const std::string& path) {
  print(concat("processor:     ", r.cpu, "\n"));
  print(concat("features:      ", r.features, "\n"));
  print(concat("kernels:       ", r.isa, " (usable: ", join(r.usable),
               "; compiled: ", join(r.compiled), ")\n"));
  print(concat(
      "cores:         ", r.cores.physical, " physical (", r.cores.performance, " performance), ",
      r.cores.logical, " logical, ", r.cores.topology.nodes().size(), " memory nodes, ",
      r.cores.cgroup_quota ? concat("cgroup quota ", *r.cores.cgroup_quota) : "no cgroup quota",
      "\n"));
  print(concat("threads:       ", threads_text(r), "\n"));
  print(concat("memory:        ", memory_text(r.memory), "\n"));
  print(concat("memory reads:  ", rate(r.memory_rate), "\n"));
  print(concat("disk reads:    ", r.disk ? rate(r.disk->bytes_per_second) : "not measured",
               r.disk ? concat(" (", r.disk->reader, "; ", path, ")\n") : concat(" (", path, ")\n")));
  print(concat("card:          ", card_text(r), "\n"));
  for (const Warning& w : r.warnings)
    print(concat("\nwarning: ", w.text, "\n    fix: ", w.fix, "\n"));
}

void run_doctor(const DoctorOptions& options) {
  if (!std::filesystem::exists(options.path))
    fail(ErrorKind::io, options.path, ": no such file or folder");
  Report report;
  examine_processor(report, options);
  examine_memory(report);
  examine_card(report);
  examine_disk(report, options.path);
  if (options.json) return print_json(to_json(report, options.path));
  print_report(report, options.path);
}

}  // namespace

void add_doctor(CLI::App& app) {
  CLI::App& command =
      *app.add_subcommand("doctor", "Examine this machine: processor, cores, memory, card, disk");
  auto options = std::make_shared<DoctorOptions>();
  command.add_option("--path", options->path, "Folder or file whose disk to measure")
      ->capture_default_str();
  command.add_option("--isa", options->isa, "Force an instruction set, as for run");
  add_threads_option(command, options->n_threads);
  add_placement_options(command, options->pin, options->numa);
  command.add_flag("--json", options->json, "One JSON document");
  add_environment(command);
  command.callback([options] { run_doctor(*options); });
}

}  // namespace duet::cli
