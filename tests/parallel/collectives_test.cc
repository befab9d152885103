// Each collective's gradient is its transpose: <A x, y> = <x, A' y>, and what finite differences
// through all ranks say.
#include "parallel/collectives.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>

#include "core/ops.h"

namespace shoal {
namespace {

enum class Kind { kReplicated, kPartial, kSharded };

struct Case {
  std::string name;
  Kind in, gradient;  // what x is, and what the gradient of the output is
  std::function<Tensor(const Tensor&, Communicator&)> apply;
};

constexpr int64_t kRows = 7, kColumns = 3;

// Uneven, the last rank's share may be empty.
std::vector<int64_t> Bounds(int size) {
  std::vector<int64_t> bounds = {0};
  for (int r = 1; r < size; ++r) bounds.push_back(std::min<int64_t>(kRows, 1 + 3 * (r - 1)));
  bounds.push_back(kRows);
  return bounds;
}

// Rank `from` sends (from + 2 to) % 3 rows to rank `to`.
std::vector<int64_t> Counts(const Communicator& c, bool send) {
  std::vector<int64_t> counts;
  for (int r = 0; r < c.size(); ++r)
    counts.push_back(send ? (c.rank() + 2 * r) % 3 : (r + 2 * c.rank()) % 3);
  return counts;
}

const std::vector<Case>& Cases() {
  using namespace collectives;  // NOLINT: all of them
  static const std::vector<Case> cases = {
      {"enter", Kind::kReplicated, Kind::kPartial,
       [](const Tensor& x, Communicator& c) { return Enter(x, c); }},
      {"all_reduce", Kind::kPartial, Kind::kReplicated,
       [](const Tensor& x, Communicator& c) { return AllReduce(x, c, x.dtype()); }},
      {"all_gather", Kind::kSharded, Kind::kPartial,
       [](const Tensor& x, Communicator& c) { return AllGather(x, Bounds(c.size()), c); }},
      {"reduce_scatter", Kind::kPartial, Kind::kSharded,
       [](const Tensor& x, Communicator& c) {
         return ReduceScatter(x, Bounds(c.size()), c, x.dtype());
       }},
      {"shard", Kind::kReplicated, Kind::kSharded,
       [](const Tensor& x, Communicator& c) { return Shard(x, Bounds(c.size()), c); }},
      {"all_to_all", Kind::kSharded, Kind::kSharded,
       [](const Tensor& x, Communicator& c) {
         return AllToAll(x, Counts(c, true), Counts(c, false), c);
       }},
      {"shift", Kind::kSharded, Kind::kSharded,
       [](const Tensor& x, Communicator& c) { return Shift(x, 1, c); }},
      {"shift_back", Kind::kSharded, Kind::kSharded,
       [](const Tensor& x, Communicator& c) { return Shift(x, -2, c); }},
  };
  return cases;
}

Tensor Random(const Dims& shape, Kind kind, const Communicator& c, uint32_t seed) {
  std::mt19937 random(seed + (kind == Kind::kReplicated ? 0 : 100u * (1 + c.rank())));
  std::vector<double> values(static_cast<size_t>(shape.numel()));
  for (double& v : values) v = std::uniform_real_distribution<double>(-1, 1)(random);
  return Tensor::From(values, shape);
}

Dims InputShape(const Case& test, const Communicator& c) {
  if (test.name == "all_to_all") {
    int64_t rows = 0;
    for (const int64_t n : Counts(c, true)) rows += n;
    return {rows, kColumns};
  }
  if (test.name == "all_gather" && c.size() > 1) {
    const auto b = Bounds(c.size());
    return {b[static_cast<size_t>(c.rank()) + 1] - b[static_cast<size_t>(c.rank())], kColumns};
  }
  return {kRows, kColumns};
}

// Over all ranks; what is replicated counts once.
double Dot(const Tensor& a, const Tensor& b, Kind kind, Communicator& c) {
  double sum = 0;
  const std::vector<double> va = a.ToVector(), vb = b.ToVector();
  EXPECT_EQ(va.size(), vb.size());
  for (size_t i = 0; i < va.size(); ++i) sum += va[i] * vb[i];
  return c.Sum(kind == Kind::kReplicated && c.rank() > 0 ? 0 : sum);
}

std::shared_ptr<Leaf> MakeLeaf(const Tensor& x) {
  auto leaf = std::make_shared<Leaf>(x.shape(), x.dtype());
  x.set_node(leaf);
  return leaf;
}

class Collectives : public ::testing::TestWithParam<int> {};

TEST_P(Collectives, GradientIsTheTranspose) {
  RunThreadRanks(GetParam(), 1, [](Communicator& c) {
    for (const Case& test : Cases()) {
      const Tensor x = Random(InputShape(test, c), test.in, c, 1);
      const auto leaf = MakeLeaf(x);
      const Tensor out = test.apply(x, c);
      const Tensor y = Random(out.shape(), test.gradient, c, 2);
      Backward(out, y);
      const double left = Dot(out.Detached(), y, test.gradient, c);
      EXPECT_NEAR(left, Dot(x.Detached(), leaf->grad, test.in, c), 1e-12) << test.name;
    }
  });
}

// L = sum of w out^2 over the ranks, along a random direction.
TEST_P(Collectives, FiniteDifferences) {
  RunThreadRanks(GetParam(), 1, [](Communicator& c) {
    for (const Case& test : Cases()) {
      const Dims shape = InputShape(test, c);
      const Tensor x = Random(shape, test.in, c, 3), d = Random(shape, test.in, c, 4);
      const auto moved = [&](double by) {
        const Tensor at = x.Detached().Clone();
        const std::vector<double> step = d.ToVector();
        for (size_t i = 0; i < step.size(); ++i) at.data<double>()[i] += by * step[i];
        return at;
      };
      const auto loss = [&](const Tensor& out) {
        const Tensor w = Random(out.shape(), test.gradient, c, 5);
        return ops::Sum(ops::Multiply(w, ops::Multiply(out, out)));
      };
      const auto global = [&](double by) {
        const double mine = loss(test.apply(moved(by), c)).Item();
        return c.Sum(test.gradient == Kind::kReplicated && c.rank() > 0 ? 0 : mine);
      };
      const auto leaf = MakeLeaf(x);
      Backward(loss(test.apply(x, c)));
      const double analytic = Dot(leaf->grad, d, test.in, c);
      const double numeric = (global(1e-5) - global(-1e-5)) / 2e-5;
      EXPECT_NEAR(analytic, numeric, 1e-7 * std::max(1.0, std::abs(numeric))) << test.name;
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, Collectives, ::testing::Values(2, 3, 4));

TEST(CollectivesAlone, AreTheIdentity) {
  const auto c = MakeSelfCommunicator();
  for (const Case& test : Cases()) {
    if (test.name == "all_to_all") continue;  // sends itself nothing here
    const Tensor x = Random({kRows, kColumns}, test.in, *c, 1);
    EXPECT_EQ(test.apply(x, *c).ToVector(), x.ToVector()) << test.name;
  }
}

// Small parts that a bf16 sum would lose one after another.
TEST(CollectivesAlone, PartialSumsOfBf16AreTakenInF32) {
  RunThreadRanks(4, 1, [](Communicator& c) {
    const Tensor x = Tensor::Full({1, 1}, DType::kBF16, 1);
    const auto leaf = MakeLeaf(x);
    const Tensor entered = collectives::Enter(x, c);
    // Each rank uses it four times.
    Tensor sum;
    for (int i = 0; i < 4; ++i) {
      const Tensor part = ops::Scale(entered, c.rank() == 0 && i == 0 ? 1 : std::exp2(-9));
      sum = sum.defined() ? ops::Add(sum, part) : part;
    }
    Backward(sum, Tensor::Full({1, 1}, DType::kBF16, 1));
    EXPECT_EQ(leaf->grad.ToVector()[0], 1 + 4 * std::exp2(-7));  // 1 + 15/512, rounded to bf16
  });
}

}  // namespace
}  // namespace shoal
