// Types for a size: the knapsack, and what is chosen for the demo model.
#include "converters/target.h"

#include <doctest/doctest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <random>

#include "base/error.h"
#include "converters/knapsack.h"
#include "tests/support/errors.h"

using namespace duet;
using namespace duet::test;

namespace {

using Items = std::vector<std::vector<SizedOption>>;

struct Total {
  uint64_t bytes = 0;
  double cost = 0;
};
Total total(const Items& items, const std::vector<size_t>& chosen) {
  Total sum;
  for (size_t i = 0; i < items.size(); ++i) {
    sum.bytes += items[i][chosen[i]].n_bytes;
    sum.cost += items[i][chosen[i]].cost;
  }
  return sum;
}

// The least cost of all combinations that fit.
double best_cost(const Items& items, uint64_t budget, size_t i = 0, uint64_t bytes = 0, double cost = 0) {
  if (bytes > budget) return HUGE_VAL;
  if (i == items.size()) return cost;
  double best = HUGE_VAL;
  for (const SizedOption& o : items[i]) best = std::min(best, best_cost(items, budget, i + 1, bytes + o.n_bytes, cost + o.cost));
  return best;
}

Items random_items(std::mt19937& random, size_t n, uint64_t scale) {
  Items items(n);
  for (auto& options : items) {
    uint64_t bytes = 1 + random() % scale;
    double cost = 1 + static_cast<double>(random() % 1000);
    for (size_t o = 0; o < 1 + random() % 4; ++o) {
      options.push_back({bytes, cost});
      bytes += 1 + random() % scale;
      cost *= 0.1 + 0.001 * static_cast<double>(random() % 1000);  // now and then dearer than the one before
    }
  }
  return items;
}

}  // namespace

TEST_CASE("target: the knapsack is exact where sizes are few") {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    const Items items = random_items(random, 1 + random() % 6, 50);
    const uint64_t budget = random() % 600;
    const double best = best_cost(items, budget);
    const std::vector<size_t> chosen = choose_options(items, budget);
    CAPTURE(round);
    REQUIRE(chosen.empty() == !std::isfinite(best));
    if (chosen.empty()) continue;
    const Total got = total(items, chosen);
    CHECK(got.bytes <= budget);
    CHECK(got.cost == doctest::Approx(best));
  }
}

TEST_CASE("target: the knapsack uses large budgets up and never exceeds them") {
  std::mt19937 random(2);
  for (int round = 0; round < 5; ++round) {
    Items items(200);
    for (auto& options : items) {
      const uint64_t n = (1 + random() % 20) * 4'200'000;
      const double weight = 1 + static_cast<double>(random() % 100);
      for (uint64_t bits = 2; bits <= 8; ++bits) options.push_back({n * bits / 8, weight * std::ldexp(1.0, -2 * static_cast<int>(bits))});
    }
    uint64_t least = 0, most = 0;
    for (const auto& options : items) {
      least += options.front().n_bytes;
      most += options.back().n_bytes;
    }
    const uint64_t budget = least + (most - least) / 10 * (1 + random() % 8);
    const Total got = total(items, choose_options(items, budget));
    CHECK(got.bytes <= budget);
    CHECK(static_cast<double>(got.bytes) >= 0.998 * static_cast<double>(budget));
    CHECK(choose_options(items, budget) == choose_options(items, budget));
  }
}

TEST_CASE("target: everything fits, nothing fits, nothing to choose") {
  const Items items = {{{10, 3.0}, {20, 1.0}, {30, 2.0}}, {{5, 0.0}}};
  CHECK(choose_options(items, 1000) == std::vector<size_t>{1, 0});  // not the larger one that costs more
  CHECK(choose_options(items, 24) == std::vector<size_t>{0, 0});
  CHECK(choose_options(items, 25) == std::vector<size_t>{1, 0});
  CHECK(choose_options(items, 14).empty());
  CHECK(choose_options({}, 0).empty());
}

