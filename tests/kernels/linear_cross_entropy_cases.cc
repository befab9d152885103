#include <cmath>

#include "kernels/linear_cross_entropy.h"
#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {
namespace {

// Args: losses, dx, dw, x, w, labels.
struct Setup {
  DType type = DType::kF32;
  DType dw_type = DType::kF32;
  int64_t tokens = 1, depth = 1, vocab = 1;
  int64_t chunk = 256;
  bool accumulate = false;
  bool backward = true;
  double range = 1;            // of x and w
  std::vector<double> labels;  // empty: random, about one in six ignored if `ignore`
  bool ignore = false;
};

constexpr double kScale = 0.37;

double Loss(const Arrays& a, int64_t i, std::vector<double>* softmax = nullptr) {
  const int64_t depth = a[3].dim(1), vocab = a[4].dim(0);
  const int64_t label = static_cast<int64_t>(a[5][i]);
  if (label < 0) return 0;
  std::vector<double> logits(vocab);
  double max = -INFINITY, sum = 0;
  for (int64_t v = 0; v < vocab; ++v) {
    double dot = 0;
    for (int64_t k = 0; k < depth; ++k) dot += a[3][i * depth + k] * a[4][v * depth + k];
    logits[v] = dot;
    max = std::isnan(dot) ? dot : std::max(max, dot);
  }
  for (double l : logits) sum += std::exp(l - max);
  if (softmax) {
    softmax->resize(vocab);
    for (int64_t v = 0; v < vocab; ++v) (*softmax)[v] = std::exp(logits[v] - max) / sum;
  }
  return std::log(sum) + max - logits[label];
}

void Reference(Arrays& a, const Setup& setup) {
  const int64_t tokens = setup.tokens, depth = setup.depth, vocab = setup.vocab;
  if (setup.backward) {
    a[1].v.assign(a[1].v.size(), 0);
    if (!setup.accumulate) a[2].v.assign(a[2].v.size(), 0);
  }
  std::vector<double> p;
  for (int64_t i = 0; i < tokens; ++i) {
    a[0][i] = Loss(a, i, &p);
    const int64_t label = static_cast<int64_t>(a[5][i]);
    if (!setup.backward || label < 0) continue;
    p[label] -= 1;
    for (int64_t v = 0; v < vocab; ++v) {
      const double d = kScale * p[v];
      for (int64_t k = 0; k < depth; ++k) {
        a[1][i * depth + k] += d * a[4][v * depth + k];
        a[2][v * depth + k] += d * a[3][i * depth + k];
      }
    }
  }
}

Case CrossEntropyCase(std::string name, const Setup& s) {
  std::vector<double> labels = s.labels;
  if (s.labels.empty()) {
    for (int64_t i = 0; i < s.tokens; ++i)
      labels.push_back(s.ignore && i % 6 == 1 ? -100 : static_cast<double>(i * 7919 % s.vocab));
    if (s.tokens > 2) labels[2] = static_cast<double>(s.vocab - 1);
    if (labels.empty()) labels = {0};
  }
  const DType loss_type = AccumulatorDType(s.type);
  Arg dw = s.backward ? Out(s.dw_type, {s.vocab, s.depth}) : Absent();
  if (s.backward && s.accumulate) dw.role = Role::kInOut;
  Case c{
      .name = "LinearCrossEntropy/" + name,
      .args = {Out(loss_type, {s.tokens}), s.backward ? Out(s.type, {s.tokens, s.depth}) : Absent(),
               dw, In(s.type, {s.tokens, s.depth}).Range(-s.range, s.range),
               In(s.type, {s.vocab, s.depth}).Range(-s.range, s.range),
               In(DType::kI32, {s.tokens}).Values(labels)},
      .kernel =
          [s](const Stream& stream, const Views& a) {
            LinearCrossEntropy(stream, a[0], a[1], a[2], s.accumulate, a[3], a[4], a[5],
                               {.gradient_scale = kScale, .chunk_tokens = s.chunk});
          },
      .reference = [s](Arrays& a) { Reference(a, s); },
      // bf16: the logits' gradient is rounded to bf16 before the products that use it, so dw has
      // that error even where it is f32.
      .tolerance = {1e-12, s.type == DType::kBF16 && s.dw_type == DType::kF32 ? 1.5e-2 : 1e-5,
                    1.5e-2},
      .flops = (s.backward ? 6.0 : 2.0) * s.tokens * s.depth * s.vocab};
  if (s.backward)
    c.gradient = {.objective =
                      [s](const Arrays& a) {
                        double sum = 0;
                        for (int64_t i = 0; i < s.tokens; ++i) sum += kScale * Loss(a, i);
                        return sum;
                      },
                  .of = {{1, 3}, {2, 4}}};
  return c;
}

void AddSizes(std::vector<Case>& cases, DType t, DType dw) {
  const auto types = fmt::format("{}_{}", Name(t), Name(dw));
  int turn = 0;
  for (int64_t tokens : {1, 3, 17, 65}) {
    for (int64_t vocab : {1, 3, 65, 257}) {
      for (int64_t chunk : {1, 7, 256}) {
        ++turn;
        const Setup s{.type = t,
                      .dw_type = dw,
                      .tokens = tokens,
                      .depth = turn % 4 == 0   ? 1
                               : turn % 4 == 1 ? 3
                               : turn % 4 == 2 ? 17
                                               : 65,
                      .vocab = vocab,
                      .chunk = chunk,
                      .accumulate = turn % 3 == 0,
                      .backward = turn % 7 != 0,
                      .ignore = turn % 2 == 0};
        cases.push_back(
            CrossEntropyCase(fmt::format("{}/{}x{}x{}/chunk{}{}{}{}", types, tokens, s.depth, vocab,
                                         chunk, s.accumulate ? "/add" : "",
                                         s.backward ? "" : "/loss_only", s.ignore ? "/ignore" : ""),
                             s));
      }
    }
  }
  // Several blocks of the vocabulary, the last of them odd.
  for (int64_t vocab : {4096, 4097, 8193, 12289}) {
    for (bool ignore : {false, true}) {
      Case c = CrossEntropyCase(fmt::format("{}/vocab{}{}", types, vocab, ignore ? "/ignore" : ""),
                                {.type = t,
                                 .dw_type = dw,
                                 .tokens = 19,
                                 .depth = 8,
                                 .vocab = vocab,
                                 .chunk = ignore ? 7 : 256,
                                 .accumulate = !ignore,
                                 .ignore = ignore});
      c.gradient = {};  // too many entries for finite differences
      cases.push_back(c);
    }
  }
}

void AddSpecial(std::vector<Case>& cases, DType t) {
  const char* n = Name(t);
  auto add = [&](const char* name, const Setup& s) {
    cases.push_back(CrossEntropyCase(fmt::format("{}/{}", name, n), s));
    return &cases.back();
  };
  for (bool accumulate : {false, true}) {
    add(accumulate ? "all_ignored_add" : "all_ignored", {.type = t,
                                                         .dw_type = t,
                                                         .tokens = 5,
                                                         .depth = 3,
                                                         .vocab = 9,
                                                         .accumulate = accumulate,
                                                         .labels = {-1, -100, -1, -2, -7}});
    add(accumulate ? "no_tokens_add" : "no_tokens",
        {.type = t, .dw_type = t, .tokens = 0, .depth = 3, .vocab = 9, .accumulate = accumulate});
  }
  add("no_depth", {.type = t, .dw_type = t, .tokens = 4, .depth = 0, .vocab = 9})->gradient = {};
  // Logits of 1e4 and more; nearly all of a row's softmax in one place.
  Case* c = add("extreme", {.type = t, .dw_type = t, .tokens = 9, .depth = 4, .vocab = 70});
  c->args[3] = c->args[3].Values({100, -100, 0, 0, 25, 3, 1, -128});
  c->args[4] = c->args[4].Values({100, 0, 4, 0, -100, 100, 0, 0.5, 0, 0, 64, -64});
  c->gradient = {};
  // A NaN spoils its own row's loss and dx; and dw, as it must.
  c = add("nan", {.type = t, .dw_type = t, .tokens = 3, .depth = 2, .vocab = 5});
  c->args[3] = c->args[3].Values({1, 2, std::nan(""), 1, 0.5, 0.25});
  c->gradient = {};
  // But not from a row that does not count.
  c = add("nan_ignored",
          {.type = t, .dw_type = t, .tokens = 3, .depth = 2, .vocab = 5, .labels = {4, -1, 0}});
  c->args[3] = c->args[3].Values({1, 2, std::nan(""), 1, 0.5, 0.25});
  c->gradient = {};
  c = add("infinite", {.type = t, .dw_type = t, .tokens = 2, .depth = 2, .vocab = 5});
  c->args[3] = c->args[3].Values({INFINITY, 2, 1, 1});
  c->args[4] = c->args[4].Values({0.5, -1, 0.7, 1, 0.6, -0.3, 0.9, 0.8, 1, 0.1});
  c->gradient = {};
}

void AddBenchmarks(std::vector<Case>& cases) {
  for (DType t : {DType::kF32, DType::kBF16}) {
    for (int64_t chunk : {256, 512, 1024}) {
      for (auto [name, depth, vocab] : {std::tuple{"llama", 512, 32000}, {"gpt2", 768, 50257}}) {
        Case c = CrossEntropyCase(fmt::format("{}/{}/chunk{}", name, Name(t), chunk),
                                  {.type = t,
                                   .dw_type = DType::kF32,
                                   .tokens = 1024,
                                   .depth = depth,
                                   .vocab = vocab,
                                   .chunk = chunk,
                                   .accumulate = true,
                                   .range = 0.1});
        c.benchmark = true;
        c.test = false;
        cases.push_back(c);
      }
    }
  }
}

const CaseFile kCases([](std::vector<Case>& cases) {
  AddSizes(cases, DType::kF64, DType::kF64);
  AddSizes(cases, DType::kF32, DType::kF32);
  AddSizes(cases, DType::kBF16, DType::kBF16);
  AddSizes(cases, DType::kBF16, DType::kF32);
  for (DType t : kFloats) AddSpecial(cases, t);
  AddBenchmarks(cases);
});

}  // namespace
}  // namespace shoal::kernels::testing
