// What the list of cases cannot say: refusals, many callers at once, many threads, many shapes.
#include "kernels/matmul.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "core/base/philox.h"
#include "core/base/thread_count.h"

namespace shoal::kernels {
namespace {

using ::testing::HasSubstr;

class HeapScratch : public ScratchSource {
 public:
  void* AllocateScratch(size_t bytes) override {
    return std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  }
  void FreeScratch(void* data) override { std::free(data); }
};

struct Shape {
  int64_t m, n, k;
};

// Operands of one product in memory of their own, and its result.
struct Operands {
  DType type, result;
  Shape shape;
  bool a_by_columns;
  std::vector<uint32_t> a, b, d;

  Operands(DType type, DType result, Shape s, bool a_by_columns)
      : type(type),
        result(result),
        shape(s),
        a_by_columns(a_by_columns),
        a(Words(type, s.m * s.k)),
        b(Words(type, s.k * s.n)),
        d(Words(result, s.m * s.n)) {
    Fill(a, 1);
    Fill(b, 2);
  }
  void Run() {
    HeapScratch scratch;
    Stream stream;
    stream.scratch = &scratch;
    View left(a.data(), type, {shape.m, shape.k});
    if (a_by_columns) left = View(a.data(), type, {shape.k, shape.m}).Transposed();
    Matmul(stream, View(d.data(), result, {shape.m, shape.n}), left,
           View(b.data(), type, {shape.k, shape.n}), {}, 0);
  }

 private:
  static int64_t Words(DType t, int64_t elements) {
    return (elements * static_cast<int64_t>(SizeOf(t)) + 3) / 4;
  }
  void Fill(std::vector<uint32_t>& words, uint64_t stream) const {
    const int64_t count = static_cast<int64_t>(words.size() * 4 / SizeOf(type));
    for (int64_t i = 0; i < count; ++i) {
      const float value = UniformFromWord(PhiloxWord({7, stream}, i)) - 0.5f;
      VisitFloat(type, "test", [&](auto tag) {
        using T = typename decltype(tag)::type;
        reinterpret_cast<T*>(words.data())[i] = static_cast<T>(value);
      });
    }
  }
};

constexpr std::pair<DType, DType> kTypes[] = {{DType::kF64, DType::kF64},
                                              {DType::kF32, DType::kF32},
                                              {DType::kBF16, DType::kBF16},
                                              {DType::kBF16, DType::kF32}};

class WithThreads {
 public:
  explicit WithThreads(int threads) : saved_(omp_get_max_threads()) { SetKernelThreads(threads); }
  ~WithThreads() { SetKernelThreads(saved_); }

