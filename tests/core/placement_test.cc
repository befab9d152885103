// What a value is to other ranks, through ops: the derived placements, and the errors that name the
// op, the axis and the parameter.
#include <gtest/gtest.h>

#include "core/ops.h"
#include "core/parameter.h"
#include "core/placement_rules.h"

namespace shoal {
namespace {

using Kind = AxisPlacement::Kind;
constexpr MeshAxis kTp = MeshAxis::kTp;

Tensor On(const Tensor& t, AxisPlacement p, MeshAxis axis = kTp) {
  Placement placement = t.placement();
  placement.Set(axis, p);
  t.set_placement(placement);
  return t;
}

// Wants a gradient.
Tensor Value(const Dims& shape, AxisPlacement p = {}, const char* name = "") {
  Tensor t = Tensor::Full(shape, DType::kF64, 0.5);
  auto leaf = std::make_shared<Leaf>(shape, DType::kF64);
  leaf->name = name;
  t.set_node(std::move(leaf));
  return On(t, p);
}

AxisPlacement Sharded(int dim) { return AxisPlacement::Sharded(dim); }

template <class F>
std::string Message(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kBug);
    return e.what();
  }
  return "no error";
}

void Names(const std::string& message, const std::vector<std::string>& parts) {
  for (const std::string& part : parts)
    EXPECT_NE(message.find(part), std::string::npos) << part << " in: " << message;
}

TEST(Placement, GradientsAreDerived) {
  EXPECT_EQ(AxisPlacement{Kind::kReplicated}.OfGradient(), AxisPlacement{Kind::kPartial});
  EXPECT_EQ(AxisPlacement{Kind::kPartial}.OfGradient(), AxisPlacement{Kind::kReplicated});
  for (const AxisPlacement p : {AxisPlacement{}, Sharded(1), AxisPlacement{Kind::kVarying}}) {
    EXPECT_EQ(p.OfGradient(), p);
  }
}

TEST(Placement, LinearIsColumnOrRowParallelByItsWeight) {
  const Tensor entered = Value({2, 3, 4}, {Kind::kReplicated});
  const Tensor columns = ops::Linear(entered, Value({10, 4}, Sharded(0)), Value({10}, Sharded(0)));
  EXPECT_EQ(columns.placement()[kTp], Sharded(2));
  const Tensor heads = ops::Reshape(columns, {2, 3, 2, 5});
  EXPECT_EQ(heads.placement()[kTp], Sharded(2));
  EXPECT_EQ(ops::Reshape(ops::Gelu(heads), {2, 3, -1}).placement()[kTp], Sharded(2));
  const Tensor parts = ops::Linear(columns, Value({4, 10}, Sharded(1)));
  EXPECT_EQ(parts.placement()[kTp].kind, Kind::kPartial);
  EXPECT_EQ(ops::Add(parts, ops::Scale(parts, 2)).placement()[kTp].kind, Kind::kPartial);
  // Rows of tokens, with a whole weight whose gradient somebody sums.
  const Tensor rows = Value({6, 4}, Sharded(0));
  EXPECT_EQ(ops::Linear(rows, Value({5, 4}, {Kind::kReplicated})).placement()[kTp], Sharded(0));
  EXPECT_EQ(ops::RmsNorm(rows, Value({4}, {Kind::kReplicated}), 1e-5).placement()[kTp], Sharded(0));
}

TEST(Placement, AxesAreIndependent) {
  const Tensor x = On(Value({6, 4}, {Kind::kReplicated}), Sharded(0), MeshAxis::kDp);
  const Tensor w = On(Value({5, 4}, Sharded(0)), {Kind::kReplicated}, MeshAxis::kDp);
  const Tensor y = ops::Linear(x, w);
  EXPECT_EQ(y.placement()[kTp], Sharded(1));
  EXPECT_EQ(y.placement()[MeshAxis::kDp], Sharded(0));
  EXPECT_EQ(ops::Sum(y).placement()[MeshAxis::kDp].kind, Kind::kPartial);
}

