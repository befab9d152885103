#include <cmath>

#include "kernels/matmul.h"
#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {
namespace {

struct Types {
  DType operand, result;
  std::string name() const { return fmt::format("{}_{}", Name(operand), Name(result)); }
};
constexpr Types kTypes[] = {{DType::kF64, DType::kF64},
                            {DType::kF32, DType::kF32},
                            {DType::kBF16, DType::kBF16},
                            {DType::kBF16, DType::kF32}};

// Args: d, a, b, bias.
void Reference(Arrays& a, bool accumulate) {
  const int row = a[0].shape.rank() == 3 ? 1 : 0;
  const int64_t batch = row ? a[0].dim(0) : 1;
  const int64_t m = a[0].dim(row), n = a[0].dim(row + 1), k = a[1].dim(row + 1);
  for (int64_t z = 0; z < batch; ++z) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double sum = a[3].v.empty() ? 0 : a[3][j];
        for (int64_t l = 0; l < k; ++l)
          sum += a[1][(z * m + i) * k + l] * a[2][(z * k + l) * n + j];
        double& d = a[0][(z * m + i) * n + j];
        d = accumulate ? d + sum : sum;
      }
    }
  }
}

Case MatmulCase(std::string name, Arg d, Arg a, Arg b, Arg bias, bool accumulate) {
  if (accumulate) d.role = Role::kInOut;
  const int64_t k = a.shape[-1];
  // The error of a sum of k products, relative to its root mean square.
  const double growth = 2 + 0.05 * std::sqrt(static_cast<double>(k));
  return {.name = "Matmul/" + name,
          .args = {d, a, b, bias},
          .kernel = [accumulate](
                        const Stream& s,
                        const Views& v) { Matmul(s, v[0], v[1], v[2], v[3], accumulate ? 1 : 0); },
          .reference = [accumulate](Arrays& v) { Reference(v, accumulate); },
          .tolerance = {2e-15 * growth, 1e-6 * growth, 4e-3},
          .flops = 2.0 * d.shape.numel() * k};
}

enum Layout { kRows, kColumns, kPaddedRows, kPaddedColumns };
constexpr const char* kLayoutNames[] = {"N", "T", "n", "t"};

Arg Lay(Arg arg, Layout layout) {
  Dims shape = arg.shape;
  if (layout == kRows) return arg;
  if (layout == kPaddedRows) return arg.Strided(PaddedStrides(shape, 3));
  if (layout == kColumns) return arg.Strided(TransposedStrides(shape));
  std::swap(shape[-2], shape[-1]);
  Dims strides = PaddedStrides(shape, 5);
  std::swap(strides[-2], strides[-1]);
  return arg.Strided(strides);
}

// Every size meets every layout, without the product of all with all.
void AddGrid(std::vector<Case>& cases) {
  constexpr int64_t kSizes[] = {1, 3, 17, 65, 257};
  int turn = 0;
  for (const Types& t : kTypes) {
    for (int64_t m : kSizes) {
      for (int64_t n : kSizes) {
        for (int64_t k : {1, 3, 64, 257}) {
          ++turn;
          const Layout la = static_cast<Layout>(turn % 4), lb = static_cast<Layout>(turn / 4 % 4);
          const bool padded = turn / 3 % 4 == 0, accumulate = turn % 3 == 0;
          Arg bias = turn % 5 == 0   ? In(t.result, {n})
                     : turn % 5 == 1 ? In(t.operand, {n})
                                     : Absent();
          cases.push_back(MatmulCase(
              fmt::format("{}/{}x{}x{}/{}{}{}{}{}", t.name(), m, n, k, kLayoutNames[la],
                          kLayoutNames[lb], padded ? "/padded" : "", accumulate ? "/add" : "",
                          bias.role == Role::kAbsent ? "" : "/bias"),
              Lay(Out(t.result, {m, n}), padded ? kPaddedRows : kRows),
              Lay(In(t.operand, {m, k}), la), Lay(In(t.operand, {k, n}), lb), bias, accumulate));
        }
      }
    }
  }
}

