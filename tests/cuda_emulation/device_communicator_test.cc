// Collectives of arrays on the device give the bits of the same collectives of arrays on the host.
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>

#include "core/tensor.h"
#include "parallel/comm_queue.h"
#include "tests/cuda_emulation/device_ranks.h"

namespace shoal::testing {
namespace {

// Arrays of these sizes with values of this rank's, where the current context computes.
std::vector<Tensor> Arrays(DType dtype, const std::vector<int64_t>& sizes, int rank) {
  std::vector<Tensor> arrays;
  for (const int64_t n : sizes) {
    std::vector<double> values;
    for (int64_t i = 0; i < n; ++i)
      values.push_back(static_cast<double>((rank + 3) * (i * 7 + n) % 101) / 7 - 5);
    arrays.push_back(Tensor::From(values, {n}).To(dtype));
  }
  return arrays;
}

std::vector<View> Views(const std::vector<Tensor>& arrays) {
  std::vector<View> views;
  for (const Tensor& a : arrays) views.push_back(a.view());
  return views;
}

std::vector<double> Values(const std::vector<Tensor>& arrays) {
  std::vector<double> values;
  for (const Tensor& a : arrays)
    for (const double v : a.ToVector()) values.push_back(v);
  return values;
}

// Uneven, some of them empty.
std::vector<int64_t> Uneven(int64_t n, int ranks) {
  std::vector<int64_t> bounds = {0, 0};
  for (int r = 2; r < ranks; ++r) bounds.push_back(n * r / ranks / 2);
  bounds.push_back(n);
  if (ranks == 1) bounds = {0, n};
  return bounds;
}

using Collective = std::function<std::vector<double>(Communicator&)>;

void ExpectSameOnTheDevice(int ranks, const Collective& collective) {
  std::vector<std::vector<double>> host(static_cast<size_t>(ranks)), device = host;
  std::vector<int64_t> sent(static_cast<size_t>(ranks));
  RunThreadRanks(ranks, 1, [&](Communicator& c) {
    const auto r = static_cast<size_t>(c.rank());
    host[r] = collective(c);
    sent[r] = c.wire_bytes(Traffic::kData);
  });
  RunDeviceRanks(ranks, [&](Communicator& c) {
    const auto r = static_cast<size_t>(c.rank());
    device[r] = collective(c);
    EXPECT_EQ(c.wire_bytes(Traffic::kData), sent[r]);
  });
  EXPECT_EQ(host, device);
  EXPECT_FALSE(host.back().empty());
}

TEST(DeviceCommunicator, ReducesAndGathersLikeTheHost) {
  // The last is in parts: a share is longer than what arrives at a time.
  const std::vector<std::vector<int64_t>> lists = {{1}, {5}, {64}, {3, 0, 130, 1}, {3000000}};
  for (const int ranks : {1, 2, 3, 5}) {
    for (const DType dtype : {DType::kF64, DType::kF32, DType::kBF16}) {
      for (const std::vector<int64_t>& sizes : lists) {
        if (sizes[0] > 1000000 && (ranks != 2 || dtype != DType::kF64)) continue;
        SCOPED_TRACE(fmt::format("{} ranks, {}, {} arrays, first {}", ranks, Name(dtype),
                                 sizes.size(), sizes[0]));
        for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax}) {
          if (sizes[0] > 1000000 && op == ReduceOp::kMax) continue;
          ExpectSameOnTheDevice(ranks, [&](Communicator& c) {
            const std::vector<Tensor> arrays = Arrays(dtype, sizes, c.rank());
            c.AllReduce(Views(arrays), op);
            return Values(arrays);
          });
        }
        const int64_t n = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
        if (n > 1000000) continue;
        for (const bool uneven : {false, true}) {
          const std::vector<int64_t> bounds = uneven ? Uneven(n, ranks) : ShardBounds(n, ranks);
          ExpectSameOnTheDevice(ranks, [&](Communicator& c) {
            const std::vector<Tensor> arrays = Arrays(dtype, sizes, c.rank());
            c.ReduceScatter(Views(arrays), bounds);
            c.AllGather(Views(arrays), bounds);
            return Values(arrays);
          });
          ExpectSameOnTheDevice(ranks, [&](Communicator& c) {
            std::vector<Tensor> arrays = Arrays(dtype, sizes, c.rank());
            const auto r = static_cast<size_t>(c.rank());
            const Tensor into = Tensor::Full({bounds[r + 1] - bounds[r] + 1}, dtype, -7);
            c.ReduceScatter(Views(arrays), bounds, Traffic::kData,
                            into.Narrowed(0, 0, bounds[r + 1] - bounds[r]).view());
            arrays.push_back(into);
            return Values(arrays);
          });
        }
      }
    }
  }
}

