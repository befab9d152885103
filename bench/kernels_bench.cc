// Times the kernels' test cases that are marked for it. Takes Google Benchmark's options:
//   kernels_bench --benchmark_filter='AdamW|RmsNorm'; OMP_NUM_THREADS sets the threads.
#include <benchmark/benchmark.h>

#include "core/base/build_config.h"
#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {
namespace {

double Bytes(const Case& c) {
  if (c.bytes > 0) return c.bytes;
  double bytes = 0;
  for (const Arg& arg : c.args)
    if (arg.role != Role::kAbsent)
      bytes += (arg.role == Role::kInOut ? 2.0 : 1.0) * arg.shape.numel() * SizeOf(arg.dtype);
  return bytes;
}

void Time(benchmark::State& state, const Case& c, Device device) {
  PreparedCase run(c, device, /*misaligned=*/false);
  run.Run();
  for (auto _ : state) run.Run();
  const auto rate = benchmark::Counter::kIsIterationInvariantRate;
  state.counters["B/s"] = benchmark::Counter(Bytes(c), rate);
  if (c.flops > 0) state.counters["F/s"] = benchmark::Counter(c.flops, rate);
}

void RegisterAll() {
  for (Device device : {Device{DeviceType::kCpu}, Device{DeviceType::kCuda}}) {
    if (!WhyUnavailable(device).empty()) continue;
    for (const Case& c : AllCases()) {
      if (!c.benchmark) continue;
      benchmark::RegisterBenchmark(
          fmt::format("{}/{}", c.name, Name(device.type)).c_str(),
          [&c, device](benchmark::State& state) { Time(state, c, device); })
          ->Unit(benchmark::kMicrosecond)
          ->UseRealTime();
    }
  }
}

}  // namespace
}  // namespace shoal::kernels::testing

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  shoal::kernels::testing::RegisterAll();
  benchmark::RunSpecifiedBenchmarks();
}
