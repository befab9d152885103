// Text files as a corpus.
#pragma once

#include "data/token_source.h"

namespace shoal {

// `options.path` is a file or a directory of text; each file is a document. Read as bytes, the
// files themselves are the corpus; any other tokenizer runs once, here, into memory.
std::shared_ptr<const TokenSource> OpenText(const CorpusOptions& options);

}  // namespace shoal
