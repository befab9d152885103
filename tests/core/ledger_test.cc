// What the allocator knows of its blocks: what is alive, what was at the peak, who asked for it.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "core/context.h"
#include "core/layers.h"
#include "core/ops.h"

namespace shoal {
namespace {

std::multiset<int64_t> Sizes(const std::vector<LiveBlock>& blocks) {
  std::multiset<int64_t> sizes;
  for (const LiveBlock& block : blocks) sizes.insert(block.bytes);
  return sizes;
}

TEST(Ledger, SaysWhatIsAlive) {
  ExecutionContext context(Device{});
  const ContextScope scope(context);
  const OriginScope here({Intern("blocks.3.mlp"), "gelu", Pass::kForward});
  const Tensor t = Tensor::Empty({3, 5}, DType::kF32, MemoryClass::kGradients);
  const Scratch scratch(context.stream(), 100);
  const Tensor nothing = Tensor::Unmaterialized({7}, DType::kF64, MemoryClass::kParameters);
  std::vector<LiveBlock> live = context.allocator()->Live();
  ASSERT_EQ(live.size(), 2u);
  if (live[0].memory_class != MemoryClass::kGradients) std::swap(live[0], live[1]);
  EXPECT_EQ(live[0].bytes, 60);
  EXPECT_EQ(live[0].label.dtype, DType::kF32);
  EXPECT_EQ(live[0].label.shape, (Dims{3, 5}));
  EXPECT_EQ(live[1].memory_class, MemoryClass::kWorkspace);
  EXPECT_EQ(live[1].bytes, 100);
  EXPECT_EQ(live[1].label.shape.rank(), 0);
  for (const LiveBlock& block : live) {
    EXPECT_EQ(*block.label.origin.module, "blocks.3.mlp");
    EXPECT_STREQ(block.label.origin.op, "gelu");
    EXPECT_EQ(block.label.origin.pass, Pass::kForward);
  }
  // What is obtained later is labelled as it was made.
  const OriginScope elsewhere({Intern("norm"), "add", Pass::kBackward});
  nothing.storage().Materialize();
  live = context.allocator()->Live();
  const auto found = std::ranges::find(live, MemoryClass::kParameters, &LiveBlock::memory_class);
  ASSERT_NE(found, live.end());
  EXPECT_EQ(*found->label.origin.module, "blocks.3.mlp");
}

// Against the definition: after each change the whole list, kept where the sum is a new highest.
TEST(Ledger, PeakIsTheFirstHighestMoment) {
  for (int seed = 0; seed < 20; ++seed) {
    std::mt19937 random(static_cast<unsigned>(seed));
    const auto allocator = Allocator::Create(Device{seed % 2 ? DeviceType::kMeta : DeviceType{}});
    std::vector<std::pair<void*, int64_t>> blocks;
    std::multiset<int64_t> alive, at_peak;
    int64_t sum = 0, highest = 0;
    for (int i = 0; i < 400; ++i) {
      if (i == 100) {  // what is alive counts from the start
        allocator->WatchPeak(true);
        highest = sum;
        at_peak = alive;
      }
      // It climbs and falls several times.
      if (blocks.empty() || random() % 10 < (i / 40 % 2 ? 3u : 7u)) {
        const auto bytes = static_cast<int64_t>(1 + random() % 5000);
        blocks.emplace_back(
            allocator->Allocate(static_cast<size_t>(bytes), MemoryClass::kActivations), bytes);
        alive.insert(bytes);
        sum += bytes;
        if (sum > highest) {
          highest = sum;
          at_peak = alive;
        }
      } else {
        const size_t k = random() % blocks.size();
        allocator->Free(blocks[k].first);
        alive.erase(alive.find(blocks[k].second));
        sum -= blocks[k].second;
        blocks[k] = blocks.back();
        blocks.pop_back();
      }
      if (i >= 100) {
        ASSERT_EQ(Sizes(allocator->AtPeak()), at_peak) << seed << ", " << i;
      }
      ASSERT_EQ(Sizes(allocator->Live()), alive);
    }
    allocator->WatchPeak(false);
    EXPECT_TRUE(allocator->AtPeak().empty());
    allocator->Allocate(1000000, MemoryClass::kActivations);
    EXPECT_TRUE(allocator->AtPeak().empty());
  }
}

TEST(Ledger, LimitIsRefusedLikeExhaustion) {
  const auto allocator = Allocator::Create(Device{});
  void* a = allocator->Allocate(600, MemoryClass::kParameters);
  allocator->set_limit(1000);
  void* b = allocator->Allocate(400, MemoryClass::kGradients);  // to the byte
  try {
    const OriginScope here({Intern("blocks.0.attention"), "linear", Pass::kBackward});
    allocator->Allocate(1, MemoryClass::kOptimizer, {CurrentOrigin(), DType::kI8, {1}});
    FAIL();
  } catch (const OutOfMemory& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kMemory);
    EXPECT_EQ(static_cast<int>(e.kind()), 76);
    for (const char* words : {"1 bytes of optimizer", "i8 [1]", "blocks.0.attention", "linear",
                              "backward", "parameters 0 MB"})
      EXPECT_NE(e.message().find(words), std::string::npos) << words << ": " << e.message();
    EXPECT_EQ(Sizes(e.live()), (std::multiset<int64_t>{400, 600}));
  }
  EXPECT_EQ(allocator->stats().live_total, 1000);
  allocator->Free(b);
  allocator->Free(allocator->Allocate(400, MemoryClass::kWorkspace));
  allocator->set_limit(100);  // what is alive stays
  EXPECT_THROW(allocator->Allocate(0 + 1, MemoryClass::kWorkspace), OutOfMemory);
  allocator->Free(a);
  allocator->Allocate(100, MemoryClass::kWorkspace);
}

TEST(Ledger, ThreadsAreCounted) {
  const auto allocator = Allocator::Create(Device{});
  allocator->WatchPeak(true);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const OriginScope here(Intern("thread." + std::to_string(t)));
      std::vector<void*> mine;
      for (size_t i = 0; i < 2000; ++i) {
        mine.push_back(allocator->Allocate(i % 97 + t, MemoryClass::kActivations));
        if (i % 3 != 0) continue;
        allocator->Free(mine[i * 7 % mine.size()]);
        mine[i * 7 % mine.size()] = mine.back();
        mine.pop_back();
        if (i % 500 == 0) allocator->Live();
      }
      for (void* data : mine) allocator->Free(data);
    });
  }
  for (auto& thread : threads) thread.join();
  int64_t sum = 0;
  for (const LiveBlock& block : allocator->AtPeak()) {
    sum += block.bytes;
    EXPECT_TRUE(block.label.origin.module->starts_with("thread."));
  }
  EXPECT_EQ(sum, allocator->stats().peak_total);
  EXPECT_TRUE(allocator->Live().empty());
  EXPECT_EQ(CurrentOrigin().module, nullptr);
}

