#include "kernels/embedding.h"

#include <cstring>

#include "kernels/contract.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/embedding.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {

// to [n] = (accumulate ? to : 0) + dout's rows at tokens[0 .. count), in that order.
template <class To, class From>
void SumTokens(To* to, bool accumulate, const From* dout, const int32_t* tokens, int64_t count,
               int64_t n) {
  const hn::ScalableTag<ComputeType<To, From>> d;
  ForVectors(d, n, [&](int64_t i, auto part) {
    auto sum = accumulate ? Load(d, to + i, part) : hn::Zero(d);
    for (int64_t t = 0; t < count; ++t) sum = hn::Add(sum, Load(d, dout + tokens[t] * n + i, part));
    Store(d, sum, to + i, part);
  });
}

// `tokens` are sorted by id, those of one id in order; those of row v end at ends[v].
void EmbeddingBackwardImpl(const View& dtable, bool accumulate, const View& dout,
                           const int32_t* ends, const int32_t* tokens) {
  const int64_t rows = dtable.dim(0), n = dtable.dim(1);
  // Work before row v, in rows of n elements. It rises with v, so that threads take equal shares.
  const auto work = [=](int64_t v) { return (v ? ends[v - 1] : 0) + (accumulate ? 0 : v); };
  const auto row_at = [=](int64_t amount) {
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      work(middle) < amount ? low = middle + 1 : high = middle;
    }
    return low;
  };
  const int64_t total = work(rows);
  VisitFloat(dtable.dtype, "EmbeddingBackward", [&](auto to_tag) {
    VisitFloat(dout.dtype, "EmbeddingBackward", [&](auto from_tag) {
      using To = typename decltype(to_tag)::type;
      using From = typename decltype(from_tag)::type;
      ParallelFor(total, total * n, [&](int64_t begin, int64_t end) {
        const int64_t last = end == total ? rows : row_at(end);
        for (int64_t v = row_at(begin); v < last; ++v) {
          const int64_t first = v ? ends[v - 1] : 0;
          if (first == ends[v] && accumulate) continue;
          SumTokens(dtable.as<To>() + v * n, accumulate, dout.as<const From>(), tokens + first,
                    ends[v] - first, n);
        }
      });
    });
  });
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shoal::kernels::cpu {
namespace {

HWY_EXPORT(EmbeddingBackwardImpl);

void CheckIds(const char* op, const Stream& stream, const View& table, const View& rows,
              const View& ids, const TablePart& part) {
  CheckRank(op, "table", table, 2);
  CheckArray(op, "table", table, table.shape, table.dtype);
  CheckRank(op, "ids", ids, 1);
  CheckArray(op, "ids", ids, ids.shape, DType::kI32);
  CheckArray(op, "the rows", rows, {ids.dim(0), table.dim(1)}, rows.dtype);
  if (stream.counting()) return;
  const auto* id = ids.as<const int32_t>();
  const int64_t size = part.size < 0 ? table.dim(0) : part.size;
  for (int64_t i = 0; i < ids.dim(0); ++i) {
    if (id[i] < 0 || id[i] >= size)
      SHOAL_FAIL(ErrorKind::kData, op, "token {} has id {}, but the vocabulary is [0, {})", i,
                 id[i], size);
  }
}

// The row of an id in this part; negative: it has none here.
int64_t RowHere(int32_t id, const TablePart& part, int64_t rows) {
  const int64_t row = id - part.first;
  return row < rows ? row : -1;
}

}  // namespace

void Embedding(const Stream& stream, const View& out, const View& table, const View& ids,
               const TablePart& part) {
  CheckIds("Embedding", stream, table, out, ids, part);
  CheckDType("Embedding", "out", out, table.dtype);
  const int64_t bytes = table.dim(1) * static_cast<int64_t>(SizeOf(table.dtype));
  const auto* id = ids.as<const int32_t>();
  ParallelFor(ids.dim(0), out.numel(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* to = out.as<char>() + i * bytes;
      const int64_t row = RowHere(id[i], part, table.dim(0));
      if (row < 0) {
        std::memset(to, 0, static_cast<size_t>(bytes));
      } else {
        std::memcpy(to, table.as<const char>() + row * bytes, static_cast<size_t>(bytes));
      }
    }
  });
}

void EmbeddingBackward(const Stream& stream, const View& dtable, bool accumulate, const View& dout,
                       const View& ids, const TablePart& part) {
  CheckIds("EmbeddingBackward", stream, dtable, dout, ids, part);
  const int64_t count = ids.dim(0), rows = dtable.dim(0);
  SHOAL_CHECK(count < INT32_MAX, "EmbeddingBackward", "{} tokens in one call", count);
  // A counting sort of the tokens by id keeps their order within an id.
  Scratch scratch(stream, (rows + 1 + count) * sizeof(int32_t));
  if (stream.counting()) return;
  int32_t* next = scratch.as<int32_t>();  // [rows + 1]: where the next token of a row goes
  int32_t* tokens = next + rows + 1;
  const auto* id = ids.as<const int32_t>();
  std::fill_n(next, rows + 1, 0);
  for (int64_t i = 0; i < count; ++i)
    if (const int64_t row = RowHere(id[i], part, rows); row >= 0) ++next[row + 1];
  for (int64_t v = 0; v < rows; ++v) next[v + 1] += next[v];
  for (int64_t i = 0; i < count; ++i)
    if (const int64_t row = RowHere(id[i], part, rows); row >= 0)
      tokens[next[row]++] = static_cast<int32_t>(i);
  HWY_DYNAMIC_DISPATCH(EmbeddingBackwardImpl)(dtable, accumulate, dout, next, tokens);
}

}  // namespace shoal::kernels::cpu
#endif