 private:
  int saved_;
};

template <class Call>
void Refuses(Call call, const char* words) {
  try {
    call();
    ADD_FAILURE() << "accepts what should fail with: " << words;
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kBug);
    EXPECT_EQ(e.op(), "matmul");
    EXPECT_THAT(e.message(), HasSubstr(words));
  }
}

TEST(Matmul, RefusesWhatItsContractDoesNotHold) {
  std::vector<double> memory(1000);
  auto f = [&](Dims shape, DType t = DType::kF32) { return View(memory.data(), t, shape); };
  auto run = [&](const View& d, const View& a, const View& b, const View& bias = {},
                 double beta = 0) {
    return [=] {
      HeapScratch scratch;
      Stream stream;
      stream.scratch = &scratch;
      Matmul(stream, d, a, b, bias, beta);
    };
  };
  Refuses(run(f({2, 3}), f({2, 4}), f({5, 3})), "do not fit: d [2, 3], a [2, 4], b [5, 3]");
  Refuses(run(f({2, 3}), f({3, 4}), f({4, 3})), "do not fit");
  Refuses(run(f({2, 2, 3}), f({3, 2, 4}), f({2, 4, 3})), "do not fit");
  Refuses(run(f({2, 3}), f({1, 2, 4}), f({4, 3})), "2, 3 and 2 dimensions");
  Refuses(run(f({2, 3}), f({2, 4}), f({4, 3}), {}, 0.5), "beta is 0.5");
  Refuses(run(f({2, 3}), f({2, 4}), f({4, 3}, DType::kBF16)), "f32 and bf16 into f32");
  Refuses(run(f({2, 3}, DType::kBF16), f({2, 4}), f({4, 3})), "f32 and f32 into bf16");
  Refuses(run(f({2, 3}, DType::kI32), f({2, 4}, DType::kI32), f({4, 3}, DType::kI32)), "i32");
  Refuses(run(f({2, 3}), f({2, 4}), f({4, 3}), f({4})), "bias f32 [4]");
  Refuses(run(f({2, 3}), f({2, 4}), f({4, 3}), f({3}, DType::kBF16)), "bias bf16 [3]");
  View sparse = f({2, 4});
  sparse.strides = {8, 2};
  Refuses(run(f({2, 3}), sparse, f({4, 3})), "a [2, 4] needs stride 1");
  View repeated = f({4, 3});
  repeated.strides = {0, 1};
  Refuses(run(f({2, 3}), f({2, 4}), repeated), "b [4, 3] needs stride 1");
  Refuses(run(f({3, 2}).Transposed(), f({2, 4}), f({4, 3})), "d [2, 3] needs stride 1");
}

TEST(Matmul, BitsDoNotDependOnThreads) {
  const Shape shapes[] = {{64, 64, 4096},   {1, 128, 4096},  {512, 64, 4096},
                          {65, 257, 2048},  {16, 768, 2048}, {768, 16, 2048},
                          {257, 257, 4099}, {130, 2200, 64}, {256, 64, 9001}};
  for (auto [type, result] : kTypes) {
    for (const Shape& s : shapes) {
      for (bool by_columns : {false, true}) {
        Operands o(type, result, s, by_columns);
        std::vector<uint32_t> one;
        for (int threads : {1, 2, 5, 16}) {
          const WithThreads with(threads);
          o.d.assign(o.d.size(), 0);
          o.Run();
          if (one.empty()) one = o.d;
          EXPECT_EQ(one, o.d) << Name(type) << " into " << Name(result) << ' ' << s.m << 'x' << s.n
                              << 'x' << s.k << " by columns " << by_columns << ", " << threads
                              << " threads";
        }
      }
    }
  }
}

// Ranks as threads, each with a team of its own.
TEST(Matmul, ServesManyCallersAtOnce) {
  for (auto [type, result] : kTypes) {
    for (bool by_columns : {false, true}) {
      Operands expected(type, result, {200, 300, 150}, by_columns);
      expected.Run();
      std::vector<std::thread> callers;
      for (int caller = 0; caller < 4; ++caller) {
        callers.emplace_back([&, caller, type = type, result = result] {
          SetKernelThreads(1 + caller % 3);
          for (int turn = 0; turn < 5; ++turn) {
            Operands o(type, result, {200, 300, 150}, by_columns);
            o.Run();
            EXPECT_EQ(o.d, expected.d);
          }
        });
      }
      for (auto& caller : callers) caller.join();
    }
  }
}

TEST(Matmul, RunsInsideAParallelRegion) {
  for (auto [type, result] : kTypes) {
    for (bool by_columns : {false, true}) {
      Operands expected(type, result, {200, 300, 150}, by_columns);
      expected.Run();
      int wrong = 0;
#pragma omp parallel num_threads(3) reduction(+ : wrong)
      {
        Operands o(type, result, {200, 300, 150}, by_columns);
        o.Run();
        if (o.d != expected.d) ++wrong;
      }
      EXPECT_EQ(wrong, 0);
    }
  }
}

// More shapes than the cache of compiled products holds; the first is still right afterwards.
TEST(Matmul, ForgetsOldShapes) {
  Operands first(DType::kF32, DType::kF32, {9, 9, 9}, false);
  first.Run();
  const std::vector<uint32_t> before = first.d;
  for (int64_t i = 0; i < 1100; ++i) Operands(DType::kF32, DType::kF32, {1, 8, 1 + i}, false).Run();
  first.d.assign(first.d.size(), 0);
  first.Run();
  EXPECT_EQ(first.d, before);
}

}  // namespace
}  // namespace shoal::kernels
