#include <cmath>

#include "kernels/cuda/checks.h"
#include "kernels/cuda/device_utils.cuh"
#include "kernels/optimizer.h"

namespace shoal::kernels::cuda {
namespace {

constexpr int kThreads = 256;

template <class A>
struct AdamWFactors {
  A beta1, one_minus_beta1, beta2, one_minus_beta2;  // the differences have no digits left in f32
  A eps, gradient_scale;
  A decay;              // 1 - lr wd
  A step_size;          // lr / (1 - beta1^t)
  A second_correction;  // 1 / (1 - beta2^t)
};

// Where the exact parameter is: in `whole`, or where that is absent between `nearest` and `rest`.
template <class T>
struct ExactParameter {
  Accumulator<T>* whole;
  T* nearest;
  int16_t* rest;

  ExactParameter(const View& parameter, const View& m)
      : whole(m && m.dtype != DType::kI16 ? m.as<Accumulator<T>>() : nullptr),
        nearest(parameter.as<T>()),
        rest(m && m.dtype == DType::kI16 ? m.as<int16_t>() : nullptr) {}

  template <int N>
  __device__ __forceinline__ void Load(Accumulator<T> (&p)[N], int64_t begin, int64_t count,
                                       bool vector) const {
    if (whole)
      LoadChunk(p, whole + begin, count, vector);
    else
      LoadChunk(p, nearest + begin, count, vector);
    if constexpr (std::is_same_v<T, BF16>) {
      if (!rest) return;
#pragma unroll
      for (int e = 0; e < N; ++e)
        if (e < count) p[e] = Join(nearest[begin + e], rest[begin + e]);
    }
  }

  template <int N>
  __device__ __forceinline__ void Store(Accumulator<T> (&p)[N], int64_t begin, int64_t count,
                                        bool vector) const {
    if constexpr (std::is_same_v<T, BF16>) {
      if (rest) {
#pragma unroll
        for (int e = 0; e < N; ++e) {
          if (e >= count) continue;
          const SplitFloat split = Split(p[e]);
          nearest[begin + e] = split.nearest;
          rest[begin + e] = split.rest;
        }
        return;
      }
    }
    if (whole) StoreChunk(whole + begin, p, count, vector);
    StoreChunk(nearest + begin, p, count, vector);
  }
};

template <class T>
__global__ void AdamWKernel(ExactParameter<T> parameter, Accumulator<T>* m, Accumulator<T>* v,
                            AnyPointer gradient, int64_t n, AdamWFactors<Accumulator<T>> f,
                            bool vector) {
  using A = Accumulator<T>;
  constexpr int N = kChunk<T>;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (begin >= n) return;
  const int64_t count = n - begin;
  A p[N], g[N], mv[N], vv[N];
  parameter.Load(p, begin, count, vector);
  LoadChunkAny(g, gradient, begin, count, vector);
  LoadChunk(mv, m + begin, count, vector);
  LoadChunk(vv, v + begin, count, vector);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const A ge = g[e] * f.gradient_scale;
    mv[e] = f.beta1 * mv[e] + f.one_minus_beta1 * ge;
    vv[e] = f.beta2 * vv[e] + f.one_minus_beta2 * ge * ge;
    p[e] = p[e] * f.decay - f.step_size * mv[e] / (sqrt(vv[e] * f.second_correction) + f.eps);
  }
  parameter.Store(p, begin, count, vector);
  StoreChunk(m + begin, mv, count, vector);
  StoreChunk(v + begin, vv, count, vector);
}

template <class A>
struct SgdFactors {
  A lr, momentum, weight_decay, gradient_scale;
  bool first;
};

template <class T>
__global__ void SgdKernel(ExactParameter<T> parameter, Accumulator<T>* momentum,
                          AnyPointer gradient, int64_t n, SgdFactors<Accumulator<T>> f,
                          bool vector) {
  using A = Accumulator<T>;
  constexpr int N = kChunk<T>;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (begin >= n) return;
  const int64_t count = n - begin;
  A p[N], g[N], u[N];
  parameter.Load(p, begin, count, vector);
  LoadChunkAny(g, gradient, begin, count, vector);
#pragma unroll
  for (int e = 0; e < N; ++e) g[e] = g[e] * f.gradient_scale + f.weight_decay * p[e];
  if (momentum) {
    if (!f.first) {
      LoadChunk(u, momentum + begin, count, vector);
#pragma unroll
      for (int e = 0; e < N; ++e) g[e] += f.momentum * u[e];
    }
    StoreChunk(momentum + begin, g, count, vector);
  }
#pragma unroll
  for (int e = 0; e < N; ++e) p[e] -= f.lr * g[e];
  parameter.Store(p, begin, count, vector);
}

void CheckParameter(const char* op, const View& parameter, const View& master,
                    const View& gradient) {
  CheckRank(op, "parameter", parameter, 1);
  CheckDense(op, "parameter", parameter, parameter.shape);
  const bool needs_master = parameter.dtype == DType::kBF16;
  SHOAL_CHECK(static_cast<bool>(master) == needs_master || parameter.numel() == 0, op,
              "a parameter of {} {} a master copy", Name(parameter.dtype),
              needs_master ? "needs" : "has no use for");
  if (needs_master) {
    const bool split = master.dtype == DType::kI16;
    CheckArray(op, "master", master, parameter.shape, split ? DType::kI16 : DType::kF32);
    SHOAL_CHECK(!split || gradient.dtype != DType::kF64, op,
                "a split master takes gradients of f32 or bf16");
  }
  CheckDense(op, "gradient", gradient, parameter.shape);
  CheckComputeDType(op, "gradient", gradient);
}

}  // namespace

