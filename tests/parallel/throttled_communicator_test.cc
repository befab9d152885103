#include "tests/parallel/throttled_communicator.h"

#include <gtest/gtest.h>

#include "core/tensor.h"
#include "parallel/comm_queue.h"

namespace shoal {
namespace {

using Clock = ThrottledLink::Clock;

double Since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// 1 MB over 2 ranks: half of it is sent in each half of an all-reduce.
constexpr int64_t kElements = 1 << 18;
constexpr double kBandwidth = 10e6;
constexpr double kSeconds = kElements * 4 / kBandwidth;  // of an all-reduce

TEST(Throttled, TakesAtLeastWhatTheWireTakes) {
  RunThreadRanks(2, 1, [&](Communicator& inner) {
    const auto link = std::make_shared<ThrottledLink>();
    ThrottledCommunicator c(inner, link);
    const Tensor data = Tensor::Full({kElements}, DType::kF32, 1);
    const View view = data.view();
    c.AllReduce(std::span(&view, 1));  // as fast as it goes
    link->set_bandwidth(kBandwidth);
    auto begin = Clock::now();
    c.AllReduce(std::span(&view, 1));
    EXPECT_GE(Since(begin), kSeconds);
    EXPECT_EQ(data.data<float>()[kElements - 1], 4);
    begin = Clock::now();
    c.AllGather(std::span(&view, 1));
    EXPECT_GE(Since(begin), kSeconds / 2);
    EXPECT_EQ(c.wire_bytes(Traffic::kData), inner.wire_bytes(Traffic::kData));
    const auto passages = link->TakePassages();
    ASSERT_EQ(passages.size(), 2U);
    EXPECT_EQ(passages[0].elements, std::vector<int64_t>{kElements});
  });
}

// Groups share the rank's link; a core that waits is free.
TEST(Throttled, AQueueWorksBehindComputation) {
  RunThreadRanks(2, 1, [&](Communicator& inner) {
    const auto link = std::make_shared<ThrottledLink>();
    ThrottledCommunicator c(inner, link);
    const auto group = c.Duplicate();
    CommQueue queue(c);
    const Tensor a = Tensor::Full({kElements}, DType::kF32, 1);
    const Tensor b = Tensor::Full({kElements}, DType::kF32, 1);
    const View of_a = a.view(), of_b = b.view();
    link->set_bandwidth(kBandwidth);
    KernelProfile waited;
    queue.set_profile(&waited);
    const auto begin = Clock::now();
    queue.Post([&] { group->AllReduce(std::span(&of_a, 1)); });
    c.AllReduce(std::span(&of_b, 1));
    queue.WaitAll();
    EXPECT_GE(Since(begin), 2 * kSeconds);  // one link
    const double serial = waited.total();
    queue.Post([&] { group->AllReduce(std::span(&of_a, 1)); });
    std::this_thread::sleep_for(std::chrono::duration<double>(3 * kSeconds));
    queue.WaitAll();
    EXPECT_LT(waited.total() - serial, kSeconds / 2);  // it was long done
  });
}

}  // namespace
}  // namespace shoal
