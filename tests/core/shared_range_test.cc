#include "core/shared_range.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>

#include "core/allocator.h"
#include "core/base/device.h"

namespace shoal {
namespace {

constexpr size_t kMegabyte = size_t{1} << 20;

TEST(SharedRange, IsTheSameMemoryWhereverItIsOpened) {
  const auto mine = SharedRange::Create(64 * kMegabyte);
  ASSERT_NE(mine, nullptr);
  const auto theirs = SharedRange::Open(mine->ticket());
  ASSERT_NE(theirs, nullptr);
  EXPECT_EQ(theirs->size(), mine->size());
  EXPECT_NE(theirs->begin(), mine->begin());
  mine->Prepare(3 * kMegabyte);
  std::memset(mine->begin(), 7, 5 * kMegabyte);
  EXPECT_EQ(theirs->begin()[0], 7);
  EXPECT_EQ(theirs->begin()[5 * kMegabyte - 1], 7);
  EXPECT_EQ(theirs->begin()[5 * kMegabyte], 0);
  theirs->begin()[63 * kMegabyte] = 1;
  EXPECT_EQ(mine->begin()[63 * kMegabyte], 1);
}

TEST(SharedRange, HoldsWhatLiesInItWhole) {
  const auto range = SharedRange::Create(2 * kMegabyte);
  ASSERT_NE(range, nullptr);
  const char* begin = range->begin();
  EXPECT_TRUE(range->Holds(begin, range->size()));
  EXPECT_TRUE(range->Holds(begin + range->size() - 1, 1));
  EXPECT_FALSE(range->Holds(begin + range->size() - 1, 2));
  EXPECT_FALSE(range->Holds(begin, range->size() + 1));
  EXPECT_FALSE(range->Holds(begin - 1, 1));
}

TEST(SharedRange, WhatIsNotThereIsRefused) {
  const auto range = SharedRange::Create(2 * kMegabyte);
  ASSERT_NE(range, nullptr);
  const std::string ticket = range->ticket();
  EXPECT_EQ(SharedRange::Open(""), nullptr);
  EXPECT_EQ(SharedRange::Open("1 2 3"), nullptr);
  EXPECT_EQ(SharedRange::Open(ticket + "0"), nullptr);  // another size
  range->Close();
  EXPECT_EQ(SharedRange::Open(ticket), nullptr);
}

// Another process sees it too, and whatever ends a process, the others keep what they have mapped.
TEST(SharedRange, OutlivesItsProcess) {
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const auto range = SharedRange::Create(8 * kMegabyte);
    char ticket[128] = {};
    if (range != nullptr) {
      range->begin()[kMegabyte] = 42;
      std::strncpy(ticket, range->ticket().c_str(), sizeof(ticket) - 1);
    }
    if (write(ready[1], ticket, sizeof(ticket)) < 0) _exit(1);
    for (;;) pause();
  }
  char ticket[128] = {};
  EXPECT_EQ(read(ready[0], ticket, sizeof(ticket)), static_cast<ssize_t>(sizeof(ticket)));
  const auto range = SharedRange::Open(ticket);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  close(ready[0]);
  close(ready[1]);
  ASSERT_NE(range, nullptr);
  EXPECT_EQ(range->begin()[kMegabyte], 42);
}

// What ranks exchange lies in the range while there is room, and is counted as ever.
TEST(SharedRange, AnAllocatorUsesIt) {
  const std::shared_ptr<SharedRange> range = SharedRange::Create(2 * kMegabyte);
  ASSERT_NE(range, nullptr);
  const auto plain = Allocator::Create(Device{}), shared = Allocator::Create(Device{});
  shared->Share(range);
  const auto both = [&](size_t bytes, MemoryClass memory_class) {
    plain->Allocate(bytes, memory_class);
    void* data = shared->Allocate(bytes, memory_class);
    std::memset(data, 1, bytes);
    return data;
  };
  void* gradient = both(kMegabyte, MemoryClass::kGradients);
  EXPECT_TRUE(range->Holds(gradient, kMegabyte));
  EXPECT_TRUE(range->Holds(both(1000, MemoryClass::kParameters), 1000));
  EXPECT_TRUE(range->Holds(both(1, MemoryClass::kCommunication), 1));
  EXPECT_FALSE(range->Holds(both(1000, MemoryClass::kActivations), 1));
  EXPECT_FALSE(range->Holds(both(1000, MemoryClass::kOptimizer), 1));
  EXPECT_FALSE(range->Holds(both(1000, MemoryClass::kWorkspace), 1));
  EXPECT_FALSE(range->Holds(both(kMegabyte, MemoryClass::kGradients), 1));  // no room
  EXPECT_EQ(shared->stats().live, plain->stats().live);
  EXPECT_EQ(shared->stats().peak, plain->stats().peak);
  EXPECT_EQ(shared->stats().peak_total, plain->stats().peak_total);
  const int64_t before = shared->stats().live_total;
  shared->Free(gradient);
  EXPECT_EQ(shared->stats().live_total, before - static_cast<int64_t>(kMegabyte));
  EXPECT_EQ(shared->Allocate(kMegabyte - 1, MemoryClass::kCommunication), gradient);  // again
}

}  // namespace
}  // namespace shoal
