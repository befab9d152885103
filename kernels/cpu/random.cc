#include "kernels/random.h"

#include <cmath>
#include <numbers>

namespace shoal::kernels::cpu {
namespace {

// The four normals of counter `c`.
void NormalQuad(const PhiloxKey& key, uint64_t counter, double (&normals)[4]) {
  const Philox4 words = Philox(key, counter);
  for (int pair = 0; pair < 2; ++pair) {
    const double u1 = (words.v[2 * pair] + 1.0) * 0x1p-32;  // (0, 1]: the logarithm is finite
    const double u2 = words.v[2 * pair + 1] * 0x1p-32;
    const double radius = std::sqrt(-2 * std::log(u1));
    normals[2 * pair] = radius * std::cos(2 * std::numbers::pi * u2);
    normals[2 * pair + 1] = radius * std::sin(2 * std::numbers::pi * u2);
  }
}

template <class F>  // f(out element index, global index)
void ForEachRow(const View& out, F&& f) {
  const int64_t rows = out.dim(0);
#pragma omp parallel for schedule(static) if (out.numel() > 32768)
  for (int64_t r = 0; r < rows; ++r) f(r);
}

void CheckSlice(const char* op, const View& out, int64_t row, int64_t column, int64_t columns) {
  SHOAL_CHECK(out.rank() == 2 && out.contiguous(), op, "out must be a contiguous matrix, is {}",
              out.shape.ToString());
  SHOAL_CHECK(row >= 0 && column >= 0 && column + out.dim(1) <= columns, op,
              "columns [{}, {}) of a matrix with {}", column, column + out.dim(1), columns);
}

}  // namespace

void FillNormal(const Stream&, const View& out, double std, int64_t row, int64_t column,
                int64_t columns, const PhiloxKey& key) {
  CheckSlice("FillNormal", out, row, column, columns);
  VisitFloat(out.dtype, "FillNormal", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t width = out.dim(1);
    ForEachRow(out, [&](int64_t r) {
      T* values = out.as<T>() + r * width;
      const uint64_t first = static_cast<uint64_t>((row + r) * columns + column);
      double normals[4];
      for (int64_t c = 0; c < width; ++c) {
        const uint64_t g = first + static_cast<uint64_t>(c);
        if (c == 0 || g % 4 == 0) NormalQuad(key, g / 4, normals);
        values[c] = T(std * normals[g % 4]);
      }
    });
  });
}

void FillUniform(const Stream&, const View& out, double bound, int64_t row, int64_t column,
                 int64_t columns, const PhiloxKey& key) {
  CheckSlice("FillUniform", out, row, column, columns);
  VisitFloat(out.dtype, "FillUniform", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t width = out.dim(1);
    ForEachRow(out, [&](int64_t r) {
      T* values = out.as<T>() + r * width;
      const uint64_t first = static_cast<uint64_t>((row + r) * columns + column);
      for (int64_t c = 0; c < width; ++c) {
        values[c] =
            T((2.0 * PhiloxWord(key, first + static_cast<uint64_t>(c)) * 0x1p-32 - 1.0) * bound);
      }
    });
  });
}

}  // namespace shoal::kernels::cpu
