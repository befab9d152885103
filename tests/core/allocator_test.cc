#include "core/allocator.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "core/base/error.h"
#include "core/tensor.h"

namespace shoal {
namespace {

TEST(Allocator, CountsLiveAndPeakByClass) {
  const auto allocator = Allocator::Create(Device{});
  void* a = allocator->Allocate(1000, MemoryClass::kActivations);
  void* b = allocator->Allocate(5, MemoryClass::kGradients);
  allocator->Free(a);
  void* c = allocator->Allocate(10, MemoryClass::kActivations);
  MemoryStats stats = allocator->stats();
  EXPECT_EQ(stats.live[static_cast<int>(MemoryClass::kActivations)], 10);
  EXPECT_EQ(stats.peak[static_cast<int>(MemoryClass::kActivations)], 1000);
  EXPECT_EQ(stats.live_total, 15);
  EXPECT_EQ(stats.peak_total, 1005);
  allocator->ResetPeak();
  EXPECT_EQ(allocator->stats().peak_total, 15);
  allocator->Free(b);
  allocator->Free(c);
  EXPECT_EQ(allocator->stats().live_total, 0);
}

TEST(Allocator, BlocksAreAlignedAndNeverOverlap) {
  const auto allocator = Allocator::Create(Device{});
  std::mt19937 random(1);
  struct Block {
    unsigned char* data;
    size_t size;
    unsigned char mark;
  };
  std::vector<Block> blocks;
  for (int i = 0; i < 5000; ++i) {
    if (blocks.empty() || random() % 3 != 0) {
      const size_t size = random() % (random() % 10 == 0 ? 300000 : 300);
      auto* data = static_cast<unsigned char*>(allocator->Allocate(size, MemoryClass::kWorkspace));
      EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % 64, 0u);
      const auto mark = static_cast<unsigned char>(random());
      std::memset(data, mark, size);
      blocks.push_back({data, size, mark});
    } else {
      const size_t k = random() % blocks.size();
      for (size_t j = 0; j < blocks[k].size; ++j) ASSERT_EQ(blocks[k].data[j], blocks[k].mark);
      allocator->Free(blocks[k].data);
      blocks[k] = blocks.back();
      blocks.pop_back();
    }
  }
}

// A step that repeats takes the same addresses: nothing grows, nothing is touched for the first
// time.
TEST(Allocator, RepeatedPatternsReuseTheSameMemory) {
  const auto allocator = Allocator::Create(Device{});
  std::vector<void*> first;
  for (int round = 0; round < 50; ++round) {
    std::vector<void*> taken;
    for (size_t size : {100000u, 64u, 5000000u, 777u, 100000u}) {
      taken.push_back(allocator->Allocate(size, MemoryClass::kActivations));
    }
    if (round == 0) first = taken;
    EXPECT_EQ(taken, first);
    for (void* data : taken) allocator->Free(data);
  }
}

TEST(Allocator, MergesFreedNeighbours) {
  const auto allocator = Allocator::Create(Device{});
  std::vector<void*> small;
  for (int i = 0; i < 100; ++i) small.push_back(allocator->Allocate(1024, MemoryClass::kWorkspace));
  for (size_t i = 0; i < small.size(); i += 2) allocator->Free(small[i]);
  for (size_t i = 1; i < small.size(); i += 2) allocator->Free(small[i]);
  EXPECT_EQ(allocator->Allocate(100 * 1024, MemoryClass::kWorkspace), small[0]);
}

TEST(Allocator, MetaCountsWithoutMemory) {
  const auto allocator = Allocator::Create(Device{DeviceType::kMeta});
  void* a = allocator->Allocate(size_t{1} << 50, MemoryClass::kParameters);
  EXPECT_EQ(allocator->stats().live_total, int64_t{1} << 50);
  allocator->Free(a);
  EXPECT_EQ(allocator->stats().live_total, 0);
}

TEST(Allocator, ExhaustionNamesTheClassAndTheBytes) {
  const auto allocator = Allocator::Create(Device{});
  try {
    allocator->Allocate(size_t{1} << 50, MemoryClass::kOptimizer);
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(e.message().find("optimizer"), std::string::npos) << e.message();
    EXPECT_NE(e.message().find(std::to_string(size_t{1} << 50)), std::string::npos) << e.message();
  }
}

TEST(Allocator, SizesThatWrapAroundAreRefused) {
  const auto allocator = Allocator::Create(Device{});
  for (const size_t bytes : {SIZE_MAX, SIZE_MAX - 62, SIZE_MAX / 2 + 1, (size_t{1} << 60) + 1}) {
    EXPECT_THROW(allocator->Allocate(bytes, MemoryClass::kWorkspace), Error) << bytes;
  }
  EXPECT_EQ(allocator->stats().peak_total, 0);
  // 2^66 elements: a product that fits no int64 must not become a small tensor.
  EXPECT_THROW(Tensor::Empty({int64_t{1} << 33, int64_t{1} << 33}, DType::kF32), Error);
  EXPECT_THROW(Tensor::Empty({int64_t{1} << 62}, DType::kF64), Error);
  EXPECT_THROW(Tensor::Empty({-1}, DType::kF32), Error);
  EXPECT_THROW(Tensor::Empty({-2, -3}, DType::kF32), Error);
  EXPECT_EQ(Tensor::Empty({int64_t{1} << 40, 0, int64_t{1} << 40}, DType::kF32).numel(), 0);
}

TEST(Allocator, ThreadsMayFreeEachOthersBlocks) {
  const auto allocator = Allocator::Create(Device{});
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 2000; ++i) {
        void* data = allocator->Allocate(100, MemoryClass::kCommunication);
        std::memset(data, 1, 100);
        allocator->Free(data);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(allocator->stats().live_total, 0);
}

#ifdef __SANITIZE_ADDRESS__
// The sanitizer sees what happens inside the allocator's range.
void Touch(const void* data, size_t at) {
  volatile auto* bytes = static_cast<volatile char*>(const_cast<void*>(data));
  bytes[at] = static_cast<char>(bytes[at] + 1);
}

TEST(AllocatorDeathTest, OverrunsAndUsesAfterFreeAreCaught) {
  const auto allocator = Allocator::Create(Device{});
  for (const size_t size : {0u, 1u, 63u, 64u, 65u, 4096u}) {
    void* data = allocator->Allocate(size, MemoryClass::kWorkspace);
    void* next = allocator->Allocate(64, MemoryClass::kWorkspace);
    if (size > 0) Touch(data, size - 1);
    EXPECT_DEATH(Touch(data, size), "use-after-poison");
    EXPECT_DEATH(Touch(data, size + 63), "use-after-poison");  // a whole vector too far
    EXPECT_DEATH(Touch(static_cast<char*>(next) - 1, 0), "use-after-poison");
    allocator->Free(data);
    EXPECT_DEATH(Touch(data, 0), "use-after-poison");
    allocator->Free(next);
  }
}

TEST(Allocator, LeavesItsAddressesClean) {
  for (int i = 0; i < 3; ++i) {
    const auto allocator = Allocator::Create(Device{});
    allocator->Free(allocator->Allocate(100000, MemoryClass::kWorkspace));
    Touch(allocator->Allocate(1000, MemoryClass::kWorkspace), 999);
  }
}
#endif

}  // namespace
}  // namespace shoal
