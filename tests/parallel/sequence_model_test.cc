// A whole model under sequence parallelism equals one rank: positions, labels, documents and
// dropout follow the rows, and gradients of parameters add up over the ranks.
#include <gtest/gtest.h>

#include <numeric>

#include "core/init.h"
#include "models/registry.h"
#include "tests/parallel/sequence_case.h"

namespace shoal {
namespace {

using namespace sequence_testing;  // NOLINT: all of it

constexpr int64_t kBatch = 2, kTokens = 37;

ModelConfig Config(const std::string& family) {
  ModelConfig config;
  config.family = family;
  config.layers = 2;
  config.d_model = 24;
  config.heads = 6;
  config.kv_heads = family == "gpt2" ? 6 : 2;
  config.head_dim = 4;
  config.mlp = 40;
  config.vocab = 31;
  config.context = kTokens;
  config.dropout = 0.1;
  config.attention_dropout = 0.3;
  return config;
}

// The loss's share and the gradients of parameters, of the tokens at these places.
double LossOf(LanguageModel& model, const std::vector<int64_t>& places, bool documents) {
  const auto rows = static_cast<int64_t>(places.size());
  std::vector<int32_t> tokens, labels, positions, ids;
  std::vector<int64_t> numbers;
  const std::vector<int32_t> packed = PackedIds(kBatch, kTokens);
  for (int64_t b = 0; b < kBatch; ++b)
    for (const int64_t t : places) {
      const auto token = [&](int64_t at) {
        return static_cast<int32_t>((7 * at * at + 3 * b) % 31);
      };
      tokens.push_back(token(t));
      labels.push_back(t % 11 == 3 ? -1 : token(t + 1));
      positions.push_back(static_cast<int32_t>(t));
      ids.push_back(packed[static_cast<size_t>(b * kTokens + t)]);
      numbers.push_back(b * kTokens + t);
    }
  SequenceInfo info;
  info.positions = Tensor::From(positions, {kBatch, rows});
  if (documents) info.documents = Tensor::From(ids, {kBatch, rows});
  info.token_numbers = Tensor::From(numbers, {kBatch * rows});
  info.sequence_starts = Tensor::From(std::vector<int64_t>{0, kTokens}, {kBatch});
  info.seed = 3;
  info.training = true;
  const Tensor hidden = model.Hidden(Tensor::From(tokens, {kBatch, rows}), info);
  const Tensor loss = model.Loss(hidden, Tensor::From(labels, {kBatch, rows}), 60);
  const double value = loss.Item();
  Backward(loss);
  return value;
}

TEST(SequenceModels, EqualOneRank) {
  for (const char* family : {"llama", "gpt2"})
    for (const bool documents : {false, true})
      for (const SequenceLayoutKind layout : kLayouts)
        for (const Kind kind : {Kind::kTokenRing, Kind::kKvRing, Kind::kUlysses}) {
          const auto whole = BuildModel(Config(family));
          MaterializeParameters(*whole, DType::kF64, 1);
          std::vector<int64_t> all(kTokens);
          std::iota(all.begin(), all.end(), 0);
          const double loss = LossOf(*whole, all, documents);
          const auto theirs = whole->Parameters();
          RunThreadRanks(3, 1, [&](Communicator& ranks) {
            const auto model = BuildModel(Config(family));
            MaterializeParameters(*model, DType::kF64, 1);
            SequenceOptions options;
            options.schedule = kind;
            options.layout = layout;
            ApplySequenceParallel(*model, options, ranks);
            const SequenceLayout rows(layout, kTokens, ranks.size());
            const double sum = ranks.Sum(LossOf(*model, rows.Tokens(ranks.rank()), documents));
            EXPECT_NEAR(sum, loss, 1e-12 * loss);
            const auto mine = model->Parameters();
            for (size_t i = 0; i < mine.size(); ++i) {
              const View view = mine[i]->leaf().grad.view();
              ranks.AllReduce(std::span(&view, 1));
              if (ranks.rank() > 0) continue;
              Errors errors;
              errors.Add(0, mine[i]->leaf().grad, theirs[i]->leaf().grad);
              // A key's bias has no gradient but rounding.
              EXPECT_LE(std::sqrt(errors.difference[0]),
                        1e-10 * std::sqrt(errors.wanted[0]) + 1e-13)
                  << family << " " << mine[i]->name() << " " << Name(kind);
            }
          });
        }
}

}  // namespace
}  // namespace shoal
