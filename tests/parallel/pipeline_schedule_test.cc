// The formulas of parallel/pipeline_schedule.h, in exact numbers; schedules that must be refused;
// text and back.
#include "parallel/pipeline_schedule.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <random>
#include <tuple>

#include "core/base/error.h"
#include "parallel/pipeline_simulator.h"

namespace shoal {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr std::array<const char*, 5> kKinds = {"gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"};

struct Times {
  double forward, input, weight;
  double sum() const { return forward + input + weight; }
};
constexpr std::array<Times, 6> kTimes = {
    {{1, 1, 1}, {2, 2, 1}, {1, 2, 1}, {1, 1, 2}, {2, 3, 4}, {3, 1, 5}}};

PipelineCosts Costs(const Times& t, double link = 0) {
  return {{t.forward}, {t.input}, {t.weight}, link};
}

PipelineSimulation Simulate(const char* kind, int p, int v, int m, const Times& t) {
  return SimulatePipeline(MakePipelineSchedule(kind, p, v, m), Costs(t));
}

// Time beyond that of the passes.
double Bubble(const PipelineSimulation& s, const Times& t) {
  return s.makespan - s.schedule.chunks * s.schedule.micro_batches * t.sum();
}

int Largest(const std::vector<int>& values) { return *std::ranges::max_element(values); }

std::string MistakeOf(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kConfig);
    return e.message();
  }
  return "";
}

TEST(PipelineSchedule, GpipeAnd1f1b) {
  for (int p = 1; p <= 8; ++p)
    for (int m = 1; m <= 17; ++m)
      for (const Times& t : kTimes) {
        const auto gpipe = Simulate("gpipe", p, 1, m, t),
                   alternating = Simulate("1f1b", p, 1, m, t);
        EXPECT_EQ(Bubble(gpipe, t), (p - 1) * t.sum());
        EXPECT_EQ(Bubble(alternating, t), (p - 1) * t.sum());
        EXPECT_NEAR(alternating.bubble, static_cast<double>(p - 1) / m, 1e-12);
        EXPECT_THAT(gpipe.facts.peak_activations, Each(m));
        for (int i = 0; i < p; ++i)
          EXPECT_EQ(alternating.facts.peak_activations[static_cast<size_t>(i)], std::min(p - i, m));
        EXPECT_THAT(alternating.facts.peak_gradients, Each(0));
      }
}

TEST(PipelineSchedule, Interleaved) {
  for (int p = 1; p <= 8; ++p)
    for (int v = 1; v <= 4; ++v)
      for (int m = 1; m <= 17; ++m)
        for (const Times& t : kTimes) {
          SCOPED_TRACE(fmt::format("p {} v {} m {}", p, v, m));
          const auto s = Simulate("interleaved", p, v, m, t);
          EXPECT_EQ(Bubble(s, t), (p - 1 + (v - 1) * std::max(0, p - m)) * t.sum());
          if (m >= p) {
            EXPECT_NEAR(s.bubble, (p - 1.0) / (v * m), 1e-12);
          }
          const int groups = std::max(1, m / p), group = (m + groups - 1) / groups;
          for (int i = 0; i < p && v > 1; ++i)
            EXPECT_EQ(s.facts.peak_activations[static_cast<size_t>(i)],
                      std::min(m * v, (v - 1) * group + 2 * (p - 1 - i) + 1));
          // p (1 + (p-1)/(p v)) of a rank's activations, as the paper has it.
          if (m % p == 0 && v > 1 && m > p) {
            EXPECT_EQ(s.facts.peak_activations[0], p * v + p - 1);
          }
        }
  EXPECT_EQ(MakePipelineSchedule("interleaved", 4, 1, 8).actions,
            MakePipelineSchedule("1f1b", 4, 1, 8).actions);
}

