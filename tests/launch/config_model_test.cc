// What follows from several keys: the batch dealt onto ranks, the model's shape.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "launch/config.h"
#include "models/presets.h"
#include "tests/launch/config_mistakes.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;

TEST(ConfigBatch, DealsSequencesOntoRanks) {
  Config c = Minimal({"batch.sequences=24", "batch.micro=2"});
  const BatchPlan plan = CheckBatch(c, 3);
  EXPECT_EQ(plan.dp, 3);
  EXPECT_EQ(plan.per_replica, 8);
  EXPECT_EQ(plan.micro, 2);
  EXPECT_EQ(plan.micro_batches, 4);
  EXPECT_EQ(CheckBatch(Minimal(), 1).micro, 8);
  c.mesh.tp = 2;
  EXPECT_EQ(CheckBatch(c, 6).dp, 3);
}

TEST(ConfigBatch, SaysWhatWouldDo) {
  const auto batch = [](int64_t ranks, const std::vector<std::string>& overrides) {
    return Mistake([&] { CheckBatch(Minimal(overrides), ranks); });
  };
  EXPECT_THAT(batch(3, {}), HasSubstr("batch.sequences 8 is not divisible by 3"));
  EXPECT_THAT(batch(3, {}), HasSubstr("set it to 6 or 9"));
  EXPECT_THAT(batch(9, {}), HasSubstr("more ranks than sequences"));
  EXPECT_THAT(batch(9, {}), HasSubstr("at most 8 ranks, or set batch.sequences to 9"));
  EXPECT_THAT(batch(2, {"batch.micro=3"}), HasSubstr("set batch.micro to 2 or 4"));
  EXPECT_THAT(batch(2, {"batch.micro=5"}),
              HasSubstr("set batch.micro to 4, or batch.sequences to 10"));
  EXPECT_THAT(batch(2, {"mesh.dp=3"}), HasSubstr("makes 3 ranks, but there are 2"));
  EXPECT_THAT(batch(3, {"mesh.tp=2"}), HasSubstr("start 2 or 4 ranks"));
  EXPECT_THAT(batch(1, {"mesh.tp=2"}), HasSubstr("start 2 ranks"));
}

TEST(ConfigBatch, HybridAttentionNeedsGroups) {
  const auto said = [](int64_t cp, std::vector<std::string> more) {
    more.push_back("mesh.cp=" + std::to_string(cp));
    return Mistake([&] { CheckBatch(Minimal(more), cp); });
  };
  const std::string hybrid = "sequence.schedule=hybrid";
  EXPECT_EQ(said(4, {hybrid}), "");
  EXPECT_EQ(said(12, {hybrid, "sequence.ulysses=6"}), "");
  EXPECT_THAT(said(8, {hybrid, "sequence.ulysses=3"}), HasSubstr("set it to one of 2, 4"));
  EXPECT_THAT(said(8, {hybrid, "sequence.ulysses=8"}), HasSubstr("set it to one of 2, 4"));
  for (const int64_t cp : {1, 2, 3, 5})
    EXPECT_THAT(said(cp, {hybrid}), HasSubstr("set mesh.cp to 4, 6, 8"));
  EXPECT_THAT(said(4, {"sequence.ulysses=2"}), HasSubstr("not of \"auto\""));
  EXPECT_THAT(said(4, {"sequence.ulysses=2", "sequence.schedule=ulysses"}),
              HasSubstr("set the schedule to \"hybrid\""));
}

TEST(ConfigBatch, EveryAdviceWorks) {
  for (int64_t sequences = 1; sequences <= 13; ++sequences)
    for (int64_t micro = 1; micro <= 9; ++micro)
      for (int64_t ranks = 1; ranks <= 7; ++ranks) {
        Config c = Minimal();
        c.batch.sequences = sequences;
        c.batch.micro = micro;
        const std::string mistake = Mistake([&] { CheckBatch(c, ranks); });
        if (mistake.empty()) {
          const BatchPlan plan = CheckBatch(c, ranks);
          EXPECT_EQ(plan.dp * plan.micro * plan.micro_batches, sequences);
          continue;
        }
        // The last number of the advice makes the next try one mistake better.
        std::string left = mistake;
        for (int tries = 0; tries < 2 && !left.empty(); ++tries) {
          const size_t advice = left.rfind(" to ");
          ASSERT_NE(advice, std::string::npos) << left;
          c.batch.sequences = std::stoll(left.substr(advice + 4));
          left = Mistake([&] { CheckBatch(c, ranks); });
        }
        EXPECT_EQ(left, "") << mistake;
      }
}

TEST(ConfigModel, FamilyDefaultsFollowFromWhatIsGiven) {
  std::string text = kMinimal;
  text.replace(text.find("preset = \"llama-60m\""), 20, "family = \"llama\"   ");
  Config c = ParseConfig(text, "c.toml", {"model.d_model=512"});
  EXPECT_THAT(Mistake([&] { ModelShape(c); }), HasSubstr("model.vocab is not known"));
  ResolveModel(&c, 257);
  const ModelConfig shape = ModelShape(c);
  EXPECT_EQ(shape.vocab, 257);
  EXPECT_EQ(shape.heads, 8);
  EXPECT_EQ(shape.kv_heads, 8);
  EXPECT_EQ(shape.mlp, 1376);  // as LLaMA 60M
  EXPECT_EQ(shape.context, 256);
  EXPECT_FALSE(shape.tied);
  text.replace(text.find("\"llama\""), 7, "\"gpt2\" ");
  c = ParseConfig(text, "c.toml", {"model.d_model=65", "model.vocab=65"});
  EXPECT_EQ(ModelShape(c).heads, 1);
  EXPECT_EQ(ModelShape(c).mlp, 260);
  EXPECT_TRUE(ModelShape(c).tied);
}

