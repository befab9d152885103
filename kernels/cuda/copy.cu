#include <cstring>

#include "kernels/copy.h"
#include "kernels/cuda/checks.h"
#include "kernels/cuda/device_utils.cuh"
#include "kernels/cuda/strided.h"

namespace shoal::kernels::cuda {
namespace {

constexpr int kThreads = 256;

// Where element i, counted in row-major order, lies on both sides.
struct Offsets {
  int64_t out = 0, in = 0;
};
__device__ __forceinline__ Offsets OffsetsOf(const StridedPlan& plan, int64_t i) {
  Offsets at;
#pragma unroll
  for (int d = StridedPlan::kMaxRank - 1; d >= 0; --d) {
    if (d >= plan.rank) continue;
    int64_t index;
    i = DivMod(i, plan.shape[d], &index);
    at.out += index * plan.out[d];
    at.in += index * plan.in[d];
  }
  return at;
}

template <class Bits>
__global__ void CopyBitsKernel(Bits* out, const Bits* in, StridedPlan plan) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= plan.count) return;
  const Offsets at = OffsetsOf(plan, i);
  out[at.out] = in[at.in];
}

template <class Bits>
__global__ void FillBitsKernel(Bits* out, Bits value, StridedPlan plan) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < plan.count) out[OffsetsOf(plan, i).out] = value;
}

// A value between two dtypes: integers pass as int64, so that none is rounded on the way.
struct Number {
  bool is_integer;
  double real;
  int64_t integer;
};

__device__ __forceinline__ Number LoadNumber(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kF64:
      return {false, static_cast<const double*>(data)[i], 0};
    case DType::kF32:
      return {false, static_cast<const float*>(data)[i], 0};
    case DType::kBF16:
      return {false, static_cast<double>(static_cast<const BF16*>(data)[i]), 0};
    case DType::kF16:
      return {false, static_cast<double>(static_cast<const F16*>(data)[i]), 0};
    case DType::kI32:
      return {true, 0, static_cast<const int32_t*>(data)[i]};
    case DType::kI64:
      return {true, 0, static_cast<const int64_t*>(data)[i]};
    case DType::kI8:
      return {true, 0, static_cast<const int8_t*>(data)[i]};
    case DType::kI16:
      return {true, 0, static_cast<const int16_t*>(data)[i]};
    default:
      return {true, 0, static_cast<const uint8_t*>(data)[i]};
  }
}

template <class T>
__device__ __forceinline__ T ToFloat(const Number& x) {
  if constexpr (sizeof(T) == 2) {
    return T(x.is_integer ? static_cast<float>(x.integer) : static_cast<float>(x.real));
  } else {
    return x.is_integer ? static_cast<T>(x.integer) : static_cast<T>(x.real);
  }
}

template <class T>
__device__ __forceinline__ T ToInteger(const Number& x) {
  return static_cast<T>(x.is_integer ? x.integer : static_cast<int64_t>(x.real));
}

__device__ __forceinline__ void StoreNumber(void* data, DType dtype, int64_t i, const Number& x) {
  switch (dtype) {
    case DType::kF64:
      static_cast<double*>(data)[i] = ToFloat<double>(x);
      break;
    case DType::kF32:
      static_cast<float*>(data)[i] = ToFloat<float>(x);
      break;
    case DType::kBF16:
      static_cast<BF16*>(data)[i] = ToFloat<BF16>(x);
      break;
    case DType::kF16:
      static_cast<F16*>(data)[i] = ToFloat<F16>(x);
      break;
    case DType::kI32:
      static_cast<int32_t*>(data)[i] = ToInteger<int32_t>(x);
      break;
    case DType::kI64:
      static_cast<int64_t*>(data)[i] = ToInteger<int64_t>(x);
      break;
    case DType::kI8:
      static_cast<int8_t*>(data)[i] = ToInteger<int8_t>(x);
      break;
    case DType::kU8:
      static_cast<uint8_t*>(data)[i] = ToInteger<uint8_t>(x);
      break;
    case DType::kI16:
      static_cast<int16_t*>(data)[i] = ToInteger<int16_t>(x);
      break;
  }
}

