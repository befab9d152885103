// Sequences of tokens drawn evenly, for what measures and does not learn.
#pragma once

#include <random>

#include "data/loader.h"

namespace shoal {

inline Batch RandomBatch(int64_t count, int64_t length, int64_t vocab, uint32_t seed) {
  std::mt19937 random(seed);
  Batch batch;
  batch.count = count;
  batch.length = length;
  batch.labelled = count * length;
  for (int64_t i = 0; i < count * length; ++i) {
    batch.tokens.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(vocab)));
    batch.labels.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(vocab)));
    batch.positions.push_back(static_cast<int32_t>(i % length));
    batch.token_numbers.push_back(i);
  }
  return batch;
}

}  // namespace shoal
