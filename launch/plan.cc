#include "launch/plan.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>

#include "launch/session.h"
#include "parallel/tensor_parallel.h"

namespace shoal {
namespace {

double Mega(int64_t bytes) { return static_cast<double>(bytes) / 1e6; }

}  // namespace

double StateBytes::PerRank(double parameters, int stage, int ranks) const {
  const double n = ranks;
  return parameters * (value / (stage >= 3 ? n : 1) + gradient / (stage >= 2 ? n : 1) +
                       optimizer / (stage >= 1 ? n : 1));
}

StateBytes StatesOf(const TrainingOptions& options) {
  const DType wide = AccumulatorDType(options.compute);
  const auto width = static_cast<double>(SizeOf(wide));
  const double master = options.compute == wide ? 0
                        : options.split_master  ? static_cast<double>(SizeOf(DType::kI16))
                                                : width;
  const auto states = static_cast<double>(MakeUpdateRule(options.rule)->states().size());
  return {static_cast<double>(SizeOf(options.compute)),
          static_cast<double>(SizeOf(options.gradients)), master + states * width};
}

PipelineSimulation SimulateStep(const TrainingOptions& options) {
  const std::vector<int> stages = StagesOf(options);
  const std::vector<double> segments = SegmentCosts(options.model, options.length);
  PipelineCosts costs = {{}, {}, {}};
  for (size_t s = 0; s + 1 < stages.size(); ++s) {
    double forward = 0;
    for (int i = stages[s]; i < stages[s + 1]; ++i) forward += segments[static_cast<size_t>(i)];
    costs.forward.push_back(forward);
    // Nothing asks for the gradient of the tokens.
    const double no_input = s == 0 ? segments[0] : 0;
    costs.backward_input.push_back(forward - no_input);
    costs.backward_weight.push_back(forward);
  }
  return SimulatePipeline(ScheduleOf(options, options.micro_batches), costs);
}

int64_t Plan::peak() const { return at_peak.bytes; }

int64_t Plan::limit() const { return budget.value_or(available); }

bool Plan::fits() const { return peak() + staging <= limit(); }

Plan MakePlan(const Config& config, const TrainingOptions& options, int ranks) {
  Plan plan;
  plan.batch = CheckBatch(config, ranks);
  plan.budget = config.memory.budget;
  plan.available = MemoryOfRank(ranks);
  const ModelConfig model = ModelShape(config);
  plan.parameters = ParameterCount(model);
  plan.tokens_per_step = config.batch.sequences * config.data.sequence_length;
  // Matrix products: everything but the tables that are only looked up; a tied head multiplies.
  int64_t matmul = plan.parameters - (model.tied ? 0 : model.vocab * model.d_model);
  if (model.family == "gpt2") matmul -= model.context * model.d_model;
  const double attention = static_cast<double>(model.layers * model.heads * model.head_dim *
                                               config.data.sequence_length);
  plan.flops_per_token = 6.0 * static_cast<double>(matmul) + 6 * attention;
  plan.flops_per_token_full = 6.0 * static_cast<double>(matmul) + 12 * attention;
  plan.options = options;
  plan.stages = StagesOf(plan.options);
  plan.pipeline = SimulateStep(plan.options);
  // Replicas differ only in how many bytes a rank's shards have on the wire.
  for (int rank = 0; rank < ranks; ++rank)
    plan.ranks.push_back(DryRun(plan.options, PassOf(config, plan.batch), rank));
  const auto largest = std::ranges::max_element(
      plan.ranks, {}, [](const RankPlan& rank) { return rank.memory.peak_total; });
  std::vector<LiveBlock> at_peak;
  DryRun(plan.options, PassOf(config, plan.batch), largest->rank, &at_peak);
  plan.at_peak = Summarise(at_peak);
  plan.at_peak.rank = largest->rank;
  plan.trials = TryAll(config, plan.options, plan.batch, &plan.at_peak);
  if (config.checkpoint.async && config.checkpoint.every > 0) {
    int64_t states = 0;
    for (const RankPlan& rank : plan.ranks) {
      const auto& peak = rank.memory.peak;
      states = std::max(states, peak[static_cast<size_t>(MemoryClass::kParameters)] +
                                    peak[static_cast<size_t>(MemoryClass::kOptimizer)]);
    }
    plan.staging = std::min(config.checkpoint.staging, states);
  }
  return plan;
}

void CheckFits(const Plan& plan, const Config& config) {
  if (plan.fits() || config.memory.overcommit) return;
  // One change at a time, then all of them.
  std::string fitting;
  for (const Trial& trial : plan.trials)
    if (trial.peak + plan.staging <= plan.limit())
      fitting += fmt::format("{}{} ({:.1f} MB)", fitting.empty() ? "what fits: " : ", ",
                             trial.knob.text, Mega(trial.peak));
  if (fitting.empty()) {
    const Knob together = {"",
                           [&](Config& c) {
                             for (const Knob& knob : KnobsOf(config, plan.options, plan.batch))
                               if (!knob.alone) knob.change(c);
                           },
                           {}};
    const auto trial = Try(config, plan.options, plan.at_peak.rank, together);
    const int64_t least = trial ? trial->peak : plan.peak();
    fitting = fmt::format("recomputation, sharding, batch.micro 1 and files together {}",
                          least + plan.staging <= plan.limit()
                              ? fmt::format("fit ({:.1f} MB)", Mega(least))
                              : fmt::format("come to {:.1f} MB: use more ranks (mesh.tp, mesh.pp, "
                                            "mesh.cp) or a smaller model",
                                            Mega(least)));
  }
  SHOAL_FAIL(
      ErrorKind::kConfig, "plan",
      "rank {} needs {:.1f} MB at its peak{}, and {} {:.1f} MB; {}. memory.overcommit = true "
      "starts anyhow",
      plan.at_peak.rank, Mega(plan.peak()),
      plan.staging > 0 ? fmt::format(" and {:.1f} MB while a save is written", Mega(plan.staging))
                       : "",
      plan.budget ? "memory.budget is" : "its share of this machine's memory is",
      Mega(plan.limit()), fitting);
}

std::string PlanJson(const Plan& plan) {
  using nlohmann::ordered_json;
  ordered_json json;
  json["ranks"] = ordered_json::array();
  for (const RankPlan& rank : plan.ranks) {
    ordered_json bytes;
    for (int c = 0; c < kMemoryClasses; ++c)
      bytes[Name(static_cast<MemoryClass>(c))] = rank.memory.peak[c];
    bytes["peak"] = rank.memory.peak_total;
    ordered_json wire;
    for (int a = 0; a < kMeshAxes; ++a)
      wire[Name(static_cast<MeshAxis>(a))] = rank.wire_bytes[static_cast<size_t>(a)];
    json["ranks"].push_back({{"rank", rank.rank}, {"bytes", bytes}, {"wire_bytes", wire}});
  }
  json["bubble"] = plan.pipeline.bubble;
  json["fits"] = plan.fits();
  json["staging_bytes"] = plan.staging;
  json["parameters"] = plan.parameters;
  json["tokens_per_step"] = plan.tokens_per_step;
  json["micro_batches"] = plan.batch.micro_batches;
  json["sequences_per_micro_batch"] = plan.batch.micro;
  json["steps_per_epoch"] = plan.steps_per_epoch;
  json["flops_per_token"] = plan.flops_per_token;
  json["flops_per_token_full_attention"] = plan.flops_per_token_full;
  WriteMemory(plan.at_peak, &json);
  json["single_changes"] = ordered_json::array();
  for (const Trial& trial : plan.trials)
    json["single_changes"].push_back({{"change", trial.knob.text}, {"peak", trial.peak}});
  return json.dump(2);
}

namespace {

// What each tensor-parallel rank holds: outside blocks, and of the first, as which all others are.
std::string TensorText(const TrainingOptions& options) {
  const auto model = BuildModel(options.model);
  const int tp = options.mesh.tp;
  std::istringstream lines(DescribeCut(*model, Cut(options.model, tp), tp));
  std::string text = fmt::format("\ncut over tp {} (of blocks, the first)\n", tp);
  for (std::string line; std::getline(lines, line);)
    if (!line.starts_with("blocks.") || line.starts_with("blocks.0.")) text += "  " + line + '\n';
  return text;
}

std::string PipelineText(const Plan& plan, const Config& config) {
  const PipelineSimulation& sim = plan.pipeline;
  const PipelineSchedule& schedule = sim.schedule;
  std::string text = fmt::format(
      "\npipeline               {}, {} stages, {} micro-batches: bubble {:.1f} % over ideal, if "
      "passes take their FLOPs\n",
      config.pipeline.schedule, schedule.stages(), schedule.micro_batches, 100 * sim.bubble);
  const auto blocks = static_cast<int>(plan.stages.back()) - LanguageModel::kOtherSegments;
  for (int rank = 0; rank < schedule.ranks; ++rank) {
    std::string holds;
    for (int chunk = 0; chunk < schedule.chunks; ++chunk) {
      const auto stage = static_cast<size_t>(schedule.Stage(rank, chunk));
      const int begin = std::max(plan.stages[stage], 1);
      const int end = std::min(plan.stages[stage + 1], blocks + 1);
      holds += chunk == 0 ? "" : "; ";
      if (stage == 0) holds += "embedding, ";
      holds += begin < end ? fmt::format("blocks {}-{}", begin - 1, end - 2) : "no block";
      if (plan.stages[stage + 1] > blocks + 1) holds += ", head";
    }
    text += fmt::format("  {:<20} {}; at most {} in flight\n", fmt::format("pp {}", rank), holds,
                        sim.facts.peak_activations[static_cast<size_t>(rank)]);
  }
  return text + DrawPipelineTimeline(sim) + '\n';
}

}  // namespace

std::string PlanText(const Plan& plan, const Config& config) {
  const BatchPlan& b = plan.batch;
  std::string text;
  const auto line = [&text](const std::string& name, const std::string& value) {
    text += fmt::format("{:<22} {}\n", name, value);
  };
  line("parameters", fmt::format("{:.2f} M", static_cast<double>(plan.parameters) / 1e6));
  line("batch",
       fmt::format("{} sequences of {} = {} tokens a step: {} replica{} x {} micro-batch{} of {}",
                   config.batch.sequences, config.data.sequence_length, plan.tokens_per_step, b.dp,
                   b.dp == 1 ? "" : "s", b.micro_batches, b.micro_batches == 1 ? "" : "es",
                   b.micro));
  if (plan.steps_per_epoch > 0) {
    line("run", fmt::format("{} steps, {:.2f} epochs", config.run.steps,
                            static_cast<double>(config.run.steps) /
                                static_cast<double>(plan.steps_per_epoch)));
  }
  line(
      "compute",
      fmt::format("{:.3g} FLOPs a token (6 N + 6 L d T, causal); {:.3g} in the 12 L d T convention",
                  plan.flops_per_token, plan.flops_per_token_full));
  const DType compute = ComputeDType(config);
  const TrainingOptions& options = plan.options;
  line("states",
       fmt::format("{} parameters, {} gradients", Name(compute), Name(options.gradients)));
  const StateBytes states = StatesOf(options);
  text += fmt::format("\n{:<22}", "states per rank, GB");
  const int columns[] = {1, 4, 16, 64, 256, 1024};
  for (const int n : columns) text += fmt::format("{:>9}", fmt::format("dp {}", n));
  text += '\n';
  const double held =
      static_cast<double>(plan.parameters) / static_cast<double>(config.mesh.tp * config.mesh.pp);
  for (int stage = 0; stage <= 3; ++stage) {
    text += fmt::format("  {:<20}", fmt::format("zero.stage {}", stage));
    for (const int n : columns)
      text += fmt::format("{:>9.3g}", states.PerRank(held, stage, n) / 1e9);
    text += '\n';
  }
  text += fmt::format("\n{:<22} {:>14} {:>14}\n", "peak per rank", "rank 0, MB", "largest, MB");
  for (int c = 0; c < kMemoryClasses; ++c) {
    int64_t largest = 0;
    for (const RankPlan& rank : plan.ranks) largest = std::max(largest, rank.memory.peak[c]);
    text += fmt::format("  {:<20} {:>14.1f} {:>14.1f}\n", Name(static_cast<MemoryClass>(c)),
                        Mega(plan.ranks[0].memory.peak[c]), Mega(largest));
  }
  text += fmt::format("  {:<20} {:>14.1f} {:>14.1f}\n", "together, at once",
                      Mega(plan.ranks[0].memory.peak_total), Mega(plan.peak()));
  if (plan.staging > 0)
    line("while a save is written", fmt::format("up to {:.1f} MB more", Mega(plan.staging)));
  text +=
      fmt::format("\nat the peak of rank {}: {:.1f} MB\n", plan.at_peak.rank, Mega(plan.peak()));
  text += MemoryText(plan.at_peak);
  if (!plan.trials.empty()) text += "\n  one change                              peak, MB\n";
  for (const Trial& trial : plan.trials)
    text += fmt::format("    {:<36} {:>9.1f}\n", trial.knob.text, Mega(trial.peak));
  text += fmt::format("\n{:<22} {:>14} {:>14}\n", "sent a step", "rank 0, MB", "all, MB");
  for (int a = 0; a < kMeshAxes; ++a) {
    const auto sent = [a](const RankPlan& r) { return r.wire_bytes[static_cast<size_t>(a)]; };
    int64_t all = 0;
    for (const RankPlan& rank : plan.ranks) all += sent(rank);
    if (all == 0) continue;
    text += fmt::format("  {:<20} {:>14.1f} {:>14.1f}\n", Name(static_cast<MeshAxis>(a)),
                        Mega(sent(plan.ranks[0])), Mega(all));
  }
  if (config.mesh.tp > 1) text += TensorText(options);
  if (!plan.ranks[0].attention.empty()) text += '\n';
  for (const RankPlan& rank : plan.ranks) {
    // Every stage's ranks decide alike.
    if (rank.attention.empty()) continue;
    line("attention over cp", rank.attention);
    if (config.data.documents) line("", "at most: as if each sequence were one document");
    break;
  }
  if (config.mesh.pp > 1) text += PipelineText(plan, config);
  for (size_t stage = 0; config.memory.recompute == "auto" && stage < options.recompute.size();
       ++stage) {
    const auto [full, selective] = options.recompute[stage];
    line(stage == 0 ? "recompute" : "",
         fmt::format("{}{} block{} whole, {} selectively",
                     options.recompute.size() > 1 ? fmt::format("pp {}: ", stage) : "", full,
                     full == 1 ? "" : "s", selective));
  }
  if (config.memory.recompute == "auto" && !plan.budget)
    line("", "as if all ranks were on this host; memory.budget says what a rank has elsewhere");
  text += fmt::format("{:<22} {} ({} {:.0f} MB)\n", "fits", plan.fits() ? "yes" : "no",
                      plan.budget ? "memory.budget" : "a rank's share of this machine has",
                      Mega(plan.limit()));
  return text;
}

}  // namespace shoal
