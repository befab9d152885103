// What ZeRO promises in bytes: model states per rank and what goes over the wire, against the
// formulas (docs/design.md, section 4), the planner's communicator and the wire itself.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <mutex>

#include "core/context.h"
#include "core/init.h"
#include "launch/plan.h"
#include "tests/launch/parity.h"

namespace shoal {
namespace {

using namespace testing;  // NOLINT: all of parity.h

int64_t Psi(const Recipe& recipe) { return ParameterCount(Model(recipe)); }

struct Measured {
  int64_t wire = 0;    // of one step, summed over the ranks
  int64_t states = 0;  // between steps, summed over the ranks
  std::vector<int64_t> wire_of_rank;
};

Measured Measure(const Recipe& recipe, int ranks, int64_t micro_batches) {
  Measured m;
  m.wire_of_rank.resize(static_cast<size_t>(ranks));
  std::mutex mutex;
  RunThreadRanks(ranks, 1, [&](Communicator& c) {
    TrainingStep step(Options(recipe), c);
    step.Run(Batches(recipe, step, 0, micro_batches, InOrder()), recipe.lr);
    const int64_t before = step.wire_bytes(MeshAxis::kDp);
    step.Run(Batches(recipe, step, 1, micro_batches, InOrder()), recipe.lr);
    const MemoryStats memory = ExecutionContext::Current().allocator()->stats();
    const std::lock_guard lock(mutex);
    const int64_t sent = step.wire_bytes(MeshAxis::kDp) - before;
    m.wire += sent;
    m.wire_of_rank[static_cast<size_t>(c.rank())] = sent;
    for (const MemoryClass k :
         {MemoryClass::kParameters, MemoryClass::kGradients, MemoryClass::kOptimizer})
      m.states += memory.live[static_cast<size_t>(k)];
  });
  return m;
}

class ZeroBytes : public ::testing::TestWithParam<std::tuple<int, DType>> {};

// Elements per step, summed over the ranks: k Psi (N - 1) with k = 2, 2, g + 1, at most 3 g.
TEST_P(ZeroBytes, WireIsTheFormula) {
  const auto [ranks, dtype] = GetParam();
  for (const int64_t g : {1, 3}) {
    for (int stage = 0; stage <= 3; ++stage) {
      const Recipe recipe = {.dtype = dtype, .zero_stage = stage};
      const int64_t psi = Psi(recipe), n = ranks;
      const auto value = static_cast<int64_t>(SizeOf(dtype));
      const auto gradient = static_cast<int64_t>(SizeOf(AccumulatorDType(dtype)));
      const int64_t sent = Measure(recipe, ranks, g).wire;
      // Stage 3 gathers once: the embedding, the norm and the head, and the last block; the other
      // block again in backward.
      const ModelConfig c = Model(recipe);
      const int64_t block = 4 * c.d_model * c.d_model + 3 * c.d_model * c.mlp + 2 * c.d_model;
      const int64_t gathered = psi + (c.layers - 1) * block;
      EXPECT_LE(gathered, 2 * psi);
      const int64_t expected[] = {2 * psi * gradient, psi * (gradient + value),
                                  psi * (g * gradient + value),
                                  g * (psi * gradient + gathered * value)};
      EXPECT_EQ(sent, expected[stage] * (n - 1)) << "stage " << stage << ", " << g;
    }
  }
}

// Hybrid: within each of N / S groups as above, and each rank's share once more over its replicas.
TEST(HybridBytes, WireIsTheFormula) {
  for (const int64_t g : {1, 3}) {
    for (int stage = 1; stage <= 2; ++stage) {
      const int64_t n = 6, s = 3, groups = n / s;
      const Recipe recipe = {.dtype = DType::kBF16, .zero_stage = stage, .shard_ranks = s};
      const int64_t psi = Psi(recipe), reduced = stage == 1 ? 1 : g;
      EXPECT_EQ(Measure(recipe, n, g).wire,
                groups * psi * (s - 1) * (4 * reduced + 2) + 2 * psi * (groups - 1) * 4)
          << "stage " << stage << ", " << g;
      EXPECT_EQ(Measure(recipe, n, g).states, psi * 2 * n + psi * 12 * groups);
    }
  }
}

// In a file, optimizer states take none of the ranks' memory.
TEST(OffloadBytes, StatesAreInTheFile) {
  const Recipe recipe = {
      .dtype = DType::kBF16, .zero_stage = 2, .offload_dir = ::testing::TempDir()};
  EXPECT_EQ(Measure(recipe, 2, 1).states, Psi(recipe) * 2 * 2);
}

TEST(OffloadBytes, AFolderThatIsNotThereIsAnError) {
  try {
    Measure({.offload_dir = "/nowhere"}, 1, 1);
    ADD_FAILURE() << "no error";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kStorage);
    EXPECT_NE(std::string(e.what()).find("/nowhere"), std::string::npos) << e.what();
  }
}

// Between steps gradients are gone; parameters and optimizer states are there.
TEST_P(ZeroBytes, StatesAreTheFormula) {
  const auto [ranks, dtype] = GetParam();
  for (int stage = 0; stage <= 3; ++stage) {
    const Recipe recipe = {.dtype = dtype, .zero_stage = stage};
    const int64_t psi = Psi(recipe), n = ranks;
    const auto value = static_cast<int64_t>(SizeOf(dtype));
    const auto wide = static_cast<int64_t>(SizeOf(AccumulatorDType(dtype)));
    const int64_t optimizer = (dtype == DType::kBF16 ? 3 : 2) * wide;
    const int64_t states = Measure(recipe, ranks, 1).states;
    EXPECT_EQ(states, psi * value * (stage == 3 ? 1 : n) + psi * optimizer * (stage == 0 ? n : 1))
        << "stage " << stage;
  }
}

INSTANTIATE_TEST_SUITE_P(All, ZeroBytes,
                         ::testing::Combine(::testing::Values(1, 2, 3, 5),
                                            ::testing::Values(DType::kF32, DType::kBF16)));

// 8 b s h (t - 1) elements a block and micro-batch, summed over the ranks; the embedding's output
// and the gradient of the hidden states are one all-reduce each. Partial sums are f32.
TEST(TensorBytes, WireIsTheFormula) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int tp : {2, 3, 5}) {
      const Recipe recipe = {.dtype = dtype, .tp = tp};
      std::atomic<int64_t> sent = 0;
      RunThreadRanks(tp, 1, [&](Communicator& c) {
        TrainingStep step(Options(recipe), c);
        step.Run(Batches(recipe, step, 0, 3, InOrder()), recipe.lr);
        sent += step.wire_bytes(MeshAxis::kTp);
        EXPECT_EQ(step.wire_bytes(MeshAxis::kDp), 0);
      });
      const ModelConfig c = Model(recipe);
      const int64_t bsh = kSequences * recipe.length * c.d_model;
      EXPECT_EQ(sent, (8 * c.layers + 4) * bsh * (tp - 1) * 4);
    }
  }
}

