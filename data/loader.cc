#include "data/loader.h"

#include <algorithm>
#include <cmath>

#include "core/base/error.h"
#include "data/order.h"

namespace shoal {

Loader::Loader(std::shared_ptr<const TokenSource> source, const LoaderOptions& options)
    : source_(std::move(source)), options_(options) {
  const int64_t length = options.sequence_length, tokens = source_->size();
  const std::string& path = source_->info().path;
  if (length < 1)
    SHOAL_FAIL(ErrorKind::kData, "data", "data.sequence_length is {}: it must be at least 1",
               length);
  if (!(options.validation_fraction >= 0 && options.validation_fraction < 1))
    SHOAL_FAIL(ErrorKind::kData, "data",
               "data.validation_fraction is {}: it must be at least 0 and less than 1",
               options.validation_fraction);
  const int64_t sequences = tokens > 0 ? (tokens - 1) / length : 0;
  if (sequences < 1)
    SHOAL_FAIL(ErrorKind::kData, "data",
               "{} has {} tokens, too few for one sequence of {} and its last label. Give more "
               "text, or set data.sequence_length to at most {}",
               path, tokens, length, std::max<int64_t>(tokens - 1, 1));
  if (options.validation_fraction > 0) {
    if (sequences < 2)
      SHOAL_FAIL(ErrorKind::kData, "data",
                 "{} has {} tokens, one sequence of {}: that cannot be split into training and "
                 "validation. Set data.validation_fraction = 0, a shorter data.sequence_length, or "
                 "give more text",
                 path, tokens, length);
    validation_ = std::clamp<int64_t>(
        std::llround(options.validation_fraction * static_cast<double>(sequences)), 1,
        sequences - 1);
  }
  train_ = sequences - validation_;
  if (options.documents && !source_->has_documents())
    SHOAL_FAIL(ErrorKind::kData, "data",
               "{} does not say where documents begin, so data.documents cannot keep them apart. "
               "Build the file with `shoal data build`, or set data.documents = false",
               path);
}

int64_t Loader::TrainSequence(int64_t sample) const {
  SHOAL_CHECK(sample >= 0, "data", "sample {}", sample);
  return ShuffledIndex(options_.seed, sample / train_, train_, sample % train_);
}

Batch Loader::Train(int64_t step, int64_t sequences, int64_t first, int64_t count) const {
  SHOAL_CHECK(step >= 0 && first >= 0 && count >= 0 && first + count <= sequences, "data",
              "sequences {} to {} of the {} of step {}", first, first + count, sequences, step);
  Batch batch = MakeBatch(count);
  for (int64_t row = 0; row < count; ++row) {
    const int64_t sample = step * sequences + first + row;
    FillRow(TrainSequence(sample), sample, row, batch);
  }
  return batch;
}

Batch Loader::Validation(int64_t first, int64_t count) const {
  SHOAL_CHECK(first >= 0 && count >= 0 && first + count <= validation_, "data",
              "sequences {} to {} of a validation split of {}", first, first + count, validation_);
  Batch batch = MakeBatch(count);
  for (int64_t row = 0; row < count; ++row) FillRow(train_ + first + row, first + row, row, batch);
  return batch;
}

Batch Loader::MakeBatch(int64_t count) const {
  Batch batch;
  batch.count = count;
  batch.length = options_.sequence_length;
  const size_t size = static_cast<size_t>(count * batch.length);
  batch.tokens.resize(size);
  batch.labels.resize(size);
  batch.positions.resize(size);
  batch.token_numbers.resize(size);
  if (options_.documents) batch.documents.resize(size);
  return batch;
}

void Loader::FillRow(int64_t sequence, int64_t sample, int64_t row, Batch& batch) const {
  const int64_t length = batch.length, begin = sequence * length, at = row * length;
  const std::span<int32_t> tokens = std::span(batch.tokens).subspan(at, length);
  const std::span<int32_t> labels = std::span(batch.labels).subspan(at, length);
  source_->Read(begin, tokens);
  std::copy(tokens.begin() + 1, tokens.end(), labels.begin());
  source_->Read(begin + length, labels.last(1));
  for (int64_t t = 0; t < length; ++t) {
    batch.positions[at + t] = static_cast<int32_t>(t);
    batch.token_numbers[at + t] = sample * length + t;
  }
  batch.labelled += length;
  if (!options_.documents) return;

  int32_t document = 0;
  for (int64_t t = 0; t < length; ++document) {
    // A start at `begin + length` is that of the token that only the last label shows.
    const int64_t next = source_->NextDocument(begin + t, begin + length + 1) - begin;
    const int64_t end = std::min(next, length);
    for (int64_t i = t; i < end; ++i) {
      batch.documents[at + i] = document;
      batch.positions[at + i] = static_cast<int32_t>(i - t);
    }
    if (next <= length) {
      labels[next - 1] = kIgnoredLabel;
      --batch.labelled;
    }
    t = end;
  }
}

}  // namespace shoal
