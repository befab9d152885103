// Schedules of attention over slow links: what the clock on the wall says beside what the virtual
// one says.
#include <fmt/format.h>

#include <limits>

#include "parallel/sequence_pass.h"
#include "tests/parallel/sequence_case.h"
#include "tests/parallel/slow_fabric.h"

namespace shoal {
namespace {

using namespace sequence_testing;  // NOLINT: all of it

constexpr int kRanks = 4;
constexpr int64_t kRows = 16, kQueryHeads = 4, kHeadDim = 128;  // so few that only links matter
constexpr double kMessage = 0.02;                               // seconds of a rank's Q

struct Precision {
  const char* name;
  DType dtype;
  bool wide;
};
constexpr Precision kPrecisions[] = {
    {"bf16", DType::kBF16, false}, {"bf16, f32 O", DType::kBF16, true}, {"f32", DType::kF32, true}};

struct Seconds {
  double forward = std::numeric_limits<double>::infinity(), backward = forward;
};

// Of the slowest rank, full attention with as many kv heads as heads.
Seconds Measure(const SequenceMethod& method, const Precision& precision, SequenceFabric kind) {
  SlowFabric fabric(kind, kRanks);
  const double bandwidth = static_cast<double>(kRows * kQueryHeads * kHeadDim) *
                           static_cast<double>(SizeOf(precision.dtype)) / kMessage;
  Seconds seconds{0, 0};
  RunThreadRanks(kRanks, 1, [&](Communicator& threads) {
    FabricCommunicator ranks(threads.Duplicate(), fabric);
    SequenceWire wire(ranks);
    const SequenceLayout layout(Layout::kContiguous, kRows * kRanks, kRanks);
    const SequencePassOptions options{0.1, precision.wide};
    const Dims shape{1, kRows, kQueryHeads, kHeadDim};
    SequenceArrays x;
    x.q = Random(shape, 1, precision.dtype, 1);
    x.k = Random(shape, 1, precision.dtype, 2);
    x.v = Random(shape, 1, precision.dtype, 3);
    for (const SequencePass pass : {SequencePass::kForward, SequencePass::kBackward}) {
      const SequenceSchedule schedule =
          MakeSequenceSchedule(method, pass, layout, {.causal = false}, kQueryHeads, kQueryHeads);
      if (pass == SequencePass::kBackward) x.dout = Random(shape, 1, precision.dtype, 4);
      threads.Barrier();
      if (threads.rank() == 0) fabric.set_bandwidth(bandwidth);
      threads.Barrier();
      const auto begin = SlowFabric::Clock::now();
      RunSequencePass(schedule, options, wire, threads.rank(), x);
      const double mine = std::chrono::duration<double>(SlowFabric::Clock::now() - begin).count();
      const double all = threads.Max(mine);
      (pass == SequencePass::kForward ? seconds.forward : seconds.backward) = all;
    }
  });
  return seconds;
}

Seconds Simulate(const SequenceMethod& method, const Precision& precision, SequenceFabric kind) {
  const SequenceWidths widths = WidthsOf(1, kHeadDim, precision.dtype, {1, precision.wide});
  const auto seconds = [&](SequencePass pass) {
    const SequenceSchedule schedule =
        MakeSequenceSchedule(method, pass, {Layout::kContiguous, kRows * kRanks, kRanks},
                             {.causal = false}, kQueryHeads, kQueryHeads);
    return SimulateSequence(schedule, widths, {kind, 1e30, 1e6, 0}).seconds;
  };
  return {seconds(SequencePass::kForward), seconds(SequencePass::kBackward)};
}

Seconds Shorter(const Seconds& a, const Seconds& b) {
  return {std::min(a.forward, b.forward), std::min(a.backward, b.backward)};
}

// Over the one-way ring. Of two messages that come to a link at once the clock's tie goes to
// either, which may take a schedule longer: the shortest of a few runs, until it is what is
// expected.
TEST(LongSequenceOverSlowLinks, TakesWhatTheSimulatorSays) {
  std::vector<SequenceMethod> methods;
  for (int k = 0; k < kSequenceKinds; ++k)
    if (const auto kind = static_cast<Kind>(k); kind != Kind::kHybrid) {
      methods.push_back({kind});
      if (!CanGoBothWays(kind)) continue;
      methods.push_back({kind});
      methods.back().both_ways = true;
    }
  for (const Kind rows : {Kind::kTokenRing, Kind::kKvRing})
    methods.push_back({Kind::kHybrid, 2, rows});
  std::string table =
      "| precision | fabric | schedule | forward | simulated | backward | simulated |\n";
  for (const Precision& precision : kPrecisions)
    for (const SequenceFabric fabric :
         {SequenceFabric::kRing, SequenceFabric::kMesh, SequenceFabric::kPort}) {
      const SequenceMethod one_way{Kind::kKvRingOneWay};
      Seconds base;  // what else the machine does makes it longer only
      for (int i = 0; i < 3; ++i) base = Shorter(base, Measure(one_way, precision, fabric));
      const Seconds simulated_base = Simulate(one_way, precision, fabric);
      for (const SequenceMethod& method : methods) {
        const Seconds simulated = Simulate(method, precision, fabric);
        const Seconds wanted = {simulated.forward / simulated_base.forward,
                                simulated.backward / simulated_base.backward};
        Seconds ratio;
        for (int i = 0; i < 5; ++i) {
          const Seconds s = Measure(method, precision, fabric);
          ratio = Shorter(ratio, {s.forward / base.forward, s.backward / base.backward});
          if (ratio.forward < 1.05 * wanted.forward && ratio.backward < 1.05 * wanted.backward)
            break;
        }
        const std::string what =
            fmt::format("{} | {} | {}", precision.name, Name(fabric), Describe(method, kRanks));
        EXPECT_NEAR(ratio.forward, wanted.forward, 0.1 * wanted.forward) << what;
        EXPECT_NEAR(ratio.backward, wanted.backward, 0.1 * wanted.backward) << what;
        table += fmt::format("| {} | {:.2f} | {:.2f} | {:.2f} | {:.2f} |\n", what, ratio.forward,
                             wanted.forward, ratio.backward, wanted.backward);
      }
    }
  fmt::print("{}", table);
}

}  // namespace
}  // namespace shoal
