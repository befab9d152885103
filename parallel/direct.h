// Collectives on arrays that lie where this rank can read and write those of all ranks. They run
// between two barriers: after the first all ranks have brought their arrays, after the second
// nobody uses another's any more. Nothing here throws.
#pragma once

#include <span>
#include <vector>

#include "parallel/communicator.h"

namespace shoal {

// Rank r's array p begins at [r][p].
using PeerArrays = std::vector<std::vector<char*>>;

// `pieces` are this rank's arrays; all ranks' are of these sizes.
struct DirectArrays {
  std::span<const View> pieces;
  const PeerArrays& peers;
  int rank;

  void AllReduce(ReduceOp op) const;
  void ReduceScatter(std::span<const int64_t> bounds, char* into) const;  // null: in place
  void AllGather(std::span<const int64_t> bounds) const;

 private:
  int size() const { return static_cast<int>(peers.size()); }
  char* At(int r, size_t piece, int64_t element) const;
  void Reduce(ReduceOp op, int64_t begin, int64_t end, bool into_all, char* elsewhere) const;
};

}  // namespace shoal
