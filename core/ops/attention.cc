#include "kernels/attention.h"

#include "core/keep.h"
#include "core/ops.h"
#include "core/ops/common.h"

namespace shoal::ops {

AttentionResult Attention(const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& q_document, const Tensor& k_document,
                          const kernels::AttentionOptions& given, const Tensor& sequence_starts) {
  const OriginScope here("attention");
  SHOAL_CHECK(q.rank() == 4 && k.rank() == 4 && k.shape() == v.shape() && q.dim(0) == k.dim(0) &&
                  q.dim(3) == k.dim(3) && k.dim(2) > 0 && q.dim(2) % k.dim(2) == 0,
              "attention", "q {}, k {} and v {} do not fit", q.shape().ToString(),
              k.shape().ToString(), v.shape().ToString());
  for (const MeshAxis axis : kAllMeshAxes) {
    if (k.placement()[axis] == AxisPlacement::Sharded(1))
      FailPlacement("attention", axis, k, 1, "has a part of each sequence, and all is attended to");
  }
  kernels::AttentionOptions options = given;
  options.dropout.sequence_starts = sequence_starts.view();
  Tensor out, lse;
  if (!TakeKept({&out, &lse})) {
    out = Tensor::Empty(q.shape(), q.dtype());
    lse = Tensor::Empty({q.dim(0), q.dim(2), q.dim(1)}, AccumulatorDType(q.dtype()));
    kernels::Attention(CurrentStream(), out.view(), lse.view(), q.view(), k.view(), v.view(),
                       q_document.view(), k_document.view(), options);
    const std::array operands = {q, k, v};
    out.set_placement(VaryingLike(operands));
    lse.set_placement(VaryingLike(operands));
    Keep({out, lse});
  }
  RecordOptions record;
  record.exact = {3};
  // `out` last: the projection behind it keeps it too (PackOnce).
  out = Record(
      "attention", out, {q, k, v}, {q, k, v, lse, out, q_document, k_document, sequence_starts},
      [options](GradContext& context) mutable {
        const Tensor q = context.Saved(0), k = context.Saved(1), v = context.Saved(2);
        const Tensor lse = context.Saved(3), out = context.Saved(4);
        const Tensor q_document = context.Saved(5), k_document = context.Saved(6);
        const Tensor starts = context.Saved(7);
        options.dropout.sequence_starts = starts.view();
        Tensor dq = Tensor::Empty(q.shape(), q.dtype());
        Tensor dk = Tensor::Empty(k.shape(), k.dtype());
        Tensor dv = Tensor::Empty(v.shape(), v.dtype());
        const Tensor dout = context.grad().contiguous() ? context.grad() : context.grad().Clone();
        kernels::AttentionBackward(CurrentStream(), dq.view(), dk.view(), dv.view(), dout.view(),
                                   q.view(), k.view(), v.view(), out.view(), lse.view(),
                                   q_document.view(), k_document.view(), options);
        context.Give(0, std::move(dq));
        context.Give(1, std::move(dk));
        context.Give(2, std::move(dv));
      },
      record);
  return {out, lse};
}

}  // namespace shoal::ops
