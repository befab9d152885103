// Megatron's pair of files: PREFIX.bin is one row of ids, PREFIX.idx says of what type they are
// and where sequences and documents begin.
#pragma once

#include <span>

#include "data/array_source.h"
#include "data/file.h"

namespace shoal {

// `options.path` is the prefix. The index is held against itself and against the size of the
// .bin: a pair that disagrees is refused.
std::shared_ptr<const TokenSource> OpenIndexed(const CorpusOptions& options);

// Writes the index of a .bin of `tokens` ids whose documents begin at `starts` (the first at 0);
// each is one sequence. The caller commits it, after the .bin.
void WriteIndex(IntType type, std::span<const int64_t> starts, int64_t tokens, AtomicFile& file);

}  // namespace shoal
