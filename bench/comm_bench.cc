// Collectives of two or more ranks beside a copy of the same size and beside MPI's own. Prints a
// JSON line per size; started by mpirun. One arm of bench/comm_bench.py.
#define OMPI_SKIP_MPICXX 1  // as in comm_mpi.cc
#include <mpi.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>
#include <tuple>

#include "core/tensor.h"
#include "launch/bootstrap.h"

namespace {

using namespace shoal;  // NOLINT: a program

struct Options {
  std::vector<int64_t> megabytes = {1, 4, 16, 64, 256};
  int repeats = 20;
  bool mpi_only = false;
};

struct Arm {
  const char* name;
  std::function<void()> call;
  std::vector<double> seconds = {};
};

// Arms in turn, so that whatever else the machine does falls on all of them. A call counts from
// when all ranks are ready to when the last is done.
void Measure(const Options& o, Communicator& c, int64_t mb) {
  const int64_t n = mb << 18;
  // The communicator may find communication memory in a shared pool; activations are private.
  const Tensor pool = Tensor::Full({n}, DType::kF32, 0, MemoryClass::kCommunication);
  const Tensor own = Tensor::Full({n}, DType::kF32, 0);
  const Tensor other = Tensor::Full({n}, DType::kF32, 0);
  const View shared = pool.view(), priv = own.view();
  const auto copy = [&] { std::memcpy(other.data<char>(), own.data<char>(), own.bytes()); };
  std::vector<Arm> arms;
  arms.push_back({"memcpy", [&] {
                    if (c.rank() == 0) copy();
                  }});
  arms.push_back({"memcpy_all_ranks", copy});
  arms.push_back({"mpi_all_reduce", [&] {
                    MPI_Allreduce(MPI_IN_PLACE, own.data<float>(), static_cast<int>(n), MPI_FLOAT,
                                  MPI_SUM, MPI_COMM_WORLD);
                  }});
  if (!o.mpi_only) {
    const int64_t begin = ShardBegin(n, c.rank(), c.size());
    const View into =
        other.Narrowed(0, begin, ShardBegin(n, c.rank() + 1, c.size()) - begin).view();
    for (const auto& [view, all_reduce, reduce_scatter, reduce_scatter_into, all_gather] :
         {std::tuple(shared, "all_reduce_pool", "reduce_scatter_pool", "reduce_scatter_into_pool",
                     "all_gather_pool"),
          std::tuple(priv, "all_reduce", "reduce_scatter", "reduce_scatter_into", "all_gather")}) {
      arms.push_back({all_reduce, [&c, v = view] { c.AllReduce(std::span(&v, 1)); }});
      arms.push_back({reduce_scatter, [&c, v = view] { c.ReduceScatter(std::span(&v, 1)); }});
      arms.push_back({reduce_scatter_into, [&c, into, v = view] {
                        c.ReduceScatter(std::span(&v, 1), {}, Traffic::kData, into);
                      }});
      arms.push_back({all_gather, [&c, v = view] { c.AllGather(std::span(&v, 1)); }});
    }
  }
  // Small ones take turns more often.
  const int repeats = o.repeats * static_cast<int>(std::clamp<int64_t>(64 / mb, 1, 16));
  for (int i = 0; i <= repeats; ++i) {
    for (Arm& arm : arms) {
      c.Barrier();
      const auto begin = std::chrono::steady_clock::now();
      arm.call();
      const std::chrono::duration<double> mine = std::chrono::steady_clock::now() - begin;
      const double seconds = c.Max(mine.count());
      if (i > 0) arm.seconds.push_back(seconds);  // the first round fills caches and page tables
    }
  }
  if (c.rank() != 0) return;
  nlohmann::ordered_json json = {{"mb", mb}, {"ranks", c.size()}, {"mpi", MpiDescription()}};
  for (Arm& arm : arms) {
    std::sort(arm.seconds.begin(), arm.seconds.end());
    json["best"][arm.name] = arm.seconds.front();
    json["median"][arm.name] = arm.seconds[arm.seconds.size() / 2];
  }
  std::cout << json.dump() << std::endl;
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  CLI::App app("Collectives beside memcpy and MPI");
  app.add_option("--mb", o.megabytes, "sizes of the array, f32")->delimiter(',');
  app.add_option("--repeats", o.repeats, "of 64 MB and more; smaller ones are repeated more");
  app.add_flag("--mpi-only", o.mpi_only, "MPI's all-reduce and memcpy alone");
  CLI11_PARSE(app, argc, argv);
  if (!DetectLauncher().present) {
    std::cerr << "comm_bench: start it by mpirun -n 2\n";
    return 2;
  }
  return RunRanks({}, [&](Communicator& communicator) {
    for (const int64_t mb : o.megabytes) Measure(o, communicator, mb);
    return 0;
  });
}
