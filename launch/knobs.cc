#include "launch/knobs.h"

#include <algorithm>
#include <map>
#include <set>

#include "launch/session.h"

namespace shoal {
namespace {

using enum MemoryClass;

std::map<std::string, int64_t> BytesBySite(const MemoryReport& report) {
  std::map<std::string, int64_t> bytes;
  for (const MemoryLine& line : report.tensors) bytes[line.Site()] += line.bytes;
  return bytes;
}

bool Shrinks(const Knob& knob, const std::string& memory_class) {
  return std::ranges::any_of(knob.classes, [&](MemoryClass c) { return memory_class == Name(c); });
}

}  // namespace

std::vector<Knob> KnobsOf(const Config& config, const TrainingOptions& options,
                          const BatchPlan& batch) {
  std::vector<Knob> knobs;
  const auto add = [&](bool meant, std::string text, std::vector<MemoryClass> classes,
                       std::function<void(Config&)> change, bool alone = false) {
    if (meant) knobs.push_back({std::move(text), std::move(change), std::move(classes), alone});
  };
  const std::string& recompute = config.memory.recompute;
  add(recompute == "none", "memory.recompute = \"selective\"", {kActivations},
      [](Config& c) { c.memory.recompute = "selective"; });
  add(recompute != "full", "memory.recompute = \"full\"", {kActivations},
      [](Config& c) { c.memory.recompute = "full"; });
  const bool shared = batch.dp * config.mesh.cp > 1;
  for (int64_t stage = config.zero.stage + 1; stage <= 3; ++stage) {
    std::vector<MemoryClass> classes = {kOptimizer};
    if (stage >= 2) classes.push_back(kGradients);
    if (stage >= 3) classes.push_back(kParameters);
    add(shared, fmt::format("zero.stage = {}", stage), classes,
        [stage](Config& c) { c.zero.stage = stage; });
  }
  add(batch.micro > 1, "batch.micro = 1", {kActivations, kWorkspace, kCommunication},
      [](Config& c) { c.batch.micro = 1; });
  add(config.memory.offload_activations != "file", "memory.offload_activations = \"file\"",
      {kActivations}, [](Config& c) { c.memory.offload_activations = "file"; });
  add(config.zero.offload != "file", "zero.offload = \"file\"", {kOptimizer},
      [](Config& c) { c.zero.offload = "file"; });
  // Small beside the pass, and large enough for products to be efficient.
  const int64_t chunk = std::max<int64_t>(256, config.data.sequence_length / 8);
  add(config.memory.mlp_chunk_rows == 0 && batch.micro * config.data.sequence_length > chunk,
      fmt::format("memory.mlp_chunk_rows = {}", chunk), {kActivations},
      [chunk](Config& c) { c.memory.mlp_chunk_rows = chunk; });
  add(
      config.mesh.tp > 1 && !config.mesh.sequence_parallel, "mesh.sequence_parallel = true",
      {kActivations}, [](Config& c) { c.mesh.sequence_parallel = true; }, true);
  add(
      config.mesh.tp > 1 && !config.memory.partition_activations,
      "memory.partition_activations = true", {kActivations},
      [](Config& c) { c.memory.partition_activations = true; }, true);
  add(
      options.compute == DType::kBF16 && options.gradients != DType::kBF16,
      "precision.gradients = \"bf16\"", {kGradients, kCommunication},
      [](Config& c) { c.precision.gradients = "bf16"; }, true);
  add(
      options.compute == DType::kBF16 && !options.split_master, "optim.master = \"split\"",
      {kOptimizer}, [](Config& c) { c.optim.master = "split"; }, true);
  add(
      config.memory.compress_activations != "int8", "memory.compress_activations = \"int8\"",
      {kActivations}, [](Config& c) { c.memory.compress_activations = "int8"; }, true);
  add(
      !config.optim.in_backward && config.optim.clip == 0 && config.optim.non_finite == "halt",
      "optim.in_backward = true", {kGradients}, [](Config& c) { c.optim.in_backward = true; },
      true);
  // Whole gradients, and stage 3's parameters, are there a bucket at a time.
  add(
      shared && config.zero.stage >= 2 && config.zero.bucket > (int64_t{1} << 20),
      "zero.bucket = \"1MiB\"", {kCommunication},
      [](Config& c) { c.zero.bucket = int64_t{1} << 20; }, true);
  const auto degree = [&](const char* name, int64_t MeshConfig::*axis,
                          const std::vector<MemoryClass>& classes) {
    const int64_t twice = 2 * config.mesh.*axis;
    add(
        batch.dp % 2 == 0, fmt::format("mesh.{} = {}", name, twice), classes,
        [axis, twice](Config& c) { c.mesh.*axis = twice; }, true);
  };
  degree("tp", &MeshConfig::tp, {kParameters, kGradients, kOptimizer, kActivations, kWorkspace});
  degree("pp", &MeshConfig::pp, {kParameters, kGradients, kOptimizer, kActivations, kWorkspace});
  degree("cp", &MeshConfig::cp, {kActivations, kWorkspace});
  return knobs;
}

std::string KnobText(const std::vector<Knob>& knobs) {
  std::string text;
  for (int c = 0; c < kMemoryClasses; ++c) {
    const char* name = Name(static_cast<MemoryClass>(c));
    std::string changes;
    for (const Knob& knob : knobs)
      if (Shrinks(knob, name)) changes += (changes.empty() ? "" : ", ") + knob.text;
    if (!changes.empty()) text += fmt::format("smaller {}: {}\n", name, changes);
  }
  return text;
}

std::optional<Trial> Try(const Config& config, const TrainingOptions& options, int rank,
                         const Knob& knob) {
  Config other = config;
  knob.change(other);
  const int ranks = options.mesh.ranks();
  Trial trial;
  trial.knob = knob;
  try {
    CheckSupported(other);
    const BatchPlan batch = CheckBatch(other, ranks);
    const bool chosen = other.memory.recompute == "auto";
    if (chosen) other.memory.recompute = "none";
    TrainingOptions changed = MakeTrainingOptions(other, batch);
    if (chosen) {
      changed.recompute = options.recompute;
      changed.recompute.resize(static_cast<size_t>(changed.mesh.pp), options.recompute.back());
    }
    for (const int r : std::set{rank, 0, ranks - 1}) {
      std::vector<LiveBlock> at_peak;
      const int64_t peak = DryRun(changed, PassOf(other, batch), r, &at_peak).memory.peak_total;
      if (peak <= trial.peak) continue;
      trial.peak = peak;
      trial.report = Summarise(at_peak);
    }
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::kConfig) throw;
    return std::nullopt;
  }
  return trial;
}

std::vector<Trial> TryAll(const Config& config, const TrainingOptions& options,
                          const BatchPlan& batch, MemoryReport* report) {
  std::vector<Trial> trials;
  for (const Knob& knob : KnobsOf(config, options, batch)) {
    auto trial = Try(config, options, report->rank, knob);
    if (trial && trial->peak < report->bytes) trials.push_back(std::move(*trial));
  }
  const auto before = BytesBySite(*report);
  std::vector<int64_t> least(report->tensors.size(), report->bytes);
  for (const Trial& trial : trials) {
    const auto after = BytesBySite(trial.report);
    for (size_t i = 0; i < least.size(); ++i) {
      MemoryLine& line = report->tensors[i];
      const auto found = after.find(line.Site());
      const int64_t left = found == after.end() ? 0 : found->second;
      if (trial.peak >= least[i] || left >= before.at(line.Site()) ||
          !Shrinks(trial.knob, line.memory_class))
        continue;
      least[i] = trial.peak;
      line.knob = trial.knob.text;
    }
  }
  return trials;
}

}  // namespace shoal
