#include <cmath>

#include "kernels/attention.h"
#include "tests/kernels/harness.h"
#include "tests/kernels/reference/attention.h"

namespace shoal::kernels::testing {
namespace {

struct Setup {
  std::string name;
  int64_t batch = 1, queries = 65, keys = 65, heads = 2, kv_heads = 1, head_dim = 16;
  bool causal = true;
  int64_t window = 0, offset = 0;
  std::vector<double> q_document, k_document;  // repeated; empty: none
  enum Layout { kContiguous, kPacked, kHeadsFirst } layout = kContiguous;
  double range = 1;  // of q and k
  double scale = 0;  // 0: one over the root of the head dim
  Tolerance tolerance = {1e-12, 2e-5, 4e-2};
  bool gradient = false;
  // Backward as over a part of the keys: out and lse are those of a larger sum. Where a query sees
  // one key, dq and dk would otherwise be zero but for rounding.
  bool partial = false;
  double dropout = 0;
  int64_t first_head = 0, q_begin = 0, q_step = 1, k_begin = 0, k_step = 1;  // of dropout

  AttentionOptions options() const {
    AttentionOptions o{scale != 0 ? scale : 1 / std::sqrt(static_cast<double>(head_dim)), causal,
                       window, offset};
    o.dropout = {.p = dropout,
                 .key = {77, 0x123456789abcdef},
                 .first_head = first_head,
                 .q_begin = q_begin,
                 .q_step = q_step,
                 .k_begin = k_begin,
                 .k_step = k_step};
    return o;
  }
};

Arg Starts(int64_t batch) {
  std::vector<double> starts = {0};
  for (int64_t b = 0; b < batch; ++b)
    starts.resize(b + 1), starts[b] = static_cast<double>(Start(b));
  return In(DType::kI64, {batch}).Values(starts);
}
AttentionOptions With(AttentionOptions o, const View& starts) {
  o.dropout.sequence_starts = starts;
  return o;
}

// Where an argument [B, T, N, H] lies: as it is, cut out of a packed projection, or [B, N, T, H].
Arg Laid(Setup::Layout layout, Arg arg) {
  const Dims& s = arg.shape;
  if (layout == Setup::kPacked) {
    const int64_t row = s[2] * s[3] + 37;
    return arg.Strided({s[1] * row, row, s[3], 1});
  }
  if (layout == Setup::kHeadsFirst) return arg.Strided({s[2] * s[1] * s[3], s[3], s[1] * s[3], 1});
  return arg;
}

Arg Documents(const std::vector<double>& values, int64_t batch, int64_t tokens) {
  if (values.empty()) return Absent();
  return In(DType::kI32, {batch, tokens}).Values(values);
}

// `wide`: the result as wide as sums.
Case ForwardCase(DType t, const Setup& s, bool wide = false) {
  const Dims q{s.batch, s.queries, s.heads, s.head_dim}, k{s.batch, s.keys, s.kv_heads, s.head_dim};
  const AttentionOptions o = s.options();
  Case c{.name = fmt::format("Attention/{}{}/{}", Name(t), wide ? "_to_f32" : "", s.name)};
  c.args = {Laid(s.layout, Out(wide ? AccumulatorDType(t) : t, q)),
            Out(AccumulatorDType(t), {s.batch, s.heads, s.queries}),
            Laid(s.layout, In(t, q)).Range(-s.range, s.range),
            Laid(s.layout, In(t, k)).Range(-s.range, s.range),
            Laid(s.layout, In(t, k)),
            Documents(s.q_document, s.batch, s.queries),
            Documents(s.k_document, s.batch, s.keys),
            Starts(s.batch)};
  c.kernel = [o](const Stream& stream, const Views& a) {
    Attention(stream, a[0], a[1], a[2], a[3], a[4], a[5], a[6], With(o, a[7]));
  };
  c.reference = [o](Arrays& a) { ForwardDefinition(o, a[0], a[1], a[2], a[3], a[4], a[5], a[6]); };
  c.tolerance = s.tolerance;
  if (wide) c.tolerance.f32 = s.tolerance.bf16;  // probabilities are rounded
  return c;
}

Case BackwardCase(DType t, const Setup& s) {
  const Dims q{s.batch, s.queries, s.heads, s.head_dim}, k{s.batch, s.keys, s.kv_heads, s.head_dim};
  const AttentionOptions o = s.options();
  Case c{.name = fmt::format("AttentionBackward/{}/{}", Name(t), s.name)};
  c.args = {Laid(s.layout, Out(t, q)),
            Laid(s.layout, Out(t, k)),
            Laid(s.layout, Out(t, k)),
            Laid(s.layout, In(t, q)),
            Laid(s.layout, In(t, q)).Range(-s.range, s.range),
            Laid(s.layout, In(t, k)).Range(-s.range, s.range),
            Laid(s.layout, In(t, k)),
            Laid(s.layout, In(t, q)),
            In(AccumulatorDType(t), {s.batch, s.heads, s.queries}),
            Documents(s.q_document, s.batch, s.queries),
            Documents(s.k_document, s.batch, s.keys),
            Starts(s.batch)};
  c.kernel = [o](const Stream& stream, const Views& a) {
    AttentionBackward(stream, a[kDq], a[kDk], a[kDv], a[kDout], a[kQ], a[kK], a[kV], a[kOutput],
                      a[kLse], a[kQDocument], a[kKDocument], With(o, a[kStarts]));
  };
  c.prepare = [o, partial = s.partial](Arrays& a) {
    const Array out = a[kOutput];
    ForwardDefinition(o, a[kOutput], a[kLse], a[kQ], a[kK], a[kV], a[kQDocument], a[kKDocument]);
    if (!partial) return;
    a[kOutput] = out;
    for (double& l : a[kLse].v) l += 0.5;
  };
  c.reference = [o](Arrays& a) { BackwardDefinition(o, a); };
  if (s.gradient && t == DType::kF64) {
    c.gradient.objective = [o](const Arrays& a) {
      Array out = a[kOutput], lse = a[kLse];
      ForwardDefinition(o, out, lse, a[kQ], a[kK], a[kV], a[kQDocument], a[kKDocument]);
      double sum = 0;
      for (int64_t i = 0; i < out.numel(); ++i) sum += out[i] * a[kDout][i];
      return sum;
    };
    c.gradient.of = {{kDq, kQ}, {kDk, kK}, {kDv, kV}};
  }
  c.tolerance = s.tolerance;
  return c;
}

// Adds to gradients as a part of the keys does: lse and delta are those of a larger sum.
Case TileCase(DType t, const Setup& s) {
  const Dims q{s.batch, s.queries, s.heads, s.head_dim}, k{s.batch, s.keys, s.kv_heads, s.head_dim};
  const Dims statistics{s.batch, s.heads, s.queries};
  const AttentionOptions o = s.options();
  const DType wide = AccumulatorDType(t);
  Case c{.name = fmt::format("AttentionBackwardTile/{}/{}", Name(t), s.name)};
  c.args = {Laid(s.layout, InOut(wide, q)),
            Laid(s.layout, InOut(wide, k)),
            Laid(s.layout, InOut(wide, k)),
            Laid(s.layout, In(t, q)),
            Laid(s.layout, In(t, q)).Range(-s.range, s.range),
            Laid(s.layout, In(t, k)).Range(-s.range, s.range),
            Laid(s.layout, In(t, k)),
            In(wide, statistics),
            In(wide, statistics),
            Documents(s.q_document, s.batch, s.queries),
            Documents(s.k_document, s.batch, s.keys),
            Starts(s.batch)};
  c.kernel = [o](const Stream& stream, const Views& a) {
    AttentionBackwardTile(stream, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10],
                          With(o, a[11]));
  };
  c.prepare = [o](Arrays& a) {
    Array out = a[4];
    ForwardDefinition(o, out, a[7], a[4], a[5], a[6], a[9], a[10]);
    for (double& l : a[7].v) l += 0.5;
  };
  c.reference = [o](Arrays& a) {
    AddGradients(o, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10]);
  };
  c.tolerance = s.tolerance;
  if (t == DType::kBF16) c.tolerance.f32 = s.tolerance.bf16;  // probabilities are rounded
  return c;
}

