// MLPs over chunks of rows: the same numbers on any layout, and memory of the chunk's size.
#include "memory/chunked_mlp.h"

#include <gtest/gtest.h>

#include <mutex>

#include "core/context.h"
#include "core/init.h"
#include "launch/dry_run.h"
#include "tests/launch/parity.h"

namespace shoal {
namespace {

using namespace testing;  // NOLINT: all of parity.h

std::vector<Layout> Layouts() {
  const auto none = [](Recipe&) {};
  return {
      {"one rank", 1, none},
      {"accumulation", 1, none, 3},
      {"full recompute", 1, [](Recipe& r) { r.recompute = true; }},
      {"selective recompute", 1, [](Recipe& r) { r.selective = true; }},
      {"updates in backward", 2, [](Recipe& r) { r.in_backward = true; }},
      {"zero 2", 3, [](Recipe& r) { r.zero_stage = 2; }},
      {"zero 3", 3,
       [](Recipe& r) {
         r.zero_stage = 3;
         r.recompute = true;
       },
       3},
      {"tp 3", 3, [](Recipe& r) { r.tp = 3; }},
      {"sequence-parallel norms", 4,
       [](Recipe& r) {
         r.tp = 4;
         r.sequence_parallel = true;
       }},
      {"the same, recomputed, of a pipeline", 6,
       [](Recipe& r) {
         r.tp = 3;
         r.pp = 2;
         r.sequence_parallel = r.recompute = true;
       },
       3},
      {"token ring", 3,
       [](Recipe& r) {
         r.cp = 3;
         r.attention = SequenceKind::kTokenRing;
       }},
      {"a rank without tokens", 4, [](Recipe& r) { r.cp = 4; }},
      {"split backward", 2,
       [](Recipe& r) {
         r.pp = 2;
         r.schedule = "zb_h1";
       },
       3},
      {"zb_v with zero and tp", 8,
       [](Recipe& r) {
         r.pp = r.virtual_stages = r.tp = 2;
         r.zero_stage = 2;
         r.schedule = "zb_v";
       },
       3},
  };
}

// Every `step`-th layout.
void CheckLayouts(const char* model, size_t step) {
  Recipe recipe = {.model = model, .steps = 2, .unclipped = true};
  recipe.layers = 4;
  const Outcome one = OneRank(recipe);
  Recipe chunked = recipe;
  chunked.mlp_chunk_rows = 7;  // cuts no number of rows here evenly
  CompareLayouts(chunked, one, Layouts(), step);
}

TEST(ParityChunkedMlp, AnyLayout) { CheckLayouts("llama-gqa-tied", 1); }
TEST(ParityChunkedMlp, Gpt2) { CheckLayouts("gpt2", 4); }
TEST(LongParityChunkedMlp, Gpt2OnAnyLayout) { CheckLayouts("gpt2", 1); }

TEST(ChunkedMlp, AnySizeOfChunks) {
  Recipe recipe = {.model = "llama", .steps = 2};
  const Outcome one = OneRank(recipe);
  for (const int64_t rows : {int64_t{1}, kSequences * 5 - 1, kSequences * 5, int64_t{1} << 40}) {
    recipe.mlp_chunk_rows = rows;
    Compare(recipe, one, TrainOn(recipe, 1, 1).outcome, 1e-10, 1e-10);
  }
}

// In bf16, per token of a block: all but what is as wide as the MLP; and while a block is computed
// or replayed, that of a chunk.
TEST(ChunkedMlp, KeepsNothingOfItsWidth) {
  constexpr int64_t kTokens = kSequences * 16;
  for (const char* model : {"llama", "gpt2"}) {
    Recipe recipe = {.model = model, .dtype = DType::kBF16, .length = 16, .steps = 1};
    const ModelConfig c = Model(recipe);
    const auto peak = [&](int layers) {
      recipe.layers = layers;
      return TrainOn(recipe, 1, 1).peak(MemoryClass::kActivations);
    };
    const int64_t whole = peak(4);
    recipe.mlp_chunk_rows = 32;
    const int64_t h = c.d_model, kv = 2 * c.kv_heads * c.head_dim, lse = 4 * c.heads;
    const int64_t norms = recipe.model == "llama" ? 2 * 4 : 4 * 4;
    EXPECT_EQ(peak(7) - peak(4), 3 * kTokens * (2 * (6 * h + kv) + norms + lse));
    EXPECT_LT(peak(4), whole);
    recipe.recompute = true;
    EXPECT_EQ(peak(7) - peak(4), 3 * kTokens * (4 * h + lse));
    const int64_t chunked = peak(4);
    recipe.mlp_chunk_rows = 0;
    EXPECT_LT(chunked, peak(4));
  }
}

TEST(ChunkedMlp, TakesWhatIsPlanned) {
  Recipe recipe = {.model = "llama", .dtype = DType::kBF16, .length = 16, .steps = 2, .tp = 2};
  recipe.mlp_chunk_rows = 100;
  for (const bool recompute : {false, true}) {
    recipe.recompute = recompute;
    TrainingOptions options = Options(recipe);
    // Then chunks add to wider ones.
    if (recompute) options.gradients = DType::kBF16;
    options.mesh.dp = 1;
    std::mutex mutex;
    RunThreadRanks(2, 1, [&](Communicator& c) {
      TrainingStep step(options, c);
      step.Run(Batches(recipe, step, 0, 1, InOrder()), recipe.lr);
      const MemoryStats real = ExecutionContext::Current().allocator()->stats();
      const RankPlan planned = DryRun(options, {kSequences, false}, c.rank());
      const std::lock_guard lock(mutex);
      for (int i = 0; i < kMemoryClasses; ++i) {
        // Of these batches not every token has a label: the loss gathers those that have.
        if (static_cast<MemoryClass>(i) == MemoryClass::kWorkspace) continue;
        EXPECT_EQ(real.peak[static_cast<size_t>(i)], planned.memory.peak[static_cast<size_t>(i)])
            << i;
      }
      EXPECT_EQ(step.wire_bytes(MeshAxis::kTp),
                planned.wire_bytes[static_cast<size_t>(MeshAxis::kTp)]);
    });
  }
}

// In bf16, chunk by chunk: rounded once, as by a single product. A rounding for each of these
// chunks would add up to several times that.
TEST(ChunkedMlp, GradientsAreRoundedOnce) {
  constexpr int64_t kRows = 512;
  for (const char* family : {"llama", "gpt2"}) {
    const ModelConfig c = Model({.model = family});
    const auto gradients = [&](DType dtype, int64_t chunk) {
      const auto model = BuildModel(c);
      MaterializeParameters(*model, DType::kBF16, 3);
      UnaryModule* mlp = nullptr;
      model->Walk([&](const std::string& path, Module& m) {
        if (path == "blocks.0.mlp") mlp = dynamic_cast<UnaryModule*>(&m);
      });
      const auto parameters = model->Parameters();
      for (const auto& p : parameters) p->leaf().grad_dtype = dtype;
      if (chunk > 0) ApplyChunkedMlp(*model, "blocks.0.mlp", chunk);
      std::mt19937 random(1);
      std::normal_distribution<float> normal;
      const auto draw = [&] {
        std::vector<float> values(static_cast<size_t>(kRows * c.d_model));
        for (float& v : values) v = normal(random);
        return Tensor::From(values, {kRows, c.d_model}).To(DType::kBF16);
      };
      const Tensor x = draw(), dy = draw();
      // Twice, as micro-batches do.
      for (int pass = 0; pass < 2; ++pass) Backward((*mlp)(x), dy);
      std::vector<double> all;
      for (const auto& p : parameters) {
        if (!p->leaf().grad.defined()) continue;
        EXPECT_EQ(p->leaf().grad.dtype(), dtype);
        const std::vector<double> values = p->leaf().grad.ToVector();
        all.insert(all.end(), values.begin(), values.end());
      }
      return all;
    };
    const std::vector<double> exact = gradients(DType::kF32, 0);
    for (const int64_t chunk : {0, 1, 100}) {
      const std::vector<double> rounded = gradients(DType::kBF16, chunk);
      ASSERT_EQ(rounded.size(), exact.size());
      double off = 0, norm = 0;
      for (size_t i = 0; i < exact.size(); ++i) {
        off += (rounded[i] - exact[i]) * (rounded[i] - exact[i]);
        norm += exact[i] * exact[i];
      }
      EXPECT_LT(std::sqrt(off / norm), 2.5e-3) << family << " " << chunk;
    }
  }
}

}  // namespace
}  // namespace shoal
