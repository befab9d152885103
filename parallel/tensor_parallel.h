// Tensor parallelism (Shoeybi et al., arXiv 1909.08053): the parameters of a model are cut along
// their logical axes, and the modules that use them are replaced by ones that exchange partial
// sums. The model knows nothing of it: what is cut, and how, follows from the axes.
//
//   Linear [cut axis, embed]      its columns are split: the gradient of its input is summed, once
//                                 for all Linears that read the same input
//   Linear [embed, cut axis]      its rows are split: its output is summed; the bias is the first
//                                 rank's
//   Embedding [vocab, ..]         each rank looks its own rows up; outputs are summed
//   LmLoss                        each rank has its part of the logits; softmax statistics and the
//                                 gradient of the hidden states are summed
//   InnerAttention                works on the query heads that are here
//
// Between those parts values are whole on all ranks. With sequence parallelism (Korthikanti et al.,
// arXiv 2205.05198) each rank has the rows of some tokens there instead: sums are reduce-scattered
// and inputs all-gathered, the same bytes on the wire; norms, dropouts and residuals work on 1/tp
// of the tokens, and the gradients of their parameters are summed over the ranks.
//
// Any degree works that gives each rank a query head. Where it does not divide a size, shares
// differ. A kv head that several ranks need is held by each, and its gradient summed over them.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "core/layers.h"
#include "parallel/communicator.h"

namespace shoal {

// How the axes are cut: [begin, end) of each for every rank. An axis that is not named stays whole.
struct AxisCut {
  struct Range {
    int64_t begin = 0, end = 0;
    int64_t size() const { return end - begin; }
  };
  std::map<std::string, std::vector<Range>> ranges;

  int64_t heads = 0, kv_heads = 0;  // of the attention
};

// Query heads are dealt out in order, and each rank gets the kv heads that its queries need; mlp
// and vocab in equal shares. Error(kConfig) if `ranks` exceeds the number of heads.
AxisCut CutTransformer(int ranks, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t mlp,
                       int64_t vocab);

// One line per parameter: name, axes, global shape, and each rank's slice.
std::string DescribeCut(Module& root, const AxisCut& cut, int ranks);

// Cuts the parameters under `root`, which have no memory yet, and replaces modules. `group` must
// outlive the model. The result is to be called before each forward, with its number of tokens.
std::function<void(int64_t)> ApplyTensorParallel(Module& root, const AxisCut& cut,
                                                 Communicator& group,
                                                 bool sequence_parallel = false);

}  // namespace shoal