// One document per entry, of that many tokens, numbered from `first`.
std::vector<double> Lengths(std::vector<int> lengths, int first = 0) {
  std::vector<double> ids;
  for (int n : lengths) ids.insert(ids.end(), n, first++);
  return ids;
}

std::vector<Setup> Setups() {
  std::vector<Setup> all;
  for (auto [t, s] : {std::pair<int64_t, int64_t>{1, 1},
                      {2, 2},
                      {63, 63},
                      {64, 64},
                      {97, 97},
                      {300, 300},
                      {1, 300},
                      {2, 97},
                      {5, 300},
                      {64, 300},
                      {300, 65},
                      {97, 1},
                      {1, 700},
                      {200, 420}}) {
    for (bool causal : {true, false})
      all.push_back({.name = fmt::format("{}x{}{}", t, s, causal ? "/causal" : ""),
                     .queries = t,
                     .keys = s,
                     .causal = causal,
                     .offset = s - t});
  }
  for (int64_t h : {1, 7, 16, 20, 64, 80, 128})
    all.push_back({.name = fmt::format("head_dim{}", h),
                   .batch = 2,
                   .heads = 4,
                   .kv_heads = 2,
                   .head_dim = h});
  for (auto [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {4, 4}, {8, 2}, {6, 3}, {8, 1}})
    for (int64_t t : {1, 97})
      all.push_back({.name = fmt::format("heads{}_{}/{}x97", n, k, t),
                     .batch = 3,
                     .queries = t,
                     .keys = 97,
                     .heads = n,
                     .kv_heads = k,
                     .head_dim = 20,
                     .offset = 97 - t});
  for (int64_t w : {1, 5, 70, 1000})
    for (int64_t offset : {0, 33, -50})
      for (bool causal : {true, false})
        all.push_back(
            {.name = fmt::format("window{}/offset{}{}", w, offset, causal ? "/causal" : ""),
             .queries = 250,
             .keys = 230,
             .causal = causal,
             .window = w,
             .offset = offset});
  for (int64_t offset : {7, -3, -64, -65, 1000})
    all.push_back({.name = fmt::format("offset{}", offset), .offset = offset});
  all.push_back({.name = "window_decode", .queries = 1, .keys = 300, .window = 70, .offset = 299});
  all.push_back({.name = "all_masked", .queries = 100, .keys = 400, .offset = -100});
  all.push_back({.name = "no_keys", .keys = 0});
  all.push_back({.name = "no_queries", .queries = 0});

  const std::vector<double> packed = Lengths({100, 1, 3, 96, 1, 49});
  for (bool causal : {true, false}) {
    const char* c = causal ? "/causal" : "";
    all.push_back({.name = fmt::format("documents{}", c),
                   .batch = 2,
                   .queries = 250,
                   .keys = 250,
                   .causal = causal,
                   .q_document = packed,
                   .k_document = packed});
    all.push_back({.name = fmt::format("documents_window{}", c),
                   .queries = 250,
                   .keys = 250,
                   .causal = causal,
                   .window = 40,
                   .q_document = packed,
                   .k_document = packed});
    all.push_back({.name = fmt::format("documents_mixed{}", c),
                   .queries = 250,
                   .keys = 210,
                   .causal = causal,
                   .offset = 9,
                   .q_document = {3, 1, 2, 2, -7, 1},
                   .k_document = {1, 2, 9, 1, -7}});
    all.push_back({.name = fmt::format("documents_apart{}", c),
                   .queries = 100,
                   .keys = 97,
                   .causal = causal,
                   .q_document = Lengths({60, 40}, 5),
                   .k_document = Lengths({60, 37}, 6)});
    all.push_back({.name = fmt::format("one_document{}", c),
                   .queries = 130,
                   .keys = 400,
                   .causal = causal,
                   .offset = 270,
                   .q_document = {4},
                   .k_document = {4}});
    all.push_back({.name = fmt::format("documents_decode{}", c),
                   .queries = 1,
                   .keys = 97,
                   .causal = causal,
                   .offset = 96,
                   .q_document = {1},
                   .k_document = Lengths({60, 37})});
  }
  for (auto layout : {Setup::kPacked, Setup::kHeadsFirst})
    for (int64_t t : {1, 97})
      all.push_back(
          {.name = fmt::format("{}/{}", layout == Setup::kPacked ? "packed" : "heads_first", t),
           .batch = 2,
           .queries = t,
           .keys = 97,
           .heads = 3,
           .kv_heads = 3,
           .head_dim = 20,
           .offset = 97 - t,
           .layout = layout});
  all.push_back({.name = "negative_scale", .scale = -0.7});
  all.push_back({.name = "large_scale", .scale = 3});
  // Logits of 1e4: a probability carries the rounding of its score and of lse.
  for (int64_t t : {1, 97})
    all.push_back({.name = fmt::format("huge_logits/{}", t),
                   .queries = t,
                   .keys = 97,
                   .offset = 97 - t,
                   .range = 100,
                   .scale = 1,
                   .tolerance = {2e-11, 4e-2, 4e-2}});
  all.push_back(
      {.name = "many_heads", .batch = 5, .queries = 17, .keys = 17, .heads = 16, .kv_heads = 8});
  for (bool causal : {true, false})
    all.push_back({.name = fmt::format("gradient{}", causal ? "/causal" : ""),
                   .batch = 2,
                   .queries = 5,
                   .keys = 7,
                   .heads = 4,
                   .kv_heads = 2,
                   .head_dim = 3,
                   .causal = causal,
                   .offset = 1,
                   .gradient = true});
  all.push_back({.name = "gradient/documents",
                 .queries = 8,
                 .keys = 8,
                 .head_dim = 3,
                 .window = 3,
                 .q_document = Lengths({1, 4, 3}),
                 .k_document = Lengths({2, 3, 3}),
                 .gradient = true});
  const std::vector<Setup> dropped = {
      {.name = "97x97", .queries = 97, .keys = 97},
      {.name = "1x300", .queries = 1, .keys = 300, .heads = 8, .kv_heads = 2, .offset = 299},
      {.name = "5x300", .queries = 5, .keys = 300, .heads = 8, .kv_heads = 2, .causal = false},
      {.name = "200x420",
       .queries = 100,
       .keys = 210,
       .head_dim = 80,
       .offset = 110,
       .q_begin = 110},
      {.name = "last_head",
       .batch = 3,
       .heads = 3,
       .kv_heads = 3,
       .head_dim = 20,
       .first_head = 61},
      {.name = "packed", .batch = 2, .queries = 50, .keys = 50, .layout = Setup::kPacked},
      {.name = "apart", .causal = false, .q_begin = 1 << 20, .k_begin = 13},
      {.name = "striped3", .q_begin = 2, .q_step = 3, .k_begin = 1, .k_step = 3},
      {.name = "striped8", .causal = false, .q_begin = 5, .q_step = 8, .k_begin = 7, .k_step = 8},
      {.name = "window", .queries = 250, .keys = 230, .window = 70, .offset = 33},
      {.name = "documents",
       .batch = 2,
       .queries = 250,
       .keys = 250,
       .q_document = packed,
       .k_document = packed},
      {.name = "all_masked", .queries = 100, .keys = 400, .offset = -100},
      {.name = "no_keys", .keys = 0},
      {.name = "gradient",
       .batch = 2,
       .queries = 5,
       .keys = 7,
       .heads = 4,
       .kv_heads = 2,
       .head_dim = 3,
       .offset = 1,
       .gradient = true},
  };
  for (double p : {0.3, 1e-9, 1 - 1e-9})
    for (Setup s : dropped) {
      if (p != 0.3 && s.name != "packed") continue;
      s.name = fmt::format("dropout{}/{}", p, s.name);
      s.dropout = p;
      all.push_back(s);
    }
  for (Setup& s : all) s.partial = s.keys == 1 || s.window == 1 || s.offset == -64 || s.range > 1;
  return all;
}

