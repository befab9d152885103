#include "kernels/cuda/checks.h"
#include "kernels/cuda/device_utils.cuh"
#include "kernels/random.h"

namespace shoal::kernels::cuda {
namespace {

constexpr int kThreads = 256;

// The part of a matrix with `columns` columns that starts at (row, column) and is `width` wide.
struct Slice {
  int64_t row, column, width, columns;

  __device__ uint64_t GlobalIndex(int64_t i) const {
    int64_t c;
    const int64_t r = DivMod(i, width, &c);
    return static_cast<uint64_t>((row + r) * columns + column + c);
  }
};

template <class T>
__global__ void FillNormalKernel(T* out, int64_t n, Slice slice, double std, PhiloxKey key) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const uint64_t g = slice.GlobalIndex(i);
  const Philox4 words = Philox(key, g / 4);
  const bool upper = g % 4 >= 2;
  // (0, 1]: the logarithm is finite
  const double u1 = ((upper ? words.v[2] : words.v[0]) + 1.0) * 0x1p-32;
  const double u2 = (upper ? words.v[3] : words.v[1]) * 0x1p-32;
  constexpr double kTwoPi = 6.283185307179586477;
  const double radius = sqrt(-2 * log(u1));
  const double normal = g % 2 == 0 ? radius * cos(kTwoPi * u2) : radius * sin(kTwoPi * u2);
  out[i] = NarrowTo<T>(std * normal);
}

template <class T>
__global__ void FillUniformKernel(T* out, int64_t n, Slice slice, double bound, PhiloxKey key) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  out[i] = NarrowTo<T>((2.0 * PhiloxWord(key, slice.GlobalIndex(i)) * 0x1p-32 - 1.0) * bound);
}

Slice SliceOf(const char* op, const View& out, int64_t row, int64_t column, int64_t columns) {
  CheckRank(op, "out", out, 2);
  CheckDense(op, "out", out, out.shape);
  SHOAL_CHECK(row >= 0 && column >= 0 && column + out.dim(1) <= columns, op,
              "columns [{}, {}) of a matrix with {}", column, column + out.dim(1), columns);
  return {row, column, out.dim(1), columns};
}

}  // namespace

void FillNormal(const Stream& stream, const View& out, double std, int64_t row, int64_t column,
                int64_t columns, const PhiloxKey& key) {
  const char* op = "FillNormal";
  const Slice slice = SliceOf(op, out, row, column, columns);
  VisitFloat(out.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Launch(stream, op, FillNormalKernel<T>, GridSize(op, CeilDiv(out.numel(), kThreads)), kThreads,
           0, out.as<T>(), out.numel(), slice, std, key);
  });
}

void FillUniform(const Stream& stream, const View& out, double bound, int64_t row, int64_t column,
                 int64_t columns, const PhiloxKey& key) {
  const char* op = "FillUniform";
  const Slice slice = SliceOf(op, out, row, column, columns);
  VisitFloat(out.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Launch(stream, op, FillUniformKernel<T>, GridSize(op, CeilDiv(out.numel(), kThreads)), kThreads,
           0, out.as<T>(), out.numel(), slice, bound, key);
  });
}

}  // namespace shoal::kernels::cuda
