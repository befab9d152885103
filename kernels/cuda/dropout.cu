#include <cmath>

#include "kernels/cuda/checks.h"
#include "kernels/cuda/device_utils.cuh"
#include "kernels/dropout.h"

namespace shoal::kernels::cuda {
namespace {

constexpr int kThreads = 256;

// A thread owns kChunk elements of one row. UniformFromWord(word) >= p is (word >> 8) >= threshold,
// both being multiples of 2^-24.
template <class T>
__global__ void DropoutKernel(T* out, const T* x, const int64_t* tokens, int64_t rows,
                              int64_t columns, int64_t chunks, uint32_t threshold,
                              Accumulator<T> scale, PhiloxKey key, bool vector) {
  using A = Accumulator<T>;
  constexpr int N = kChunk<T>;
  int64_t chunk;
  const int64_t row =
      DivMod(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, chunks, &chunk);
  if (row >= rows) return;
  const int64_t d = chunk * N;
  A v[N];
  LoadChunk(v, x + row * columns + d, columns - d, vector);
  const uint64_t first = static_cast<uint64_t>(tokens[row]) * columns + d;
  Philox4 words = Philox(key, first / 4);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const uint64_t index = first + e;
    if (e > 0 && index % 4 == 0) words = Philox(key, index / 4);
    const uint32_t word = index % 4 < 2 ? (index % 4 == 0 ? words.v[0] : words.v[1])
                                        : (index % 4 == 2 ? words.v[2] : words.v[3]);
    v[e] = (word >> 8) >= threshold ? v[e] * scale : A(0);
  }
  StoreChunk(out + row * columns + d, v, columns - d, vector);
}

}  // namespace

void Dropout(const Stream& stream, const View& out, const View& x, const View& tokens, double p,
             const PhiloxKey& key) {
  const char* op = "Dropout";
  CheckRank(op, "x", x, 2);
  CheckDense(op, "x", x, x.shape);
  CheckArray(op, "out", out, x.shape, x.dtype);
  CheckArray(op, "tokens", tokens, {x.dim(0)}, DType::kI64);
  SHOAL_CHECK(p >= 0 && p < 1, op, "p is {}, not in [0, 1)", p);
  const int64_t rows = x.dim(0), columns = x.dim(1);
  if (x.numel() == 0) return;
  VisitFloat(x.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int N = kChunk<T>;
    const int64_t chunks = CeilDiv(columns, N);
    Launch(stream, op, DropoutKernel<T>, GridSize(op, CeilDiv(rows * chunks, kThreads)), kThreads,
           0, out.as<T>(), x.as<T>(), tokens.as<int64_t>(), rows, columns, chunks,
           static_cast<uint32_t>(std::ceil(p * 0x1p24)), Accumulator<T>(1 / (1 - p)), key,
           columns % N == 0 && AllAligned16(out.data, x.data));
  });
}

}  // namespace shoal::kernels::cuda
