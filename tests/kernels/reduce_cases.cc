#include <cmath>

#include "kernels/reduce.h"
#include "kernels/reduce_arrays.h"
#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {
namespace {

Case SumCase(std::string name, Arg x) {
  return {.name = "Sum/" + name,
          .args = {Out(DType::kF64, {1}), x},
          .kernel = [](const Stream& s, const Views& a) { Sum(s, a[0], a[1]); },
          .reference =
              [](Arrays& a) {
                a[0][0] = 0;
                for (double v : a[1].v) a[0][0] += v;
              },
          .tolerance = {1e-12, 0, 0}};
}

Case SumSquaresCase(std::string name, Arg x) {
  return {.name = "SumSquares/" + name,
          .args = {Out(DType::kF64, {1}), x},
          .kernel = [](const Stream& s, const Views& a) { SumSquares(s, a[0], a[1]); },
          .reference =
              [](Arrays& a) {
                a[0][0] = 0;
                for (double v : a[1].v) a[0][0] += v * v;
              },
          .tolerance = {1e-12, 0, 0}};
}

Case SumRowsCase(std::string name, Arg out, Arg x, bool accumulate) {
  return {.name = "SumRows/" + name,
          .args = {out, x},
          .kernel = [=](const Stream& s, const Views& a) { SumRows(s, a[0], a[1], accumulate); },
          .reference =
              [=](Arrays& a) {
                const int64_t n = a[1].dim(1);
                for (int64_t j = 0; j < n; ++j) {
                  double sum = accumulate ? a[0][j] : 0;
                  for (int64_t i = 0; i < a[1].dim(0); ++i) sum += a[1](i, j);
                  a[0][j] = sum;
                }
              },
          .tolerance = {x.dtype == DType::kF64 ? 1e-13 : 2e-6}};
}

Case ReduceInOrderCase(std::string name, ReduceOp op, Arg x) {
  return {.name = fmt::format("ReduceInOrder/{}{}", op == ReduceOp::kMax ? "max/" : "", name),
          .args = {Out(x.dtype, {x.shape[1]}), x},
          .kernel = [=](const Stream& s, const Views& a) { ReduceInOrder(s, op, a[0], a[1]); },
          .reference =
              [=](Arrays& a) {
                for (int64_t j = 0; j < a[1].dim(1); ++j) {
                  double result = a[1](0, j);
                  for (int64_t p = 1; p < a[1].dim(0); ++p) {
                    const double v = a[1](p, j);
                    if (op == ReduceOp::kSum) result += v;
                    if (op == ReduceOp::kMax && !(result >= v || std::isnan(result))) result = v;
                  }
                  a[0][j] = result;
                }
              },
          .tolerance = {x.dtype == DType::kF64 ? 1e-15 : 1e-6}};
}

const CaseFile kCases([](std::vector<Case>& cases) {
  for (DType t : kFloats) {
    const char* n = Name(t);
    for (const Dims& shape : {Dims{0}, Dims{}, Dims{1}, Dims{31}, Dims{33}, Dims{16384},
                              Dims{16385}, Dims{3, 5, 7001}}) {
      const auto name = fmt::format("{}/{}", n, shape.ToString());
      cases.push_back(SumCase(name, In(t, shape).Range(0, 1)));
      cases.push_back(SumSquaresCase(name, In(t, shape)));
    }
    // f32 squares that neither f32 could hold.
    if (t != DType::kF64) {
      cases.push_back(SumSquaresCase(fmt::format("{}/huge", n), In(t, {77}).Values({1e30, 3e38})));
      cases.push_back(
          SumSquaresCase(fmt::format("{}/tiny", n), In(t, {77}).Values({1e-30, 1e-38})));
    }
    cases.push_back(
        SumSquaresCase(fmt::format("{}/nan", n), In(t, {5}).Values({1, std::nan(""), 2, 3, 4})));
    cases.push_back(
        SumCase(fmt::format("{}/cancelling", n), In(t, {40000}).Values({1e9, 1, -1e9})));
    for (DType o : kFloats)
      for (bool accumulate : {false, true})
        cases.push_back(SumRowsCase(fmt::format("{}_from_{}/{}", Name(o), n, accumulate),
                                    accumulate ? InOut(o, {65}) : Out(o, {65}), In(t, {37, 65}),
                                    accumulate));
    for (const Dims& shape : {Dims{0, 3}, Dims{1, 1}, Dims{3, 0}, Dims{19, 3}, Dims{1030, 97}})
      cases.push_back(SumRowsCase(fmt::format("{}/{}", n, shape.ToString()), Out(t, {shape[1]}),
                                  In(t, shape), false));
    for (const Dims& shape : {Dims{1, 1}, Dims{2, 0}, Dims{2, 2049}, Dims{3, 4100}, Dims{17, 5}})
      for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax})
        cases.push_back(
            ReduceInOrderCase(fmt::format("{}/{}", n, shape.ToString()), op, In(t, shape)));
    cases.push_back(ReduceInOrderCase(fmt::format("{}/apart", n), ReduceOp::kSum,
                                      In(t, {3, 33}).Strided(PaddedStrides({3, 33}, 7))));
    cases.push_back(ReduceInOrderCase(fmt::format("{}/nan", n), ReduceOp::kMax,
                                      In(t, {3, 4}).Values({1, 2, std::nan(""), 4, 5})));
    if (t == DType::kF64) continue;
    const Dims large{1 << 26};
    for (Case c :
         {SumSquaresCase(fmt::format("bench/{}", n), In(t, large)),
          SumRowsCase(fmt::format("bench/{}", n), InOut(DType::kF32, {3072}), In(t, {4096, 3072}),
                      true),
          ReduceInOrderCase(fmt::format("bench/{}", n), ReduceOp::kSum, In(t, {8, 1 << 22}))}) {
      c.benchmark = true;
      c.test = false;
      cases.push_back(c);
    }
  }
});

}  // namespace
}  // namespace shoal::kernels::testing
