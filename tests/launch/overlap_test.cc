// How much of ZeRO's traffic hides behind computation, on links so slow that all of it takes half
// as long as the computation.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <iostream>
#include <map>

#include "bench/random_batch.h"
#include "core/context.h"
#include "launch/training_step.h"
#include "models/presets.h"
#include "tests/parallel/throttled_communicator.h"

namespace shoal {
namespace {

using Clock = std::chrono::steady_clock;

// Parts of a step by when this rank waits for a collective.
enum Part {
  kBegin,     // up to the first block: its gather, and the embedding's
  kForward,   // between blocks
  kHead,      // behind the last block's forward and before its backward
  kBackward,  // between blocks
  kEnd,  // behind the first block's backward: what is still on its way, the embedding, the update
  kParts,
};

// Seconds, medians over the steps of one rank.
struct Overlap {
  double free_step = 0, step = 0;  // without and with slow links
  double traffic = 0, blocks = 0;  // on the link: all, and that of the blocks alone
  double hidden = 0;               // of the blocks', behind their forward and backward
  std::array<double, kParts> exposed = {};
  double total_exposed() const {
    double sum = 0;
    for (const double e : exposed) sum += e;
    return sum;
  }
  double hidden_share() const { return hidden / blocks; }
};

// Seconds for which the blocks' arrays are on the link in [begin, end). An array of `table`
// elements is the embedding's or the head's.
double OfBlocks(const std::vector<ThrottledLink::Passage>& passages, int64_t table,
                Clock::time_point begin, Clock::time_point end) {
  double sum = 0;
  for (const ThrottledLink::Passage& p : passages) {
    double all = 0, blocks = 0;
    for (const int64_t n : p.elements) {
      all += static_cast<double>(n);
      blocks += n == table ? 0 : static_cast<double>(n);
    }
    const std::chrono::duration<double> inside = std::min(p.end, end) - std::max(p.begin, begin);
    if (all > 0) sum += std::max(0.0, inside.count()) * blocks / all;
  }
  return sum;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double Waited(const KernelProfile& profile) {
  for (const auto& [name, seconds] : profile.parts())
    if (std::string_view(name) == "Communication") return seconds;
  return 0;
}

Overlap Measure(const ModelConfig& model, int stage, int64_t batch, int64_t length, int steps) {
  Overlap result;
  RunThreadRanks(2, 1, [&](Communicator& inner) {
    const auto link = std::make_shared<ThrottledLink>();
    ThrottledCommunicator world(inner, link);
    TrainingOptions options;
    options.model = model;
    options.zero_stage = stage;
    TrainingStep step(options, world);
    const std::vector<Batch> batches = {
        RandomBatch(batch, length, model.vocab, static_cast<uint32_t>(inner.rank()))};

    KernelProfile profile;
    step.set_profile(&profile);
    double last = 0;
    std::array<double, kParts> exposed = {};
    std::array<Clock::time_point, kParts> until = {};
    const auto mark = [&](Part part) {
      const double now = Waited(profile);
      exposed[part] = now - std::exchange(last, now);
      until[part] = Clock::now();
    };
    // Behind the optimizer's own hooks.
    const auto& blocks = step.model().blocks();
    ModuleHooks& front = blocks.front()->hooks();
    ModuleHooks& back = blocks.back()->hooks();
    front.pre_forward.push_back([&](Module&) { mark(kBegin); });
    back.post_forward.push_back([&](Module&) { mark(kForward); });
    back.pre_backward.push_back([&](Module&) { mark(kHead); });
    front.post_backward.push_back([&](Module&) { mark(kBackward); });

    Clock::time_point begin;
    const auto run = [&](double bandwidth) {
      link->set_bandwidth(bandwidth);
      inner.Barrier();
      begin = Clock::now();
      step.Run(batches, 1e-4);
      mark(kEnd);
      return std::chrono::duration<double>(Clock::now() - begin).count();
    };
    // Computation alone, and the traffic that goes with it.
    run(0);
    std::vector<double> free_steps;
    const int64_t before = step.wire_bytes(MeshAxis::kDp);
    for (int i = 0; i < 3; ++i) free_steps.push_back(run(0));
    const double bytes = static_cast<double>(step.wire_bytes(MeshAxis::kDp) - before) / 3;
    const double bandwidth = bytes / (inner.Max(Median(free_steps)) / 2);

    // In turn, so that what else the machine does falls on both.
    std::vector<double> slow_steps, of_blocks, hidden;
    std::array<std::vector<double>, kParts> parts;
    for (int i = 0; i < steps; ++i) {
      free_steps.push_back(run(0));
      run(bandwidth);  // may leave something on the link for the next
      slow_steps.push_back(run(bandwidth));
      for (size_t p = 0; p < kParts; ++p) parts[p].push_back(exposed[p]);
      const auto passages = link->TakePassages();
      const int64_t table = model.vocab * model.d_model;
      of_blocks.push_back(OfBlocks(passages, table, begin, Clock::now()));
      hidden.push_back(OfBlocks(passages, table, until[kBegin], until[kForward]) +
                       OfBlocks(passages, table, until[kHead], until[kBackward]) -
                       exposed[kForward] - exposed[kBackward]);
    }
    if (inner.rank() != 0) return;
    result.free_step = Median(free_steps);
    result.step = Median(slow_steps);
    result.traffic = bytes / bandwidth;
    result.blocks = Median(of_blocks);
    result.hidden = Median(hidden);
    for (size_t p = 0; p < kParts; ++p) result.exposed[p] = Median(parts[p]);
  });
  return result;
}

void Print(const char* name, int stage, const Overlap& o) {
  std::cout << fmt::format("| {} | {} | {:.2f} | {:.2f} | {:.2f} | {:.2f} | {:.0f} % |", name,
                           stage, o.step / o.free_step, o.traffic / o.free_step,
                           o.blocks / o.free_step, o.total_exposed() / o.free_step,
                           100 * o.hidden_share());
  for (const double e : o.exposed) std::cout << fmt::format(" {:.3f} |", e / o.free_step);
  std::cout << std::endl;
}

// Run as bench/results/2026-11-24-overlap.md says.
TEST(LongOverlap, Llama60m) {
  std::cout
      << "| model | stage | step | traffic | the blocks' | exposed | the blocks' hidden | begin "
         "| forward | head | backward | end |\n";
  for (const int stage : {2, 3}) {
    const Overlap o = Measure(*FindPreset("llama-60m"), stage, 2, 256, 5);
    Print("llama-60m", stage, o);
    // What is gathered one unit ahead, or behind the update, is there when its block begins.
    EXPECT_LE(o.exposed[kForward], 0.05 * o.free_step);
    EXPECT_GE(o.hidden_share(), 0.4);
  }
}

}  // namespace
}  // namespace shoal
