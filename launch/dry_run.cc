#include "launch/dry_run.h"

#include <algorithm>
#include <map>
#include <tuple>

namespace shoal {
namespace {

// A batch of the right shape; on `meta` nobody reads it.
Batch EmptyBatch(const PassShape& pass, int64_t length) {
  Batch batch;
  batch.count = pass.sequences;
  batch.length = length;
  batch.labelled = batch.count * length;
  const auto n = static_cast<size_t>(batch.count * length);
  batch.tokens.resize(n);
  batch.labels.resize(n);
  batch.positions.resize(n);
  batch.token_numbers.resize(n);
  if (pass.documents) batch.documents.resize(n);
  return batch;
}

using Recompute = TrainingOptions::Recompute;

// The choice of the ranks of one pipeline stage. They must agree: what is run again calls
// collectives.
class Search {
 public:
  Search(const TrainingOptions& options, const PassShape& pass, size_t stage,
         std::vector<int> ranks, int64_t budget)
      : options_(options), pass_(pass), stage_(stage), ranks_(std::move(ranks)), budget_(budget) {}

  // The cheapest that fits all of them. False: none does.
  bool Find(int blocks, Recompute* best) {
    // Few ranks have the largest peak under any choice; the others are only checked.
    Include(Largest({0, 0}));
    Include(Largest({blocks, 0}));
    for (;;) {
      if (!FindForSome(blocks, best)) return false;
      const int rank = Largest(*best);
      if (PeakOf(rank, *best) <= budget_) return true;
      Include(rank);
    }
  }

  int64_t Peak(const Recompute& blocks) { return PeakOf(Largest(blocks), blocks); }

 private:
  int64_t PeakOf(int rank, const Recompute& blocks) {
    const auto [found, fresh] = peaks_.try_emplace({rank, blocks.full, blocks.selective}, 0);
    if (fresh) {
      options_.recompute[stage_] = blocks;
      found->second = DryRun(options_, pass_, rank).memory.peak_total;
    }
    return found->second;
  }

  int Largest(const Recompute& blocks) {
    return *std::max_element(ranks_.begin(), ranks_.end(),
                             [&](int a, int b) { return PeakOf(a, blocks) < PeakOf(b, blocks); });
  }

  void Include(int rank) {
    if (std::find(some_.begin(), some_.end(), rank) == some_.end()) some_.push_back(rank);
  }

  bool Fits(const Recompute& blocks) {
    return std::all_of(some_.begin(), some_.end(),
                       [&](int rank) { return PeakOf(rank, blocks) <= budget_; });
  }

  bool FindForSome(int blocks, Recompute* best) {
    const auto cost_of = [&](int full, int selective) {
      return RecomputeCost(options_, {full, selective});
    };
    bool found = false;
    double least = 0;
    for (int full = 0; full <= blocks; ++full) {
      if (found && cost_of(full, 0) >= least) break;
      if (!Fits({full, blocks - full})) continue;
      // More never takes more memory.
      int low = 0, high = blocks - full;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (Fits({full, middle}))
          high = middle;
        else
          low = middle + 1;
      }
      const double cost = cost_of(full, low);
      if (found && cost >= least) continue;
      found = true;
      least = cost;
      *best = {full, low};
    }
    return found;
  }

  TrainingOptions options_;
  PassShape pass_;
  size_t stage_;
  std::vector<int> ranks_, some_;
  int64_t budget_;
  std::map<std::tuple<int, int, int>, int64_t> peaks_;
};

}  // namespace

RankPlan DryRun(const TrainingOptions& options, const PassShape& pass, int rank,
                std::vector<LiveBlock>* at_peak) {
  ExecutionContext context(Device{DeviceType::kMeta});
  context.allocator()->WatchPeak(at_peak != nullptr);
  const ContextScope scope(context);
  const auto communicator = MakeMetaCommunicator(rank, options.mesh.ranks());
  TrainingStep step(options, *communicator);
  const std::vector<Batch> batches(static_cast<size_t>(options.micro_batches),
                                   EmptyBatch(pass, options.length));
  RankPlan plan = {rank, step.blocks()};
  const auto add = [&](int sign) {
    for (int a = 0; a < kMeshAxes; ++a)
      plan.wire_bytes[static_cast<size_t>(a)] += sign * step.wire_bytes(static_cast<MeshAxis>(a));
  };
  add(-1);
  step.Run(batches, 1);
  add(1);
  plan.memory = context.allocator()->stats();
  if (at_peak != nullptr) *at_peak = context.allocator()->AtPeak();
  plan.attention = step.DescribeAttention();
  return plan;
}

double RecomputeCost(const TrainingOptions& options, const TrainingOptions::Recompute& blocks) {
  constexpr double kFlopsPerByte = 20;  // processors do ten, accelerators some hundred
  const ModelConfig& m = options.model;
  const auto h = static_cast<double>(m.d_model), f = static_cast<double>(m.mlp);
  const auto heads = static_cast<double>((2 * m.heads + 2 * m.kv_heads) * m.head_dim);
  const bool gated = m.family == "llama";
  // Norms and activation functions read and write.
  const double touched = 4 * h + (gated ? 3 : 2) * f;
  const double selective = kFlopsPerByte * touched * static_cast<double>(SizeOf(options.compute));
  // The forward without attention, which is kept, and without what comes behind the activation
  // function, which no backward reads.
  const double full = 2 * (h * heads + (gated ? 2 : 1) * h * f) + selective;
  return blocks.full * full + blocks.selective * selective;
}

void ChooseRecompute(TrainingOptions* options, const PassShape& pass, int64_t budget) {
  const auto stages = static_cast<size_t>(options->mesh.pp);
  options->recompute.assign(stages, {});
  // Data-parallel replicas are alike.
  std::vector<std::vector<int>> ranks(stages);
  for (int rank = 0; rank < options->mesh.ranks(); ++rank) {
    const auto world = MakeMetaCommunicator(rank, options->mesh.ranks());
    const Mesh mesh(*world, options->mesh);
    if (mesh.coordinate(MeshAxis::kDp) == 0)
      ranks[static_cast<size_t>(mesh.coordinate(MeshAxis::kPp))].push_back(rank);
  }
  std::vector<Recompute> chosen;
  for (size_t s = 0; s < stages; ++s) {
    const int blocks = DryRun(*options, pass, ranks[s][0]).blocks;
    Search search(*options, pass, s, ranks[s], budget);
    if (!search.Find(blocks, &chosen.emplace_back()))
      SHOAL_FAIL(ErrorKind::kConfig, "memory",
                 "memory.recompute = \"auto\" does not fit a rank of pipeline stage {} into {:.1f} "
                 "MB: {:.1f} MB without it, {:.1f} MB with every block recomputed. Raise "
                 "memory.budget, lower batch.micro, or shard more (zero.stage, mesh.tp, mesh.cp)",
                 s, static_cast<double>(budget) / 1e6, static_cast<double>(search.Peak({})) / 1e6,
                 static_cast<double>(search.Peak({blocks, 0})) / 1e6);
  }
  options->recompute = chosen;
}

}  // namespace shoal