class TwoLayers : public UnaryModule {
 public:
  TwoLayers() {
    AddChild("up", up_, std::make_shared<Linear>(4, 6, "a", "b", true, InitSpec{}));
    AddChild("down", down_, std::make_shared<Linear>(6, 4, "b", "a", true, InitSpec{}));
  }

 protected:
  Tensor Forward(const Tensor& x) override { return (*down_)(ops::Gelu((*up_)(x))); }

 private:
  std::shared_ptr<UnaryModule> up_, down_;
};

// "module op pass" -> shapes
using Origins = std::map<std::string, std::vector<std::string>>;

Origins Of(const std::vector<LiveBlock>& blocks) {
  Origins origins;
  for (const LiveBlock& block : blocks) {
    const Origin& o = block.label.origin;
    origins[(o.module ? *o.module : "-") + ' ' + (o.op ? o.op : "-") + ' ' + Name(o.pass)]
        .push_back(block.label.shape.ToString());
  }
  return origins;
}

TEST(Ledger, OriginsThroughForwardAndBackward) {
  ExecutionContext context(Device{});
  const ContextScope scope(context);
  TwoLayers model;
  for (const auto& p : model.Parameters()) {
    p->Materialize(DType::kF64);
    p->value().Fill(0.1);
  }
  const Tensor x = Tensor::Full({5, 4}, DType::kF64, 1, MemoryClass::kWorkspace);
  EXPECT_EQ(Of(context.allocator()->Live()).at("up.weight - ").at(0), "[6, 4]");
  for (const bool again : {false, true}) {
    Tensor loss;
    {
      const OriginScope forward(Pass::kForward);
      const auto rematerialize = again ? std::make_unique<RematerializeScope>() : nullptr;
      loss = ops::Sum(model(x));
    }
    const Origins kept = Of(context.allocator()->Live());
    EXPECT_EQ(kept.at("up linear forward"), (std::vector<std::string>{"[5, 6]"}));
    EXPECT_EQ(kept.count("- gelu forward"), again ? 0u : 1u);  // the root has no path
    context.allocator()->WatchPeak(true);
    Backward(std::exchange(loss, {}));
    const Origins peak = Of(context.allocator()->AtPeak());
    // The gradient of its input.
    EXPECT_EQ(std::ranges::count(peak.at("down linear backward"), "[5, 6]"), 1);
    EXPECT_EQ(peak.count("- gelu recomputed"), again ? 1u : 0u);
    EXPECT_EQ(Of(context.allocator()->Live()).at("down.weight linear backward").at(0), "[4, 6]");
    for (const auto& p : model.Parameters()) p->leaf().grad = Tensor();
  }
  EXPECT_EQ(CurrentOrigin().op, nullptr);
}

}  // namespace
}  // namespace shoal
