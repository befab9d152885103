// What `shoal data build` and `shoal data inspect` do.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/token_source.h"

namespace shoal {

struct BuildOptions {
  std::string input;   // a text file or a directory of text
  std::string output;  // x.h5 or x.hdf5, or the prefix of a pair .bin and .idx (or one of them)
  // What turns text into ids, as for MakeTokenizer. With train_vocab it is the model to write:
  // "x.model", or empty for one beside the output.
  std::string tokenizer = "bytes";
  int64_t train_vocab = 0;  // > 0: first train a SentencePiece model of so many pieces
  bool binary = false;      // take any bytes as text
  bool overwrite = false;
};

struct BuildResult {
  std::vector<std::string> files;  // what was written
  std::string tokenizer;           // what a run with this data names as data.tokenizer
  std::string dtype;
  int64_t text_bytes = 0, documents = 0, tokens = 0, vocab = 0;
};

// Tokenizes once what a run would tokenize at every start; the tokens are the same. Memory does
// not grow with the text. The output appears whole, when all is on the disk, or not at all.
BuildResult BuildDataset(const BuildOptions& options);

struct DatasetSummary {
  SourceInfo info;
  int64_t tokens = 0;
  int64_t documents = 0;  // counted by their ends where the file does not say; -1: unknown
  int32_t smallest_id = 0, largest_id = 0;
  std::string fingerprint;
  // The beginnings of the first documents (of the corpus, where none are known), decoded.
  std::vector<std::string> samples;
};

// Reads all of a corpus. `options.tokenizer` also decodes the samples; without one there are none.
DatasetSummary InspectDataset(const CorpusOptions& options, int max_samples = 3,
                              int64_t sample_tokens = 64);

}  // namespace shoal
