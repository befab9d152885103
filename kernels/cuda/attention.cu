#include "kernels/attention.h"
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/checks.h"

namespace shoal::kernels::cuda {
namespace {

void CheckHeads(const char* op, const char* name, const View& v, const Dims& shape, DType dtype) {
  CheckShape(op, name, v, shape);
  CheckDType(op, name, v, dtype);
  CheckUnitStride(op, name, v);
  CheckPresent(op, name, v);
}

AttentionProblem MakeProblem(const char* op, const View& q, const View& k, const View& v,
                             const View& lse, const View& q_document, const View& k_document,
                             const AttentionOptions& options) {
  CheckRank(op, "q", q, 4);
  CheckRank(op, "k", k, 4);
  CheckComputeDType(op, "q", q);
  CheckHeads(op, "q", q, q.shape, q.dtype);
  CheckHeads(op, "k", k, {q.dim(0), k.dim(1), k.dim(2), q.dim(3)}, q.dtype);
  CheckHeads(op, "v", v, k.shape, q.dtype);
  CheckArray(op, "lse", lse, {q.dim(0), q.dim(2), q.dim(1)}, AccumulatorDType(q.dtype));
  SHOAL_CHECK(k.dim(2) > 0 ? q.dim(2) % k.dim(2) == 0 : q.dim(2) == 0, op,
              "{} heads are not a multiple of {} kv heads", q.dim(2), k.dim(2));
  SHOAL_CHECK(static_cast<bool>(q_document) == static_cast<bool>(k_document), op,
              "q_document and k_document must be given together");
  if (q_document) {
    CheckArray(op, "q_document", q_document, {q.dim(0), q.dim(1)}, DType::kI32);
    CheckArray(op, "k_document", k_document, {q.dim(0), k.dim(1)}, DType::kI32);
  }
  AttentionProblem problem;
  problem.batch = q.dim(0);
  problem.heads = q.dim(2);
  problem.kv_heads = k.dim(2);
  problem.head_dim = static_cast<int>(q.dim(3));
  problem.scale = options.scale;
  problem.mask.queries = q.dim(1);
  problem.mask.keys = k.dim(1);
  problem.mask.window = options.window;
  problem.mask.offset = options.query_offset;
  problem.mask.causal = options.causal;
  problem.mask.q_document = q_document.as<int32_t>();
  problem.mask.k_document = k_document.as<int32_t>();
  return problem;
}

// delta [B, N, T] = row sums of dout out. One warp per row.
constexpr int kDeltaWarps = 8;

template <class T>
__global__ void DeltaKernel(Accumulator<T>* delta, Heads<const T> dout, Heads<const T> out,
                            AttentionProblem p) {
  using A = Accumulator<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDeltaWarps + threadIdx.x / 32;
  if (row >= p.batch * p.heads * p.mask.queries) return;  // the same for the whole warp
  int64_t t, n;
  const int64_t b = DivMod(DivMod(row, p.mask.queries, &t), p.heads, &n);
  const T *x = dout.Row(b, t, n), *y = out.Row(b, t, n);
  A sum = 0;
  for (int h = threadIdx.x % 32; h < p.head_dim; h += 32) sum += Widen<A>(x[h]) * Widen<A>(y[h]);
  sum = WarpReduce(sum, SumOp());
  if (threadIdx.x % 32 == 0) delta[row] = sum;
}

}  // namespace

void Attention(const Stream& stream, const View& out, const View& lse, const View& q, const View& k,
               const View& v, const View& q_document, const View& k_document,
               const AttentionOptions& options) {
  const char* op = "Attention";
  AttentionArguments a = {out, lse, q, k, v, {}};
  a.problem = MakeProblem(op, q, k, v, lse, q_document, k_document, options);
  CheckHeads(op, "out", out, q.shape, q.dtype);
  if (lse.numel() == 0) return;
  if (MmaAttentionApplies(q))
    MmaAttention(stream, op, a);
  else
    PlainAttention(stream, op, a);
}

void AttentionBackward(const Stream& stream, const View& dq, const View& dk, const View& dv,
                       const View& dout, const View& q, const View& k, const View& v,
                       const View& out, const View& lse, const View& q_document,
                       const View& k_document, const AttentionOptions& options) {
  const char* op = "AttentionBackward";
  AttentionBackwardArguments a = {dq, dk, dv, dout, q, k, v, lse, {}, {}};
  a.problem = MakeProblem(op, q, k, v, lse, q_document, k_document, options);
  CheckHeads(op, "dq", dq, q.shape, q.dtype);
  CheckHeads(op, "dk", dk, k.shape, q.dtype);
  CheckHeads(op, "dv", dv, k.shape, q.dtype);
  CheckHeads(op, "dout", dout, q.shape, q.dtype);
  CheckHeads(op, "out", out, q.shape, q.dtype);
  Scratch delta(stream, lse.bytes());
  a.delta = View(delta.as<char>(), lse.dtype, lse.shape, lse.device);
  VisitFloat(q.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Launch(stream, op, DeltaKernel<T>, GridSize(op, CeilDiv(lse.numel(), kDeltaWarps)),
           32 * kDeltaWarps, 0, a.delta.as<Accumulator<T>>(), Heads<const T>(dout),
           Heads<const T>(out), a.problem);
  });
  if (MmaAttentionApplies(q))
    MmaAttentionBackward(stream, op, a);
  else
    PlainAttentionBackward(stream, op, a);
}

}  // namespace shoal::kernels::cuda
