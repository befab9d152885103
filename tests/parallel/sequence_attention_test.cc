// Sequence-parallel attention equals attention on one rank, forward and backward, and sends what
// its schedule says.
#include "parallel/sequence_attention.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <map>
#include <mutex>
#include <random>
#include <thread>

#include "core/base/mutation.h"
#include "core/ops.h"

namespace shoal {
namespace {

using Kind = SequenceKind;
using Layout = SequenceLayoutKind;

enum class Mask { kFull, kCausal, kWindow, kPacked };
constexpr Mask kMasks[] = {Mask::kFull, Mask::kCausal, Mask::kWindow, Mask::kPacked};
constexpr Layout kLayouts[] = {Layout::kContiguous, Layout::kZigzag, Layout::kStriped};
constexpr std::pair<int64_t, int64_t> kHeads[] = {{8, 8}, {8, 2}, {8, 1}, {6, 3}};
constexpr int64_t kHeadDims[] = {16, 64, 80};

struct Case {
  Kind kind;
  Layout layout;
  Mask mask;
  int64_t tokens, heads, kv_heads, head_dim, batch;
  double logits = 1;  // about the largest
  std::optional<Kind> backward = {};
  DType dtype = DType::kF64;
  bool wide_results = true;

  bool causal() const { return mask != Mask::kFull; }
  int64_t window() const { return mask == Mask::kWindow ? 1 + tokens / 5 : 0; }
  std::string Text(int ranks) const {
    return fmt::format("P {} {} {} mask {} S {} heads {}/{} H {} B {}", ranks, Name(kind),
                       Name(layout), static_cast<int>(mask), tokens, heads, kv_heads, head_dim,
                       batch);
  }
};

Tensor Random(const Dims& shape, double range, DType dtype, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> uniform(-range, range);
  std::vector<double> values(static_cast<size_t>(shape.numel()));
  for (double& v : values) v = uniform(random);
  return Tensor::From(values, shape).To(dtype);
}

// Documents of 1 to 12 tokens, others in each sequence.
std::vector<int32_t> PackedIds(int64_t batch, int64_t tokens) {
  std::vector<int32_t> ids;
  for (int64_t b = 0; b < batch; ++b) {
    std::mt19937 random(static_cast<uint32_t>(b + 7));
    int32_t id = 0;
    for (int64_t t = 0, left = 0; t < tokens; ++t, --left) {
      if (left == 0) ++id, left = 1 + static_cast<int64_t>(random() % 12);
      ids.push_back(id);
    }
  }
  return ids;
}

// The whole: what goes in and what must come out.
struct Whole {
  Tensor q, k, v, dout, out, dq, dk, dv, documents;
};

std::shared_ptr<Leaf> MakeLeaf(const Tensor& x) {
  auto leaf = std::make_shared<Leaf>(x.shape(), x.dtype());
  x.set_node(leaf);
  return leaf;
}

Whole MakeWhole(const Case& c) {
  Whole w;
  const Dims q{c.batch, c.tokens, c.heads, c.head_dim},
      k{c.batch, c.tokens, c.kv_heads, c.head_dim};
  const double range = std::sqrt(c.logits);
  w.q = Random(q, range, c.dtype, 1);
  w.k = Random(k, range, c.dtype, 2);
  w.v = Random(k, 1, c.dtype, 3);
  w.dout = Random(q, 1, c.dtype, 4);
  if (c.mask == Mask::kPacked)
    w.documents = Tensor::From(PackedIds(c.batch, c.tokens), {c.batch, c.tokens});
  // In double, from the values that the ranks have.
  const Tensor q64 = w.q.To(DType::kF64), k64 = w.k.To(DType::kF64), v64 = w.v.To(DType::kF64);
  const auto lq = MakeLeaf(q64), lk = MakeLeaf(k64), lv = MakeLeaf(v64);
  const kernels::AttentionOptions options = {1 / std::sqrt(static_cast<double>(c.head_dim)),
                                             c.causal(), c.window(), 0};
  w.out = ops::Attention(q64, k64, v64, w.documents, w.documents, options).out;
  Backward(w.out, w.dout.To(DType::kF64));
  w.out = w.out.Detached();
  w.dq = lq->grad, w.dk = lk->grad, w.dv = lv->grad;
  return w;
}

// The rows of dimension 1 that `rank` has.
Tensor Mine(const Tensor& whole, const SequenceLayout& layout, int rank) {
  Dims shape = whole.shape();
  shape[1] = layout.Rows(rank);
  Tensor rows = Tensor::Empty(shape, whole.dtype());
  int64_t row = 0;
  for (const int64_t token : layout.Tokens(rank))
    rows.Narrowed(1, row++, 1).CopyFrom(whole.Narrowed(1, token, 1));
  return rows;
}

// Squares of differences and of what is wanted: out, dq, dk, dv.
struct Errors {
  double difference[4] = {}, wanted[4] = {};
  bool finite = true;
  void Add(int i, const Tensor& got, const Tensor& want) {
    const std::vector<double> g = got.ToVector(), w = want.ToVector();
    ASSERT_EQ(g.size(), w.size());
    for (size_t j = 0; j < g.size(); ++j) {
      difference[i] += (g[j] - w[j]) * (g[j] - w[j]);
      wanted[i] += w[j] * w[j];
      finite = finite && std::isfinite(g[j]);
    }
  }
  double Relative(int i) const {
    return std::sqrt(difference[i] / (wanted[i] > 0 ? wanted[i] : 1));
  }
  double Worst() const {
    if (!finite) return std::numeric_limits<double>::infinity();
    double worst = 0;
    for (int i = 0; i < 4; ++i) worst = std::max(worst, Relative(i));
    return worst;
  }
};

// Runs the case on this rank, and checks the bytes that it sends.
void RunRank(const Case& c, const Whole& w, Communicator& ranks, Errors& errors,
             std::mutex& mutex) {
  SequenceOptions options;
  options.schedule = c.kind;
  options.backward = c.backward;
  options.layout = c.layout;
  options.causal = c.causal();
  options.window = c.window();
  options.wide_results = c.wide_results;
  const auto group = std::make_shared<SequenceGroup>(options, ranks);
  SequenceAttention attention(group);
  const SequenceLayout layout(c.layout, c.tokens, ranks.size());
  const int rank = ranks.rank();
  const Tensor q = Mine(w.q, layout, rank), k = Mine(w.k, layout, rank),
               v = Mine(w.v, layout, rank);
  const auto lq = MakeLeaf(q), lk = MakeLeaf(k), lv = MakeLeaf(v);
  SequenceInfo info;
  if (w.documents.defined()) info.documents = Mine(w.documents, layout, rank);
  const Tensor out = attention.Forward(q, k, v, info);
  const auto plan = group->PlanFor(q, k, info);
  const SequenceWidths widths = WidthsOf(c.batch, c.head_dim, c.dtype, {1, c.wide_results});
  EXPECT_EQ(group->wire_bytes(), CountTraffic(plan->forward, widths).Sent(rank))
      << c.Text(ranks.size());
  const int64_t before = group->wire_bytes();
  Backward(out, Mine(w.dout, layout, rank));
  EXPECT_EQ(group->wire_bytes() - before, CountTraffic(plan->backward, widths).Sent(rank))
      << c.Text(ranks.size());
  const std::lock_guard lock(mutex);
  errors.Add(0, out.Detached(), Mine(w.out, layout, rank));
  errors.Add(1, lq->grad, Mine(w.dq, layout, rank));
  errors.Add(2, lk->grad, Mine(w.dk, layout, rank));
  errors.Add(3, lv->grad, Mine(w.dv, layout, rank));
}

Errors RunCase(const Case& c, int ranks) {
  const Whole whole = MakeWhole(c);
  Errors errors;
  std::mutex mutex;
  RunThreadRanks(ranks, 1, [&](Communicator& comm) { RunRank(c, whole, comm, errors, mutex); });
  return errors;
}

class SequenceExactness : public ::testing::TestWithParam<int> {};

std::vector<int64_t> Lengths(int64_t ranks) {
  return {1, std::max<int64_t>(1, ranks - 1), ranks, 2 * ranks + 1, 97};
}

// Every schedule x layout x mask; heads, head dims, batches and lengths take turns.
TEST_P(SequenceExactness, EqualsOneRank) {
  const int ranks = GetParam();
  const std::vector<int64_t> lengths = Lengths(ranks);
  int turn = ranks;
  for (int kind = 0; kind < kSequenceKinds; ++kind)
    for (const Layout layout : kLayouts)
      for (const Mask mask : kMasks) {
        ++turn;
        const auto [heads, kv] = kHeads[turn % 4];
        const Case c{static_cast<Kind>(kind),
                     layout,
                     mask,
                     lengths[static_cast<size_t>(turn) % 5],
                     heads,
                     kv,
                     kHeadDims[turn % 3],
                     turn % 2 == 0 ? 1 : 3};
        EXPECT_LE(RunCase(c, ranks).Worst(), 1e-12) << c.Text(ranks);
      }
}

// With fewer tokens every softmax has one key, and dq and dk are zero but for rounding.
TEST_P(SequenceExactness, LogitsOfTenThousand) {
  const int ranks = GetParam();
  int turn = 0;
  for (int kind = 0; kind < kSequenceKinds; ++kind) {
    const Case c{
        static_cast<Kind>(kind), kLayouts[turn % 3], kMasks[turn % 2], 97, 6, 3, 16, 1, 1e4};
    ++turn;
    EXPECT_LE(RunCase(c, ranks).Worst(), 1e-10) << c.Text(ranks);
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, SequenceExactness, ::testing::Range(1, 9));

// A backward need not move what the forward moved.
TEST(SequencePasses, MayDiffer) {
  for (const auto& [forward, backward] :
       {std::pair{Kind::kKvRing, Kind::kTokenRing}, {Kind::kTokenRingLagged, Kind::kAllGather}}) {
    const Case c{forward, Layout::kZigzag, Mask::kCausal, 29, 8, 2, 16, 2, 1, backward};
    EXPECT_LE(RunCase(c, 3).Worst(), 1e-12);
  }
  const Case mixed{Kind::kUlysses,  Layout::kZigzag, Mask::kCausal, 29, 8, 2, 16, 2, 1,
                   Kind::kTokenRing};
  EXPECT_THROW(RunCase(mixed, 2), Error);
}

TEST(SequencePasses, SingleAndHalfPrecision) {
  for (int kind = 0; kind < kSequenceKinds; ++kind) {
    Case c{static_cast<Kind>(kind), Layout::kZigzag, Mask::kPacked, 61, 6, 3, 64, 2};
    c.dtype = DType::kF32;
    EXPECT_LE(RunCase(c, 4).Worst(), 1e-6) << c.Text(4);
    c.dtype = DType::kBF16;
    for (const bool wide : {false, true}) {
      c.wide_results = wide;
      EXPECT_LE(RunCase(c, 4).Worst(), 6e-3) << c.Text(4);
    }
  }
}

// Sums are wide wherever they grow, so that more ranks do not mean a larger error.
TEST(SequencePasses, ErrorOfBf16IsFlatInRanks) {
  for (const Kind kind : {Kind::kTokenRing, Kind::kTokenRingLagged, Kind::kKvRing})
    for (const bool wide : {true, false}) {
      Case c{kind, Layout::kZigzag, Mask::kFull, 256, 4, 4, 64, 1, 4};
      c.dtype = DType::kBF16;
      c.wide_results = wide;
      const Errors alone = RunCase(c, 1), many = RunCase(c, 8);
      for (const int i : {0, 1, 2, 3})
        EXPECT_LE(many.Relative(i), (wide ? 1.1 : 1.25) * alone.Relative(i))
            << Name(kind) << " " << i;
    }
}

// --- known bugs ----------------------------------------------------------------------------------

double WithMutation(const Case& c, int ranks, Mutation mutation) {
  active_mutation = mutation;
  const double worst = RunCase(c, ranks).Worst();
  active_mutation = Mutation::kNone;
  return worst;
}

TEST(SequenceMutations, AreNoticed) {
  const auto with = [](Kind kind) {
    return Case{kind, Layout::kZigzag, Mask::kCausal, 48, 4, 2, 16, 1};
  };
  for (const Kind kind : {Kind::kTokenRing, Kind::kKvRing, Kind::kAllGather}) {
    EXPECT_LE(RunCase(with(kind), 4).Worst(), 1e-12);
    EXPECT_GT(WithMutation(with(kind), 4, Mutation::kStatisticsOfTheTile), 1e-3) << Name(kind);
  }
  for (const Kind kind : {Kind::kKvRing, Kind::kKvRingOneWay})
    EXPECT_GT(WithMutation(with(kind), 4, Mutation::kFirstKeysReused), 1e-3) << Name(kind);
  for (const Kind kind : {Kind::kTokenRing, Kind::kTokenRingRelay, Kind::kTokenRingLagged})
    EXPECT_GT(WithMutation(with(kind), 4, Mutation::kPartMergedTwice), 1e-3) << Name(kind);
}

// --- in a model ----------------------------------------------------------------------------------

// x, scaled for each use, through `layers` slots: what is left of a transformer.
class Layers : public Module {
 public:
  explicit Layers(int layers) : slots_(static_cast<size_t>(layers)) {
    for (size_t i = 0; i < slots_.size(); ++i)
      AddChild(fmt::format("attention_{}", i), slots_[i], std::make_shared<InnerAttention>());
  }
  Tensor Forward(Tensor x, const SequenceInfo& info) {
    for (const auto& slot : slots_)
      x = ops::Add(x, slot->Forward(x, ops::Scale(x, 0.7), ops::Scale(x, 1.3), info));
    return x;
  }

 private:
  std::vector<std::shared_ptr<InnerAttention>> slots_;
};

TEST(SequenceInModules, LayersShareAGroupAndEqualOneRank) {
  constexpr int64_t kTokens = 23;
  const Tensor x = Random({2, kTokens, 4, 16}, 1, DType::kF64, 5);
  const Tensor y = Random({2, kTokens, 4, 16}, 1, DType::kF64, 6);
  const Tensor documents = Tensor::From(PackedIds(2, kTokens), {2, kTokens});
  for (const std::optional<Kind> kind : {std::optional<Kind>(), std::optional(Kind::kTokenRing)}) {
    const Tensor whole = x.Detached();
    const auto leaf = MakeLeaf(whole);
    SequenceInfo all;
    all.documents = documents;
    Backward(Layers(3).Forward(whole, all), y);
    Errors errors;
    std::mutex mutex;
    RunThreadRanks(3, 1, [&](Communicator& ranks) {
      SequenceOptions options;
      options.schedule = kind;
      Layers layers(3);
      const auto group = ApplySequenceParallel(layers, options, ranks);
      const SequenceLayout layout(options.layout, kTokens, ranks.size());
      SequenceInfo info;
      info.documents = Mine(documents, layout, ranks.rank());
      std::vector<int32_t> positions;
      for (int b = 0; b < 2; ++b)
        for (const int64_t token : layout.Tokens(ranks.rank()))
          positions.push_back(static_cast<int32_t>(token));
      info.positions = Tensor::From(positions, info.documents.shape());
      const Tensor mine = Mine(x, layout, ranks.rank());
      const auto own = MakeLeaf(mine);
      const int64_t control = ranks.wire_bytes(Traffic::kControl);
      const Tensor out = layers.Forward(mine, info);
      // The length and the ids went round once, for three layers.
      EXPECT_LE(ranks.wire_bytes(Traffic::kControl) - control, 4 * 2 * kTokens + 4 * 8);
      EXPECT_GT(group->wire_bytes(), 0);
      EXPECT_EQ(ranks.wire_bytes(Traffic::kData), 0);
      EXPECT_THAT(group->Describe(), ::testing::HasSubstr(kind ? "as asked for" : "milliseconds"));
      Backward(out, Mine(y, layout, ranks.rank()));
      const std::lock_guard lock(mutex);
      errors.Add(0, own->grad, Mine(leaf->grad, layout, ranks.rank()));
    });
    EXPECT_LE(errors.Worst(), 1e-12);
  }
}

TEST(SequenceInModules, RefusesWhatItCannotDo) {
  RunThreadRanks(2, 1, [](Communicator& ranks) {
    const auto complaint = [&](const Tensor& q, const SequenceInfo& info) -> std::string {
      try {
        SequenceAttention(std::make_shared<SequenceGroup>(SequenceOptions{}, ranks))
            .Forward(q, q, q, info);
      } catch (const Error& e) {
        EXPECT_EQ(e.kind(), ErrorKind::kConfig);
        return e.message();
      }
      return "";
    };
    const Tensor q = Tensor::Full({1, ranks.rank() == 0 ? 2 : 6, 1, 8}, DType::kF32, 1);
    EXPECT_THAT(complaint(q, {}), ::testing::HasSubstr("cut the batch by SequenceLayout"));
    KvCache cache;
    SequenceInfo generation;
    generation.cache = &cache;
    EXPECT_THAT(complaint(q, generation), ::testing::HasSubstr("cache"));
    class Mapped : public InnerAttention {};
    class Model : public Module {
     public:
      Model() { AddChild("inner", slot_, std::make_shared<Mapped>()); }
      std::shared_ptr<InnerAttention> slot_;
    } model;
    try {
      ApplySequenceParallel(model, {}, ranks);
      ADD_FAILURE();
    } catch (const Error& e) {
      EXPECT_THAT(e.message(), ::testing::HasSubstr("inner maps query heads"));
    }
  });
}

// What the planner counts on the meta device is what real ranks send.
TEST(SequenceInModules, MetaRanksCountWhatRealRanksSend) {
  constexpr int64_t kTokens = 40;
  for (int kind = 0; kind < kSequenceKinds; ++kind) {
    SequenceOptions options;
    options.schedule = static_cast<Kind>(kind);
    options.tokens = kTokens;
    std::vector<int64_t> sent(4);
    const auto run = [&](Communicator& ranks) {
      const auto group = std::make_shared<SequenceGroup>(options, ranks);
      const SequenceLayout layout(options.layout, kTokens, ranks.size());
      const Tensor q = Tensor::Full({2, layout.Rows(ranks.rank()), 4, 16}, DType::kBF16, 1);
      MakeLeaf(q);
      const Tensor out = SequenceAttention(group).Forward(q, q, q, {});
      Backward(out, Tensor::Full(out.shape(), out.dtype(), 1));
      return group->wire_bytes();
    };
    RunThreadRanks(
        4, 1, [&](Communicator& ranks) { sent[static_cast<size_t>(ranks.rank())] = run(ranks); });
    for (int r = 0; r < 4; ++r) {
      ExecutionContext context(Device{DeviceType::kMeta, 0});
      const ContextScope scope(context);
      EXPECT_EQ(run(*MakeMetaCommunicator(r, 4)), sent[static_cast<size_t>(r)]);
    }
  }
}

// At the same number of rows per rank, what a pass holds for a while does not grow with the ranks:
// exactly where a message is gone once it is sent, and nearly so where it waits for its receiver.
TEST(SequenceInModules, PeakMemoryIsFlatInRanks) {
  const auto peak = [](Kind kind, Communicator& ranks) {
    SequenceOptions options;
    options.schedule = kind;
    options.causal = false;
    options.tokens = 64 * ranks.size();
    const auto group = std::make_shared<SequenceGroup>(options, ranks);
    const Tensor q = Tensor::Full({1, 64, 4, 64}, DType::kF32, 1);
    MakeLeaf(q);
    Allocator& memory = *ExecutionContext::Current().allocator();
    memory.ResetPeak();
    const Tensor out = SequenceAttention(group).Forward(q, q, q, {});
    Backward(out, Tensor::Full(out.shape(), out.dtype(), 1));
    return static_cast<double>(memory.stats().peak_total);
  };
  const auto planned = [&](Kind kind, int ranks) {
    ExecutionContext context(Device{DeviceType::kMeta, 0});
    const ContextScope scope(context);
    return peak(kind, *MakeMetaCommunicator(1, ranks));
  };
  const auto real = [&](Kind kind, int p) {
    std::vector<double> peaks(static_cast<size_t>(p));
    RunThreadRanks(p, 1, [&](Communicator& ranks) {
      peaks[static_cast<size_t>(ranks.rank())] = peak(kind, ranks);
    });
    return *std::ranges::max_element(peaks);
  };
  for (const Kind kind : {Kind::kTokenRing, Kind::kTokenRingRelay, Kind::kTokenRingLagged,
                          Kind::kKvRing, Kind::kKvRingOneWay, Kind::kKvDirect}) {
    EXPECT_LE(planned(kind, 8), 1.01 * planned(kind, 3)) << Name(kind);
    EXPECT_LE(real(kind, 8), 1.6 * real(kind, 3)) << Name(kind);
  }
  EXPECT_GT(planned(Kind::kAllGather, 8), 1.5 * planned(Kind::kAllGather, 3));
}

// Ranks that come late, again and again: nobody waits for ever.
TEST(SequenceInModules, RandomDelays) {
  RunThreadRanks(4, 1, [](Communicator& ranks) {
    std::mt19937 random(static_cast<uint32_t>(ranks.rank()));
    std::vector<std::unique_ptr<SequenceAttention>> layers;
    for (int kind = 0; kind < kSequenceKinds; ++kind) {
      SequenceOptions options;
      options.schedule = static_cast<Kind>(kind);
      layers.push_back(
          std::make_unique<SequenceAttention>(std::make_shared<SequenceGroup>(options, ranks)));
    }
    const Tensor q = Tensor::Full({1, 4, 2, 8}, DType::kF32, 1);
    MakeLeaf(q);
    for (int i = 0; i < 20; ++i)
      for (const auto& layer : layers) {
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
        const Tensor out = layer->Forward(q, q, q, {});
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
        Backward(out, Tensor::Full(out.shape(), out.dtype(), 1));
      }
  });
}

// Started as `mpirun -n N parallel_test --gtest_filter=Mpi.*`; see CMakeLists.txt here.
TEST(Mpi, SequenceAttention) {
  if (std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr) GTEST_SKIP() << "not started by mpirun";
  const auto ranks = MakeMpiCommunicator();
  SetThreadRank(ranks->rank());
  std::mt19937 random(static_cast<uint32_t>(ranks->rank()));
  for (int kind = 0; kind < kSequenceKinds; ++kind)
    for (const Layout layout : kLayouts)
      for (const Mask mask : kMasks) {
        const Case c{static_cast<Kind>(kind), layout, mask, 61, 8, 2, 64, 2};
        Errors errors;
        std::mutex mutex;
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
        RunRank(c, MakeWhole(c), *ranks, errors, mutex);
        EXPECT_LE(errors.Worst(), 1e-12) << c.Text(ranks->size());
      }
}

class LongSequenceExactness : public ::testing::TestWithParam<int> {};

TEST_P(LongSequenceExactness, EqualsOneRank) {
  const int ranks = GetParam();
  for (int kind = 0; kind < kSequenceKinds; ++kind)
    for (const Layout layout : kLayouts)
      for (const Mask mask : kMasks)
        for (const auto& [heads, kv] : kHeads)
          for (const int64_t head_dim : kHeadDims)
            for (const int64_t batch : {1, 3})
              for (const int64_t tokens : Lengths(ranks)) {
                const Case c{
                    static_cast<Kind>(kind), layout, mask, tokens, heads, kv, head_dim, batch};
                ASSERT_LE(RunCase(c, ranks).Worst(), 1e-12) << c.Text(ranks);
              }
}

INSTANTIATE_TEST_SUITE_P(Ranks, LongSequenceExactness, ::testing::Range(1, 9));

}  // namespace
}  // namespace shoal
