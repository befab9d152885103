#include "core/init.h"

#include "core/base/philox.h"
#include "kernels/random.h"

namespace shoal {

void InitParameter(const Parameter& parameter, uint64_t seed) {
  const PhiloxKey key{seed, HashName(parameter.name())};
  const InitSpec& init = parameter.init();
  const Tensor& value = parameter.value();
  if (init.kind == InitSpec::Kind::kZeros || init.kind == InitSpec::Kind::kOnes) {
    value.Fill(init.kind == InitSpec::Kind::kOnes ? 1 : 0);
    return;
  }
  // A row of the kernel's matrix is everything behind the first dimension; a vector is one row.
  const Dims& global = parameter.global_shape();
  SHOAL_CHECK(global.rank() <= 2, parameter.name(),
              "random values are drawn for vectors and matrices, not {}", global.ToString());
  const bool matrix = global.rank() == 2;
  const int64_t row = matrix ? parameter.offset()[0] : 0;
  const Tensor rows = matrix ? value : value.Reshaped({1, -1});
  const auto fill =
      init.kind == InitSpec::Kind::kNormal ? kernels::FillNormal : kernels::FillUniform;
  fill(ExecutionContext::Current().stream(), rows.view(), init.scale, row, parameter.offset()[-1],
       global[-1], key);
}

void MaterializeParameters(Module& root, DType dtype, uint64_t seed) {
  for (const auto& parameter : root.Parameters()) {
    parameter->Materialize(dtype);
    InitParameter(*parameter, seed);
  }
}

}  // namespace shoal
