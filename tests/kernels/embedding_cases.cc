#include "kernels/embedding.h"
#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {
namespace {

// The row of the table, or -1.
int64_t RowOf(double id, const TablePart& part, int64_t v) {
  const int64_t row = static_cast<int64_t>(id) - part.first;
  return row >= 0 && row < v ? row : -1;
}

Case EmbeddingCase(std::string name, DType t, int64_t v, int64_t m, int64_t d, Arg ids,
                   TablePart part = {}) {
  return {.name = "Embedding/" + name,
          .args = {Out(t, {m, d}), In(t, {v, d}), ids},
          .kernel = [=](const Stream& s, const Views& a) { Embedding(s, a[0], a[1], a[2], part); },
          .reference =
              [=](Arrays& a) {
                for (int64_t i = 0; i < a[0].dim(0); ++i) {
                  const int64_t row = RowOf(a[2][i], part, v);
                  for (int64_t j = 0; j < a[0].dim(1); ++j) a[0](i, j) = row < 0 ? 0 : a[1](row, j);
                }
              },
          .tolerance = {0, 0, 0}};
}

// Arguments: dtable, dout, ids, and a table for the gradient.
Case BackwardCase(std::string name, DType table, DType t, int64_t v, int64_t m, int64_t d, Arg ids,
                  bool accumulate, TablePart part = {}) {
  return {
      .name = "EmbeddingBackward/" + name,
      .args = {accumulate ? InOut(table, {v, d}) : Out(table, {v, d}), In(t, {m, d}), ids,
               In(t, {v, d})},
      .kernel = [=](const Stream& s,
                    const Views& a) { EmbeddingBackward(s, a[0], accumulate, a[1], a[2], part); },
      .reference =
          [=](Arrays& a) {
            if (!accumulate) a[0].v.assign(a[0].numel(), 0);
            for (int64_t i = 0; i < m; ++i) {
              const int64_t row = RowOf(a[2][i], part, v);
              for (int64_t j = 0; j < d && row >= 0; ++j) a[0](row, j) += a[1](i, j);
            }
          },
      .gradient = {[=](const Arrays& a) {
                     double sum = 0;
                     for (int64_t i = 0; i < m; ++i) {
                       const int64_t row = RowOf(a[2][i], part, v);
                       for (int64_t j = 0; j < d && row >= 0; ++j) sum += a[1](i, j) * a[3](row, j);
                     }
                     return sum;
                   },
                   {{0, 3}}},
      .tolerance = {t == DType::kF64 ? 1e-12 : 4e-6, 4e-6, 4e-3},
      .bytes = static_cast<double>(m * d) * (SizeOf(t) + 2 * SizeOf(table))};
}

const CaseFile kCases([](std::vector<Case>& cases) {
  struct Size {
    int64_t v, m, d;
  };
  for (DType t : kFloats) {
    for (auto [v, m, d] : {Size{1, 1, 1},
                           {5, 3, 65},
                           {3, 0, 7},
                           {257, 129, 64},
                           {100, 300, 127},
                           {2000, 40, 3},
                           {7, 4000, 33}}) {
      const Arg ids = In(DType::kI32, {m}).Range(0, v - 1);
      const auto name = fmt::format("{}/V{}_M{}_D{}", Name(t), v, m, d);
      cases.push_back(EmbeddingCase(name, t, v, m, d, ids));
      for (bool accumulate : {false, true})
        cases.push_back(BackwardCase(fmt::format("{}/accumulate_{}", name, accumulate), t, t, v, m,
                                     d, ids, accumulate));
    }
    // All tokens in the first row, all in the last, and a few rows that most tokens share.
    for (std::vector<double> ids : {std::vector<double>{0}, {499}, {3, 3, 3, 3, 499, 3, 250}})
      cases.push_back(BackwardCase(fmt::format("{}/crowded_{}", Name(t), ids.back()), t, t, 500,
                                   900, 48, In(DType::kI32, {900}).Values(ids), true));
    // A part of a table, rows 5 to 7 of 20: most ids are in another, or all are; or it is empty.
    for (const auto& [v, ids] :
         {std::pair{3, std::vector<double>{0, 7, 19, 4, 8, 5}}, {3, {19}}, {0, {5, 0, 19}}}) {
      const Arg part = In(DType::kI32, {70}).Values(ids);
      const auto name = fmt::format("{}/part_{}_{}", Name(t), v, ids.size());
      cases.push_back(EmbeddingCase(name, t, v, 70, 33, part, {5, 20}));
      for (bool accumulate : {false, true})
        cases.push_back(BackwardCase(fmt::format("{}/accumulate_{}", name, accumulate), t, t, v, 70,
                                     33, part, accumulate, {5, 20}));
    }
    for (DType table : kFloats)
      cases.push_back(BackwardCase(fmt::format("{}_from_{}", Name(table), Name(t)), table, t, 20,
                                   50, 19, In(DType::kI32, {50}).Range(0, 19), true));
    if (t == DType::kF64) continue;
    const int64_t v = 50257, m = 4096, d = 768;
    const Arg ids = In(DType::kI32, {m}).Range(0, v - 1);
    for (Case c :
         {EmbeddingCase(fmt::format("bench/{}", Name(t)), t, v, m, d, ids),
          BackwardCase(fmt::format("bench/{}", Name(t)), DType::kF32, t, v, m, d, ids, true)}) {
      if (c.bytes == 0) c.bytes = 2.0 * m * d * SizeOf(t);
      c.benchmark = true;
      c.test = false;
      cases.push_back(c);
    }
  }
});

}  // namespace
}  // namespace shoal::kernels::testing
