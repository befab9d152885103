// One pass of sequence-parallel attention on this rank: does the actions of its list, whatever the
// schedule. Shapes: B batch, T rows of this rank, S tokens of the sequence, N heads, K kv heads, H
// head dim.
#pragma once

#include <memory>
#include <vector>

#include "core/tensor.h"
#include "parallel/sequence_schedule.h"
#include "parallel/sequence_wire.h"

namespace shoal {

// What a rank has of a pass. Forward: q, k and v in; out and lse come out. Backward: also dout, out
// and lse in; dq, dk and dv come out.
struct SequenceArrays {
  Tensor q, dout, out, dq;  // [B, T, N, H]
  Tensor k, v, dk, dv;      // [B, T, K, H]
  Tensor lse;               // [B, N, T] f32 (f64 for f64)
  // Where heads are exchanged, instead of q, k, v, out and lse of the rows: the group's rows G of
  // this rank's heads, which its backward needs: [B, G, heads, H] and [B, heads, G]. Forward makes
  // them, backward takes them.
  Tensor head_q, head_k, head_v, head_out, head_lse;
};

struct SequencePassOptions {
  double scale = 1;
  bool wide_results = true;                // O on its way to its owner is as wide as sums
  kernels::AttentionDropout dropout = {};  // but for places and heads: tiles know them
};

// The widths of that pass, to count its bytes by.
SequenceWidths WidthsOf(int64_t batch, int64_t head_dim, DType dtype,
                        const SequencePassOptions& options);

// `schedule` is of `arrays`' heads, and one that CheckSequenceSchedule lets pass. All ranks call
// it.
void RunSequencePass(const SequenceSchedule& schedule, const SequencePassOptions& options,
                     SequenceWire& wire, int rank, SequenceArrays& arrays);

}  // namespace shoal