__global__ void ConvertKernel(void* out, DType out_dtype, const void* in, DType in_dtype,
                              StridedPlan plan) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= plan.count) return;
  const Offsets at = OffsetsOf(plan, i);
  StoreNumber(out, out_dtype, at.out, LoadNumber(in, in_dtype, at.in));
}

// The cast of mixed precision: contiguous, between f64, f32 and bf16.
template <class A>
__global__ void CastKernel(AnyPointer out, AnyPointer in, int64_t n, bool vector) {
  constexpr int N = kAnyChunk;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (begin >= n) return;
  A v[N];
  LoadChunkAny(v, in, begin, n - begin, vector);
  StoreChunkAny(out, begin, v, n - begin, vector);
}

bool IsComputeDType(DType dtype) { return IsFloat(dtype) && dtype != DType::kF16; }

// f(TypeTag<Bits>) with an unsigned type of `size` bytes.
template <class F>
void VisitBits(int size, F&& f) {
  switch (size) {
    case 1:
      return f(TypeTag<uint8_t>{});
    case 2:
      return f(TypeTag<uint16_t>{});
    case 4:
      return f(TypeTag<uint32_t>{});
    case 8:
      return f(TypeTag<uint64_t>{});
    default:
      return f(TypeTag<Pack<uint64_t, 2>>{});
  }
}

}  // namespace

void Copy(const Stream& stream, const View& out, const View& x) {
  const char* op = "Copy";
  CheckShape(op, "x", x, out.shape);
  StridedPlan plan = PlanStrided(out, x);
  if (plan.count == 0) return;
  if (out.dtype == x.dtype) {
    if (plan.Dense()) {
      SHOAL_CUDA_CHECK(cudaSetDevice(stream.device.index), op);
      SHOAL_CUDA_CHECK(
          cudaMemcpyAsync(out.data, x.data, out.bytes(), cudaMemcpyDeviceToDevice, Handle(stream)),
          op);
      return;
    }
    const int size =
        WidenStrided(plan, static_cast<int>(SizeOf(out.dtype)),
                     reinterpret_cast<uintptr_t>(out.data), reinterpret_cast<uintptr_t>(x.data));
    VisitBits(size, [&](auto tag) {
      using Bits = typename decltype(tag)::type;
      Launch(stream, op, CopyBitsKernel<Bits>, GridSize(op, CeilDiv(plan.count, kThreads)),
             kThreads, 0, out.as<Bits>(), x.as<Bits>(), plan);
    });
  } else if (plan.Dense() && IsComputeDType(out.dtype) && IsComputeDType(x.dtype)) {
    const auto launch = [&](auto tag) {
      using A = typename decltype(tag)::type;
      Launch(stream, op, CastKernel<A>, GridSize(op, CeilDiv(plan.count, kThreads * kAnyChunk)),
             kThreads, 0, AnyPointer(out), AnyPointer(x), plan.count,
             AllAligned16(out.data, x.data));
    };
    if (out.dtype == DType::kF64 && x.dtype == DType::kF32)
      launch(TypeTag<double>{});
    else
      launch(TypeTag<float>{});
  } else {
    Launch(stream, op, ConvertKernel, GridSize(op, CeilDiv(plan.count, kThreads)), kThreads, 0,
           out.data, out.dtype, x.data, x.dtype, plan);
  }
}

void Fill(const Stream& stream, const View& out, double value) {
  const char* op = "Fill";
  StridedPlan plan = PlanStrided(out, out);
  if (plan.count == 0) return;
  // The element's bits, repeated so that they fill any wider element too.
  alignas(16) unsigned char bits[16];
  const size_t element = SizeOf(out.dtype);
  VisitAny(out.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T x = static_cast<T>(value);
    for (size_t at = 0; at < sizeof bits; at += element) std::memcpy(bits + at, &x, element);
  });
  const uintptr_t address = reinterpret_cast<uintptr_t>(out.data);
  const int size = WidenStrided(plan, static_cast<int>(element), address, address);
  VisitBits(size, [&](auto tag) {
    using Bits = typename decltype(tag)::type;
    Bits x;
    std::memcpy(&x, bits, sizeof x);
    Launch(stream, op, FillBitsKernel<Bits>, GridSize(op, CeilDiv(plan.count, kThreads)), kThreads,
           0, out.as<Bits>(), x, plan);
  });
}

}  // namespace shoal::kernels::cuda
