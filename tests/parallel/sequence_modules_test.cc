// Sequence parallelism in modules: layers, refusals, planning, memory, delays.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "tests/parallel/sequence_case.h"

namespace shoal {
namespace {

using namespace sequence_testing;  // NOLINT: all of it

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
  });
}

// What the planner counts on the meta device is what real ranks send.
TEST(SequenceInModules, MetaRanksCountWhatRealRanksSend) {
  constexpr int64_t kTokens = 40;
  for (const auto& [kind, both_ways] : WaysOf(4)) {
    SequenceOptions options;
    options.schedule = kind;
    options.both_ways = both_ways;
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
  using Way = std::pair<Kind, bool>;
  const auto peak = [](const Way& way, Communicator& ranks) {
    SequenceOptions options;
    options.schedule = way.first;
    options.both_ways = way.second;
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
  const auto planned = [&](const Way& way, int ranks) {
    ExecutionContext context(Device{DeviceType::kMeta, 0});
    const ContextScope scope(context);
    return peak(way, *MakeMetaCommunicator(1, ranks));
  };
  const auto real = [&](const Way& way, int p) {
    std::vector<double> peaks(static_cast<size_t>(p));
    RunThreadRanks(p, 1, [&](Communicator& ranks) {
      peaks[static_cast<size_t>(ranks.rank())] = peak(way, ranks);
    });
    return *std::ranges::max_element(peaks);
  };
  for (const Way& way : WaysOf(3)) {
    if (way.first == Kind::kAllGather || way.first == Kind::kUlysses) continue;
    EXPECT_LE(planned(way, 8), 1.01 * planned(way, 3)) << Name(way.first) << way.second;
    EXPECT_LE(real(way, 8), 1.6 * real(way, 3)) << Name(way.first) << way.second;
  }
  EXPECT_GT(planned({Kind::kAllGather, false}, 8), 1.5 * planned({Kind::kAllGather, false}, 3));
}

// Ranks that come late, again and again: nobody waits for ever.
TEST(SequenceInModules, RandomDelays) {
  RunThreadRanks(4, 1, [](Communicator& ranks) {
    std::mt19937 random(static_cast<uint32_t>(ranks.rank()));
    std::vector<std::unique_ptr<SequenceAttention>> layers;
    for (const auto& [kind, both_ways] : WaysOf(4)) {
      SequenceOptions options;
      options.schedule = kind;
      options.both_ways = both_ways;
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

}  // namespace
}  // namespace shoal
