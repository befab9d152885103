// The executor: passes that take a known time take as long together as the simulator says, and
// nothing hangs when a stage fails.
#include "parallel/pipeline.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "core/parameter.h"
#include "parallel/pipeline_simulator.h"

namespace shoal {
namespace {

void SleepMs(double ms) {
  std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(ms));
}

// x -> x + w, and each pass takes its time.
Tensor SleepyStage(const Tensor& x, const Parameter& w, const PipelineCosts& costs) {
  SleepMs(costs.forward[0]);
  const Tensor use = w.Use();
  return Record(
      "sleepy", x.Clone(), {x, use}, {},
      [input = costs.backward_input[0], weight = costs.backward_weight[0]](GradContext& c) {
        // The first stage's input wants no gradient, and takes its time nevertheless.
        if (c.Needs(0)) {
          SleepMs(input);
          c.Give(0, c.grad());
        }
        if (c.Needs(1)) {
          SleepMs(weight);
          c.Give(1, c.grad());
        }
      });
}

struct Timed {
  PipelineSimulation measured, expected;
};

Timed RunSleepy(const std::string& kind, int ranks, int chunks, int micro_batches,
                const PipelineCosts& costs) {
  const PipelineSchedule schedule = MakePipelineSchedule(kind, ranks, chunks, micro_batches);
  std::vector<std::vector<PipelineSimulation::Span>> spans(static_cast<size_t>(ranks));
  RunThreadRanks(ranks, 1, [&](Communicator& c) {
    std::vector<std::shared_ptr<Parameter>> weights;
    for (int i = 0; i < chunks; ++i) {
      weights.push_back(
          std::make_shared<Parameter>(Dims{1}, std::vector<std::string>{"embed"}, InitSpec{}));
      weights.back()->Materialize(DType::kF64);
      weights.back()->value().Fill(0);
    }
    PipelineExecutor executor(schedule, c);
    PipelineWork work;
    work.forward = [&](int chunk, int, const Tensor& in) {
      Tensor x = in;
      if (!x.defined()) {
        x = Tensor::Full({1}, DType::kF64, 1);
        auto leaf = std::make_shared<Leaf>(x.shape(), x.dtype());
        leaf->weight = false;
        x.set_node(std::move(leaf));
      }
      return SleepyStage(x, *weights[static_cast<size_t>(chunk)], costs);
    };
    work.boundary = [](int) { return Tensor::Empty({1}, DType::kF64); };
    int shares = 0;
    work.shared = [&](int, bool) { ++shares; };
    c.Barrier();
    const double loss = executor.Run(work);
    const int last = schedule.Holder(schedule.stages() - 1).first;
    EXPECT_EQ(loss, c.rank() == last ? micro_batches : 0);
    EXPECT_EQ(shares, chunks * micro_batches);
    for (const auto& weight : weights) EXPECT_EQ(weight->leaf().grad.Item(), micro_batches);
    spans[static_cast<size_t>(c.rank())] = executor.spans();
    // An element each way and micro-batch over each boundary.
    int64_t boundaries = 0;
    for (const PipelineAction& a : schedule.actions[static_cast<size_t>(c.rank())])
      boundaries += IsSend(a.op);
    EXPECT_EQ(executor.wire_bytes(), 8 * boundaries);
  });
  return {MeasuredPipeline(schedule, std::move(spans)), SimulatePipeline(schedule, costs)};
}

// Passes of 30 ms and more, so that what is beside them does not count.
TEST(TimedPipeline, BubblesAreTheFormulas) {
  const PipelineCosts even = {{30}, {30}, {30}}, uneven = {{30}, {45}, {30}};
  struct Case {
    std::string kind;
    int ranks, chunks, micro_batches;
    PipelineCosts costs;
    double bubble;  // over ideal
  };
  const std::vector<Case> cases = {
      {"gpipe", 4, 1, 8, even, 3.0 / 8},
      {"1f1b", 4, 1, 8, even, 3.0 / 8},
      {"interleaved", 2, 2, 4, even, 1.0 / 8},
      {"zb_h1", 4, 1, 8, even, 3.0 / 24},
      {"zb_h1", 3, 1, 4, uneven, 2.0 * 45 / (4 * 105)},
      {"zb_v", 3, 2, 6, even, 2.0 / 36},
  };
  for (const Case& test : cases) {
    // Sleeps are never short; another program may make them long once.
    double best = 1e9;
    for (int attempt = 0; attempt < 10; ++attempt) {
      const Timed t = RunSleepy(test.kind, test.ranks, test.chunks, test.micro_batches, test.costs);
      EXPECT_NEAR(t.expected.bubble, test.bubble, 1e-12) << test.kind;
      best = std::min(best, 1000 * t.measured.makespan / t.expected.makespan);
      if (best < 1.05) break;
    }
    EXPECT_GT(best, 0.999) << test.kind;
    EXPECT_LT(best, 1.05) << test.kind;
  }
}

// Any kind of failure on any rank ends all of them, with its own error.
TEST(PipelineExecutor, AFailedStageEndsTheOthers) {
  for (int failing = 0; failing < 3; ++failing) {
    for (const char* kind : {"gpipe", "1f1b", "zb_h1"}) {
      const auto run = [&] {
        RunThreadRanks(3, 1, [&](Communicator& c) {
          PipelineExecutor executor(MakePipelineSchedule(kind, 3, 1, 5), c);
          PipelineWork work;
          int forwards = 0;
          work.forward = [&](int, int, const Tensor& in) -> Tensor {
            if (c.rank() == failing && ++forwards == 3) throw std::runtime_error("stage");
            const Tensor x = in.defined() ? in : Tensor::Full({4}, DType::kF64, 1);
            return c.rank() == 2 ? Tensor::Full({1}, DType::kF64, 1) : x.Clone();
          };
          work.boundary = [](int) { return Tensor::Empty({4}, DType::kF64); };
          work.shared = [](int, bool) {};
          executor.Run(work);
        });
      };
      EXPECT_THROW(run(), std::exception) << kind << " " << failing;
    }
  }
}

TEST(PipelineCut, TheCostliestStageIsAsCheapAsCanBe) {
  // 30 blocks on 4 stages, all of them, with a head as heavy as 5.
  std::vector<double> costs(32, 1);
  costs.front() = 0.01;
  costs.back() = 5;
  EXPECT_EQ(CutIntoStages(costs, 4), (std::vector<int>{0, 9, 18, 27, 32}));
  EXPECT_EQ(CutIntoStages(std::vector<double>{1, 1, 1}, 3), (std::vector<int>{0, 1, 2, 3}));
  EXPECT_EQ(CutIntoStages(std::vector<double>{1}, 1), (std::vector<int>{0, 1}));
  EXPECT_THROW(CutIntoStages(std::vector<double>{1, 1}, 3), Error);
}

}  // namespace
}  // namespace shoal
