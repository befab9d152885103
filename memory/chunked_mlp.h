// A module over chunks of its input's rows: of what it computes between input and result, only one
// chunk's exists at a time (TiledMLP of ALST, arXiv 2506.13996). Forward keeps the input alone, and
// backward computes each chunk again, so that activations of an MLP's width grow with the chunk and
// not with the sequence. The price is one more forward of the module, with its communication; where
// its block is computed again anyhow (memory/recompute.h) that is the only second one.
#pragma once

#include "core/module.h"

namespace shoal {

// Where ranks have shares of the rows that the module works on, and exchange them inside.
struct RowShares {
  int ranks = 1;
  std::function<int64_t()> all;           // rows of all ranks, in a forward
  std::function<int64_t(int64_t)> mine;   // this rank's share of as many
  std::function<void(int64_t)> announce;  // a forward over as many begins; at last, over all
};

// The UnaryModule at `path`, whose rows must not depend on each other. `rows`: of a rank, at a
// time. After the transforms that replace its modules. A weight's gradient is as wide as sums while
// chunks add to it, and rounded once. Where a backward is split (zero-bubble pipelines) the
// module's weights get their gradients in its first half.
void ApplyChunkedMlp(Module& root, const std::string& path, int64_t rows,
                     const RowShares& shares = {});

}  // namespace shoal
