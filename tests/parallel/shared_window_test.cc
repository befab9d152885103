// The collectives of ranks that share a host: here the ranks are threads with a window and pools of
// their own, and under mpirun they are processes (Mpi.*; see CMakeLists.txt).
#include "parallel/shared_window.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>

#include "core/context.h"
#include "core/tensor.h"
#include "parallel/comm_queue.h"
#include "parallel/pieces.h"

namespace shoal {
namespace {

constexpr size_t kMegabyte = size_t{1} << 20;

// Small whole numbers: their sums over a few ranks are exact in bf16 too.
double ValueAt(int rank, int64_t i) { return static_cast<double>((i * 7 + rank * 3) % 16); }
double SumAt(int ranks, int64_t i) {
  double sum = 0;
  for (int r = 0; r < ranks; ++r) sum += ValueAt(r, i);
  return sum;
}

// What the checks below need of a communicator or of a window.
struct Ranks {
  int rank, size;
  std::function<void(std::span<const View>)> all_reduce;
  std::function<void(std::span<const View>, std::span<const int64_t>)> reduce_scatter, all_gather;
};

// Arrays of `sizes` one after the other in `memory`, with gaps.
template <class T>
std::vector<View> ViewsIn(char* memory, const std::vector<int64_t>& sizes) {
  std::vector<View> pieces;
  for (const int64_t n : sizes) {
    pieces.emplace_back(memory, DTypeOf<T>::value, Dims{n});
    memory += static_cast<size_t>(n) * sizeof(T) + sizeof(T);
  }
  return pieces;
}

template <class T>
void CheckAll(const Ranks& c, const std::vector<View>& pieces) {
  const auto each = [&](auto&& f) {
    int64_t i = 0;
    for (const View& piece : pieces) {
      for (int64_t j = 0; j < piece.numel(); ++j) f(piece.as<T>()[j], i++);
    }
    return i;
  };
  const auto fill = [&] {
    return each([&](T& x, int64_t i) { x = T(static_cast<float>(ValueAt(c.rank, i))); });
  };
  const auto expect = [&](auto&& value) {
    int64_t wrong = 0;
    each([&](T& x, int64_t i) { wrong += static_cast<double>(x) != value(i) ? 1 : 0; });
    ASSERT_EQ(wrong, 0) << "of " << Name(DTypeOf<T>::value);
  };
  const int64_t n = fill();
  c.all_reduce(pieces);
  expect([&](int64_t i) { return SumAt(c.size, i); });
  for (const bool uneven : {false, true}) {
    std::vector<int64_t> bounds;
    for (int r = 0; r <= c.size; ++r)
      bounds.push_back(uneven && r < c.size ? n * r / c.size / 3 : ShardBegin(n, r, c.size));
    const auto owner = [&](int64_t i) {
      int r = 0;
      while (i >= bounds[static_cast<size_t>(r) + 1]) ++r;
      return r;
    };
    fill();
    c.reduce_scatter(pieces, bounds);
    expect([&](int64_t i) { return owner(i) == c.rank ? SumAt(c.size, i) : ValueAt(c.rank, i); });
    fill();
    c.all_gather(pieces, bounds);
    expect([&](int64_t i) { return ValueAt(owner(i), i); });
  }
}

std::vector<std::vector<int64_t>> Sizes() {
  std::vector<int64_t> many(300);
  for (size_t i = 0; i < many.size(); ++i) many[i] = static_cast<int64_t>(i * 37 % 900);
  return {{20000}, {1, 0, 40001, 5}, {700001, 13, 300000}, many};
}

// `memory(bytes)`: where this rank's arrays are.
template <class F>
void CheckSizes(const Ranks& c, F&& memory) {
  for (const std::vector<int64_t>& sizes : Sizes()) {
    int64_t n = 0;
    for (const int64_t s : sizes) n += s + 1;
    char* at = memory(static_cast<size_t>(n) * sizeof(double));
    CheckAll<float>(c, ViewsIn<float>(at, sizes));
    CheckAll<BF16>(c, ViewsIn<BF16>(at, sizes));
    CheckAll<double>(c, ViewsIn<double>(at, sizes));
  }
}

// Every rank maps every range at an address of its own, as processes do.
class ThreadWindows : public ::testing::TestWithParam<int> {};

TEST_P(ThreadWindows, PoolsPrivateAndMixed) {
  const int ranks = GetParam();
  std::vector<char> memory(static_cast<size_t>(SharedWindow::Bytes(ranks)) + 64);
  void* base = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  std::vector<std::shared_ptr<SharedRange>> ranges;
  for (int r = 0; r < ranks; ++r) ranges.push_back(SharedRange::Create(32 * kMegabyte));
  std::vector<SharedWindow::Pools> pools_of(static_cast<size_t>(ranks));
  for (int r = 0; r < ranks; ++r) {
    for (int other = 0; other < ranks; ++other) {
      const auto& range = ranges[static_cast<size_t>(other)];
      pools_of[static_cast<size_t>(r)].push_back(r == other ? range
                                                            : SharedRange::Open(range->ticket()));
      ASSERT_NE(pools_of[static_cast<size_t>(r)].back(), nullptr);
    }
  }
  RunThreadRanks(ranks, 1, [&](Communicator& c) {
    SharedWindow window(base, c.rank(), ranks);
    const Ranks window_ranks = {
        c.rank(), ranks, [&](auto pieces) { window.AllReduce(pieces, ReduceOp::kSum); },
        [&](auto pieces, auto bounds) { window.ReduceScatter(pieces, bounds); },
        [&](auto pieces, auto bounds) { window.AllGather(pieces, bounds); }};
    // The same by way of an array of its own.
    Ranks elsewhere = window_ranks;
    elsewhere.reduce_scatter = [&](auto pieces, auto bounds) {
      const auto me = static_cast<size_t>(c.rank());
      const int64_t share = bounds[me + 1] - bounds[me];
      std::vector<char> sum(static_cast<size_t>(share) * SizeOf(pieces[0].dtype));
      window.ReduceScatter(pieces, bounds, sum.data());
      Cursor(pieces, bounds[me]).CopyOut(share, sum.data());
    };
    std::vector<char> own(16 * kMegabyte);
    const auto here = [&](size_t) { return own.data(); };
    CheckSizes(window_ranks, here);
    const SharedWindow::Pools& pools = pools_of[static_cast<size_t>(c.rank())];
    window.set_pools(pools);
    const auto pool = [&](size_t) { return pools[static_cast<size_t>(c.rank())]->begin() + 192; };
    CheckSizes(window_ranks, pool);
    CheckSizes(window_ranks, here);
    CheckSizes(elsewhere, pool);
    CheckSizes(elsewhere, here);
    if (c.rank() == ranks - 1) {
      CheckSizes(window_ranks, here);
    } else {
      CheckSizes(window_ranks, pool);
    }
    // One array of several is elsewhere, on every rank.
    std::vector<View> pieces = ViewsIn<float>(pool(0), {50000, 50000, 7});
    pieces[1] = View(own.data(), DType::kF32, {50000});
    CheckAll<float>(window_ranks, pieces);
    // What differs is refused by all, and the window can be used afterwards.
    const std::vector<View> odd = ViewsIn<float>(pool(0), {50000 + c.rank() / (ranks - 1)});
    EXPECT_THROW(window.AllReduce(odd, ReduceOp::kSum), Error);
    CheckSizes(window_ranks, pool);
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, ThreadWindows, ::testing::Values(2, 3, 4));

Ranks RanksOf(Communicator& c) {
  return {c.rank(), c.size(), [&](auto pieces) { c.AllReduce(pieces); },
          [&](auto pieces, auto bounds) { c.ReduceScatter(pieces, bounds); },
          [&](auto pieces, auto bounds) { c.AllGather(pieces, bounds); }};
}

TEST(Mpi, Pools) {
  if (std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr) GTEST_SKIP() << "not started by mpirun";
  const auto world = MakeMpiCommunicator();
  ExecutionContext context{Device{}};
  const ContextScope scope(context);
  Tensor early = Tensor::Empty({int64_t{16} << 20}, DType::kU8, MemoryClass::kCommunication);
  ASSERT_TRUE(world->ShareMemory());
  std::vector<int> backwards;
  for (int r = world->size() - 1; r >= 0; --r) backwards.push_back(r);
  const auto group = world->Subgroup(backwards);
  const auto of_queue = world->Subgroup(backwards);
  CommQueue queue(*world);
  for (Communicator* c : {world.get(), group.get()}) {
    const Ranks ranks = RanksOf(*c);
    // Each time another block of the pool, some where another was: it grows and is used again.
    std::vector<Tensor> kept;
    const auto pool = [&](size_t bytes) {
      kept.push_back(
          Tensor::Empty({static_cast<int64_t>(bytes)}, DType::kU8, MemoryClass::kCommunication));
      if (kept.size() > 2) kept.erase(kept.begin());
      return kept.back().data<char>();
    };
    CheckSizes(ranks, pool);
    CheckSizes(ranks, [&](size_t) { return early.data<char>(); });  // older than the pool
    CheckSizes(ranks,
               [&](size_t bytes) { return c->rank() == 0 ? early.data<char>() : pool(bytes); });
    const int64_t more = int64_t{40} << 20;
    const Tensor large = Tensor::Full({more}, DType::kF32, 1, MemoryClass::kGradients);
    const View view = large.view();
    c->AllReduce(std::span(&view, 1));
    EXPECT_EQ(large.data<float>()[more - 1], static_cast<float>(c->size()));
  }
  // Behind a queue, whose group is its own.
  const Tensor data = Tensor::Full({1 << 20}, DType::kF32, 2, MemoryClass::kParameters);
  queue.Wait(queue.Post([&, view = data.view()] { of_queue->AllReduce(std::span(&view, 1)); }));
  EXPECT_EQ(data.data<float>()[12345], 2.0F * static_cast<float>(world->size()));
}

}  // namespace
}  // namespace shoal