// The same blocks' bytes as sums that are scattered and gathered, in the dtype of the activations
// where nothing is summed; and the gradients of the gains, three vectors a layer but one.
TEST(SequenceParallelBytes, WireIsTheFormula) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int tp : {2, 3, 5}) {
      const Recipe recipe = {.dtype = dtype, .tp = tp, .sequence_parallel = true};
      std::atomic<int64_t> sent = 0;
      RunThreadRanks(tp, 1, [&](Communicator& c) {
        TrainingStep step(Options(recipe), c);
        step.Run(Batches(recipe, step, 0, 1, InOrder()), recipe.lr);
        sent += step.wire_bytes(MeshAxis::kTp);
      });
      const ModelConfig c = Model(recipe);
      const int64_t bsh = kSequences * recipe.length * c.d_model;
      const auto value = static_cast<int64_t>(SizeOf(dtype));
      const int64_t gains = (2 * c.layers + 1) * c.d_model;
      // Twice a block: gathered and summed forward, gathered and summed backward; the embedding
      // scatters once, the loss gathers once, and back.
      EXPECT_EQ(sent, (4 * c.layers + 2) * bsh * (tp - 1) * (4 + value) + 2 * gains * (tp - 1) * 4);
    }
  }
}

// 2 b s h elements a boundary and micro-batch; a tied head's gradient is summed once more.
TEST(PipelineBytes, WireIsTheFormula) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const bool tied : {false, true}) {
      for (const auto& [schedule, stages] :
           {std::pair("gpipe", 1), {"1f1b", 1}, {"interleaved", 2}, {"zb_h1", 1}, {"zb_v", 2}}) {
        Recipe recipe = {.dtype = dtype, .tied = tied, .pp = 3, .virtual_stages = stages};
        recipe.schedule = schedule;
        recipe.layers = 5;
        std::atomic<int64_t> sent = 0;
        std::array<std::atomic<int64_t>, 3> of_rank = {};
        RunThreadRanks(3, 1, [&](Communicator& c) {
          TrainingStep step(Options(recipe), c);
          step.Run(Batches(recipe, step, 0, 4, InOrder()), recipe.lr);
          sent += of_rank[static_cast<size_t>(c.rank())] = step.wire_bytes(MeshAxis::kPp);
        });
        const ModelConfig c = Model(recipe);
        const int64_t bsh = kSequences * recipe.length * c.d_model;
        const auto value = static_cast<int64_t>(SizeOf(dtype));
        // In zb_v the turning point is on one rank, and so are the first and the last stage.
        const bool v = recipe.schedule == "zb_v";
        const int64_t boundaries = 3 * stages - 1 - v;
        EXPECT_EQ(sent,
                  2 * bsh * value * boundaries + (tied && !v ? 2 * c.vocab * c.d_model * 4 : 0))
            << schedule << tied;
        for (int r = 0; r < 3; ++r) {
          ExecutionContext context(Device{DeviceType::kMeta});
          const ContextScope scope(context);
          const auto meta = MakeMetaCommunicator(r, 3);
          TrainingStep step(Options(recipe), *meta);
          step.Run(Batches(recipe, step, 0, 4, InOrder()), recipe.lr);
          EXPECT_EQ(step.wire_bytes(MeshAxis::kPp), of_rank[static_cast<size_t>(r)]);
        }
      }
    }
  }
}