void AddBatches(std::vector<Case>& cases) {
  for (const Types& t : kTypes) {
    for (bool accumulate : {false, true}) {
      for (Layout la : {kRows, kColumns, kPaddedRows}) {
        for (Layout lb : {kRows, kColumns}) {
          const auto name = fmt::format("batch/{}/{}{}{}", t.name(), kLayoutNames[la],
                                        kLayoutNames[lb], accumulate ? "/add" : "");
          const Arg a = Lay(In(t.operand, {5, 33, 17}), la), d = Out(t.result, {5, 33, 65});
          cases.push_back(
              MatmulCase(name, d, a, Lay(In(t.operand, {5, 17, 65}), lb), Absent(), accumulate));
          // One b for all: as rows of one tall product where a is dense, else batch by batch.
          Arg shared = In(t.operand, {5, 17, 65});
          shared.strides = lb == kRows ? Dims{0, 65, 1} : Dims{0, 1, 17};
          cases.push_back(
              MatmulCase("shared_" + name, d, a, shared, In(t.result, {65}), accumulate));
        }
      }
    }
    // Heads of a packed [T, N, H], as attention sees them.
    Arg q = In(t.operand, {4, 65, 16}), k = In(t.operand, {4, 16, 65});
    q.strides = {16, 64, 1};
    k.strides = {16, 1, 64};
    cases.push_back(
        MatmulCase("heads/" + t.name(), Out(t.result, {4, 65, 65}), q, k, Absent(), false));
  }
}

// What a thread count could change: deep sums with few columns, where a GEMM splits K; many tiles.
void AddDeep(std::vector<Case>& cases) {
  for (const Types& t : kTypes) {
    for (auto [m, n, k] : {std::tuple{1, 1, 4099},
                           {3, 3, 2048},
                           {16, 64, 4096},
                           {65, 17, 2050},
                           {64, 8, 4096},
                           {1, 513, 2048},
                           {513, 1, 2048}}) {
      for (Layout la : {kRows, kColumns, kPaddedColumns})
        cases.push_back(
            MatmulCase(fmt::format("deep/{}/{}x{}x{}/{}", t.name(), m, n, k, kLayoutNames[la]),
                       Out(t.result, {m, n}), Lay(In(t.operand, {m, k}), la), In(t.operand, {k, n}),
                       Absent(), false));
    }
    for (Layout la : {kRows, kColumns})
      cases.push_back(MatmulCase(fmt::format("tiles/{}/{}", t.name(), kLayoutNames[la]),
                                 Out(t.result, {450, 833}), Lay(In(t.operand, {450, 40}), la),
                                 In(t.operand, {40, 833}), In(t.result, {833}), true));
    cases.push_back(MatmulCase("wide/" + t.name(), Out(t.result, {130, 2113}),
                               In(t.operand, {130, 30}), In(t.operand, {30, 2113}), Absent(),
                               false));
  }
}

void AddEmpty(std::vector<Case>& cases) {
  for (const Types& t : kTypes) {
    for (bool accumulate : {false, true}) {
      for (auto [m, n, k] : {std::tuple{0, 5, 7}, {5, 0, 7}, {5, 7, 0}, {0, 0, 0}}) {
        for (bool bias : {false, true})
          cases.push_back(MatmulCase(fmt::format("empty/{}/{}x{}x{}{}{}", t.name(), m, n, k,
                                                 accumulate ? "/add" : "", bias ? "/bias" : ""),
                                     Out(t.result, {m, n}), In(t.operand, {m, k}),
                                     In(t.operand, {k, n}), bias ? In(t.operand, {n}) : Absent(),
                                     accumulate));
      }
      cases.push_back(
          MatmulCase(fmt::format("empty_batch/{}{}", t.name(), accumulate ? "/add" : ""),
                     Out(t.result, {0, 3, 5}), In(t.operand, {0, 3, 4}), In(t.operand, {0, 4, 5}),
                     Absent(), accumulate));
    }
  }
}