TEST(DeviceCommunicator, SendsLikeTheHost) {
  for (const int ranks : {1, 2, 3}) {
    ExpectSameOnTheDevice(ranks, [&](Communicator& c) {
      std::vector<Tensor> arrays = Arrays(DType::kF32, {7}, c.rank());
      c.Broadcast(arrays[0].view(), ranks - 1);
      // Rank r sends s + 2 r elements to rank s.
      std::vector<int64_t> out, in;
      for (int64_t s = 0; s < ranks; ++s) {
        out.push_back(s + 2 * c.rank());
        in.push_back(c.rank() + 2 * s);
      }
      const auto sum = [](const std::vector<int64_t>& v) {
        return std::accumulate(v.begin(), v.end(), int64_t{0});
      };
      const Tensor send = Arrays(DType::kBF16, {sum(out)}, c.rank())[0];
      const Tensor receive = Tensor::Full({sum(in)}, DType::kBF16, 0);
      c.AllToAll(send.view(), out, receive.view(), in);
      arrays.push_back(receive);
      return Values(arrays);
    });
  }
}

// A send waits for its receiver, and no send or receive for another link's.
TEST(DeviceCommunicator, NeighboursSendBothWaysAtOnce) {
  constexpr int kRanks = 3;
  ExpectSameOnTheDevice(kRanks, [&](Communicator& c) {
    const std::unique_ptr<Communicator> group = c.Duplicate();
    CommQueue up(c), down(c);
    std::vector<Tensor> arrays = Arrays(DType::kF32, {40, 40}, c.rank());
    const Tensor from_below = Tensor::Full({40}, DType::kF32, 0);
    const Tensor from_above = Tensor::Full({40}, DType::kF32, 0);
    const int above = (c.rank() + 1) % kRanks, below = (c.rank() + kRanks - 1) % kRanks;
    up.Post([&] { group->Send(arrays[0].view(), above); });
    down.Post([&] { group->Send(arrays[1].view(), below); });
    group->Receive(from_below.view(), below);
    group->Receive(from_above.view(), above);
    up.WaitAll();
    down.WaitAll();
    return Values({from_below, from_above});
  });
}

TEST(DeviceCommunicator, ScalarsAndNamesTakeTheHost) {
  RunDeviceRanks(3, [](Communicator& c) {
    EXPECT_EQ(c.Sum(c.rank() + 1.0), 6);
    EXPECT_EQ(c.Max(-1.0 * c.rank()), 0);
    EXPECT_EQ(c.AllGatherStrings(std::string(1, static_cast<char>('a' + c.rank()))),
              (std::vector<std::string>{"a", "b", "c"}));
    const std::array<int, 2> pair = {0, 2};
    const std::array<int, 1> single = {1};
    const auto group = c.rank() == 1 ? c.Subgroup(single) : c.Subgroup(pair);
    const Tensor ones = Tensor::Full({3}, DType::kBF16, 1 + c.rank());
    const View view = ones.view();
    group->AllReduce(std::span(&view, 1));
    EXPECT_EQ(ones.ToVector()[2], c.rank() == 1 ? 2 : 4);
  });
}

// Both ways of looking at the device's memory that a machine with a GPU would punish.
TEST(DeviceMemoryDeathTest, IsNotTheHosts) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(
      {
        ExecutionContext context({DeviceType::kCuda, 0});
        const ContextScope scope(context);
        const Tensor ones = Tensor::Full({3}, DType::kF32, 1);
        fmt::print("{}", *static_cast<const volatile float*>(ones.view().data));
      },
      ::testing::KilledBySignal(SIGSEGV), "");
}

}  // namespace
}  // namespace shoal::testing
