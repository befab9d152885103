// What a model is told about its batch besides the token ids. Positions are data: a rank that holds
// part of a sequence passes the positions of that part, and no layer counts them itself.
#pragma once

#include <vector>

#include "core/tensor.h"

namespace shoal {

// Keys and values of the tokens that came before, per attention layer, for generation.
struct KvCache {
  struct Layer {
    Tensor k, v;  // [B, capacity, K, H]
  };
  std::vector<Layer> layers;
  int64_t length = 0;  // tokens held
};

struct SequenceInfo {
  Tensor positions;        // i32 [B, T]
  Tensor documents;        // i32 [B, T]; undefined: each row is one document
  Tensor token_numbers;    // i64 [B T], each token's number in the whole run; for dropout
  Tensor sequence_starts;  // i64 [B], the number of each whole sequence's first token; for dropout
                           // of attention
  uint64_t seed = 0;       // for dropout
  bool training = false;   // dropout acts
  KvCache* cache = nullptr;  // if set, attention also sees what it holds, and adds to it
};

}  // namespace shoal