// The planner's ranks send what real ranks send, each.
TEST(Zero, MetaRanksSendWhatRealRanksSend) {
  for (int stage = 0; stage <= 3; ++stage) {
    const Recipe recipe = {.dtype = DType::kF32, .zero_stage = stage};
    const Measured real = Measure(recipe, 3, 3);
    for (int r = 0; r < 3; ++r) {
      ExecutionContext context(Device{DeviceType::kMeta});
      const ContextScope scope(context);
      const auto meta = MakeMetaCommunicator(r, 3);
      TrainingStep step(Options(recipe), *meta);
      step.Run(Batches(recipe, step, 0, 3, InOrder()), recipe.lr);
      const int64_t before = step.wire_bytes(MeshAxis::kDp);
      step.Run(Batches(recipe, step, 1, 3, InOrder()), recipe.lr);
      EXPECT_EQ(step.wire_bytes(MeshAxis::kDp) - before, real.wire_of_rank[static_cast<size_t>(r)]);
    }
  }
}

// The paper's table for 7.5 billion parameters, in GB (figure 1 and table 1).
TEST(Zero, StatesAreThePapersTable) {
  TrainingOptions options;
  options.compute = options.gradients = DType::kBF16;
  const StateBytes states = StatesOf(options);
  const auto gb = [&](int stage, int ranks) { return states.PerRank(7.5e9, stage, ranks) / 1e9; };
  const struct {
    int ranks;
    double stage[3];
  } rows[] = {{1, {120, 120, 120}},     {4, {52.5, 41.3, 30}},     {16, {35.6, 21.6, 7.5}},
              {64, {31.4, 16.6, 1.88}}, {256, {30.4, 15.4, 0.47}}, {1024, {30.1, 15.1, 0.12}}};
  for (const auto& row : rows) {
    EXPECT_NEAR(gb(0, row.ranks), 120, 1e-9);
    for (int stage = 1; stage <= 3; ++stage)
      EXPECT_NEAR(gb(stage, row.ranks), row.stage[stage - 1], 0.05) << row.ranks;
  }
  options.gradients = DType::kF32;
  EXPECT_EQ(StatesOf(options).PerRank(1, 0, 64), 18);
  options.compute = DType::kF32;
  EXPECT_EQ(StatesOf(options).PerRank(1, 1, 4), 8 + 8.0 / 4);
}

// Frozen parameters are not updated, exchanged or given states, and stage 3 gathers them.
TEST(Zero, FrozenParameters) {
  // Freezing has to come before the optimizer is made; methods do that. Until there is one, the
  // optimizer is made by hand.
  const Recipe recipe = {.zero_stage = 0};
  std::vector<std::vector<double>> expected;
  for (int stage = 0; stage <= 3; ++stage) {
    RunThreadRanks(3, 1, [&](Communicator& c) {
      Mesh mesh(c, {.dp = 3});
      const auto model = BuildModel(Model(recipe));
      std::vector<Module*> blocks;
      for (const auto& block : model->blocks()) blocks.push_back(block.get());
      size_t frozen = 0;
      for (const auto& p : model->Parameters()) {
        const bool freeze = p->name().find("attention") != std::string::npos;
        p->set_requires_grad(!freeze);
        frozen += freeze;
      }
      ASSERT_GT(frozen, 4u);
      ZeroOptions options;
      options.stage = stage;
      options.compute = options.gradients = DType::kF64;
      ZeroOptimizer optimizer(*model, blocks, mesh, options,
                              [](const Parameter& p) { InitParameter(p, 3); });
      const Batch batch = MakeBatch(0, {c.rank() * 2, c.rank() * 2 + 1}, recipe, 65);
      const Tensor tokens = Tensor::From(batch.tokens, {2, 5});
      Placement of_replica;
      of_replica.Set(MeshAxis::kDp, AxisPlacement::Sharded(0));
      tokens.set_placement(of_replica);
      SequenceInfo info;
      info.positions = Tensor::From(batch.positions, {2, 5});
      info.token_numbers = Tensor::From(batch.token_numbers, {10});
      for (int s = 0; s < 3; ++s) {
        const Tensor hidden = model->Hidden(tokens, info);
        Backward(model->Loss(hidden, Tensor::From(batch.labels, {2, 5}), 30));
        optimizer.FinishPass(0, true);
        optimizer.FinishStep();
        optimizer.Step(1e-2, 1);
      }
      optimizer.GatherParameters();
      if (c.rank() != 0) return;
      size_t i = 0;
      for (const auto& p : model->Parameters()) {
        const std::vector<double> now = p->value().ToVector();
        if (stage == 0) {
          expected.push_back(now);
        } else {
          EXPECT_LT(ParameterDifference(expected[i++], now, 1e-2), 1e-12) << p->name();
        }
      }
    });
  }
}

}  // namespace
}  // namespace shoal
