// From a corpus to batches. Nothing here has state: a batch is a function of (corpus, options,
// step), the same for any number of ranks, so a rank reads its own slice and a resumed run is at
// its place at once.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "data/token_source.h"

namespace shoal {

// Labels with this value have no loss (as kernels/linear_cross_entropy.h defines it).
inline constexpr int32_t kIgnoredLabel = -1;

struct LoaderOptions {
  int64_t sequence_length = 0;     // T
  double validation_fraction = 0;  // of the sequences, from the end of the corpus; 0: none
  uint64_t seed = 0;
  // Off: a sequence is T tokens in a row, whatever documents they are from. On: attention does not
  // cross into another document, positions restart with each, and no token is asked to predict
  // the first token of the next.
  bool documents = false;
};

// Row-major [count, T].
struct Batch {
  int64_t count = 0, length = 0;       // sequences, T
  std::vector<int32_t> tokens;         // [count, T]
  std::vector<int32_t> labels;         // [count, T]  the next token, or kIgnoredLabel
  std::vector<int32_t> positions;      // [count, T]  from 0; from 0 again in each document
  std::vector<int32_t> documents;      // [count, T]  0, 1, ... within a sequence; empty if off
  std::vector<int64_t> token_numbers;  // [count, T]  different for every token of the run, the same
                                       // on any rank: the counter of dropout
  // [count]  the number of each sequence's first token; empty: that is token_numbers' first in it.
  std::vector<int64_t> sequence_starts;
  int64_t labelled = 0;  // labels that are not ignored
};

class Loader {
 public:
  Loader(std::shared_ptr<const TokenSource> source, const LoaderOptions& options);

  // A corpus of n tokens is cut into floor((n - 1) / T) sequences; the last of them validate:
  // the fraction, rounded to a whole number and at least 1 where it is not 0.
  int64_t train_sequences() const { return train_; }
  int64_t validation_sequences() const { return validation_; }
  const TokenSource& source() const { return *source_; }
  const LoaderOptions& options() const { return options_; }

  // Sequences [first, first + count) of the global batch of optimizer step `step` (from 0), which
  // has `sequences` in all. A batch runs on into the next epoch where one ends.
  Batch Train(int64_t step, int64_t sequences, int64_t first, int64_t count) const;
  // Sequences [first, first + count) of the validation split, in the order of the corpus.
  Batch Validation(int64_t first, int64_t count) const;

  // Which sequence of the corpus the run reads as its `sample`-th, over all epochs.
  int64_t TrainSequence(int64_t sample) const;

 private:
  Batch MakeBatch(int64_t count) const;
  void FillRow(int64_t sequence, int64_t sample, int64_t row, Batch& batch) const;

  std::shared_ptr<const TokenSource> source_;
  LoaderOptions options_;
  int64_t train_ = 0, validation_ = 0;
};

}  // namespace shoal
