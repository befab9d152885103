// Directories that transformers wrote (make_hugging_face.py) are the models that they were there.
#include "launch/hugging_face.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "launch/session.h"

namespace shoal {
namespace {

TEST(HuggingFaceGolden, TransformersDirectoriesHaveTheirLoss) {
  const std::string folder = std::string(SHOAL_SOURCE_DIR) + "/tests/golden/hugging_face/";
  std::ifstream in(folder + "losses.json");
  const auto losses = nlohmann::json::parse(in);
  ASSERT_EQ(losses.size(), 3u);
  for (const auto& [name, expected] : losses.items()) {
    ASSERT_TRUE(IsHuggingFace(folder + name));
    const LoadedModel loaded = LoadModel(folder + name, DType::kF64);
    constexpr int64_t kRows = 3, kTokens = 11;
    const int64_t vocab = loaded.model->config().vocab;
    std::vector<int32_t> tokens, labels, positions;
    for (int64_t b = 0; b < kRows; ++b) {
      for (int64_t t = 0; t < kTokens; ++t) {
        tokens.push_back(static_cast<int32_t>((31 * t + 17 * b) % vocab));
        labels.push_back(static_cast<int32_t>((31 * (t + 1) + 17 * b) % vocab));
        positions.push_back(static_cast<int32_t>(t));
      }
    }
    const NoGrad no_grad;
    const Dims shape = {kRows, kTokens};
    SequenceInfo info;
    info.positions = Tensor::From(positions, shape);
    const Tensor hidden = loaded.model->Hidden(Tensor::From(tokens, shape), info);
    const double loss =
        loaded.model->Loss(hidden, Tensor::From(labels, shape), kRows * kTokens).Item();
    // In its LLaMA the norms and the rotation are f32 whatever the dtype.
    const double tolerance = name == "gpt2" ? 1e-12 : 2e-6;
    EXPECT_NEAR(loss, expected.get<double>(), tolerance * loss) << name;
  }
}

}  // namespace
}  // namespace shoal