TEST(PipelineSchedule, ZbH1) {
  for (int p = 1; p <= 8; ++p)
    for (int m = 1; m <= 17; ++m)
      for (const Times& t : kTimes) {
        SCOPED_TRACE(fmt::format("p {} m {} t {} {} {}", p, m, t.forward, t.input, t.weight));
        const auto s = Simulate("zb_h1", p, 1, m, t);
        if (m >= p) {
          EXPECT_EQ(Bubble(s, t),
                    (p - 1) * std::max({t.forward + t.input - t.weight, t.forward, t.input}));
        } else if (t.weight <= std::min(t.forward, t.input)) {
          EXPECT_EQ(Bubble(s, t), (p - 1) * (t.forward + t.input) - (m - 1) * t.weight);
        }
        EXPECT_LE(s.makespan, Simulate("1f1b", p, 1, m, t).makespan);
        for (int i = 0; i < p; ++i) {
          const auto r = static_cast<size_t>(i);
          EXPECT_EQ(s.facts.peak_activations[r], std::min(p, m));
          EXPECT_EQ(s.facts.peak_gradients[r], std::min(i + 1, m));
        }
      }
}

// Four ranks, eight micro-batches, the numbers of the papers' figures.
TEST(PipelineSchedule, KnownNumbers) {
  const Times one = {1, 1, 1};
  const auto alternating = Simulate("1f1b", 4, 1, 8, one), h1 = Simulate("zb_h1", 4, 1, 8, one),
             v = Simulate("zb_v", 4, 2, 8, {0.5, 0.5, 0.5});
  EXPECT_EQ(alternating.makespan, 33);
  EXPECT_THAT(alternating.facts.peak_activations, ElementsAre(4, 3, 2, 1));
  EXPECT_EQ(h1.makespan, 27);
  EXPECT_THAT(h1.facts.peak_activations, Each(4));
  EXPECT_THAT(h1.facts.peak_gradients, ElementsAre(1, 2, 3, 4));
  EXPECT_EQ(v.makespan, 25.5);
  EXPECT_EQ(v.inner_bubble, 0);
  EXPECT_THAT(v.facts.peak_activations, Each(8));
  EXPECT_THAT(alternating.busy, Each(24));
}

TEST(PipelineSchedule, ZbV) {
  const Times one = {1, 1, 1};
  for (int p = 1; p <= 12; ++p)
    for (int m = 1; m <= 3 * p + 1; ++m) {
      SCOPED_TRACE(fmt::format("p {} m {}", p, m));
      const auto s = Simulate("zb_v", p, 2, m, one);
      if (m >= p) {
        EXPECT_EQ(Bubble(s, one), p - 1);
      }
      if (m >= 2 * p - 1) {
        EXPECT_EQ(s.inner_bubble, 0);
      }
      EXPECT_EQ(Largest(s.facts.peak_activations), std::min(2 * p, 2 * m));
      for (const Times& t : kTimes) {
        if (t.weight > t.forward + t.input) continue;
        // A stage of zb_h1 is two of these.
        const Times two = {2 * t.forward, 2 * t.input, 2 * t.weight};
        const auto h1 = Simulate("zb_h1", p, 1, m, two), v = Simulate("zb_v", p, 2, m, t);
        EXPECT_LE(v.makespan, h1.makespan) << t.forward << t.input << t.weight;
        if (p > 1 && &t == kTimes.data()) {
          EXPECT_LT(v.makespan, h1.makespan);
        }
      }
    }
}

// No step is shorter than what the longest way through it takes.
TEST(PipelineSchedule, Links) {
  for (const char* kind : kKinds) {
    const int v = kind == std::string("zb_v") || kind == std::string("interleaved") ? 2 : 1;
    const auto schedule = MakePipelineSchedule(kind, 3, v, 1);
    const auto s = SimulatePipeline(schedule, {{2}, {3}, {1}, 10});
    // One micro-batch: down and up, and then rank 0's first weights.
    const int hops = kind == std::string("interleaved") ? 5 : kind == std::string("zb_v") ? 4 : 2;
    EXPECT_GE(s.makespan, 3 * v * (2 + 3) + 2 * hops * 10 + 1) << kind;
    EXPECT_THAT(s.busy, Each(6 * v)) << kind;
  }
  // Two ranks by hand: the message of F0 arrives at 1 + 5, and its gradient at 9 + 5.
  const auto s = SimulatePipeline(MakePipelineSchedule("1f1b", 2, 1, 1), {{1}, {1}, {1}, 5});
  EXPECT_EQ(s.makespan, 16);
  EXPECT_EQ(s.spans[0][2].start, 1);  // F0 SA0 RG0 B0
  EXPECT_EQ(s.spans[0][2].end, 14);
  EXPECT_EQ(s.spans[1][1].start, 6);  // RA0 F0 B0 SG0
}