TEST(Placement, APartIsNotTakenForTheWhole) {
  const Tensor parts =
      ops::Linear(Value({2, 3}, Sharded(1)), Value({4, 3}, Sharded(1), "blocks.0.mlp.down.weight"));
  Names(Message([&] { ops::Gelu(parts); }),
        {"gelu", "axis tp", "'blocks.0.mlp.down.weight'", "part of a sum"});
  Names(Message([&] { ops::Add(Value({2, 4}), parts); }), {"add", "axis tp", "on each"});
  Names(Message([&] { ops::RmsNorm(parts, Value({4}), 1e-5); }), {"rms_norm", "axis tp"});
  // Unless it stays one: scaling is linear.
  EXPECT_EQ(ops::Scale(parts, 3).placement()[kTp].kind, Kind::kPartial);
}

TEST(Placement, AGradientThatNobodySumsIsAnError) {
  // A column-parallel Linear whose input did not enter.
  Names(Message([&] {
          ops::Linear(Value({2, 4}, {}, "embed.weight"), Value({5, 4}, Sharded(0), "q.weight"));
        }),
        {"linear", "axis tp", "'embed.weight'", "Enter"});
  // A gain on rows of tokens, under sequence parallelism.
  Names(Message([&] {
          ops::RmsNorm(Value({6, 4}, Sharded(0)), Value({4}, {}, "norm.weight"), 1e-5);
        }),
        {"rms_norm", "axis tp", "'norm.weight'", "gradient"});
  // A table that no data-parallel exchange knows of.
  const Tensor ids = On(Tensor::From(std::vector<int32_t>{0, 1}, {2}), Sharded(0));
  Names(Message([&] {
          ops::Embedding(Value({3, 4}, {}, "position.weight"), ids);
        }),
        {"embedding", "'position.weight'"});
  // Constants have none.
  EXPECT_EQ(ops::Multiply(Value({2, 4}, Sharded(0)), Tensor::Full({2, 4}, DType::kF64, 2))
                .placement()[kTp],
            Sharded(0));
}

TEST(Placement, WhatNeedsAWholeRowRefusesAPart) {
  const Tensor columns = Value({2, 4}, Sharded(1), "q.weight");
  Names(Message([&] { ops::Softmax(columns); }), {"softmax", "tp", "'q.weight'", "each row"});
  Names(Message([&] { ops::Linear(columns, Value({3, 4}, {Kind::kReplicated})); }), {"linear"});
  Names(Message([&] {
          ops::Linear(Value({2, 4}, Sharded(1)), Value({3, 4}, Sharded(1)), Value({3}, {}, "b"));
        }),
        {"linear", "'b'", "on each"});
  Names(Message([&] {
          ops::LinearCrossEntropy(Value({2, 4}, {Kind::kReplicated}),
                                  Value({3, 4}, Sharded(0), "head.weight"),
                                  Tensor::From(std::vector<int32_t>{0, 1}, {2}), 2);
        }),
        {"linear_cross_entropy", "'head.weight'", "softmax"});
  const Tensor q = Value({1, 2, 1, 4}, Sharded(1));
  Names(Message([&] { ops::Attention(q, q, q, {}, {}, {}); }), {"attention", "sequence"});
}

TEST(Placement, ALossIsTheSameOnAllRanksOrASumsPart) {
  Names(Message([&] { Backward(ops::Sum(Value({2}, {Kind::kReplicated}, "w"))); }),
        {"backward", "'w'", "no loss"});
  Backward(ops::Sum(Value({2}, Sharded(0))));
  Backward(ops::Sum(Value({2})));
}

// Extents of 1 leave open which dimension a reshape's shards are along; that is no error.
TEST(Placement, AnAmbiguousReshapeVaries) {
  const Tensor rows = Value({1, 6}, Sharded(1));
  EXPECT_EQ(ops::Reshape(rows, {1, 1, 2, 3}).placement()[kTp].kind, Kind::kVarying);
  EXPECT_EQ(ops::Reshape(Value({4, 1, 6}, Sharded(1)), {4, 6}).placement()[kTp].kind,
            Kind::kVarying);
  EXPECT_EQ(ops::Reshape(Value({4, 6}, Sharded(1)), {2, 2, 2, 3}).placement()[kTp], Sharded(2));
  EXPECT_EQ(ops::Reshape(Value({2, 2, 6}, Sharded(2)), {4, 6}).placement()[kTp], Sharded(1));
}

}  // namespace
}  // namespace shoal
