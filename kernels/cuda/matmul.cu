#include "kernels/copy.h"
#include "kernels/cuda/bias.h"
#include "kernels/cuda/checks.h"
#include "kernels/cuda/device_utils.cuh"
#include "kernels/cuda/gemm.h"
#include "kernels/matmul.h"

namespace shoal::kernels::cuda {
namespace {

struct MatrixStrides {
  int64_t batch, row, column;
  explicit MatrixStrides(const View& view)
      : batch(view.rank() == 3 ? view.strides[0] : 0),
        row(view.strides[-2]),
        column(view.strides[-1]) {}
};

constexpr int kTile = 16;

// Any strides and dtypes, one element of d per thread: for what cuBLASLt does not do.
template <class A>
__global__ void PlainMatmulKernel(AnyPointer d, MatrixStrides d_strides, AnyPointer a,
                                  MatrixStrides a_strides, AnyPointer b, MatrixStrides b_strides,
                                  AnyPointer bias, int64_t m, int64_t n, int64_t k,
                                  bool accumulate) {
  __shared__ A a_tile[kTile][kTile + 1], b_tile[kTile][kTile + 1];
  const int tx = threadIdx.x % kTile, ty = threadIdx.x / kTile;
  int64_t row_tile, column_tile;
  const int64_t rest = DivMod(blockIdx.x, CeilDiv(n, kTile), &column_tile);
  const int64_t batch = DivMod(rest, CeilDiv(m, kTile), &row_tile);
  const int64_t row = row_tile * kTile + ty, column = column_tile * kTile + tx;
  A sum = 0;
  for (int64_t k0 = 0; k0 < k; k0 += kTile) {
    a_tile[ty][tx] = row < m && k0 + tx < k
                         ? LoadAny<A>(a, batch * a_strides.batch + row * a_strides.row +
                                             (k0 + tx) * a_strides.column)
                         : A(0);
    b_tile[ty][tx] = k0 + ty < k && column < n
                         ? LoadAny<A>(b, batch * b_strides.batch + (k0 + ty) * b_strides.row +
                                             column * b_strides.column)
                         : A(0);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTile; ++i) sum += a_tile[ty][i] * b_tile[i][tx];
    __syncthreads();
  }
  if (row >= m || column >= n) return;
  const int64_t at = batch * d_strides.batch + row * d_strides.row + column * d_strides.column;
  if (accumulate) sum += LoadAny<A>(d, at);
  if (bias.data) sum += LoadAny<A>(bias, column);
  StoreAny(d, at, sum);
}

void PlainMatmul(const Stream& stream, const char* op, const View& d, const View& a, const View& b,
                 const View& bias, double beta) {
  const int64_t m = d.shape[-2], n = d.shape[-1], k = a.shape[-1];
  const int64_t batch = d.rank() == 3 ? d.shape[0] : 1;
  const auto launch = [&](auto tag) {
    using A = typename decltype(tag)::type;
    Launch(stream, op, PlainMatmulKernel<A>,
           GridSize(op, batch * CeilDiv(m, kTile) * CeilDiv(n, kTile)), kTile * kTile, 0,
           AnyPointer(d), MatrixStrides(d), AnyPointer(a), MatrixStrides(a), AnyPointer(b),
           MatrixStrides(b), AnyPointer(bias), m, n, k, beta != 0);
  };
  if (d.dtype == DType::kF64)
    launch(TypeTag<double>{});
  else
    launch(TypeTag<float>{});
}

// Copies of operands that begin at an odd address, for the time of one product.
class Realigned {
 public:
  // `read`: the copy starts with the operand's values.
  Realigned(const Stream& stream, const View& operand, bool read)
      : operand_(operand), memory_(stream, Needed(operand) ? SpanBytes(operand) : 0) {
    if (!Needed(operand)) return;
    operand_.data = memory_.as<char>();
    if (read) Copy(stream, operand_, operand);
  }
  const View& view() const { return operand_; }
  static bool Needed(const View& v) {
    return reinterpret_cast<uintptr_t>(v.data) % kGemmAlignment != 0;
  }

 private:
  static size_t SpanBytes(const View& v) {
    int64_t last = 0;
    for (int i = 0; i < v.rank(); ++i) last += (v.shape[i] - 1) * v.strides[i];
    return (last + 1) * SizeOf(v.dtype);
  }

  View operand_;
  Scratch memory_;
};

// The product by cuBLASLt; false where it has none.
bool LibraryMatmul(const Stream& stream, const char* op, const View& d, const View& a,
                   const View& b, const View& bias, double beta) {
  std::optional<Gemm> gemm = PlanGemm(d, a, b, beta);
  if (!gemm) return false;
  const int64_t n = d.shape[-1];
  // The epilogue takes a bias of d's dtype.
  const bool convert = bias && (bias.dtype != d.dtype || Realigned::Needed(bias));
  Scratch converted(stream, convert ? n * SizeOf(d.dtype) : 0);
  gemm->bias = bias.data;
  if (convert) {
    const View view(converted.as<char>(), d.dtype, {n}, d.device);
    Copy(stream, view, bias);
    gemm->bias = view.data;
  }
  if (RunCublasLt(stream, op, *gemm)) return true;
  // Not every product has a bias epilogue, none in f64.
  if (!bias || !d.contiguous()) return false;
  gemm->bias = nullptr;
  if (!RunCublasLt(stream, op, *gemm)) return false;
  const View rows(d.data, d.dtype, {d.numel() / n, n}, d.device);
  AddBiasAny(stream, rows, rows, bias);
  return true;
}

}  // namespace

void Matmul(const Stream& stream, const View& d, const View& a, const View& b, const View& bias,
            double beta) {
  const char* op = "matmul";
  SHOAL_CHECK((d.rank() == 2 || d.rank() == 3) && a.rank() == d.rank() && b.rank() == d.rank(), op,
              "d {}, a {} and b {} are not all of two or all of three dimensions",
              d.shape.ToString(), a.shape.ToString(), b.shape.ToString());
  const int64_t n = d.shape[-1];
  SHOAL_CHECK(a.shape[-2] == d.shape[-2] && b.shape[-1] == n && a.shape[-1] == b.shape[-2] &&
                  (d.rank() == 2 || (a.shape[0] == d.shape[0] && b.shape[0] == d.shape[0])),
              op, "{} times {} is not {}", a.shape.ToString(), b.shape.ToString(),
              d.shape.ToString());
  SHOAL_CHECK(a.dtype == b.dtype, op, "a is {}, b is {}", Name(a.dtype), Name(b.dtype));
  SHOAL_CHECK(SizeOf(d.dtype) >= SizeOf(a.dtype), op, "d is {}, narrower than a, {}", Name(d.dtype),
              Name(a.dtype));
  SHOAL_CHECK(beta == 0 || beta == 1, op, "beta is {}, not 0 or 1", beta);
  for (const View* view : {&d, &a, &b}) CheckComputeDType(op, "an argument", *view);
  CheckUnitStride(op, "d", d);
  if (bias) {
    CheckDense(op, "bias", bias, {n});
    CheckComputeDType(op, "bias", bias);
  }
  if (d.numel() == 0) return;

  if (a.shape[-1] > 0) {
    const Realigned ra(stream, a, true), rb(stream, b, true), rd(stream, d, beta != 0);
    if (LibraryMatmul(stream, op, rd.view(), ra.view(), rb.view(), bias, beta)) {
      if (Realigned::Needed(d)) Copy(stream, d, rd.view());
      return;
    }
  }
  PlainMatmul(stream, op, d, a, b, bias, beta);
}

}  // namespace shoal::kernels::cuda