// Every pass begins as soon as its rank and what it needs are there.
TEST(PipelineSchedule, Clock) {
  using Op = PipelineOp;
  std::mt19937 random(3);
  const auto pick = [&](int least, int most) {
    return std::uniform_int_distribution<int>(least, most)(random);
  };
  for (int round = 0; round < 200; ++round) {
    const std::string kind = kKinds[static_cast<size_t>(round) % kKinds.size()];
    const int p = pick(1, 5), v = kind == "interleaved" ? pick(1, 3) : kind == "zb_v" ? 2 : 1;
    PipelineCosts costs{{}, {}, {}, static_cast<double>(pick(0, 4))};
    for (int stage = 0; stage < p * v; ++stage)
      for (auto* times : {&costs.forward, &costs.backward_input, &costs.backward_weight})
        times->push_back(pick(1, 9));
    const auto s = SimulatePipeline(MakePipelineSchedule(kind, p, v, pick(1, 9)), costs);
    std::map<std::tuple<Op, int, int>, PipelineSimulation::Span> passes;  // op, stage, micro-batch
    const auto each_pass = [&](const auto& f) {
      for (int rank = 0; rank < p; ++rank)
        for (size_t i = 0; i < s.spans[static_cast<size_t>(rank)].size(); ++i) {
          const PipelineAction& a = s.schedule.actions[static_cast<size_t>(rank)][i];
          if (!IsMessage(a.op)) f(rank, a, s.spans[static_cast<size_t>(rank)][i]);
        }
    };
    each_pass([&](int rank, const PipelineAction& a, const PipelineSimulation::Span& span) {
      passes[{a.op, s.schedule.Stage(rank, a.chunk), a.micro_batch}] = span;
    });
    std::vector<double> free(static_cast<size_t>(p), 0);
    each_pass([&](int rank, const PipelineAction& a, const PipelineSimulation::Span& span) {
      const int stage = s.schedule.Stage(rank, a.chunk);
      double ready = free[static_cast<size_t>(rank)];
      const int needed = stage + (a.op == Op::kForward ? -1 : 1);
      if (a.op != Op::kBackwardWeight && needed >= 0 && needed < p * v) {
        const double link = s.schedule.Holder(needed).first == rank ? 0 : costs.link;
        ready = std::max(ready, passes.at({a.op, needed, a.micro_batch}).end + link);
      }
      EXPECT_EQ(span.start, ready);
      free[static_cast<size_t>(rank)] = span.end;
    });
    EXPECT_EQ(s.makespan, *std::ranges::max_element(free));
  }
}

TEST(PipelineSchedule, StagesOfTheirOwnTimes) {
  const auto s =
      SimulatePipeline(MakePipelineSchedule("1f1b", 2, 1, 4), {{1, 3}, {1, 3}, {0, 0}, 0});
  EXPECT_THAT(s.busy, ElementsAre(8, 24));
  EXPECT_EQ(s.makespan, 1 + 24 + 1);
  EXPECT_NEAR(s.bubble, 2.0 / 24, 1e-12);
}

TEST(PipelineSchedule, Messages) {
  using Op = PipelineOp;
  const auto s = MakePipelineSchedule("1f1b", 2, 1, 2);
  EXPECT_THAT(
      s.actions[0],
      ElementsAre(PipelineAction{Op::kForward, 0, 0}, PipelineAction{Op::kSendActivation, 0, 0},
                  PipelineAction{Op::kForward, 1, 0}, PipelineAction{Op::kSendActivation, 1, 0},
                  PipelineAction{Op::kReceiveGradient, 0, 0}, PipelineAction{Op::kBackward, 0, 0},
                  PipelineAction{Op::kReceiveGradient, 1, 0}, PipelineAction{Op::kBackward, 1, 0}));
  // Between a rank's own stages nothing is sent: at the V's turn, and on one rank.
  const auto v = MakePipelineSchedule("zb_v", 2, 2, 1);
  EXPECT_EQ(v.Peer(1, {Op::kSendActivation, 0, 0}), -1);
  EXPECT_EQ(v.Peer(1, {Op::kSendActivation, 0, 1}), 0);
  EXPECT_EQ(v.Peer(0, {Op::kSendActivation, 0, 1}), -1);
  const auto alone = MakePipelineSchedule("interleaved", 1, 3, 2);
  for (const PipelineAction& action : alone.actions[0]) EXPECT_FALSE(IsMessage(action.op));
  for (int stage = 0; stage < 4; ++stage) {
    const auto [rank, chunk] = v.Holder(stage);
    EXPECT_EQ(v.Stage(rank, chunk), stage);
  }
  // A weight half is the last to use its activations.
  const auto facts = CheckPipelineSchedule(MakePipelineSchedule("zb_h1", 2, 1, 2));
  EXPECT_THAT(facts.last_use[1], ElementsAre(8, 9));  // RA0 F0 I0 SG0 RA1 F1 I1 SG1 W0 W1
}

