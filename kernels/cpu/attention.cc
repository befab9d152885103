#include "kernels/attention.h"

#include <omp.h>

#include <vector>

#include "core/base/thread_count.h"
#include "kernels/contract.h"
#include "kernels/cpu/attention_units.h"

namespace shoal::kernels::cpu {
namespace {

bool HasBf16Dot() {
#ifdef __x86_64__
  static const bool kHas = __builtin_cpu_supports("avx512bf16");
  return kHas;
#else
  return false;
#endif
}

// [B, tokens, heads, H] with strides.
void CheckHeads(const char* op, const char* name, const View& x, const Dims& shape, DType dtype) {
  CheckShape(op, name, x, shape);
  CheckDType(op, name, x, dtype);
  CheckPresent(op, name, x);
  SHOAL_CHECK(x.strides[3] == 1 || x.shape[3] <= 1, op,
              "{}'s last dimension has stride {}; it must be contiguous", name, x.strides[3]);
}

AttentionProblem MakeProblem(const char* op, const View& lse, const View& q, const View& k,
                             const View& v, const View& q_document, const View& k_document,
                             const AttentionOptions& options) {
  CheckRank(op, "q", q, 4);
  CheckRank(op, "k", k, 4);
  VisitFloat(q.dtype, op, [](auto) {});
  AttentionProblem a;
  a.lse = lse, a.q = q, a.k = k, a.v = v;
  a.q_document = q_document, a.k_document = k_document, a.options = options;
  a.batch = q.dim(0), a.queries = q.dim(1), a.heads = q.dim(2), a.head_dim = q.dim(3);
  a.keys = k.dim(1), a.kv_heads = k.dim(2);
  SHOAL_CHECK(a.kv_heads > 0 ? a.heads % a.kv_heads == 0 : a.heads == 0, op,
              "{} heads are not a multiple of {} kv heads", a.heads, a.kv_heads);
  CheckHeads(op, "q", q, q.shape, q.dtype);
  CheckHeads(op, "k", k, {a.batch, a.keys, a.kv_heads, a.head_dim}, q.dtype);
  CheckHeads(op, "v", v, k.shape, q.dtype);
  CheckArray(op, "lse", lse, {a.batch, a.heads, a.queries}, AccumulatorDType(q.dtype));
  SHOAL_CHECK(static_cast<bool>(q_document) == static_cast<bool>(k_document), op,
              "only one of q_document and k_document is given");
  if (q_document) {
    CheckShape(op, "q_document", q_document, {a.batch, a.queries});
    CheckDType(op, "q_document", q_document, DType::kI32);
    CheckShape(op, "k_document", k_document, {a.batch, a.keys});
    CheckDType(op, "k_document", k_document, DType::kI32);
  }
  const AttentionDropout& dropout = options.dropout;
  SHOAL_CHECK(dropout.p >= 0 && dropout.p < 1, op, "dropout's p is {}, not in [0, 1)", dropout.p);
  if (a.drops()) {
    CheckShape(op, "sequence_starts", dropout.sequence_starts, {a.batch});
    CheckDType(op, "sequence_starts", dropout.sequence_starts, DType::kI64);
    CheckPresent(op, "sequence_starts", dropout.sequence_starts);
  }
  return a;
}

// Every unit in parallel, each with scratch of its own thread.
template <class Run>
void RunUnits(const Stream& stream, const std::vector<AttentionUnit>& units, int64_t scratch_bytes,
              int threads, Run run) {
  const auto count = static_cast<int64_t>(units.size());
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads == 0) return;
  // Different pages for different threads, and not the same cache sets.
  const int64_t step = RoundUp(scratch_bytes, 4096) + 4096 + 64;
  const Scratch scratch(stream, static_cast<size_t>(step * threads));
  if (stream.counting()) return;
  char* base = scratch.as<char>();
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) run(units[i], base + step * omp_get_thread_num());
}

int64_t Blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The most keys that a unit's queries see: what it packs.
int64_t MostKeys(const AttentionProblem& a, const std::vector<AttentionUnit>& units) {
  int64_t most = 0;
  for (const AttentionUnit& u : units) {
    const int64_t begin = std::max(u.key_begin, a.KeysBegin(u.query_begin));
    const int64_t end = std::min(RoundUp(u.key_end, kGroup), a.KeysEnd(u.query_end - 1));
    most = std::max(most, end - RoundDown(begin, kKeyTile));
  }
  return most;
}

// How many pieces each kv head has to be cut into for the threads to be evenly loaded: 1 if whole
// kv heads keep that part of them busy.
int64_t PiecesPerKvHead(const AttentionProblem& a, int threads, double busy) {
  const int64_t whole = a.batch * a.kv_heads;
  if (static_cast<double>(whole) >= busy * static_cast<double>(Blocks(whole, threads) * threads))
    return 1;
  return Blocks(4 * threads, whole);
}

void CheckGradients(const char* op, AttentionProblem& a, const View& dq, const View& dk,
                    const View& dv, const View& dout, DType dtype) {
  CheckHeads(op, "dq", dq, a.q.shape, dtype);
  CheckHeads(op, "dout", dout, a.q.shape, a.q.dtype);
  CheckHeads(op, "dk", dk, a.k.shape, dtype);
  CheckHeads(op, "dv", dv, a.k.shape, dtype);
  a.dq = dq, a.dk = dk, a.dv = dv, a.dout = dout;
}

