#include "core/ops.h"
#include "core/ops/common.h"
#include "kernels/dropout.h"
#include "kernels/embedding.h"

namespace shoal::ops {
namespace {

// Rows of the table on several ranks: each has the rows that it holds, and zeros for the others.
Placement EmbeddingPlacement(const Tensor& table, const Tensor& ids) {
  const std::array operands = {table, ids};
  return PlacePerAxis(operands, [&](MeshAxis axis) -> AxisPlacement {
    if (table.placement()[axis] != AxisPlacement::Sharded(0))
      return UniformPlacement("embedding", axis, operands);
    if (!ids.placement()[axis].SameOnAllRanks())
      FailPlacement("embedding", axis, ids, 1,
                    "differs between ranks that each hold some of the table's rows");
    return {AxisPlacement::kPartial};
  });
}

}  // namespace

Tensor Embedding(const Tensor& table, const Tensor& ids, const kernels::TablePart& part) {
  const OriginScope here("embedding");
  Dims shape = ids.shape();
  shape.push_back(table.dim(1));
  Tensor out = Tensor::Empty(shape, table.dtype());
  const Tensor flat = ids.Reshaped({-1});
  kernels::Embedding(CurrentStream(), Rows(out).view(), table.view(), flat.view(), part);
  return Record("embedding", out, {table}, {flat},
                [part](GradContext& context) {
                  const Tensor ids = context.Saved(0);
                  const auto [dtable, accumulate] = context.Sink(0);
                  kernels::EmbeddingBackward(CurrentStream(), dtable.view(), accumulate,
                                             Rows(context.grad()).view(), ids.view(), part);
                },
                {.placement = EmbeddingPlacement(table, ids)});
}

Tensor Dropout(const Tensor& x, const Tensor& tokens, double p, const PhiloxKey& key) {
  const OriginScope here("dropout");
  if (p == 0) return x;
  SHOAL_CHECK(p > 0 && p < 1, "dropout", "p = {}", p);
  CheckWholeRows("dropout", x);  // the mask counts columns from 0
  Tensor out = Tensor::Empty(x.shape(), x.dtype());
  const Tensor flat = tokens.Reshaped({-1});
  kernels::Dropout(CurrentStream(), Rows(out).view(), Rows(x).view(), flat.view(), p, key);
  return Record("dropout", out, {x}, {flat}, [p, key](GradContext& context) {
    const Tensor tokens = context.Saved(0);
    Tensor gradient = Overwritable(context.TakeGrad());
    kernels::Dropout(CurrentStream(), Rows(gradient).view(), Rows(gradient).view(), tokens.view(),
                     p, key);
    context.Give(0, std::move(gradient));
  });
}

}  // namespace shoal::ops
