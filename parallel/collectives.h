// Differentiable collectives. Each names what its input and output are on the ranks of the group,
// and so what its gradient is; the gradient of A is A's transpose:
//
//   op             input -> output           gradient
//   Enter          invariant -> replicated   partial -> invariant: all-reduce
//   AllReduce      partial -> invariant      invariant -> replicated: identity
//   AllGather      sharded(0) -> replicated  partial -> sharded(0): reduce-scatter
//   ReduceScatter  partial -> sharded(0)     sharded(0) -> replicated: all-gather
//   Shard          invariant -> sharded(0)   sharded(0) -> invariant: all-gather
//   AllToAll       rows to rows              all-to-all back
//   Shift          rank r's to rank r + by   shift by -by
//
// The placements (core/placement.h) are those on the group's axis; an input that has another one is
// an Error. Rows are the elements of dimension 0, in rank order. Partial sums are exchanged in at
// least f32. A group of one returns its input.
#pragma once

#include <span>

#include "core/autograd.h"
#include "parallel/communicator.h"

namespace shoal::collectives {

// Where a replicated value goes into work that is split over the group: consumers' gradients are
// parts of a sum, are added up in at least f32, and all-reduced once.
Tensor Enter(const Tensor& x, Communicator& group);

// The sum over the group, rounded to `dtype`; x is at least as wide.
Tensor AllReduce(const Tensor& x, Communicator& group, DType dtype);

// Rows [bounds[r], bounds[r + 1]) are rank r's. x: this rank's -> all.
Tensor AllGather(const Tensor& x, std::span<const int64_t> bounds, Communicator& group);
// x: all rows, summed -> this rank's, rounded to `dtype`; x is at least as wide.
Tensor ReduceScatter(const Tensor& x, std::span<const int64_t> bounds, Communicator& group,
                     DType dtype);
// x: all rows -> this rank's; moves nothing.
Tensor Shard(const Tensor& x, std::span<const int64_t> bounds, Communicator& group);

// send_rows[r] rows go to rank r, receive_rows[r] come from there.
Tensor AllToAll(const Tensor& x, std::span<const int64_t> send_rows,
                std::span<const int64_t> receive_rows, Communicator& group);

// What rank - by has (around the ring); all have one shape.
Tensor Shift(const Tensor& x, int by, Communicator& group);

}  // namespace shoal::collectives