TEST(ConfigModel, PresetWithOtherSizes) {
  const ModelConfig shape =
      ModelShape(Minimal({"model.vocab=257", "model.heads=4", "model.layers=2"}));
  EXPECT_EQ(shape.vocab, 257);
  EXPECT_EQ(shape.layers, 2);
  EXPECT_EQ(shape.heads, 4);
  EXPECT_EQ(shape.kv_heads, 4);
  EXPECT_EQ(shape.head_dim, 128);
  EXPECT_EQ(shape.mlp, 1376);
  const ModelConfig grouped = ModelShape(Minimal({"model.preset=llama-8b", "model.heads=16"}));
  EXPECT_EQ(grouped.kv_heads, 8);
}

TEST(ConfigModel, SizesThatDoNotFit) {
  EXPECT_THAT(MistakeOf("model.heads=3"), HasSubstr("set heads to 2 or 4"));
  EXPECT_THAT(MistakeOf("model.kv_heads=3"), HasSubstr("kv_heads 3 does not divide heads 8"));
  EXPECT_THAT(MistakeOf("model.head_dim=63"), HasSubstr("odd"));
  EXPECT_THAT(Mistake([] {
                Minimal({"model.preset=gpt2-124m", "model.kv_heads=6"});
              }),
              HasSubstr("gpt2 has as many"));
  EXPECT_THAT(Mistake([] {
                Minimal({"model.preset=gpt2-124m", "data.sequence_length=1025"});
              }),
              HasSubstr("set model.context to 1025"));
  EXPECT_THAT(MistakeOf("model.context=255"), HasSubstr("longer than the model's context 255"));
  EXPECT_EQ(ModelShape(Minimal({"data.sequence_length=4097"})).context, 4097);
  EXPECT_THAT(Mistake([] {
                Config c = Minimal({"model.vocab=256"});
                ResolveModel(&c, 257);
              }),
              HasSubstr("set model.vocab to 257"));
}

TEST(ConfigModel, FromTakesTheShapeOfTheWeights) {
  std::string text = kMinimal;
  text.replace(text.find("preset = \"llama-60m\""), 20, "from = \"/weights\"   ");
  Config c = ParseConfig(text, "c.toml",
                         {"model.dropout=0.1", "model.attention_dropout=0.2", "model.context=512"});
  EXPECT_THAT(Mistake([&] { ModelShape(c); }), HasSubstr("have not been read"));
  ResolveModelFrom(&c, *FindPreset("gpt2-124m"));
  const ModelConfig shape = ModelShape(c);
  EXPECT_EQ(shape.family, "gpt2");
  EXPECT_EQ(shape.layers, 12);
  EXPECT_EQ(shape.dropout, 0.1);
  EXPECT_EQ(shape.attention_dropout, 0.2);
  EXPECT_EQ(shape.context, 512);
  EXPECT_EQ(ParseConfig(WriteConfig(c), "resolved"), c);
  Config wrong = ParseConfig(text, "c.toml", {"model.layers=3"});
  EXPECT_THAT(Mistake([&] { ResolveModelFrom(&wrong, *FindPreset("gpt2-124m")); }),
              HasSubstr("model.layers is 3 in the configuration, but 12 in the weights"));
}

TEST(ConfigSupported, NamesTheKey) {
  EXPECT_EQ(Mistake([] { CheckSupported(Minimal()); }), "");
  for (const char* text : {"mesh.ep=2", "method.name=lora"}) {
    const Config c = Minimal({text});
    const std::string key = std::string(text).substr(0, std::string(text).find('='));
    EXPECT_THAT(Mistake([&] { CheckSupported(c); }), HasSubstr(key));
  }
}

TEST(ConfigSupported, WhatCannotBeTogether) {
  const auto said = [](const std::vector<std::string>& more) {
    return Mistake([&] { CheckSupported(Minimal(more)); });
  };
  EXPECT_THAT(said({"optim.in_backward=true"}), HasSubstr("set optim.clip = 0"));
  EXPECT_THAT(said({"optim.in_backward=true", "optim.clip=0", "optim.non_finite=skip"}),
              HasSubstr("optim.non_finite = \"halt\""));
  EXPECT_EQ(said({"optim.in_backward=true", "optim.clip=0"}), "");
  EXPECT_EQ(said({"memory.compress_activations=bf16"}), "");
  EXPECT_THAT(said({"memory.compress_activations=bf16", "precision.compute=bf16"}),
              HasSubstr("set it to \"int8\""));
}

TEST(ConfigSupported, TheBestSaveNeedsValidations) {
  const auto said = [](std::vector<std::string> more) {
    more.emplace_back("checkpoint.keep_best=true");
    return Mistake([&] { CheckSupported(Minimal(more)); });
  };
  EXPECT_THAT(said({}), HasSubstr("run.validate_every to a divisor of checkpoint.every"));
  EXPECT_THAT(said({"data.validation_fraction=0.1", "checkpoint.every=10", "run.validate_every=4"}),
              HasSubstr("run.validate_every to 2 or 5"));
  EXPECT_EQ(said({"data.validation_fraction=0.1", "checkpoint.every=10", "run.validate_every=5"}),
            "");
}

}  // namespace
}  // namespace shoal