TEST_CASE("target: sensitivity moves bits") {
  ConvertOptions options;
  options.target_bpw = 4.5;
  const std::filesystem::path folder = DUET_SOURCE_DIR "/models/demo";
  ConversionSource source = open_folder(folder, options);
  const auto index = [&](const std::string& name) {
    for (size_t i = 0; i < source.jobs.size(); ++i)
      if (source.jobs[i].name == name) return i;
    return source.jobs.size();
  };
  const size_t a = index("blk.1.ffn_up_exps.weight"), b = index("blk.4.ffn_up_exps.weight");
  REQUIRE(b < source.jobs.size());
  std::vector<double> sensitivity(source.jobs.size(), 1.0);
  sensitivity[a] = 50;
  choose_types(options, sensitivity, source);
  CHECK(source.jobs[a].format->block_bytes * 256 / source.jobs[a].format->block_elems >
        source.jobs[b].format->block_bytes * 256 / source.jobs[b].format->block_elems);
  CHECK(plan_of(source.jobs, "").bits_per_weight <= 4.5);
  CHECK(plan_of(source.jobs, "").bits_per_weight > 4.5 * 0.995);
}

TEST_CASE("target: rules are kept, norms stay, too small a size is refused") {
  ConvertOptions options;
  options.target_bpw = 4;
  options.tensor_types = {"blk\\.0\\.attn=Q8_0"};
  options.output_tensor_type = "F16";
  const ConvertPlan plan = plan_convert(DUET_SOURCE_DIR "/models/demo", options);
  CHECK(plan.bits_per_weight <= 4);
  for (const PlannedTensor& tensor : plan.tensors) {
    const std::string type = tensor.format->name;
    if (tensor.name.find("blk.0.attn_") == 0 && tensor.name != "blk.0.attn_norm.weight") CHECK(type == "Q8_0");
    if (tensor.name == "output.weight") CHECK(type == "F16");
    if (tensor.name.find("norm") != std::string::npos || tensor.name.find("ffn_gate_inp") != std::string::npos) CHECK(type == "F32");
  }
  options.target_bpw = 1.5;
  check_thrown(thrown_by([&] { plan_convert(DUET_SOURCE_DIR "/models/demo", options); }), ErrorKind::usage, "smallest is");
}

TEST_CASE("target: relative errors fall with bits and are weighted") {
  ConvertOptions options;
  ConversionSource source = open_folder(DUET_SOURCE_DIR "/models/demo", options);
  TensorJob* job = nullptr;
  for (TensorJob& j : source.jobs)
    if (j.name == "blk.2.ffn_down_exps.weight") job = &j;
  REQUIRE(job != nullptr);
  double before = 1;
  for (const DType type : {DType::Q2_K, DType::Q3_K, DType::Q4_K, DType::Q5_K, DType::Q6_K, DType::Q8_0}) {
    const double error = relative_error(*job, format_of(type), 2);
    CHECK(error < 0.5 * before);
    CHECK(error > 0);
    CHECK(error == relative_error(*job, format_of(type), 1));
    before = error;
  }
  CHECK(relative_error(*job, format_of(DType::BF16), 1) == 0);  // as it is stored
}

TEST_CASE("target: relative errors are those of rows all over a tensor, whatever repeats in it") {
  constexpr size_t kRows = 4096, kCols = 256;
  const auto error_of = [](size_t period, size_t zero) {
    std::mt19937 random(3);
    std::vector<float> values(kRows * kCols);
    for (size_t i = 0; i < values.size(); ++i) {
      const float v = static_cast<float>(random() % 2001) / 1000 - 1;
      values[i] = i / kCols % period == zero ? 0 : v;
    }
    const Format& f32 = format_of(DType::F32);
    const TensorJob job{"t", &f32, {kRows, kCols}, {{.source = {"t", &f32, {kRows, kCols}, std::as_bytes(std::span(values))}}}};
    return relative_error(job, format_of(DType::Q4_K), 2);
  };
  const double all = error_of(kRows, 0);
  for (const size_t period : {size_t{2}, size_t{8}, size_t{128}})
    for (size_t zero = 0; zero < std::min<size_t>(period, 8); ++zero) CHECK(error_of(period, zero) / all == doctest::Approx(1).epsilon(0.05));
}
