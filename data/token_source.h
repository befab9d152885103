// A corpus: one long row of token ids with random access, whatever it is stored in. Immutable and
// safe to read from several threads, so ranks as threads share one.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "data/tokenizer.h"

namespace shoal {

struct SourceInfo {
  std::string path;
  std::string format;        // "text", "hdf5", "bin/idx"
  std::string dtype;         // of an id as stored: "u16", ...; "bytes" for text read as bytes
  int64_t stored_bytes = 0;  // of all files
  int64_t documents = -1;    // -1: the format does not say
  std::optional<int32_t> end_of_document;  // the id that ends each document, where known
};

class TokenSource {
 public:
  virtual ~TokenSource() = default;

  const SourceInfo& info() const { return info_; }
  virtual int64_t size() const = 0;  // tokens

  // Tokens [begin, begin + out.size()). Every id is held against the vocabulary given at opening;
  // one outside it is an Error that names file, position and id.
  virtual void Read(int64_t begin, std::span<int32_t> out) const = 0;

  // Whether it is known where documents begin.
  virtual bool has_documents() const = 0;
  // The first position in (position, limit) where a document begins, or limit.
  virtual int64_t NextDocument(int64_t position, int64_t limit) const = 0;

 protected:
  SourceInfo info_;
};

struct CorpusOptions {
  std::string path;
  const Tokenizer* tokenizer = nullptr;  // turns text into ids; files of ids do not need it
  int64_t vocab = 0;    // the model's: every id must be below it. 0: any id that fits 32 bits
  bool binary = false;  // take any bytes as text
  // For files of ids that do not say where documents end themselves: the id that ends one.
  std::optional<int32_t> end_of_document;
};

// What lies at `path` decides: a directory or a file of text; an HDF5 file with a dataset of
// integers; a pair PATH.bin and PATH.idx (naming one of the two does as well). A document end
// is put after each file of text, files of ids are taken as they are. All ids are checked here, at
// the speed of memory; in files of ids beyond 16 GiB only when they are read, at no cost where the
// stored type is too narrow for a wrong one.
std::shared_ptr<const TokenSource> OpenCorpus(const CorpusOptions& options);

// 32 hexadecimal digits that change when the tokens do: XXH3-128 of the number of tokens and of
// the tokens themselves - all of them up to 2^24, beyond that 4096 runs spread evenly. The same
// tokens in another format have the same fingerprint.
std::string Fingerprint(const TokenSource& source);

}  // namespace shoal
