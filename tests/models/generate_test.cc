#include "models/generate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "core/init.h"
#include "models/registry.h"

namespace shoal {
namespace {

std::shared_ptr<LanguageModel> Model(const std::string& family) {
  ModelConfig c;
  c.family = family;
  c.layers = 2;
  c.d_model = 24;
  c.heads = 6;
  c.kv_heads = family == "llama" ? 2 : 6;
  c.head_dim = 4;
  c.mlp = 40;
  c.vocab = 33;
  c.context = 16;
  c.tied = family == "gpt2";
  auto model = BuildModel(c);
  MaterializeParameters(*model, DType::kF64, 3);
  // Larger weights than initial ones, so that the logits tell tokens apart.
  for (const auto& p : model->Parameters()) {
    if (!p->decays()) continue;
    double* values = p->value().data<double>();
    for (int64_t i = 0; i < p->value().numel(); ++i) values[i] *= 20;
  }
  return model;
}

std::vector<double> LogitsAt(LanguageModel& model, const std::vector<int32_t>& text, int64_t begin,
                             KvCache* cache) {
  const NoGrad no_grad;
  const int64_t t = static_cast<int64_t>(text.size()) - begin;
  std::vector<int32_t> positions(static_cast<size_t>(t));
  std::iota(positions.begin(), positions.end(), static_cast<int32_t>(begin));
  SequenceInfo info;
  info.positions = Tensor::From(positions, {1, t});
  info.cache = cache;
  const std::vector<int32_t> fresh(text.begin() + begin, text.end());
  const Tensor hidden = model.Hidden(Tensor::From(fresh, {1, t}), info);
  if (cache != nullptr) cache->length += t;
  return model.Logits(hidden.Narrowed(1, t - 1, 1).Clone()).ToVector();
}

class Generation : public ::testing::TestWithParam<std::string> {};

// Token by token over the cache is the whole text at once.
TEST_P(Generation, CacheChangesNothing) {
  const auto model = Model(GetParam());
  std::vector<int32_t> text = {5, 1, 32, 7};
  KvCache cache = model->MakeCache(1, 16, DType::kF64);
  int64_t begin = 0;
  for (int i = 0; i < 12; ++i) {
    const std::vector<double> whole = LogitsAt(*model, text, 0, nullptr),
                              cached = LogitsAt(*model, text, begin, &cache);
    double largest = 0;
    for (double l : whole) largest = std::max(largest, std::abs(l));
    for (size_t v = 0; v < whole.size(); ++v)
      EXPECT_NEAR(whole[v], cached[v], 1e-12 * largest) << "token " << i;
    begin = static_cast<int64_t>(text.size());
    text.push_back(
        static_cast<int32_t>(std::max_element(whole.begin(), whole.end()) - whole.begin()));
  }
}

TEST_P(Generation, GreedyIsTheLikeliestToken) {
  const auto model = Model(GetParam());
  std::vector<int32_t> text = {5, 1};
  GenerateOptions options;
  options.tokens = 10;
  options.temperature = 0;
  for (int32_t id : Generate(*model, text, options)) {
    const std::vector<double> logits = LogitsAt(*model, text, 0, nullptr);
    EXPECT_EQ(id, std::max_element(logits.begin(), logits.end()) - logits.begin());
    text.push_back(id);
  }
  EXPECT_EQ(text.size(), 12u);
}

TEST_P(Generation, GoesOnBeyondTheContext) {
  const auto model = Model(GetParam());
  GenerateOptions options;
  options.tokens = 60;
  const std::vector<int32_t> prompt(25, 3);  // longer than the context
  EXPECT_EQ(Generate(*model, prompt, options).size(), 60u);
}

INSTANTIATE_TEST_SUITE_P(Families, Generation, ::testing::Values("llama", "gpt2"));

TEST(Generate, TheSeedDecides) {
  const auto model = Model("llama");
  const auto with = [&](uint64_t seed) {
    GenerateOptions options;
    options.tokens = 14;
    options.seed = seed;
    return Generate(*model, std::vector<int32_t>{1}, options);
  };
  EXPECT_EQ(with(1), with(1));
  EXPECT_NE(with(1), with(2));
}

TEST(Generate, LimitsAreKept) {
  const auto model = Model("llama");
  const std::vector<double> logits = LogitsAt(*model, {4}, 0, nullptr);
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  const auto first_tokens = [&](GenerateOptions options) {
    options.tokens = 1;
    std::set<int32_t> seen;
    for (options.seed = 0; options.seed < 400; ++options.seed) {
      for (int32_t id : Generate(*model, std::vector<int32_t>{4}, options)) seen.insert(id);
    }
    return seen;
  };
  GenerateOptions flat;
  flat.temperature = 50;  // nearly uniform
  EXPECT_GT(first_tokens(flat).size(), 25u);
  flat.top_k = 3;
  EXPECT_EQ(first_tokens(flat), (std::set<int32_t>{order[0], order[1], order[2]}));
  GenerateOptions nucleus;
  nucleus.top_p = 1e-9;
  EXPECT_EQ(first_tokens(nucleus), (std::set<int32_t>{order[0]}));
  GenerateOptions limited;
  limited.temperature = 50;
  limited.vocab_limit = 5;
  for (int32_t id : first_tokens(limited)) EXPECT_LT(id, 5);
}

// The frequencies of 4000 draws are the softmax's.
TEST(Generate, DrawsFromTheDistribution) {
  const auto model = Model("gpt2");
  std::vector<double> p = LogitsAt(*model, {4}, 0, nullptr);
  const double highest = *std::max_element(p.begin(), p.end());
  for (double& v : p) v = std::exp((v - highest) / 2);
  const double total = std::accumulate(p.begin(), p.end(), 0.0);
  std::map<int32_t, int> counts;
  GenerateOptions options;
  options.tokens = 1;
  options.temperature = 2;
  constexpr int kDraws = 4000;
  for (options.seed = 0; options.seed < kDraws; ++options.seed) {
    ++counts[Generate(*model, std::vector<int32_t>{4}, options)[0]];
  }
  for (size_t v = 0; v < p.size(); ++v) {
    const double expected = p[v] / total * kDraws;
    EXPECT_NEAR(counts[static_cast<int32_t>(v)], expected, 5 * std::sqrt(expected) + 3) << v;
  }
}

TEST(Generate, StopEndsTheText) {
  const auto model = Model("llama");
  GenerateOptions options;
  options.tokens = 10;
  options.temperature = 0;
  const std::vector<int32_t> free = Generate(*model, std::vector<int32_t>{4}, options);
  options.stop = free[3];
  const std::vector<int32_t> stopped = Generate(*model, std::vector<int32_t>{4}, options);
  EXPECT_EQ(stopped.size(),
            static_cast<size_t>(std::find(free.begin(), free.end(), free[3]) - free.begin()));
  EXPECT_THROW(Generate(*model, std::vector<int32_t>{}, options), Error);
}

}  // namespace
}  // namespace shoal