// A schedule file for `p` ranks of `v` stages, and what is wrong with it.
std::string Refusal(const std::string& text, int p, int v, int m) {
  return MistakeOf(
      [&] { CheckPipelineSchedule(ParsePipelineSchedule(text, "mine.csv", p, v, m)); });
}

TEST(PipelineSchedule, RefusedPasses) {
  EXPECT_EQ(Refusal("F0, B0\nF0, B0\n", 2, 1, 1), "");
  EXPECT_EQ(Refusal("F0, I0, W0\nF0, B0\n", 2, 1, 1), "");
  EXPECT_EQ(Refusal("F0, F1, B0, B1\nF0, B0\n", 2, 1, 2),
            "mine.csv: rank 1: F1 is missing; every stage does micro-batches 0 to 1");
  EXPECT_EQ(Refusal("F0, F1, B0\nF0, F1, B0, B1\n", 2, 1, 2),
            "mine.csv: rank 0: B1 is missing; every stage does micro-batches 0 to 1");
  EXPECT_THAT(Refusal("F0, I0\n", 1, 1, 1), HasSubstr("rank 0: W0 is missing"));
  EXPECT_THAT(Refusal("F0, W0\n", 1, 1, 1), HasSubstr("rank 0: I0 is missing"));
  EXPECT_EQ(Refusal("F0, B0, F0\n", 1, 1, 1),
            "mine.csv: rank 0, action 3 (F0): already done by action 1 (F0)");
  EXPECT_EQ(Refusal("F0, I0, W0, B0\n", 1, 1, 1),
            "mine.csv: rank 0, action 4 (B0): already done by action 3 (W0)");
  EXPECT_EQ(Refusal("F0, B0, W0\n", 1, 1, 1),
            "mine.csv: rank 0, action 3 (W0): already done by action 2 (B0)");
  EXPECT_EQ(Refusal("B0, F0\n", 1, 1, 1),
            "mine.csv: rank 0, action 1 (B0): needs F0, which comes later: action 2 (F0)");
  EXPECT_EQ(Refusal("F0, W0, I0\n", 1, 1, 1),
            "mine.csv: rank 0, action 2 (W0): needs I0, which comes later: action 3 (I0)");
  EXPECT_EQ(Refusal("F0.1, F0.0, B0.1, B0.0\n", 1, 2, 1),
            "mine.csv: rank 0, action 1 (F0.1): needs F0.0, which comes later: action 2 (F0.0)");
  EXPECT_EQ(
      Refusal("placement = v\nF0.0, F0.1, B0.1, B0.0\nF0.0, F0.1, B0.0, I0.1, W0.1\n", 2, 2, 1),
      "mine.csv: rank 1, action 5 (B0.0): needs I0.1, which comes later: action 8 (I0.1)");

  PipelineSchedule schedule = MakePipelineSchedule("gpipe", 1, 1, 2);
  const auto mistake = [&] { return MistakeOf([&] { CheckPipelineSchedule(schedule); }); };
  schedule.actions[0].push_back({PipelineOp::kForward, 2, 0});
  EXPECT_EQ(mistake(), "gpipe: rank 0, action 5 (F2): micro-batches are 0 to 1");
  schedule.actions[0].back() = {PipelineOp::kForward, 0, 1};
  EXPECT_EQ(mistake(), "gpipe: rank 0, action 5 (F0): a rank's stages are 0 to 0");
  schedule.actions.emplace_back();
  EXPECT_THAT(mistake(), HasSubstr("2 lists of actions do not make 1 ranks"));
}

