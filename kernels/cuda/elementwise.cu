#include "kernels/cuda/bias.h"
#include "kernels/cuda/checks.h"
#include "kernels/cuda/device_utils.cuh"
#include "kernels/elementwise.h"

namespace shoal::kernels::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, int N>
struct Pointers {
  T* p[N];
};

// out_k[i] = f_k(in_0[i], in_1[i], ...). A thread owns one chunk of every array and reads all of
// them before it writes, so outputs may alias inputs.
template <class T, int kOut, int kIn, class F>
__global__ void MapKernel(Pointers<T, kOut> out, Pointers<const T, kIn> in, int64_t n, bool vector,
                          F f) {
  using A = Accumulator<T>;
  constexpr int N = kChunk<T>;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (begin >= n) return;
  A x[kIn][N], y[kOut][N];
#pragma unroll
  for (int k = 0; k < kIn; ++k) LoadChunk(x[k], in.p[k] + begin, n - begin, vector);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    A xe[kIn], ye[kOut];
#pragma unroll
    for (int k = 0; k < kIn; ++k) xe[k] = x[k][e];
    f(xe, ye);
#pragma unroll
    for (int k = 0; k < kOut; ++k) y[k][e] = ye[k];
  }
#pragma unroll
  for (int k = 0; k < kOut; ++k) StoreChunk(out.p[k] + begin, y[k], n - begin, vector);
}

// MakeF<A>() is the function for arithmetic in A.
template <int kOut, int kIn, class MakeF>
void Map(const Stream& stream, const char* op, const View (&out)[kOut], const View (&in)[kIn],
         MakeF&& make_f) {
  const Dims shape = out[0].shape;
  const DType dtype = out[0].dtype;
  const int64_t n = shape.numel();
  bool vector = true;
  for (const View& view : out) {
    CheckArray(op, "an output", view, shape, dtype);
    vector = vector && IsAligned16(view.data);
  }
  for (const View& view : in) {
    CheckArray(op, "an input", view, shape, dtype);
    vector = vector && IsAligned16(view.data);
  }
  VisitFloat(dtype, "elementwise", [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto f = make_f(TypeTag<Accumulator<T>>{});
    Pointers<T, kOut> out_pointers;
    Pointers<const T, kIn> in_pointers;
    for (int k = 0; k < kOut; ++k) out_pointers.p[k] = out[k].template as<T>();
    for (int k = 0; k < kIn; ++k) in_pointers.p[k] = in[k].template as<T>();
    const unsigned grid = GridSize(op, CeilDiv(n, kThreads * kChunk<T>));
    Launch(stream, op, MapKernel<T, kOut, kIn, decltype(f)>, grid, kThreads, 0, out_pointers,
           in_pointers, n, vector, f);
  });
}

template <class A>
struct ScaleFunction {
  A alpha;
  __device__ void operator()(const A (&x)[1], A (&y)[1]) const { y[0] = alpha * x[0]; }
};

template <class A>
struct MultiplyFunction {
  __device__ void operator()(const A (&x)[2], A (&y)[1]) const { y[0] = x[0] * x[1]; }
};

template <class A>
__device__ __forceinline__ A Sigmoid(A x) {
  return A(1) / (A(1) + exp(-x));
}

// gelu(x) = x (1 + tanh u) / 2 = x sigmoid(2 u), u = c (x + a x^3): the latter keeps its digits
// where tanh u is near -1.
template <class A>
struct GeluFunction {
  static constexpr A c = A(0.79788456080286535588), a = A(0.044715);
  __device__ static A Gate(A x) { return Sigmoid(A(2) * c * x * (A(1) + a * x * x)); }
  __device__ void operator()(const A (&x)[1], A (&y)[1]) const { y[0] = x[0] * Gate(x[0]); }
};

template <class A>
struct GeluBackwardFunction {  // x = {dy, x}
  __device__ void operator()(const A (&x)[2], A (&y)[1]) const {
    using G = GeluFunction<A>;
    const A gate = G::Gate(x[1]), slope = A(2) * gate * (A(1) - gate);
    // Where the gate is flat its slope is 0, even if x^2 overflows.
    const A tail = slope == A(0) ? A(0) : x[1] * slope * G::c * (A(1) + A(3) * G::a * x[1] * x[1]);
    y[0] = x[0] * (gate + tail);
  }
};

template <class A>
struct SiluFunction {
  __device__ void operator()(const A (&x)[1], A (&y)[1]) const { y[0] = x[0] * Sigmoid(x[0]); }
};

template <class A>
__device__ __forceinline__ A SiluSlope(A x, A sigmoid) {
  return sigmoid * (A(1) + x * (A(1) - sigmoid));
}

template <class A>
struct SiluBackwardFunction {  // x = {dy, x}
  __device__ void operator()(const A (&x)[2], A (&y)[1]) const {
    y[0] = x[0] * SiluSlope(x[1], Sigmoid(x[1]));
  }
};

template <class A>
struct SwiGluFunction {  // x = {gate, up}
  __device__ void operator()(const A (&x)[2], A (&y)[1]) const {
    y[0] = x[0] * Sigmoid(x[0]) * x[1];
  }
};

template <class A>
struct SwiGluBackwardFunction {  // x = {dy, gate, up}, y = {dgate, dup}
  __device__ void operator()(const A (&x)[3], A (&y)[2]) const {
    const A sigmoid = Sigmoid(x[1]);
    y[0] = x[0] * x[2] * SiluSlope(x[1], sigmoid);
    y[1] = x[0] * x[1] * sigmoid;
  }
};

