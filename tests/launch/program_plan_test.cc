// What is known before a run: whether it fits, what would make it fit, and that `auto` keeps to its
// budget.
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "tests/launch/program.h"

namespace shoal {
namespace {

using nlohmann::ordered_json;

class ProgramPlan : public ProgramTest {
 protected:
  // So long that activations are most of it.
  static Settings Long() {
    return Settings().Set("model.layers", "6").Set("data.sequence_length", "64");
  }
  int64_t PlannedPeak(const std::vector<std::string>& more) {
    std::vector<std::string> words = {"plan", "a.toml", "--json", "--ranks", "2"};
    words.insert(words.end(), more.begin(), more.end());
    const ordered_json plan = ordered_json::parse(Must(words).out);
    int64_t peak = 0;
    for (const ordered_json& rank : plan["ranks"])
      peak = std::max(peak, rank["bytes"]["peak"].get<int64_t>());
    return peak;
  }
};

TEST_F(ProgramPlan, WhatDoesNotFitIsRefusedWithWhatWould) {
  WriteText(Path("a.toml"), Long().Text());
  const int64_t none = PlannedPeak({}), full = PlannedPeak({"memory.recompute=full"});
  ASSERT_LT(full, none);
  const std::string budget = "memory.budget=" + std::to_string(none - 1);
  ExpectOneBlock(Run({"train", "a.toml", budget, "--local-ranks", "2"}), 2,
                 {"rank 0 needs", "memory.budget is", "memory.recompute = \"full\"",
                  "batch.micro = 1", "memory.overcommit = true"});
  ExpectNoRun();
  ExpectOneBlock(Run({"train", "a.toml", "memory.budget=1000", "--local-ranks", "2"}), 2,
                 {"together come to", "use more ranks"});
  ExpectNoRun();
  // What it names fits, and who insists may start.
  EXPECT_EQ(
      Run({"train", "a.toml", budget, "memory.recompute=full", "run.dir=b", "--local-ranks", "2"})
          .exit_code,
      0);
  EXPECT_EQ(
      Run({"train", "a.toml", budget, "memory.overcommit=true", "--local-ranks", "2"}).exit_code,
      0);
}

// The layout as text: which rank holds what, and which attention was chosen and why.
TEST_F(ProgramPlan, SaysHowTheModelIsCut) {
  WriteText(Path("a.toml"), Long().Text());
  const std::string text = Must({"plan", "a.toml", "mesh.tp=2", "mesh.cp=2", "--ranks", "4"}).out;
  for (const char* words :
       {"cut over tp 2", "blocks.0.attention.q.weight [16, 16]  heads: [0, 8) [8, 16)",
        "blocks.0.attention_norm.weight [16]\n", "vocab: [0, ", "attention over cp", "forward ",
        "layout zigzag"})
    EXPECT_NE(text.find(words), std::string::npos) << words << "\n" << text;
  EXPECT_EQ(text.find("blocks.1."), std::string::npos);
  const auto bound = [&](const std::string& more) {
    const std::string planned = Must({"plan", "a.toml", "mesh.cp=2", "--ranks", "2", more}).out;
    return planned.find("as if each sequence were one document") != std::string::npos;
  };
  EXPECT_FALSE(bound("data.documents=false"));
  EXPECT_TRUE(bound("data.documents=true"));
}

TEST_F(ProgramPlan, AutoKeepsToItsBudget) {
  WriteText(Path("a.toml"), Long().Text());
  const int64_t none = PlannedPeak({}), full = PlannedPeak({"memory.recompute=full"});
  ASSERT_EQ(Run({"train", "a.toml", "run.dir=all"}).exit_code, 0);
  int n = 0;
  for (const double share : {0.2, 0.6, 1.0}) {
    const int64_t budget = full + static_cast<int64_t>(share * static_cast<double>(none - full));
    const std::string run = "run" + std::to_string(n++);
    const ProgramResult result =
        Run({"train", "a.toml", "memory.recompute=auto", "memory.budget=" + std::to_string(budget),
             "run.dir=" + run, "--local-ranks", "2"});
    ASSERT_EQ(result.exit_code, 0) << result.err;
    const auto peaks = Metrics(run).back().peak_bytes;
    ASSERT_EQ(peaks.back().first, "peak");
    EXPECT_LE(peaks.back().second, budget);
    EXPECT_EQ(Metrics(run).size(), Metrics("all").size());
    EXPECT_NEAR(Metrics(run).back().loss, Metrics("all").back().loss, 1e-10);
  }
  ExpectOneBlock(Run({"train", "a.toml", "memory.recompute=auto", "memory.budget=1000"}), 2,
                 {"memory.recompute = \"auto\"", "with every block recomputed"});
  // Without a budget ranks share this host's memory, wherever they will be.
  const std::string words = "as if all ranks were on this host";
  const auto planned = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"plan", "a.toml", "--ranks", "2"});
    return Must(more).out;
  };
  EXPECT_NE(planned({"memory.recompute=auto"}).find(words), std::string::npos);
  EXPECT_EQ(planned({"memory.recompute=auto", "memory.budget=1GiB"}).find(words),
            std::string::npos);
  EXPECT_EQ(planned({}).find(words), std::string::npos);
}

}  // namespace
}  // namespace shoal
