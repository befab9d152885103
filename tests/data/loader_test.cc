#include "data/loader.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "data/array_source.h"
#include "tests/data/temp_dir.h"

namespace shoal {
namespace {

using testing::ExpectDataError;

TokenArray PackTokens(std::span<const int32_t> ids, int64_t vocab) {
  PackedTokens tokens(vocab);
  tokens.Add(ids);
  return std::move(tokens).Finish();
}

// Tokens 0, 1, 2, ...: a token is its own place in the corpus.
std::shared_ptr<const TokenSource> Counting(int64_t n) {
  std::vector<int32_t> ids(n);
  std::iota(ids.begin(), ids.end(), 0);
  return std::make_shared<ArraySource>(SourceInfo{.path = "counting"}, PackTokens(ids, 1 << 20), 0,
                                       nullptr);
}

// Documents of the given lengths, each closed by the id 0.
std::shared_ptr<const TokenSource> Documents(const std::vector<int>& lengths) {
  std::vector<int32_t> ids;
  for (const int length : lengths) {
    for (int i = 0; i < length; ++i) ids.push_back(static_cast<int32_t>(10 * ids.size() + 1));
    ids.push_back(0);
  }
  return std::make_shared<ArraySource>(SourceInfo{.path = "documents", .end_of_document = 0},
                                       PackTokens(ids, 1 << 20), 0, nullptr);
}

TEST(Loader, LabelsAreTheNextTokens) {
  const Loader loader(Counting(23), {.sequence_length = 5});
  EXPECT_EQ(loader.train_sequences(), 4);
  EXPECT_EQ(loader.validation_sequences(), 0);
  const Batch batch = loader.Train(0, 4, 0, 4);
  EXPECT_EQ(batch.count, 4);
  EXPECT_EQ(batch.length, 5);
  EXPECT_EQ(batch.labelled, 20);
  EXPECT_TRUE(batch.documents.empty());
  std::set<int32_t> seen(batch.tokens.begin(), batch.tokens.end());
  EXPECT_EQ(seen.size(), 20u);
  for (size_t i = 0; i < 20; ++i) {
    EXPECT_EQ(batch.labels[i], batch.tokens[i] + 1);
    EXPECT_EQ(batch.tokens[i] % 5, static_cast<int32_t>(i % 5));
    EXPECT_EQ(batch.positions[i], static_cast<int32_t>(i % 5));
    EXPECT_EQ(batch.token_numbers[i], static_cast<int64_t>(i));
  }
}

TEST(Loader, CutsAllSizesByTheSameRule) {
  for (int64_t n = 2; n < 40; ++n)
    for (int64_t length = 1; length < n; ++length)
      EXPECT_EQ(Loader(Counting(n), {.sequence_length = length}).train_sequences(),
                (n - 1) / length);
}

TEST(Loader, AnyDivisionAmongRanksReadsTheSameBatch) {
  const Loader loader(Counting(1000), {.sequence_length = 7, .seed = 5});
  for (int64_t step : {0, 1, 17, 1000003}) {
    const Batch whole = loader.Train(step, 12, 0, 12);
    for (int64_t ranks : {1, 2, 3, 4, 5, 12}) {
      std::vector<int32_t> tokens, labels;
      std::vector<int64_t> numbers;
      for (int64_t rank = 0; rank < ranks; ++rank) {
        const int64_t first = 12 * rank / ranks, end = 12 * (rank + 1) / ranks;
        const Batch part = loader.Train(step, 12, first, end - first);
        tokens.insert(tokens.end(), part.tokens.begin(), part.tokens.end());
        labels.insert(labels.end(), part.labels.begin(), part.labels.end());
        numbers.insert(numbers.end(), part.token_numbers.begin(), part.token_numbers.end());
      }
      EXPECT_EQ(tokens, whole.tokens);
      EXPECT_EQ(labels, whole.labels);
      EXPECT_EQ(numbers, whole.token_numbers);
    }
  }
}

TEST(Loader, BatchesRunAcrossEpochs) {
  const Loader loader(Counting(71), {.sequence_length = 7, .seed = 1});
  ASSERT_EQ(loader.train_sequences(), 10);
  std::vector<int32_t> first_tokens;
  std::set<int64_t> numbers;
  for (int64_t step = 0; step < 10; ++step) {
    const Batch batch = loader.Train(step, 3, 0, 3);
    for (int row = 0; row < 3; ++row) first_tokens.push_back(batch.tokens[row * 7] / 7);
    numbers.insert(batch.token_numbers.begin(), batch.token_numbers.end());
  }
  std::set<std::vector<int32_t>> orders;
  for (int epoch = 0; epoch < 3; ++epoch) {
    const std::vector<int32_t> order(first_tokens.begin() + epoch * 10,
                                     first_tokens.begin() + epoch * 10 + 10);
    EXPECT_EQ(std::set<int32_t>(order.begin(), order.end()).size(), 10u);
    orders.insert(order);
  }
  EXPECT_EQ(orders.size(), 3u);
  EXPECT_EQ(numbers.size(), 210u);  // dropout differs in every epoch
}

// A different batch size reads the same samples in the same order.
TEST(Loader, OrderDoesNotDependOnTheBatch) {
  const Loader loader(Counting(500), {.sequence_length = 3, .seed = 9});
  std::vector<int32_t> in_fours, in_sixes;
  for (int64_t step = 0; step < 30; ++step) {
    const Batch batch = loader.Train(step, 4, 0, 4);
    in_fours.insert(in_fours.end(), batch.tokens.begin(), batch.tokens.end());
  }
  for (int64_t step = 0; step < 20; ++step) {
    const Batch batch = loader.Train(step, 6, 0, 6);
    in_sixes.insert(in_sixes.end(), batch.tokens.begin(), batch.tokens.end());
  }
  EXPECT_EQ(in_fours, in_sixes);
}

TEST(Loader, ValidationIsTheTailInOrder) {
  const Loader loader(Counting(1001), {.sequence_length = 10, .validation_fraction = 0.05});
  EXPECT_EQ(loader.train_sequences(), 95);
  EXPECT_EQ(loader.validation_sequences(), 5);
  const Batch batch = loader.Validation(0, 5);
  for (int i = 0; i < 50; ++i) EXPECT_EQ(batch.tokens[i], 950 + i);
  EXPECT_EQ(batch.labels.back(), 1000);
  EXPECT_EQ(loader.Validation(3, 2).tokens[0], 980);
  const Batch train = loader.Train(0, 95, 0, 95);
  for (const int32_t token : train.tokens) EXPECT_LT(token, 950);
  EXPECT_THROW(loader.Validation(3, 3), Error);
}

TEST(Loader, SplitsAreNeverEmpty) {
  for (int64_t sequences = 2; sequences < 30; ++sequences) {
    for (const double fraction : {1e-9, 0.01, 0.05, 0.5, 0.99, 1 - 1e-9}) {
      const Loader loader(Counting(sequences * 4 + 1),
                          {.sequence_length = 4, .validation_fraction = fraction});
      EXPECT_GE(loader.train_sequences(), 1);
      EXPECT_GE(loader.validation_sequences(), 1);
      EXPECT_EQ(loader.train_sequences() + loader.validation_sequences(), sequences);
      const double exact = fraction * static_cast<double>(sequences);
      if (exact >= 1 && exact <= static_cast<double>(sequences - 1)) {
        EXPECT_LE(std::abs(static_cast<double>(loader.validation_sequences()) - exact), 0.5);
      }
    }
  }
}

TEST(Loader, RefusesWhatCannotBeCut) {
  ExpectDataError({"sequence_length is 0"}, [] { Loader(Counting(10), {.sequence_length = 0}); });
  ExpectDataError({"sequence_length is -3"}, [] { Loader(Counting(10), {.sequence_length = -3}); });
  ExpectDataError({"counting has 10 tokens", "one sequence of 10", "at most 9"},
                  [] { Loader(Counting(10), {.sequence_length = 10}); });
  ExpectDataError({"has 1 tokens"}, [] { Loader(Counting(1), {.sequence_length = 1}); });
  ExpectDataError({"has 0 tokens"}, [] { Loader(Counting(0), {.sequence_length = 1}); });
  ExpectDataError({"cannot be split"},
                  [] { Loader(Counting(10), {.sequence_length = 9, .validation_fraction = 0.1}); });
  for (const double fraction :
       {-0.1, 1.0, 2.0, std::nan(""), std::numeric_limits<double>::infinity()})
    ExpectDataError({"validation_fraction"}, [&] {
      Loader(Counting(10), {.sequence_length = 2, .validation_fraction = fraction});
    });
  ExpectDataError({"counting does not say where documents begin"},
                  [] { Loader(Counting(10), {.sequence_length = 2, .documents = true}); });
}

TEST(Loader, KeepsDocumentsApart) {
  // Tokens:    0  1  2  3 | 4 5 | 6 | 7  8 ...   starts at 4, 6, 7
  const auto source = Documents({3, 1, 0, 20});
  const Loader loader(source, {.sequence_length = 9, .documents = true});
  ASSERT_EQ(loader.train_sequences(), 3);
  Batch batch;
  for (int64_t sample = 0; sample < 3; ++sample)
    if (loader.TrainSequence(sample) == 0) batch = loader.Train(sample, 1, 0, 1);
  EXPECT_EQ(batch.documents, (std::vector<int32_t>{0, 0, 0, 0, 1, 1, 2, 3, 3}));
  EXPECT_EQ(batch.positions, (std::vector<int32_t>{0, 1, 2, 3, 0, 1, 0, 0, 1}));
  // The end is a label of the last token; the end itself has none.
  EXPECT_EQ(batch.labels, (std::vector<int32_t>{batch.tokens[1], batch.tokens[2], 0, -1, 0, -1, -1,
                                                batch.tokens[8], 91}));
  EXPECT_EQ(batch.labelled, 6);
}

TEST(Loader, ADocumentStartJustPastTheSequenceIsNoLabel) {
  const auto source = Documents({3, 5});  // starts at 4
  const Loader loader(source, {.sequence_length = 4, .documents = true});
  for (int64_t sample = 0; sample < loader.train_sequences(); ++sample) {
    const Batch batch = loader.Train(sample, 1, 0, 1);
    const bool first = loader.TrainSequence(sample) == 0;
    EXPECT_EQ(batch.labels.back() == kIgnoredLabel, first);
    EXPECT_EQ(batch.labelled, first ? 3 : 4);
    EXPECT_EQ(batch.positions, (std::vector<int32_t>{0, 1, 2, 3}));
    EXPECT_EQ(batch.documents, (std::vector<int32_t>{0, 0, 0, 0}));
  }
}

// Against the definition, token by token, on documents of many lengths.
TEST(Loader, PackingFollowsItsDefinition) {
  std::vector<int> lengths;
  for (int i = 0; i < 60; ++i) lengths.push_back(i * i % 13);
  const auto source = Documents(lengths);
  std::vector<int32_t> ids(source->size());
  source->Read(0, ids);
  for (const int64_t length : {1, 2, 3, 8, 31}) {
    const Loader loader(source, {.sequence_length = length, .documents = true});
    for (int64_t sample = 0; sample < loader.train_sequences(); ++sample) {
      const int64_t begin = loader.TrainSequence(sample) * length;
      const Batch batch = loader.Train(sample, 1, 0, 1);
      int32_t document = 0, position = 0;
      int64_t labelled = 0;
      for (int64_t t = 0; t < length; ++t) {
        if (t > 0 && ids[begin + t - 1] == 0) {
          ++document;
          position = 0;
        }
        ASSERT_EQ(batch.tokens[t], ids[begin + t]);
        ASSERT_EQ(batch.documents[t], document);
        ASSERT_EQ(batch.positions[t], position++);
        ASSERT_EQ(batch.labels[t], ids[begin + t] == 0 ? -1 : ids[begin + t + 1]);
        labelled += batch.labels[t] != -1;
      }
      ASSERT_EQ(batch.labelled, labelled);
    }
  }
}

TEST(Loader, EmptySliceIsAnEmptyBatch) {
  const Loader loader(Counting(50), {.sequence_length = 4});
  const Batch batch = loader.Train(3, 5, 5, 0);
  EXPECT_EQ(batch.count, 0);
  EXPECT_TRUE(batch.tokens.empty());
  EXPECT_THROW(loader.Train(0, 5, 3, 3), Error);
  EXPECT_THROW(loader.Train(-1, 5, 0, 1), Error);
}

// The quickstart's figures: 4404412 bytes and a document end, T = 256, the last 5 % held out.
TEST(Loader, KingJamesSplit) {
  const Loader loader(Counting(4404413), {.sequence_length = 256, .validation_fraction = 0.05});
  EXPECT_EQ(loader.train_sequences(), 16344);
  EXPECT_EQ(loader.validation_sequences(), 860);
}

}  // namespace
}  // namespace shoal