template <template <class> class Function>
struct Make {
  template <class A>
  Function<A> operator()(TypeTag<A>) const {
    return {};
  }
};

// out = alpha a + beta b, dtypes free.
template <class A>
__global__ void AddKernel(AnyPointer out, AnyPointer a, AnyPointer b, int64_t n, bool vector,
                          A alpha, A beta) {
  constexpr int N = kAnyChunk;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (begin >= n) return;
  A x[N], y[N];
  LoadChunkAny(x, a, begin, n - begin, vector);
  LoadChunkAny(y, b, begin, n - begin, vector);
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] = alpha * x[e] + beta * y[e];
  StoreChunkAny(out, begin, x, n - begin, vector);
}

// out [M, N] = x [M, N] + bias [N]. Chunks are cut from the flat array, so one may cross a row.
template <class A>
__global__ void AddBiasKernel(AnyPointer out, AnyPointer x, AnyPointer bias, int64_t n,
                              int64_t columns, bool vector) {
  constexpr int N = kAnyChunk;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (begin >= n) return;
  A v[N];
  LoadChunkAny(v, x, begin, n - begin, vector);
  int64_t column;
  DivMod(begin, columns, &column);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (begin + e < n) v[e] += LoadAny<A>(bias, column);
    if (++column == columns) column = 0;
  }
  StoreChunkAny(out, begin, v, n - begin, vector);
}

// f(TypeTag<A>) with the widest accumulator that the operands need.
template <class F>
void VisitAccumulator(std::initializer_list<DType> dtypes, F&& f) {
  for (DType dtype : dtypes)
    if (dtype == DType::kF64) return f(TypeTag<double>{});
  f(TypeTag<float>{});
}

}  // namespace

void AddBiasAny(const Stream& stream, const View& out, const View& x, const View& bias) {
  const char* op = "AddBias";
  CheckRank(op, "out", out, 2);
  CheckDense(op, "out", out, out.shape);
  CheckDense(op, "x", x, out.shape);
  CheckDense(op, "bias", bias, {out.dim(1)});
  for (const View* view : {&out, &x, &bias}) CheckComputeDType(op, "an argument", *view);
  const int64_t n = out.numel();
  VisitAccumulator({out.dtype, x.dtype, bias.dtype}, [&](auto tag) {
    using A = typename decltype(tag)::type;
    Launch(stream, op, AddBiasKernel<A>, GridSize(op, CeilDiv(n, kThreads * kAnyChunk)), kThreads,
           0, AnyPointer(out), AnyPointer(x), AnyPointer(bias), n, out.dim(1),
           AllAligned16(out.data, x.data));
  });
}

void AddBias(const Stream& stream, const View& out, const View& x, const View& bias) {
  CheckDType("AddBias", "x", x, out.dtype);
  CheckDType("AddBias", "bias", bias, out.dtype);
  AddBiasAny(stream, out, x, bias);
}

void Add(const Stream& stream, const View& out, const View& a, const View& b, double alpha,
         double beta) {
  const char* op = "Add";
  for (const View* view : {&out, &a, &b}) {
    CheckDense(op, "an argument", *view, out.shape);
    CheckComputeDType(op, "an argument", *view);
  }
  const int64_t n = out.numel();
  VisitAccumulator({out.dtype, a.dtype, b.dtype}, [&](auto tag) {
    using A = typename decltype(tag)::type;
    Launch(stream, op, AddKernel<A>, GridSize(op, CeilDiv(n, kThreads * kAnyChunk)), kThreads, 0,
           AnyPointer(out), AnyPointer(a), AnyPointer(b), n, AllAligned16(out.data, a.data, b.data),
           A(alpha), A(beta));
  });
}

void Scale(const Stream& stream, const View& out, const View& x, double alpha) {
  Map(stream, "Scale", {out}, {x}, [&](auto tag) {
    using A = typename decltype(tag)::type;
    return ScaleFunction<A>{A(alpha)};
  });
}

void Multiply(const Stream& stream, const View& out, const View& a, const View& b) {
  Map(stream, "Multiply", {out}, {a, b}, Make<MultiplyFunction>{});
}

void Gelu(const Stream& stream, const View& out, const View& x) {
  Map(stream, "Gelu", {out}, {x}, Make<GeluFunction>{});
}

void GeluBackward(const Stream& stream, const View& dx, const View& dy, const View& x) {
  Map(stream, "GeluBackward", {dx}, {dy, x}, Make<GeluBackwardFunction>{});
}

void Silu(const Stream& stream, const View& out, const View& x) {
  Map(stream, "Silu", {out}, {x}, Make<SiluFunction>{});
}

void SiluBackward(const Stream& stream, const View& dx, const View& dy, const View& x) {
  Map(stream, "SiluBackward", {dx}, {dy, x}, Make<SiluBackwardFunction>{});
}

void SwiGlu(const Stream& stream, const View& out, const View& gate, const View& up) {
  Map(stream, "SwiGlu", {out}, {gate, up}, Make<SwiGluFunction>{});
}

void SwiGluBackward(const Stream& stream, const View& dgate, const View& dup, const View& dy,
                    const View& gate, const View& up) {
  Map(stream, "SwiGluBackward", {dgate, dup}, {dy, gate, up}, Make<SwiGluBackwardFunction>{});
}

}  // namespace shoal::kernels::cuda
