#include "kernels/matmul.h"

#include "kernels/cpu/matmul_internal.h"

namespace shoal::kernels::cpu {
namespace {

// K = 0: nothing to add up.
void AddBiasOnly(const Product& p) {
  VisitFloat(p.result, "matmul", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    for (int64_t z = 0; z < p.batch; ++z) {
      for (int64_t i = 0; i < p.m; ++i) {
        T* row = static_cast<T*>(p.d) + z * p.d_batch + i * p.d_row;
        for (int64_t j = 0; j < p.n; ++j) {
          A sum = p.accumulate ? static_cast<A>(row[j]) : A{0};
          if (p.bias && p.bias_type == p.result)
            sum += static_cast<A>(static_cast<const T*>(p.bias)[j]);
          if (p.bias && p.bias_type != p.result)
            sum += static_cast<A>(static_cast<float>(static_cast<const BF16*>(p.bias)[j]));
          row[j] = static_cast<T>(sum);
        }
      }
    }
  });
}

// A dimension of size 1 has no stride of its own: gives it the one that makes the matrix plain.
// Returns false where no dimension has stride 1 or rows overlap.
bool Normalize(int64_t rows, int64_t columns, int64_t& row, int64_t& column) {
  if (columns == 1) column = 1;
  if (rows == 1) row = column == 1 ? columns : 1;
  if (column == 1) {
    if (columns == 1 && rows > 1 && row == 0) return false;
    return row >= columns;
  }
  return row == 1 && column >= rows;
}

}  // namespace

void Matmul(const Stream& stream, const View& d, const View& a, const View& b, const View& bias,
            double beta) {
  const int rank = d.rank();
  SHOAL_CHECK((rank == 2 || rank == 3) && a.rank() == rank && b.rank() == rank, "matmul",
              "d, a and b have {}, {} and {} dimensions, not 2 or 3 each", rank, a.rank(),
              b.rank());
  Product p{};
  p.m = d.dim(-2);
  p.n = d.dim(-1);
  p.k = a.dim(-1);
  p.batch = rank == 3 ? d.dim(0) : 1;
  SHOAL_CHECK(a.dim(-2) == p.m && b.dim(-2) == p.k && b.dim(-1) == p.n &&
                  (rank == 2 || (a.dim(0) == p.batch && b.dim(0) == p.batch)),
              "matmul", "shapes do not fit: d {}, a {}, b {}", d.shape.ToString(),
              a.shape.ToString(), b.shape.ToString());
  SHOAL_CHECK(beta == 0 || beta == 1, "matmul", "beta is {}, not 0 or 1", beta);
  const bool types =
      a.dtype == b.dtype &&
      (a.dtype == DType::kBF16
           ? d.dtype == DType::kBF16 || d.dtype == DType::kF32
           : (a.dtype == DType::kF32 || a.dtype == DType::kF64) && d.dtype == a.dtype);
  SHOAL_CHECK(types, "matmul", "no product of {} and {} into {}", Name(a.dtype), Name(b.dtype),
              Name(d.dtype));
  SHOAL_CHECK(!bias || (bias.rank() == 1 && bias.dim(0) == p.n && bias.contiguous() &&
                        (bias.dtype == d.dtype || bias.dtype == a.dtype)),
              "matmul", "bias {} {} does not fit d {} {}", Name(bias.dtype), bias.shape.ToString(),
              Name(d.dtype), d.shape.ToString());
  if (p.m == 0 || p.n == 0 || p.batch == 0) return;

  p.a_row = a.strides[-2];
  p.a_column = a.strides[-1];
  p.b_row = b.strides[-2];
  p.b_column = b.strides[-1];
  p.d_row = d.strides[-2];
  int64_t d_column = d.strides[-1];
  if (rank == 3) {
    p.a_batch = a.strides[0];
    p.b_batch = b.strides[0];
    p.d_batch = d.strides[0];
  }
  p.a = a.data;
  p.b = b.data;
  p.d = d.data;
  p.bias = bias.data;
  p.bias_type = bias.dtype;
  p.operand = a.dtype;
  p.result = d.dtype;
  p.accumulate = beta == 1;
  SHOAL_CHECK(Normalize(p.m, p.n, p.d_row, d_column) && d_column == 1, "matmul",
              "d {} needs stride 1 in its last dimension and rows apart, not {}",
              d.shape.ToString(), d.strides.ToString());
  if (p.k == 0) {
    if (!stream.counting()) AddBiasOnly(p);
    return;
  }
  SHOAL_CHECK(Normalize(p.m, p.k, p.a_row, p.a_column), "matmul",
              "a {} needs stride 1 in one of its last two dimensions, not {}", a.shape.ToString(),
              a.strides.ToString());
  SHOAL_CHECK(Normalize(p.k, p.n, p.b_row, p.b_column), "matmul",
              "b {} needs stride 1 in one of its last two dimensions, not {}", b.shape.ToString(),
              b.strides.ToString());

  // One b for the whole batch of dense row blocks is one taller product.
  if (p.batch > 1 && p.b_batch == 0 && p.a_column == 1 && p.a_batch == p.m * p.a_row &&
      p.d_batch == p.m * p.d_row) {
    p.m *= p.batch;
    p.batch = 1;
  }
  if (p.operand == DType::kF64)
    MatmulF64(stream, p);
  else
    MatmulDnnl(stream, p);
}

}  // namespace shoal::kernels::cpu
