// The same checks over threads and, when started by mpirun, over MPI.
#include "parallel/communicator.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <thread>

#include "core/base/error.h"
#include "core/context.h"
#include "core/tensor.h"

namespace shoal {
namespace {

template <class T>
std::vector<T> Values(int rank, int64_t n, int salt) {
  std::vector<T> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    values[static_cast<size_t>(i)] =
        T(static_cast<float>((rank + 1) * 0.25 + static_cast<double>((i * 7 + salt) % 64)));
  }
  return values;
}

template <class T>
void CheckSum(Communicator& c, std::vector<int64_t> sizes) {
  std::vector<std::vector<T>> data;
  std::vector<View> pieces;
  for (size_t p = 0; p < sizes.size(); ++p)
    data.push_back(Values<T>(c.rank(), sizes[p], static_cast<int>(p)));
  for (size_t p = 0; p < sizes.size(); ++p)
    pieces.emplace_back(data[p].data(), DTypeOf<T>::value, Dims{sizes[p]});
  c.AllReduce(pieces);
  for (size_t p = 0; p < sizes.size(); ++p) {
    std::vector<Accumulator<T>> expected(static_cast<size_t>(sizes[p]));
    for (int r = 0; r < c.size(); ++r) {
      const std::vector<T> other = Values<T>(r, sizes[p], static_cast<int>(p));
      for (size_t i = 0; i < other.size(); ++i)
        expected[i] += static_cast<Accumulator<T>>(other[i]);
    }
    for (size_t i = 0; i < expected.size(); ++i) {
      ASSERT_EQ(static_cast<double>(data[p][i]), static_cast<double>(T(expected[i])))
          << "piece " << p << " at " << i;
    }
  }
}

void CheckCommunicator(Communicator& c) {
  for (int64_t n : {1, 2, 5, 1000, 300001}) {
    CheckSum<float>(c, {n});
    CheckSum<double>(c, {n});
    CheckSum<BF16>(c, {n});
  }
  CheckSum<float>(c, {3, 0, 1, 700000, 7});

  // Without rounding apart, the ring form: every byte is sent 2 (P - 1) / P times, summed over the
  // ranks.
  const int64_t before = c.wire_bytes(Traffic::kData);
  CheckSum<float>(c, {1001});
  const double sent = static_cast<double>(c.wire_bytes(Traffic::kData) - before);
  EXPECT_EQ(c.Sum(sent), 2.0 * (c.size() - 1) * 1001 * 4);

  EXPECT_EQ(c.Sum(c.rank() + 1), c.size() * (c.size() + 1) / 2);
  EXPECT_EQ(c.Max(c.rank() == 0 ? 5 : -1), 5);
  EXPECT_TRUE(std::isnan(c.Max(c.rank() == c.size() - 1 ? std::nan("") : 1)));
  EXPECT_TRUE(std::isnan(c.Sum(c.rank() == c.size() - 1 ? std::nan("") : 1)));

  for (int root = 0; root < c.size(); ++root) {
    std::vector<float> data = Values<float>(c.rank(), 12345, 3);
    c.Broadcast(View(data.data(), DType::kF32, {12345}), root);
    EXPECT_EQ(data, Values<float>(root, 12345, 3));
  }

  const std::vector<std::string> all =
      c.AllGatherStrings(std::string(static_cast<size_t>(c.rank() * 3), 'a' + c.rank()));
  ASSERT_EQ(static_cast<int>(all.size()), c.size());
  for (int r = 0; r < c.size(); ++r)
    EXPECT_EQ(all[static_cast<size_t>(r)], std::string(static_cast<size_t>(r * 3), 'a' + r));
  c.Barrier();
}

class ThreadRanks : public ::testing::TestWithParam<int> {};

TEST_P(ThreadRanks, Collectives) { RunThreadRanks(GetParam(), 1, CheckCommunicator); }

INSTANTIATE_TEST_SUITE_P(Ranks, ThreadRanks, ::testing::Values(1, 2, 3, 4, 5, 8));

TEST(ThreadRanks, TheErrorOfOneEndsAll) {
  try {
    RunThreadRanks(4, 1, [](Communicator& c) {
      if (c.rank() == 2) SHOAL_FAIL(ErrorKind::kData, "test", "rank two is out of data");
      for (int i = 0; i < 1000000; ++i) c.Barrier();
    });
    FAIL() << "no error";
  } catch (const Error& e) {
    EXPECT_EQ(e.rank(), 2);
    EXPECT_EQ(e.kind(), ErrorKind::kData);
  }
}

TEST(ThreadRanks, DifferentSizesAreAnErrorNotAHang) {
  EXPECT_THROW(RunThreadRanks(2, 1,
                              [](Communicator& c) {
                                std::vector<float> data(static_cast<size_t>(10 + c.rank()));
                                const View view(data.data(), DType::kF32,
                                                {static_cast<int64_t>(data.size())});
                                c.AllReduce(std::span(&view, 1));
                              }),
               Error);
}

// Nobody may leave a collective while another reads its memory: each rank's arrays die with it.
TEST(ThreadRanks, WhatDiffersIsRefusedByAllRanks) {
  for (int round = 0; round < 50; ++round) {
    for (const int odd_one : {0, 1, 2}) {
      for (const bool dtype : {false, true}) {
        for (const bool broadcast : {false, true}) {
          std::atomic<int> refused = 0;
          EXPECT_THROW(RunThreadRanks(3, 1,
                                      [&](Communicator& c) {
                                        const bool odd = c.rank() == odd_one;
                                        const DType type = odd && dtype ? DType::kF64 : DType::kF32;
                                        const int64_t n = odd && !dtype ? 50000 : 50001;
                                        const Tensor a = Tensor::Full({1000}, DType::kF32, 1);
                                        const Tensor b = Tensor::Full({n}, type, 1);
                                        // One dtype per call: the second array alone where they
                                        // differ.
                                        std::vector<View> views = {a.view(), b.view()};
                                        if (dtype) views.erase(views.begin());
                                        try {
                                          if (broadcast) {
                                            c.Broadcast(b.view(), 1);
                                          } else {
                                            c.AllReduce(views);
                                          }
                                        } catch (const Error& e) {
                                          EXPECT_NE(e.message().find("different"),
                                                    std::string::npos);
                                          ++refused;
                                          throw;
                                        }
                                      }),
                       Error);
          EXPECT_EQ(refused, 3);
        }
      }
    }
  }
}

TEST(ThreadRanks, AnAbortIsNotTakenForSuccess) {
  EXPECT_THROW(RunThreadRanks(3, 1,
                              [](Communicator& c) {
                                if (c.rank() == 1) return c.Abort(0);
                                for (;;) c.Sum(1);
                              }),
               PeerFailed);
}

// A rank that fails at any moment: the others' collectives end or throw, and their memory is theirs
// until nobody reads it.
TEST(ThreadRanks, FailuresAtAnyMoment) {
  for (int round = 0; round < 200; ++round) {
    EXPECT_THROW(RunThreadRanks(4, 1,
                                [&](Communicator& c) {
                                  for (int i = 0;; ++i) {
                                    if (c.rank() == round % 4 && i == round / 8)
                                      throw std::runtime_error("on purpose");
                                    const Tensor t = Tensor::Full({513}, DType::kF64, 1);
                                    const View view = t.view();
                                    c.AllReduce(std::span(&view, 1));
                                    ASSERT_EQ(t.data<double>()[512], 4);
                                  }
                                }),
                 std::runtime_error);
  }
}

TEST(ThreadRanks, EachRankCountsItsOwnMemory) {
  RunThreadRanks(3, 1, [](Communicator& c) {
    Allocator& allocator = *ExecutionContext::Current().allocator();
    void* data =
        allocator.Allocate(static_cast<size_t>(100 * (c.rank() + 1)), MemoryClass::kActivations);
    c.Barrier();
    EXPECT_EQ(allocator.stats().live_total, 100 * (c.rank() + 1));
    allocator.Free(data);
  });
}

TEST(MetaRanks, SendWhatRealRanksSend) {
  std::vector<int64_t> real(3);
  RunThreadRanks(3, 1, [&](Communicator& c) {
    std::vector<float> data(101);
    const View view(data.data(), DType::kF32, {101});
    c.AllReduce(std::span(&view, 1));
    real[static_cast<size_t>(c.rank())] = c.wire_bytes(Traffic::kData);
  });
  for (int r = 0; r < 3; ++r) {
    const auto meta = MakeMetaCommunicator(r, 3);
    const View view(reinterpret_cast<void*>(64), DType::kF32, {101}, Device{DeviceType::kMeta});
    meta->AllReduce(std::span(&view, 1));
    EXPECT_EQ(meta->wire_bytes(Traffic::kData), real[static_cast<size_t>(r)]);
  }
}

// Started as `mpirun -n N parallel_test --gtest_filter=Mpi.*`; see CMakeLists.txt here.
TEST(Mpi, Collectives) {
  if (std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr) GTEST_SKIP() << "not started by mpirun";
  const auto c = MakeMpiCommunicator();
  SetThreadRank(c->rank());
  CheckCommunicator(*c);
}

}  // namespace
}  // namespace shoal
