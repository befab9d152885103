#include <cmath>
#include <limits>

#include "kernels/cuda/checks.h"
#include "kernels/cuda/device_utils.cuh"
#include "kernels/quantize.h"

namespace shoal::kernels::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kPerLane = static_cast<int>(kQuantizeBlock) / kLanes;
constexpr int kThreads = 256;

// What a warp works on.
struct Block {
  int64_t at = 0;      // of its first value
  int64_t number = 0;  // of its scale
  int64_t n = 0;       // 0: none
};

__device__ __forceinline__ Block BlockOfWarp(int64_t rows, int64_t columns, int64_t blocks) {
  Block b;
  b.number = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  int64_t in_row;
  const int64_t row = DivMod(b.number, blocks, &in_row);
  if (row >= rows) return b;
  b.at = row * columns + in_row * kQuantizeBlock;
  const int64_t left = columns - in_row * kQuantizeBlock;
  b.n = left < kQuantizeBlock ? left : kQuantizeBlock;
  return b;
}

template <class T>
__global__ void QuantizeKernel(int8_t* codes, float* scales, const T* x, int64_t rows,
                               int64_t columns, int64_t blocks) {
  using A = Accumulator<T>;
  const Block b = BlockOfWarp(rows, columns, blocks);
  const int lane = threadIdx.x % kLanes;
  A v[kPerLane], most = 0;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    const int64_t i = e * kLanes + lane;
    v[e] = i < b.n ? Widen<A>(x[b.at + i]) : A(0);
    most = MaxOp()(most, v[e] < 0 ? -v[e] : v[e]);
  }
  most = WarpReduce(most, MaxOp());
  const bool too_large = !(most <= A(kQuantizeLargest));
  const bool zeros = too_large || most < A(kQuantizeSmallest);
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    const int64_t i = e * kLanes + lane;
    if (i < b.n)
      codes[b.at + i] = zeros ? int8_t{0} : static_cast<int8_t>(rint(v[e] * A(127) / most));
  }
  if (lane == 0 && b.n > 0)
    scales[b.number] = too_large ? static_cast<float>(NAN)
                       : zeros   ? 0.0f
                                 : static_cast<float>(most / 127);
}

template <class T>
__global__ void DequantizeKernel(T* x, const int8_t* codes, const float* scales, int64_t rows,
                                 int64_t columns, int64_t blocks) {
  using A = Accumulator<T>;
  const Block b = BlockOfWarp(rows, columns, blocks);
  if (b.n == 0) return;
  const A scale = static_cast<A>(scales[b.number]);
  for (int64_t i = threadIdx.x % kLanes; i < b.n; i += kLanes)
    x[b.at + i] = NarrowTo<T>(static_cast<A>(codes[b.at + i]) * scale);
}

void CheckQuantized(const char* op, const View& x, const View& codes, const View& scales) {
  CheckRank(op, "x", x, 2);
  CheckDense(op, "x", x, x.shape);
  CheckArray(op, "codes", codes, x.shape, DType::kI8);
  CheckArray(op, "scales", scales, {x.dim(0), QuantizeBlocks(x.dim(1))}, DType::kF32);
}

}  // namespace

void Quantize(const Stream& stream, const View& codes, const View& scales, const View& x) {
  const char* op = "Quantize";
  CheckQuantized(op, x, codes, scales);
  VisitFloat(x.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Launch(stream, op, QuantizeKernel<T>, GridSize(op, CeilDiv(scales.numel() * kLanes, kThreads)),
           kThreads, 0, codes.as<int8_t>(), scales.as<float>(), x.as<const T>(), x.dim(0), x.dim(1),
           scales.dim(1));
  });
}

void Dequantize(const Stream& stream, const View& x, const View& codes, const View& scales) {
  const char* op = "Dequantize";
  CheckQuantized(op, x, codes, scales);
  VisitFloat(x.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Launch(stream, op, DequantizeKernel<T>,
           GridSize(op, CeilDiv(scales.numel() * kLanes, kThreads)), kThreads, 0, x.as<T>(),
           codes.as<const int8_t>(), scales.as<const float>(), x.dim(0), x.dim(1), scales.dim(1));
  });
}

}  // namespace shoal::kernels::cuda