TEST(PipelineSchedule, RefusedMessages) {
  EXPECT_EQ(Refusal("F0, SA0, RG0, B0\nRA0, F0, B0, SG0\n", 2, 1, 1), "");
  EXPECT_EQ(Refusal("F0, RG0, B0\nRA0, F0, B0, SG0\n", 2, 1, 1),
            "mine.csv: rank 0: SA0 is missing; rank 1 cannot go on without it");
  EXPECT_EQ(Refusal("F0, SA0, RG0, B0\nRA0, F0, B0\n", 2, 1, 1),
            "mine.csv: rank 1: SG0 is missing; rank 0 cannot go on without it");
  EXPECT_EQ(Refusal("F0, SA0, RG0, B0\nF0, B0, SG0\n", 2, 1, 1),
            "mine.csv: rank 1, action 1 (F0): needs RA0, which is missing");
  EXPECT_EQ(Refusal("F0, SA0, B0, RG0\nRA0, F0, B0, SG0\n", 2, 1, 1),
            "mine.csv: rank 0, action 3 (B0): needs RG0, which comes later: action 4 (RG0)");
  EXPECT_EQ(Refusal("SA0, F0, RG0, B0\nRA0, F0, B0, SG0\n", 2, 1, 1),
            "mine.csv: rank 0, action 1 (SA0): needs F0, which comes later: action 2 (F0)");
  EXPECT_EQ(Refusal("F0, SA0, RG0, B0\nRA0, F0, SG0, B0\n", 2, 1, 1),
            "mine.csv: rank 1, action 3 (SG0): needs B0, which comes later: action 4 (B0)");
  EXPECT_EQ(
      Refusal("RA0, F0, SA0, RG0, B0\nRA0, F0, B0, SG0\n", 2, 1, 1),
      "mine.csv: rank 0, action 1 (RA0): there is no such message: the stage at its other end "
      "is not there or on this rank");
  EXPECT_EQ(Refusal("F0, SA0, SA0, RG0, B0\nRA0, F0, B0, SG0\n", 2, 1, 1),
            "mine.csv: rank 0, action 3 (SA0): already done by action 2 (SA0)");
  // Each rank's own passes are in order.
  EXPECT_EQ(
      Refusal("F0, F1, B0, B1\nF1, B1, F0, B0\n", 2, 1, 2),
      "mine.csv: rank 0, action 5 (RG0): messages arrive in the order in which they are sent, "
      "and the next one from rank 1 is that of its action 4 (SG1)");
  EXPECT_EQ(
      Refusal("F0, F1, B1, B0\nF1, B1, F0, B0\n", 2, 1, 2),
      "mine.csv: rank 1, action 1 (RA1): messages arrive in the order in which they are sent, "
      "and the next one from rank 0 is that of its action 2 (SA0)");
}

TEST(PipelineSchedule, Deadlock) {
  // Rank 0 wants the gradient of micro-batch 0 before it sends 1; rank 1 wants 1 before it sends
  // that gradient.
  EXPECT_EQ(
      Refusal("F0, B0, F1, B1\nF0, F1, B0, B1\n", 2, 1, 2),
      "mine.csv: deadlock: rank 0 waits at action 3 (RG0) for rank 1's action 6 (SG0); rank 1 "
      "waits at action 3 (RA1) for rank 0's action 6 (SA1)");
  // A rank outside the circle waits as well, and is not named.
  EXPECT_EQ(
      Refusal("F0, F1, B0, B1\nF0, B0, F1, B1\nF0, F1, B0, B1\n", 3, 1, 2),
      "mine.csv: deadlock: rank 1 waits at action 4 (RG0) for rank 2's action 6 (SG0); rank 2 "
      "waits at action 3 (RA1) for rank 1's action 9 (SA1)");
}