// The problem's gradients: delta is known.
void RunBackward(const Stream& stream, const AttentionProblem& a) {
  if (a.batch == 0 || a.heads == 0 || a.head_dim == 0) return;
  const int threads = KernelThreads();
  // Apart, dQ and dK, dV take 7 products where together they take 5, but any number of threads.
  const int64_t pieces = PiecesPerKvHead(a, threads, 0.7);
  std::vector<AttentionUnit> units;
  const int64_t tiles = Blocks(a.keys, kKeyTile), blocks = Blocks(a.queries, kQueryBlock);
  if (pieces == 1) {
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t h = 0; h < a.kv_heads; ++h)
        units.push_back(
            {b, h, h * a.group(), (h + 1) * a.group(), 0, a.queries, 0, a.keys, true, true, false});
  } else {
    const int64_t key_pieces = std::min(pieces, tiles);
    const int64_t block_pieces = std::min(Blocks(pieces, a.group()), blocks);
    for (int64_t b = 0; b < a.batch; ++b) {
      for (int64_t h = 0; h < a.kv_heads; ++h) {
        for (int64_t p = 0; p < key_pieces; ++p)
          units.push_back({b, h, h * a.group(), (h + 1) * a.group(), 0, a.queries,
                           tiles * p / key_pieces * kKeyTile,
                           std::min(a.keys, tiles * (p + 1) / key_pieces * kKeyTile), false, true,
                           false});
        for (int64_t n = h * a.group(); n < (h + 1) * a.group(); ++n)
          for (int64_t p = block_pieces - 1; p >= 0; --p)
            units.push_back({b, h, n, n + 1, blocks * p / block_pieces * kQueryBlock,
                             std::min(a.queries, blocks * (p + 1) / block_pieces * kQueryBlock), 0,
                             a.keys, true, false, false});
      }
    }
  }
  const int64_t keys = MostKeys(a, units);
  const bool pairs = HasBf16Dot();
  RunUnits(stream, units, AttentionBackwardScratch(a, pairs, keys), threads,
           [&](const AttentionUnit& u, char* scratch) {
             RunAttentionBackwardUnit(a, pairs, keys, u, scratch);
           });
}

}  // namespace

void Attention(const Stream& stream, const View& out, const View& lse, const View& q, const View& k,
               const View& v, const View& q_document, const View& k_document,
               const AttentionOptions& options) {
  AttentionProblem a = MakeProblem("Attention", lse, q, k, v, q_document, k_document, options);
  const bool wide = out.dtype != q.dtype;
  CheckHeads("Attention", "out", out, q.shape, wide ? AccumulatorDType(q.dtype) : q.dtype);
  a.out = out;
  if (q.numel() == 0) return;
  const int threads = KernelThreads();
  const int64_t pieces = PiecesPerKvHead(a, threads, 0.9);
  // Heads of a group share packed keys, so a kv head is cut along the queries first.
  const int64_t blocks = Blocks(a.queries, kQueryBlock);
  const int64_t block_pieces = std::min(pieces, blocks);
  const int64_t head_pieces = std::min(Blocks(pieces, block_pieces), a.group());
  const int64_t unit_heads = Blocks(a.group(), head_pieces);
  // Dropout has one head's numbers at a time.
  const bool streamed = block_pieces == blocks &&
                        (unit_heads == 1 || (a.queries * unit_heads <= kQueryBlock && !a.drops()));
  std::vector<AttentionUnit> units;
  for (int64_t p = block_pieces - 1; p >= 0; --p)  // with a causal mask the last have most to do
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t h = 0; h < a.kv_heads; ++h)
        for (int64_t g = 0; g < head_pieces; ++g)
          units.push_back({b, h, h * a.group() + a.group() * g / head_pieces,
                           h * a.group() + a.group() * (g + 1) / head_pieces,
                           blocks * p / block_pieces * kQueryBlock,
                           std::min(a.queries, blocks * (p + 1) / block_pieces * kQueryBlock), 0,
                           a.keys, false, false, streamed});
  const int64_t keys = streamed ? kKeyTile : MostKeys(a, units);
  const bool pairs = HasBf16Dot();
  RunUnits(
      stream, units, AttentionScratch(a, pairs, keys), threads,
      [&](const AttentionUnit& u, char* scratch) { RunAttentionUnit(a, pairs, keys, u, scratch); });
}

void AttentionBackward(const Stream& stream, const View& dq, const View& dk, const View& dv,
                       const View& dout, const View& q, const View& k, const View& v,
                       const View& out, const View& lse, const View& q_document,
                       const View& k_document, const AttentionOptions& options) {
  const char* op = "AttentionBackward";
  AttentionProblem a = MakeProblem(op, lse, q, k, v, q_document, k_document, options);
  CheckGradients(op, a, dq, dk, dv, dout, q.dtype);
  CheckHeads(op, "out", out, q.shape, q.dtype);
  const Scratch delta(stream, lse.bytes());
  a.delta = View(delta.as<void>(), lse.dtype, lse.shape);
  if (!stream.counting()) AttentionDelta(stream, a.delta, dout, out);
  RunBackward(stream, a);
}

void AttentionBackwardTile(const Stream& stream, const View& dq, const View& dk, const View& dv,
                           const View& dout, const View& q, const View& k, const View& v,
                           const View& lse, const View& delta, const View& q_document,
                           const View& k_document, const AttentionOptions& options) {
  const char* op = "AttentionBackwardTile";
  AttentionProblem a = MakeProblem(op, lse, q, k, v, q_document, k_document, options);
  CheckGradients(op, a, dq, dk, dv, dout, lse.dtype);
  CheckArray(op, "delta", delta, lse.shape, lse.dtype);
  a.delta = delta;
  a.add = true;
  RunBackward(stream, a);
}

}  // namespace shoal::kernels::cpu
