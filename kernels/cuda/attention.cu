#include <limits>

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
  const AttentionDropout& dropout = options.dropout;
  SHOAL_CHECK(dropout.p >= 0 && dropout.p < 1, op, "dropout's p is {}, not in [0, 1)", dropout.p);
  if (dropout.p > 0) {
    CheckShape(op, "sequence_starts", dropout.sequence_starts, {q.dim(0)});
    CheckDType(op, "sequence_starts", dropout.sequence_starts, DType::kI64);
    CheckPresent(op, "sequence_starts", dropout.sequence_starts);
    problem.keep = {dropout.key,
                    dropout.sequence_starts.as<int64_t>(),
                    dropout.sequence_starts.strides[0],
                    dropout.first_head,
                    dropout.q_begin,
                    dropout.q_step,
                    dropout.k_begin,
                    dropout.k_step,
                    dropout.Threshold(),
                    dropout.Scale()};
  }
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

// One softmax's result into another's. One warp per row.
template <class T>
__global__ void MergeKernel(Heads<Accumulator<T>> out, Accumulator<T>* lse, int64_t lse_batch,
                            int64_t lse_head, Heads<const T> part, const Accumulator<T>* lse_part,
                            int64_t part_batch, int64_t part_head, AttentionProblem p) {
  using A = Accumulator<T>;
  constexpr A kNothing = -std::numeric_limits<A>::infinity();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDeltaWarps + threadIdx.x / 32;
  if (row >= p.batch * p.heads * p.mask.queries) return;  // the same for the whole warp
  int64_t t, n;
  const int64_t b = DivMod(DivMod(row, p.mask.queries, &t), p.heads, &n);
  A& mine = lse[b * lse_batch + n * lse_head + t];
  const A old = mine, other = lse_part[b * part_batch + n * part_head + t];
  if (other == kNothing) return;
  const bool first = old == kNothing;
  const A top = old > other ? old : other;
  const A weight = first ? A(0) : exp(old - top), weight_part = first ? A(1) : exp(other - top);
  const A sum = weight + weight_part;
  A* x = out.Row(b, t, n);
  const T* y = part.Row(b, t, n);
  for (int h = threadIdx.x % 32; h < p.head_dim; h += 32)
    x[h] = first ? Widen<A>(y[h]) : weight / sum * x[h] + weight_part / sum * Widen<A>(y[h]);
  __syncwarp();  // all have read the old value
  if (threadIdx.x % 32 == 0) mine = first ? other : top + log(sum);
}

// The rows of x [B, T, N, H] as those of a problem's queries.
AttentionProblem RowsOf(const View& x) {
  AttentionProblem problem;
  problem.batch = x.dim(0);
  problem.heads = x.dim(2);
  problem.head_dim = static_cast<int>(x.dim(3));
  problem.mask.queries = x.dim(1);
  return problem;
}

void CheckGradients(const char* op, const AttentionBackwardArguments& a, DType dtype) {
  CheckHeads(op, "dq", a.dq, a.q.shape, dtype);
  CheckHeads(op, "dk", a.dk, a.k.shape, dtype);
  CheckHeads(op, "dv", a.dv, a.k.shape, dtype);
  CheckHeads(op, "dout", a.dout, a.q.shape, a.q.dtype);
}

void RunBackward(const Stream& stream, const char* op, const AttentionBackwardArguments& a) {
  if (MmaAttentionApplies(a.q))
    MmaAttentionBackward(stream, op, a);
  else
    PlainAttentionBackward(stream, op, a);
}

}  // namespace

void Attention(const Stream& stream, const View& out, const View& lse, const View& q, const View& k,
               const View& v, const View& q_document, const View& k_document,
               const AttentionOptions& options) {
  const char* op = "Attention";
  AttentionArguments a = {out, lse, q, k, v, {}};
  a.problem = MakeProblem(op, q, k, v, lse, q_document, k_document, options);
  const bool wide = out.dtype != q.dtype;
  CheckHeads(op, "out", out, q.shape, wide ? AccumulatorDType(q.dtype) : q.dtype);
  if (lse.numel() == 0) return;
  if (MmaAttentionApplies(q))
    MmaAttention(stream, op, a);
  else
    PlainAttention(stream, op, a);
}

