#include "models/presets.h"

#include <gtest/gtest.h>

#include "core/base/error.h"

namespace shoal {
namespace {

TEST(Presets, HaveTheSizesOfTheirNames) {
  const struct {
    const char* name;
    double millions;
  } published[] = {{"gpt2-124m", 124.4},   {"gpt2-350m", 354.8}, {"gpt2-774m", 774.0},
                   {"gpt2-1.5b", 1557.6},  {"llama-60m", 58.1},  {"llama-130m", 134.1},
                   {"llama-350m", 367.97}, {"llama-1b", 1339.1}, {"llama-7b", 6738.4},
                   {"llama-8b", 8030.3}};
  EXPECT_EQ(PresetNames().size(), std::size(published));
  for (const auto& [name, millions] : published) {
    const ModelConfig* preset = FindPreset(name);
    ASSERT_NE(preset, nullptr) << name;
    EXPECT_NO_THROW(CheckModelConfig(*preset));
    EXPECT_NEAR(ParameterCount(*preset) / 1e6, millions, millions * 1e-3) << name;
  }
  EXPECT_EQ(FindPreset("llama-60"), nullptr);
}

TEST(Presets, SizesThatDoNotFitAreRefused) {
  ModelConfig config = *FindPreset("llama-8b");
  config.kv_heads = 5;
  EXPECT_THROW(CheckModelConfig(config), Error);
  config = *FindPreset("llama-8b");
  config.family = "bert";
  EXPECT_THROW(CheckModelConfig(config), Error);
  config = *FindPreset("gpt2-124m");
  config.layers = 0;
  EXPECT_THROW(CheckModelConfig(config), Error);
}

}  // namespace
}  // namespace shoal
