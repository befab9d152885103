#include "launch/verify.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "launch/session.h"
#include "launch/training_step.h"

namespace shoal {
namespace {

// One rank takes the whole batch, in passes of the same size.
Config OneRank(const Config& config, const BatchPlan& plan) {
  Config one = config;
  one.mesh = MeshConfig{};
  one.zero = ZeroConfig{};
  one.pipeline = PipelineConfig{};
  one.sequence = SequenceConfig{};
  one.memory = MemoryConfig{};
  one.batch.micro = plan.micro;
  return one;
}

class Comparison {
 public:
  Comparison(const Config& config, Verification* result)
      : tolerance_(ToleranceOf(config)), lr_(config.optim.lr), result_(result) {}

  void Scalar(int64_t step, const char* what, double one, double many) {
    const double scale = std::max(std::abs(one), 1e-300);
    Take({step, what, 0, one, many}, std::abs(one - many) / scale, tolerance_.scalar);
  }

  // A gradient that is zero but for rounding moves AdamW by noise of about lr a step: differences
  // are measured against the largest value or that, whichever is more.
  void Parameter(int64_t step, const std::string& name, const std::vector<double>& one,
                 const std::vector<double>& many) {
    double largest = static_cast<double>(step) * lr_, worst = -1, squares = 0, differences = 0;
    size_t at = 0;
    for (size_t i = 0; i < one.size(); ++i) {
      const double difference = std::abs(one[i] - many[i]);
      largest = std::max(largest, std::abs(one[i]));
      squares += one[i] * one[i];
      differences += difference * difference;
      if (!(difference <= worst)) {
        worst = difference;
        at = i;
      }
    }
    if (one.empty()) return;
    const double least = lr_ * std::sqrt(static_cast<double>(one.size()));
    const double relative = tolerance_.l2
                                ? std::sqrt(differences) / std::max(std::sqrt(squares), least)
                                : worst / largest;
    Take({step, name, static_cast<int64_t>(at), one[at], many[at]}, relative, tolerance_.parameter);
  }

 private:
  void Take(Verification::Difference difference, double relative, double tolerance) {
    // A NaN on both sides is no agreement.
    if (!(relative <= result_->max_relative_difference))
      result_->max_relative_difference = relative;
    if (!(relative <= tolerance) && !result_->first) result_->first = std::move(difference);
  }

  Tolerance tolerance_;
  double lr_;
  Verification* result_;
};

}  // namespace

Tolerance ToleranceOf(const Config& config) {
  if (config.precision.compute == "fp64") return {1e-10, 1e-10, false};
  if (config.precision.compute == "bf16") return {1e-2, 2e-2, true};
  return {1e-5, config.optim.name == "sgd" ? 1e-5 : 1e-4, true};
}

Verification Verify(const Config& config, int ranks, int64_t steps) {
  const BatchPlan plan = CheckBatch(config, ranks);
  Verification result;
  result.steps = steps;
  RunThreadRanks(ranks, 0, [&](Communicator& world) {
    Config mine = config;
    const OpenedData data = OpenData(&mine);
    const TrainingOptions options = MakeTrainingOptions(mine, plan);
    TrainingStep many(options, world);
    LoadWeights(&mine, world, Ignore, many);
    many.optimizer().TakeValues();
    // The first rank also trains the twin.
    Config one_config = OneRank(mine, plan);
    const BatchPlan one_plan = CheckBatch(one_config, 1);
    const auto self = MakeSelfCommunicator();
    std::optional<TrainingStep> one;
    Comparison comparison(mine, &result);
    if (world.rank() == 0) {
      TrainingOptions alone = MakeTrainingOptions(one_config, one_plan);
      alone.gradients = options.gradients;  // as many ranks hold them
      one.emplace(alone, *self);
      LoadWeights(&one_config, *self, Ignore, *one);
      one->optimizer().TakeValues();
    }
    for (int64_t step = 1; step <= steps; ++step) {
      const TrainingStep::Result got = many.Run(
          StepBatches(mine, plan, *data.loader, step, many.mesh().coordinate(MeshAxis::kDp)),
          mine.optim.lr);
      if (one) {
        const TrainingStep::Result expected =
            one->Run(StepBatches(one_config, one_plan, *data.loader, step, 0), mine.optim.lr);
        comparison.Scalar(step, "loss", expected.loss, got.loss);
        comparison.Scalar(step, "grad_norm", expected.grad_norm, got.grad_norm);
      }
      many.optimizer().GatherParameters();
      for (const TrainingStep::Known& parameter : many.parameters()) {
        const std::vector<double> whole = many.Whole(parameter);
        if (one) comparison.Parameter(step, parameter.name, one->Whole(parameter), whole);
      }
    }
  });
  return result;
}

std::string VerificationJson(const Verification& v) {
  nlohmann::ordered_json json = {{"equal", !v.first.has_value()},
                                 {"max_relative_difference", v.max_relative_difference},
                                 {"first_difference", nullptr},
                                 {"steps", v.steps}};
  if (v.first) {
    json["first_difference"] = {{"step", v.first->step},
                                {"what", v.first->what},
                                {"index", v.first->index},
                                {"one_rank", v.first->one_rank},
                                {"ranks", v.first->ranks}};
  }
  return json.dump(2);
}

std::string VerificationText(const Verification& v, const Config& config, int ranks) {
  const Tolerance t = ToleranceOf(config);
  std::string text = fmt::format(
      "{} ranks against one, {} steps in {}: largest relative difference {:.2g} (allowed: {:.0e} "
      "in "
      "loss and norm, {:.0e} in parameters)\n",
      ranks, v.steps, config.precision.compute, v.max_relative_difference, t.scalar, t.parameter);
  if (!v.first) return text + "equal\n";
  const bool scalar = v.first->what == "loss" || v.first->what == "grad_norm";
  return text + fmt::format(
                    "different: at step {}, {}{} is {:.17g} on one rank and {:.17g} on {}\n",
                    v.first->step, v.first->what, scalar ? "" : fmt::format("[{}]", v.first->index),
                    v.first->one_rank, v.first->ranks, ranks);
}

}  // namespace shoal