TEST(PipelineSchedule, RefusedText) {
  EXPECT_EQ(Refusal("F0, B0\n", 2, 1, 1),
            "mine.csv has a line of actions for each of 1 ranks, but mesh.pp is 2");
  EXPECT_THAT(Refusal("# one\n\nF0, X3, B0\n", 1, 1, 1),
              HasSubstr("mine.csv, line 3: entry 2, \"X3\", is no action"));
  for (const char* entry :
       {"", "F", "3", "F-1", "F0.", "F.0", "F0.0.0", "F0x", "f0", "F 0", "F99999999999"})
    EXPECT_THAT(Refusal(fmt::format("F0, {}, B0", entry), 1, 1, 1),
                HasSubstr(fmt::format("line 1: entry 2, \"{}\", is no action", entry)));
  EXPECT_THAT(Refusal("F0, B0,\n", 1, 1, 1), HasSubstr("entry 3, \"\", is no action"));
  EXPECT_THAT(Refusal("F0, F1\n", 1, 1, 1),
              AllOf(HasSubstr("line 1: entry 2, \"F1\""), HasSubstr("batch.micro")));
  EXPECT_EQ(Refusal("F0, F0.1\n", 1, 1, 1),
            "mine.csv, line 1: entry 2, \"F0.1\": a rank has stages 0 to 0; set "
            "pipeline.virtual_stages to 2");
  EXPECT_THAT(Refusal("placement = v\nF0, B0\n", 1, 1, 1), HasSubstr("pipeline.virtual_stages"));
  EXPECT_THAT(Refusal("placement = w\nF0, B0\n", 1, 1, 1),
              HasSubstr("\"placement = w\" is no setting"));
  EXPECT_THAT(Refusal("F0, B0\nplacement = loop\n", 1, 1, 1), HasSubstr("before the ranks"));
  EXPECT_EQ(
      Refusal(" # a comment\r\nplacement=loop # no V\r\n\r\n F0.0 ,B0 # the rank\r\n", 1, 1, 1),
      "");
}

TEST(PipelineSchedule, RefusedKinds) {
  const auto mistake = [](const char* kind, int p, int v, int m) {
    return MistakeOf([&] { MakePipelineSchedule(kind, p, v, m); });
  };
  EXPECT_THAT(mistake("2f2b", 2, 1, 2), AllOf(HasSubstr("pipeline.schedule"), HasSubstr("zb_h1")));
  EXPECT_THAT(mistake("1f1b", 0, 1, 2), HasSubstr("mesh.pp is 0"));
  EXPECT_THAT(mistake("interleaved", 2, 0, 2), HasSubstr("pipeline.virtual_stages is 0"));
  EXPECT_THAT(mistake("1f1b", 2, 1, 0), HasSubstr("batch.micro"));
  for (const char* kind : {"gpipe", "1f1b", "zb_h1"})
    EXPECT_THAT(
        mistake(kind, 2, 2, 2),
        AllOf(HasSubstr("pipeline.virtual_stages is 2: set that to 1"), HasSubstr("interleaved")));
  for (const int v : {1, 3}) EXPECT_THAT(mistake("zb_v", 2, v, 2), HasSubstr("set that to 2"));
}

TEST(PipelineSchedule, AnySizes) {
  std::mt19937 random(1);
  const auto pick = [&](int most) { return std::uniform_int_distribution<int>(1, most)(random); };
  int refused = 0;
  for (int i = 0; i < 10000; ++i) {
    const std::string kind = kKinds[static_cast<size_t>(pick(5) - 1)];
    const int p = pick(8), v = pick(4), m = pick(24);
    SCOPED_TRACE(fmt::format("{} p {} v {} m {}", kind, p, v, m));
    const bool possible = kind == "interleaved" || v == (kind == "zb_v" ? 2 : 1);
    PipelineSchedule schedule;
    const std::string mistake = MistakeOf([&] { schedule = MakePipelineSchedule(kind, p, v, m); });
    EXPECT_EQ(mistake.empty(), possible) << mistake;
    refused += mistake.empty() ? 0 : 1;
    if (mistake.empty()) {
      EXPECT_EQ(MistakeOf([&] { CheckPipelineSchedule(schedule); }), "");
    }
  }
  EXPECT_GT(refused, 3000);
  EXPECT_LT(refused, 7000);
}

