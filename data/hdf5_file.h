// Token ids in HDF5: a dataset of integers named "tokens", or the only one in the file. One of
// more dimensions has a document in each row; one of a single dimension may have a dataset
// "documents" beside it, the ascending first token of each, and an attribute "end_of_document",
// the id that ends each. The only file of data/ that knows the library.
#pragma once

#include <span>

#include "data/array_source.h"
#include "data/file.h"

namespace shoal {

// Whether `path` is a file that begins as HDF5 does. Works without the library.
bool IsHdf5(const std::string& path);

// A contiguous dataset is mapped and never goes through the library again; a chunked or
// compressed one is decoded into memory here.
std::shared_ptr<const TokenSource> OpenHdf5(const CorpusOptions& options);

// Writes "tokens", contiguous, and "documents", which begin at `starts`. The caller commits it.
void WriteHdf5(const TokenArray& tokens, std::span<const int64_t> starts, int32_t end_of_document,
               AtomicFile& target);

}  // namespace shoal