void AdamW(const Stream& stream, const View& parameter, const View& master, const View& m,
           const View& v, const View& gradient, const AdamWOptions& options) {
  const char* op = "AdamW";
  const DType state = AccumulatorDType(parameter.dtype);
  CheckParameter(op, parameter, master, gradient);
  CheckArray(op, "m", m, parameter.shape, state);
  CheckArray(op, "v", v, parameter.shape, state);
  SHOAL_CHECK(options.step >= 1, op, "step is {}, but counts from 1", options.step);
  const int64_t n = parameter.numel();
  const double t = static_cast<double>(options.step);
  VisitFloat(parameter.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    const AdamWFactors<A> factors = {
        A(options.beta1),
        A(1 - options.beta1),
        A(options.beta2),
        A(1 - options.beta2),
        A(options.eps),
        A(options.gradient_scale),
        A(1 - options.lr * options.weight_decay),
        A(options.lr / (1 - std::pow(options.beta1, t))),
        A(1 / (1 - std::pow(options.beta2, t))),
    };
    Launch(stream, op, AdamWKernel<T>, GridSize(op, CeilDiv(n, kThreads * kChunk<T>)), kThreads, 0,
           ExactParameter<T>(parameter, master), m.as<A>(), v.as<A>(), AnyPointer(gradient), n,
           factors, AllAligned16(parameter.data, master.data, m.data, v.data, gradient.data));
  });
}

void Sgd(const Stream& stream, const View& parameter, const View& master, const View& momentum,
         const View& gradient, const SgdOptions& options) {
  const char* op = "Sgd";
  CheckParameter(op, parameter, master, gradient);
  SHOAL_CHECK(momentum || options.momentum == 0 || parameter.numel() == 0, op,
              "momentum is {} but its buffer is absent", options.momentum);
  if (momentum)
    CheckArray(op, "momentum", momentum, parameter.shape, AccumulatorDType(parameter.dtype));
  const int64_t n = parameter.numel();
  VisitFloat(parameter.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    const SgdFactors<A> factors = {A(options.lr), A(options.momentum), A(options.weight_decay),
                                   A(options.gradient_scale), options.first};
    Launch(stream, op, SgdKernel<T>, GridSize(op, CeilDiv(n, kThreads * kChunk<T>)), kThreads, 0,
           ExactParameter<T>(parameter, master), momentum.as<A>(), AnyPointer(gradient), n, factors,
           AllAligned16(parameter.data, master.data, momentum.data, gradient.data));
  });
}

}  // namespace shoal::kernels::cuda
