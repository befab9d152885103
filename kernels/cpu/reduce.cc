#include "kernels/reduce.h"

#include "kernels/contract.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/reduce.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {

// Element i of a block is added to running sum i % kSums, and the sums are added as a binary tree:
// the same additions at any vector width.
constexpr int kSums = 32;

template <bool kSquare, class T>
double SumBlock(const T* x, int64_t n) {
  const hn::CappedTag<double, kSums> d;
  constexpr int kVectors = kSums / hn::MaxLanes(d);
  constexpr int64_t kLanes = hn::MaxLanes(d);
  hn::Vec<decltype(d)> sums[kVectors];
  for (auto& s : sums) s = hn::Zero(d);
  const auto step = [&](const T* from) HWY_ATTR {
#pragma GCC unroll 16
    for (int k = 0; k < kVectors; ++k) {
      const auto v = LoadAs(d, from + k * kLanes);
      sums[k] = kSquare ? hn::MulAdd(v, v, sums[k]) : hn::Add(sums[k], v);
    }
  };
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) step(x + i);
  if (i < n) {
    T rest[kSums];
    std::memset(static_cast<void*>(rest), 0, sizeof(rest));
    std::memcpy(static_cast<void*>(rest), x + i, (n - i) * sizeof(T));
    step(rest);
  }
  double flat[kSums];
  for (int k = 0; k < kVectors; ++k) hn::StoreU(sums[k], d, flat + k * kLanes);
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) flat[k] += flat[k + half];
  return flat[0];
}

template <bool kSquare>
void SumBlocks(const View& x, int64_t block, double* sums) {
  const int64_t n = x.numel();
  VisitFloat(x.dtype, "Sum", [&](auto tag) {
    using T = typename decltype(tag)::type;
    ParallelBlocks(n, block, n, [&](int64_t b, int64_t begin, int64_t end) {
      sums[b] = SumBlock<kSquare>(x.as<const T>() + begin, end - begin);
    });
  });
}
void SumImpl(const View& x, int64_t block, double* sums) { SumBlocks<false>(x, block, sums); }
void SumSquaresImpl(const View& x, int64_t block, double* sums) { SumBlocks<true>(x, block, sums); }

// partial [blocks, N] = column sums of blocks of rows, then out.
void SumRowsImpl(const View& out, const View& x, bool accumulate, int64_t block, void* scratch) {
  const int64_t rows = x.dim(0), n = x.dim(1);
  VisitFloat(x.dtype, "SumRows", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    A* partial = static_cast<A*>(scratch);
    ParallelBlocks(rows, block, rows * n, [&](int64_t b, int64_t begin, int64_t end) {
      const hn::ScalableTag<A> d;
      A* sum = partial + b * n;
      std::fill_n(sum, n, A(0));
      int64_t r = begin;
      for (; r + 4 <= end; r += 4) {
        const T* row = x.as<const T>() + r * n;
        ForVectors(d, n, [&](int64_t i, auto part) {
          auto s = hn::Add(Load(d, sum + i, part), Load(d, row + i, part));
          s = hn::Add(s, Load(d, row + n + i, part));
          s = hn::Add(s, Load(d, row + 2 * n + i, part));
          Store(d, hn::Add(s, Load(d, row + 3 * n + i, part)), sum + i, part);
        });
      }
      for (; r < end; ++r)
        Map<A>(
            n, [](auto, auto s, auto v) { return hn::Add(s, v); }, sum, sum,
            x.as<const T>() + r * n);
    });
    VisitFloat(out.dtype, "SumRows", [&](auto out_tag) {
      using Out = typename decltype(out_tag)::type;
      SumPartials(out.as<Out>(), accumulate, partial, (rows + block - 1) / block, n);
    });
  });
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shoal::kernels::cpu {
namespace {

HWY_EXPORT(SumImpl);
HWY_EXPORT(SumSquaresImpl);
HWY_EXPORT(SumRowsImpl);

void SumAll(const char* op, const Stream& stream, const View& out, const View& x,
            void (*blocks)(const View&, int64_t, double*)) {
  CheckArray(op, "out", out, {1}, DType::kF64);
  CheckArray(op, "x", x, x.shape, x.dtype);
  constexpr int64_t kBlock = 16 * 1024;
  const int64_t count = (x.numel() + kBlock - 1) / kBlock;
  Scratch sums(stream, count * sizeof(double));
  if (stream.counting()) return;
  blocks(x, kBlock, sums.as<double>());
  double total = 0;
  for (int64_t b = 0; b < count; ++b) total += sums.as<double>()[b];
  *out.as<double>() = total;
}

}  // namespace

void Sum(const Stream& stream, const View& out, const View& x) {
  SumAll("Sum", stream, out, x, HWY_DYNAMIC_DISPATCH(SumImpl));
}

void SumSquares(const Stream& stream, const View& out, const View& x) {
  SumAll("SumSquares", stream, out, x, HWY_DYNAMIC_DISPATCH(SumSquaresImpl));
}

void SumRows(const Stream& stream, const View& out, const View& x, bool accumulate) {
  CheckRank("SumRows", "x", x, 2);
  CheckArray("SumRows", "x", x, x.shape, x.dtype);
  CheckArray("SumRows", "out", out, {x.dim(1)}, out.dtype);
  const int64_t block = RowsPerBlock(x.dim(0));
  Scratch partial(stream,
                  (x.dim(0) + block - 1) / block * x.dim(1) * SizeOf(AccumulatorDType(x.dtype)));
  if (stream.counting()) return;
  HWY_DYNAMIC_DISPATCH(SumRowsImpl)(out, x, accumulate, block, partial.as<void>());
}

}  // namespace shoal::kernels::cpu
#endif
