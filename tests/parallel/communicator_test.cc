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
#include "parallel/comm_queue.h"

namespace shoal {
namespace {

template <class T>
T ValueAt(int rank, int64_t i, int salt) {
  return T(static_cast<float>((rank + 1) * 0.25 + static_cast<double>((i * 7 + salt) % 64)));
}

template <class T>
std::vector<T> Values(int rank, int64_t n, int salt) {
  std::vector<T> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) values[static_cast<size_t>(i)] = ValueAt<T>(rank, i, salt);
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

// Views of consecutive arrays of these sizes in `data`.
template <class T>
std::vector<View> Pieces(std::vector<T>& data, const std::vector<int64_t>& sizes) {
  std::vector<View> pieces;
  T* at = data.data();
  for (const int64_t n : sizes) {
    pieces.emplace_back(at, DTypeOf<T>::value, Dims{n});
    at += n;
  }
  return pieces;
}

int64_t Total(const std::vector<int64_t>& sizes) {
  int64_t n = 0;
  for (const int64_t s : sizes) n += s;
  return n;
}

// Equal shares, or uneven ones of which some are empty.
std::vector<int64_t> BoundsOf(int64_t n, int size, bool uneven) {
  std::vector<int64_t> bounds;
  for (int r = 0; r <= size; ++r)
    bounds.push_back(!uneven     ? ShardBegin(n, r, size)
                     : r == size ? n
                     : r < 2     ? 0
                                 : n * r / size / 2);
  return bounds;
}

// Guards around each array, and what is not this rank's stays as it was.
template <class T>
void CheckReduceScatter(Communicator& c, const std::vector<int64_t>& sizes, bool uneven,
                        bool in_place) {
  const int64_t n = Total(sizes);
  std::vector<T> data = Values<T>(c.rank(), n, 0);
  const std::vector<int64_t> bounds = BoundsOf(n, c.size(), uneven);
  const int64_t begin = bounds[static_cast<size_t>(c.rank())];
  const int64_t end = bounds[static_cast<size_t>(c.rank()) + 1];
  const int64_t before = c.wire_bytes(Traffic::kData);
  std::vector<T> sums(static_cast<size_t>(end - begin + 1), T(-7.0F));  // and a guard
  const View into = in_place ? View() : View(sums.data(), DTypeOf<T>::value, {end - begin});
  c.ReduceScatter(Pieces(data, sizes), uneven ? std::span(bounds) : std::span<const int64_t>(),
                  Traffic::kData, into);
  EXPECT_EQ(c.wire_bytes(Traffic::kData) - before,
            c.size() == 1 ? 0 : (n - (end - begin)) * static_cast<int64_t>(sizeof(T)));
  std::vector<T> expected = Values<T>(c.rank(), n, 0);
  for (int64_t i = begin; i < end; ++i) {
    Accumulator<T> sum = 0;
    for (int r = 0; r < c.size(); ++r) sum += static_cast<Accumulator<T>>(ValueAt<T>(r, i, 0));
    if (in_place) {
      expected[static_cast<size_t>(i)] = T(sum);
    } else {
      ASSERT_EQ(static_cast<double>(sums[static_cast<size_t>(i - begin)]),
                static_cast<double>(T(sum)))
          << i;
    }
  }
  EXPECT_EQ(static_cast<double>(sums.back()), -7);
  for (int64_t i = 0; i < n; ++i) {
    ASSERT_EQ(static_cast<double>(data[static_cast<size_t>(i)]),
              static_cast<double>(expected[static_cast<size_t>(i)]))
        << i;
  }
}

template <class T>
void CheckAllGather(Communicator& c, const std::vector<int64_t>& sizes, bool uneven) {
  const int64_t n = Total(sizes);
  const std::vector<int64_t> bounds = BoundsOf(n, c.size(), uneven);
  const auto owner = [&](int64_t i) {
    int r = 0;
    while (i >= bounds[static_cast<size_t>(r) + 1]) ++r;
    return r;
  };
  std::vector<T> data = Values<T>(c.rank(), n, 0);
  if (uneven) {
    c.AllGather(Pieces(data, sizes), bounds);
  } else {
    c.AllGather(Pieces(data, sizes));
  }
  std::vector<std::vector<T>> of_rank;
  for (int r = 0; r < c.size(); ++r) of_rank.push_back(Values<T>(r, n, 0));
  for (int64_t i = 0; i < n; ++i) {
    ASSERT_EQ(static_cast<double>(data[static_cast<size_t>(i)]),
              static_cast<double>(of_rank[static_cast<size_t>(owner(i))][static_cast<size_t>(i)]))
        << i;
  }
}

// Rank r sends (r + 1) (to + scale) elements of value r + to / 16 + place to each.
void CheckAllToAll(Communicator& c, int64_t scale) {
  const auto count = [&](int from, int to) { return scale * ((from + 2 * to) % 3); };
  const auto value = [](int from, int to, int64_t i) {
    return static_cast<float>(from * 100 + to * 10) + static_cast<float>(i % 7);
  };
  std::vector<int64_t> send_counts, receive_counts;
  std::vector<float> send, expected;
  for (int r = 0; r < c.size(); ++r) {
    send_counts.push_back(count(c.rank(), r));
    receive_counts.push_back(count(r, c.rank()));
    for (int64_t i = 0; i < send_counts.back(); ++i) send.push_back(value(c.rank(), r, i));
    for (int64_t i = 0; i < receive_counts.back(); ++i) expected.push_back(value(r, c.rank(), i));
  }
  std::vector<float> receive(expected.size());
  c.AllToAll(View(send.data(), DType::kF32, {static_cast<int64_t>(send.size())}), send_counts,
             View(receive.data(), DType::kF32, {static_cast<int64_t>(receive.size())}),
             receive_counts);
  EXPECT_EQ(receive, expected);
}

// Once around, in a message of odd size and in an empty one.
void CheckSendReceive(Communicator& c) {
  if (c.size() == 1) return;
  const int next = (c.rank() + 1) % c.size(), last = (c.rank() + c.size() - 1) % c.size();
  for (const int64_t n : {0, 1, 300001}) {
    std::vector<double> mine = Values<double>(c.rank(), n, 1), got(static_cast<size_t>(n));
    const View out(mine.data(), DType::kF64, {n}), in(got.data(), DType::kF64, {n});
    if (c.rank() == 0) {
      c.Send(out, next);
      c.Receive(in, last);
    } else {
      c.Receive(in, last);
      c.Send(out, next);
    }
    EXPECT_EQ(got, Values<double>(last, n, 1));
  }
}

// Even and odd ranks apart, in reverse order.
void CheckSubgroup(Communicator& c) {
  std::vector<int> members;
  for (int r = c.size() - 1; r >= 0; --r)
    if (r % 2 == c.rank() % 2) members.push_back(r);
  const auto half = c.Subgroup(members);
  ASSERT_EQ(half->size(), static_cast<int>(members.size()));
  ASSERT_EQ(members[static_cast<size_t>(half->rank())], c.rank());
  double expected = 0;
  for (const int r : members) expected += r;
  EXPECT_EQ(half->Sum(c.rank()), expected);
  CheckSum<float>(*half, {1000, 3});
  CheckAllGather<float>(*half, {5, 7, 100}, false);
}

// Work behind a queue of its own while the group itself is used.
void CheckQueue(Communicator& c) {
  const auto q = c.Duplicate();
  CommQueue queue(c);
  std::vector<double> a(1000, c.rank()), b(10, 1);
  const View va(a.data(), DType::kF64, {1000}), vb(b.data(), DType::kF64, {10});
  queue.Post([&q, va] { q->AllReduce(std::span(&va, 1)); });
  const CommQueue::Ticket second = queue.Post([&q, vb] { q->AllReduce(std::span(&vb, 1)); });
  EXPECT_EQ(c.Sum(1), c.size());
  queue.Wait(second);
  EXPECT_EQ(b[9], c.size());
  EXPECT_EQ(a[999], c.size() * (c.size() - 1) / 2.0);  // posted before
  const CommQueue::Ticket bad = queue.Post([] { throw std::runtime_error("here"); });
  EXPECT_THROW(queue.Wait(bad), std::runtime_error);
}

void CheckCommunicator(Communicator& c) {
  for (const bool uneven : {false, true}) {
    for (const std::vector<int64_t>& sizes :
         {std::vector<int64_t>{1}, {2, 0, 3}, {0}, {64, 1, 999, 5}, {700001, 13, 400000}}) {
      for (const bool in_place : {true, false}) {
        CheckReduceScatter<float>(c, sizes, uneven, in_place);
        CheckReduceScatter<BF16>(c, sizes, uneven, in_place);
      }
      CheckReduceScatter<double>(c, sizes, uneven, true);
      CheckAllGather<float>(c, sizes, uneven);
      CheckAllGather<BF16>(c, sizes, uneven);
      CheckAllGather<int32_t>(c, sizes, uneven);
    }
  }
  for (const int64_t scale : {0, 1, 50, 300000}) CheckAllToAll(c, scale);
  CheckSendReceive(c);
  CheckSubgroup(c);
  if (c.size() > 1) CheckQueue(c);
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
        allocator.Allocate(100 * static_cast<size_t>(c.rank() + 1), MemoryClass::kActivations);
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
  for (const bool shared_memory : {true, false}) {
    const auto c = MakeMpiCommunicator(shared_memory);
    SetThreadRank(c->rank());
    CheckCommunicator(*c);
  }
}

}  // namespace
}  // namespace shoal