void AttentionDelta(const Stream& stream, const View& delta, const View& dout, const View& out) {
  const char* op = "AttentionDelta";
  CheckRank(op, "out", out, 4);
  CheckComputeDType(op, "out", out);
  CheckHeads(op, "out", out, out.shape, out.dtype);
  CheckHeads(op, "dout", dout, out.shape, out.dtype);
  CheckArray(op, "delta", delta, {out.dim(0), out.dim(2), out.dim(1)}, AccumulatorDType(out.dtype));
  VisitFloat(out.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Launch(stream, op, DeltaKernel<T>, GridSize(op, CeilDiv(delta.numel(), kDeltaWarps)),
           32 * kDeltaWarps, 0, delta.as<Accumulator<T>>(), Heads<const T>(dout),
           Heads<const T>(out), RowsOf(out));
  });
}

void AttentionBackward(const Stream& stream, const View& dq, const View& dk, const View& dv,
                       const View& dout, const View& q, const View& k, const View& v,
                       const View& out, const View& lse, const View& q_document,
                       const View& k_document, const AttentionOptions& options) {
  const char* op = "AttentionBackward";
  AttentionBackwardArguments a = {dq, dk, dv, dout, q, k, v, lse, {}, {}};
  a.problem = MakeProblem(op, q, k, v, lse, q_document, k_document, options);
  CheckGradients(op, a, q.dtype);
  CheckHeads(op, "out", out, q.shape, q.dtype);
  Scratch delta(stream, lse.bytes());
  a.delta = View(delta.as<char>(), lse.dtype, lse.shape, lse.device);
  AttentionDelta(stream, a.delta, dout, out);
  RunBackward(stream, op, a);
}

void AttentionBackwardTile(const Stream& stream, const View& dq, const View& dk, const View& dv,
                           const View& dout, const View& q, const View& k, const View& v,
                           const View& lse, const View& delta, const View& q_document,
                           const View& k_document, const AttentionOptions& options) {
  const char* op = "AttentionBackwardTile";
  AttentionBackwardArguments a = {dq, dk, dv, dout, q, k, v, lse, delta, {}};
  a.add = true;
  a.problem = MakeProblem(op, q, k, v, lse, q_document, k_document, options);
  CheckGradients(op, a, lse.dtype);
  CheckArray(op, "delta", delta, lse.shape, lse.dtype);
  RunBackward(stream, op, a);
}

void MergeAttention(const Stream& stream, const View& out, const View& lse, const View& out_part,
                    const View& lse_part) {
  const char* op = "MergeAttention";
  CheckRank(op, "out", out, 4);
  CheckComputeDType(op, "out_part", out_part);
  const DType wide = AccumulatorDType(out_part.dtype);
  CheckHeads(op, "out", out, out.shape, wide);
  CheckHeads(op, "out_part", out_part, out.shape, out_part.dtype);
  for (const View& l : {lse, lse_part}) {
    CheckShape(op, "lse", l, {out.dim(0), out.dim(2), out.dim(1)});
    CheckDType(op, "lse", l, wide);
    CheckUnitStride(op, "lse", l);
    CheckPresent(op, "lse", l);
  }
  VisitFloat(out_part.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    Launch(stream, op, MergeKernel<T>, GridSize(op, CeilDiv(lse.numel(), kDeltaWarps)),
           32 * kDeltaWarps, 0, Heads<A>(out), lse.as<A>(), lse.strides[0], lse.strides[1],
           Heads<const T>(out_part), lse_part.as<const A>(), lse_part.strides[0],
           lse_part.strides[1], RowsOf(out));
  });
}

}  // namespace shoal::kernels::cuda