// Floating-point operations by one convention: two products forward, five backward, half of each
// under a causal mask.
void AddBenchmarks(std::vector<Case>& cases, DType t, Setup s) {
  const double product = 2.0 * s.batch * s.heads * s.queries * s.keys * s.head_dim *
                         (s.causal && s.queries > 1 ? 0.5 : 1);
  s.layout = Setup::kPacked;
  Case forward = ForwardCase(t, s), backward = BackwardCase(t, s);
  forward.flops = 2 * product;
  backward.flops = 5 * product;
  backward.prepare = nullptr;
  for (Case* c : {&forward, &backward}) {
    if (c == &backward && s.queries == 1) continue;
    c->benchmark = true;
    c->test = false;
    cases.push_back(*c);
  }
}

const CaseFile kCases([](std::vector<Case>& cases) {
  for (DType t : kFloats) {
    for (const Setup& s : Setups()) {
      cases.push_back(ForwardCase(t, s));
      cases.push_back(BackwardCase(t, s));
      cases.push_back(TileCase(t, s));
      if (t == DType::kBF16) cases.push_back(ForwardCase(t, s, true));
    }
    const double nan = std::nan("");
    Case c = ForwardCase(t, {.name = "nan_query"});
    std::vector<double> values(65 * 2 * 16, 0.5);
    values[40 * 32 + 3] = nan;
    c.args[2] = c.args[2].Values(values);
    cases.push_back(c);
    c = ForwardCase(t, {.name = "nan_key", .heads = 1});
    values.resize(65 * 16);
    values[40 * 16 + 3] = nan;
    c.args[3] = c.args[3].Values(values);
    cases.push_back(c);
  }
  for (DType t : {DType::kF32, DType::kBF16}) {
    for (int64_t n : {256, 1024, 4096})
      AddBenchmarks(cases, t,
                    {.name = fmt::format("bench/4x{}x12x64", n),
                     .batch = 4,
                     .queries = n,
                     .keys = n,
                     .heads = 12,
                     .kv_heads = 12,
                     .head_dim = 64});
    AddBenchmarks(cases, t,
                  {.name = "bench/4x1024x12x64/dropout",
                   .batch = 4,
                   .queries = 1024,
                   .keys = 1024,
                   .heads = 12,
                   .kv_heads = 12,
                   .head_dim = 64,
                   .dropout = 0.1});
    AddBenchmarks(cases, t,
                  {.name = "bench/1x2048x32_8x128",
                   .queries = 2048,
                   .keys = 2048,
                   .heads = 32,
                   .kv_heads = 8,
                   .head_dim = 128});
    AddBenchmarks(cases, t,
                  {.name = "bench/1x1_4096x12x64",
                   .queries = 1,
                   .keys = 4096,
                   .heads = 12,
                   .kv_heads = 12,
                   .head_dim = 64,
                   .offset = 4095});
    AddBenchmarks(cases, t,
                  {.name = "bench/1x1_4096x32_8x128",
                   .queries = 1,
                   .keys = 4096,
                   .heads = 32,
                   .kv_heads = 8,
                   .head_dim = 128,
                   .offset = 4095});
  }
});

}  // namespace
}  // namespace shoal::kernels::testing
