#include "parallel/direct.h"

#include <cstring>

#include "kernels/reduce_arrays.h"
#include "parallel/pieces.h"

namespace shoal {

char* DirectArrays::At(int r, size_t piece, int64_t element) const {
  return peers[static_cast<size_t>(r)][piece] +
         element * static_cast<int64_t>(SizeOf(pieces[piece].dtype));
}

// op over the ranks of elements [begin, end), into these of this rank's arrays, of all ranks', or,
// if given, one after the other to `elsewhere`.
void DirectArrays::Reduce(ReduceOp op, int64_t begin, int64_t end, bool into_all,
                          char* elsewhere) const {
  std::vector<const void*> sources(peers.size());
  std::vector<void*> outs;
  ForRange(pieces, begin, end, [&](size_t p, int64_t first, int64_t count) {
    for (int r = 0; r < size(); ++r) sources[static_cast<size_t>(r)] = At(r, p, first);
    outs = {elsewhere != nullptr ? elsewhere : At(rank, p, first)};
    if (elsewhere != nullptr) elsewhere += count * static_cast<int64_t>(SizeOf(pieces[p].dtype));
    for (int r = 0; r < size() && into_all; ++r)
      if (r != rank) outs.push_back(At(r, p, first));
    kernels::cpu::ReduceArrays(pieces[p].dtype, op, sources, outs, count);
  });
}

// Each rank sums its slice and writes the sum into all ranks' arrays: the slices are disjoint, so
// nobody reads what another has overwritten.
void DirectArrays::AllReduce(ReduceOp op) const {
  const int64_t n = Elements(pieces);
  Reduce(op, ShardBegin(n, rank, size()), ShardBegin(n, rank + 1, size()), true, nullptr);
}

void DirectArrays::ReduceScatter(std::span<const int64_t> bounds, char* into) const {
  const auto r = static_cast<size_t>(rank);
  Reduce(ReduceOp::kSum, bounds[r], bounds[r + 1], false, into);
}

void DirectArrays::AllGather(std::span<const int64_t> bounds) const {
  for (int step = 1; step < size(); ++step) {  // each rank reads another at a time
    const int r = (rank + step) % size();
    ForRange(pieces, bounds[static_cast<size_t>(r)], bounds[static_cast<size_t>(r) + 1],
             [&](size_t p, int64_t first, int64_t count) {
               std::memcpy(At(rank, p, first), At(r, p, first),
                           static_cast<size_t>(count) * SizeOf(pieces[p].dtype));
             });
  }
}

}  // namespace shoal
