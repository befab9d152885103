#include <cmath>

#include "kernels/cuda/checks.h"
#include "kernels/cuda/device_utils.cuh"
#include "kernels/rope.h"

namespace shoal::kernels::cuda {
namespace {

struct HeadStrides {
  int64_t batch, token, head;
  HeadStrides(const View& view)
      : batch(view.strides[0]), token(view.strides[1]), head(view.strides[2]) {}
};

// One block per token: the angles once, in f64 (a position times a frequency has few digits left
// after the comma in f32), then all heads. out may alias x: a thread reads both halves of a pair
// before it writes them.
template <class T>
__global__ void RopeKernel(T* out, HeadStrides out_strides, const T* x, HeadStrides x_strides,
                           const int32_t* positions, int64_t tokens, int heads, int half,
                           double log2_theta, double sign, bool vector) {
  using A = Accumulator<T>;
  constexpr int N = kChunk<T>;
  A* cosine = reinterpret_cast<A*>(DynamicShared());
  A* sine = cosine + half;
  int64_t t;
  const int64_t b = DivMod(blockIdx.x, tokens, &t);
  const double position = positions[blockIdx.x];
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    double s, c;
    sincos(position * exp2(-log2_theta * i / half), &s, &c);
    cosine[i] = static_cast<A>(c);
    sine[i] = static_cast<A>(s * sign);
  }
  __syncthreads();
  const int chunks = (half + N - 1) / N;
  for (int k = threadIdx.x; k < heads * chunks; k += blockDim.x) {
    const int head = k / chunks, i = (k - head * chunks) * N;
    const T* xr = x + b * x_strides.batch + t * x_strides.token + head * x_strides.head + i;
    T* outr = out + b * out_strides.batch + t * out_strides.token + head * out_strides.head + i;
    A low[N], high[N];
    LoadChunk(low, xr, half - i, vector);
    LoadChunk(high, xr + half, half - i, vector);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (i + e >= half) continue;
      const A c = cosine[i + e], s = sine[i + e], l = low[e], h = high[e];
      low[e] = l * c - h * s;
      high[e] = h * c + l * s;
    }
    StoreChunk(outr, low, half - i, vector);
    StoreChunk(outr + half, high, half - i, vector);
  }
}

// Whether every head of the view starts at a 16-byte boundary.
bool HeadsAligned(const View& view, int chunk) {
  return IsAligned16(view.data) && view.strides[0] % chunk == 0 && view.strides[1] % chunk == 0 &&
         view.strides[2] % chunk == 0;
}

}  // namespace

void Rope(const Stream& stream, const View& out, const View& x, const View& positions, double theta,
          bool inverse) {
  const char* op = "Rope";
  CheckRank(op, "x", x, 4);
  CheckShape(op, "out", out, x.shape);
  CheckDType(op, "out", out, x.dtype);
  CheckArray(op, "positions", positions, {x.dim(0), x.dim(1)}, DType::kI32);
  SHOAL_CHECK(x.dim(3) % 2 == 0, op, "head dimension {} is odd", x.dim(3));
  SHOAL_CHECK(x.dim(3) == 0 || (x.strides[3] == 1 && out.strides[3] == 1), op,
              "last strides {} of x and {} of out are not 1", x.strides[3], out.strides[3]);
  const int64_t tokens = x.dim(1), heads = x.dim(2), half = x.dim(3) / 2;
  if (x.numel() == 0) return;
  VisitFloat(x.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int N = kChunk<T>;
    const bool vector = half % N == 0 && HeadsAligned(out, N) && HeadsAligned(x, N);
    Launch(stream, op, RopeKernel<T>, GridSize(op, x.dim(0) * tokens),
           RowThreads(heads * CeilDiv(half, N), 1, 256), 2 * half * sizeof(Accumulator<T>),
           out.as<T>(), HeadStrides(out), x.as<T>(), HeadStrides(x), positions.as<int32_t>(),
           tokens, static_cast<int>(heads), static_cast<int>(half), std::log2(theta),
           inverse ? -1.0 : 1.0, vector);
  });
}

}  // namespace shoal::kernels::cuda