void AddSpecial(std::vector<Case>& cases) {
  const double nan = std::nan(""), inf = INFINITY;
  for (const Types& t : kTypes) {
    // Only the rows and columns that hold them may be spoilt.
    cases.push_back(MatmulCase("nan/" + t.name(), Out(t.result, {3, 4}),
                               In(t.operand, {3, 3}).Values({1, 2, 3, nan, 1, 1, 4, inf, 1}),
                               In(t.operand, {3, 4}), Absent(), false));
    cases.push_back(MatmulCase("huge/" + t.name(), Out(t.result, {2, 2}),
                               In(t.operand, {2, 1}).Values({1e19, -1e19}),
                               In(t.operand, {1, 2}).Values({1e18, -1e19}), Absent(), false));
  }
}

// The layers of GPT-2 124M and LLaMA-60M at 1024 tokens: y = x W^T, dx = dy W, dW (+)= dy^T x.
void AddLayers(std::vector<Case>& cases) {
  struct Layer {
    const char* name;
    int64_t out, in;
  };
  constexpr int64_t kTokens = 1024;
  for (const Layer& l : {Layer{"gpt2_attention", 768, 768},
                         {"gpt2_up", 3072, 768},
                         {"gpt2_down", 768, 3072},
                         {"llama_attention", 512, 512},
                         {"llama_up", 1376, 512},
                         {"llama_down", 512, 1376}}) {
    for (DType t : {DType::kF32, DType::kBF16}) {
      const Arg x = In(t, {kTokens, l.in}), w = In(t, {l.out, l.in}), dy = In(t, {kTokens, l.out});
      const Arg xw = Lay(In(t, {l.in, l.out}), kColumns),
                dyt = Lay(In(t, {l.out, kTokens}), kColumns);
      auto add = [&](const char* what, Arg d, Arg a, Arg b, bool accumulate) {
        Case c = MatmulCase(fmt::format("{}/{}/{}", l.name, Name(t), what), d, a, b, Absent(),
                            accumulate);
        c.benchmark = true;
        c.test = false;
        cases.push_back(c);
      };
      add("forward", Out(t, {kTokens, l.out}), x, xw, false);
      add("dx", Out(t, {kTokens, l.in}), dy, w, false);
      add("dx_add", Out(t, {kTokens, l.in}), dy, w, true);
      add("dw", Out(DType::kF32, {l.out, l.in}), dyt, x, false);
      add("dw_add", Out(DType::kF32, {l.out, l.in}), dyt, x, true);
    }
  }
  // What the layers are measured against: operands that fit the caches, in the best layout.
  for (DType t : {DType::kF32, DType::kBF16}) {
    Case c = MatmulCase(fmt::format("gemm_peak/{}", Name(t)), Out(t, {1024, 512}),
                        In(t, {1024, 512}), Lay(In(t, {512, 512}), kColumns), Absent(), false);
    c.benchmark = true;
    c.test = false;
    cases.push_back(c);
  }
  for (DType t : {DType::kF32, DType::kBF16}) {  // 4 x 12 heads of 256 tokens
    Case c = MatmulCase(fmt::format("heads/{}", Name(t)), Out(t, {48, 256, 256}),
                        In(t, {48, 256, 64}), Lay(In(t, {48, 64, 256}), kColumns), Absent(), false);
    c.benchmark = true;
    c.test = false;
    cases.push_back(c);
  }
  Case c = MatmulCase("f64/512", Out(DType::kF64, {512, 512}), In(DType::kF64, {512, 512}),
                      In(DType::kF64, {512, 512}), Absent(), false);
  c.benchmark = true;
  c.test = false;
  cases.push_back(c);
}

const CaseFile kCases([](std::vector<Case>& cases) {
  AddGrid(cases);
  AddBatches(cases);
  AddDeep(cases);
  AddEmpty(cases);
  AddSpecial(cases);
  AddLayers(cases);
});

}  // namespace
}  // namespace shoal::kernels::testing