// One action left out, doubled, or swapped with the next is found, or does no harm: then every pass
// is still simulated.
TEST(PipelineSchedule, SpoiledSchedules) {
  std::mt19937 random(2);
  const auto pick = [&](size_t n) {
    return std::uniform_int_distribution<size_t>(0, n - 1)(random);
  };
  for (int i = 0; i < 3000; ++i) {
    const std::string kind = kKinds[pick(5)];
    const int v = kind == "interleaved" ? 3 : kind == "zb_v" ? 2 : 1;
    PipelineSchedule schedule =
        MakePipelineSchedule(kind, 2 + static_cast<int>(pick(3)), v, 1 + static_cast<int>(pick(8)));
    auto& order = schedule.actions[pick(schedule.actions.size())];
    const size_t at = pick(order.size() - 1);
    const auto place = order.begin() + static_cast<std::ptrdiff_t>(at);
    const size_t how = pick(3);
    if (how == 0) order.erase(place);
    if (how == 1) order.insert(place, order[pick(order.size())]);
    if (how == 2) std::swap(order[at], order[at + 1]);
    const std::string mistake = MistakeOf([&] {
      const auto s = SimulatePipeline(schedule, {});
      EXPECT_THAT(s.busy, Each(3.0 * v * schedule.micro_batches));
    });
    if (how != 2) {
      EXPECT_NE(mistake, "");
    }
  }
}

TEST(PipelineSchedule, TextAndBack) {
  for (const char* kind : kKinds)
    for (const bool messages : {false, true}) {
      const bool loop = kind != std::string("zb_v");
      const int v = kind == std::string("interleaved") ? 3 : loop ? 1 : 2;
      const auto schedule = MakePipelineSchedule(kind, 4, v, 11);
      const auto read =
          ParsePipelineSchedule(WritePipelineSchedule(schedule, messages), "mine.csv", 4, v, 11);
      EXPECT_EQ(read.actions, schedule.actions) << kind;
      EXPECT_EQ(read.placement, schedule.placement) << kind;
      EXPECT_EQ(read.name, "mine.csv");
    }
  EXPECT_EQ(WritePipelineSchedule(MakePipelineSchedule("zb_h1", 2, 1, 2), false),
            "# zb_h1: 2 ranks of 1 stages, 2 micro-batches\n"
            "F0, F1, I0, W0, I1, W1\n"
            "F0, I0, F1, I1, W0, W1\n");
  EXPECT_THAT(WritePipelineSchedule(MakePipelineSchedule("zb_v", 1, 2, 1), true),
              HasSubstr("\nplacement = v\nF0.0, F0.1, I0.1, I0.0, W0.1, W0.0\n"));
}

TEST(PipelineSchedule, Drawing) {
  const auto s = SimulatePipeline(MakePipelineSchedule("1f1b", 2, 1, 2), {});
  EXPECT_EQ(
      DrawPipelineTimeline(s),
      "1f1b: 2 ranks, 1 stage each, 2 micro-batches; time 9, bubble 50.0 % of 6; a column is 1\n"
      "rank 0 |  0  1  .  . B0 --  . B1 -- | holds 2\n"
      "rank 1 |  .  0 B0 --  1 B1 --  .  . | holds 1\n"
      "3 forward, B3 backward, I3 and W3 its input and weight halves, -- goes on, . idle;\n"
      "holds: most activations at a time, of one stage and micro-batch\n");
  EXPECT_THAT(DrawPipelineTimeline(Simulate("zb_v", 2, 2, 1, {1, 1, 1})),
              HasSubstr("rank 0 |  0a   .   .  0b I0b"));
  const std::string svg = DrawPipelineTimelineSvg(s);
  EXPECT_THAT(svg, AllOf(::testing::StartsWith("<svg xmlns="), ::testing::EndsWith("</svg>\n"),
                         HasSubstr("rank 1, B1: 5 to 7")));
  // Times so short that the text has no column for them.
  const auto uneven =
      SimulatePipeline(MakePipelineSchedule("gpipe", 2, 1, 2), {{1e-9, 1}, {1}, {0}, 0});
  EXPECT_LT(DrawPipelineTimeline(uneven).size(), 10000u);
  EXPECT_NE(DrawPipelineTimeline(
                SimulatePipeline(MakePipelineSchedule("gpipe", 1, 1, 1), {{0}, {0}, {0}, 0})),
            "");
}

}  // namespace
}  // namespace shoal
