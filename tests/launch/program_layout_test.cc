// The program on layouts: the same numbers, the bytes that were planned, and a save of one layout
// continued on another.
#include <fmt/core.h>

#include <nlohmann/json.hpp>

#include "tests/launch/program.h"

namespace shoal {
namespace {

using nlohmann::ordered_json;

struct Layout {
  int ranks, tp, zero_stage;
  std::string Name() const {
    return fmt::format("{} ranks, tp {}, zero {}", ranks, tp, zero_stage);
  }
};

class ProgramLayout : public ProgramTest {
 protected:
  // Three heads that share two kv heads unevenly, sizes that no degree divides.
  static Settings Uneven(const Layout& layout) {
    Settings s;
    s.Set("model.d_model", "12").Set("model.heads", "6").Set("model.kv_heads", "3");
    s.Set("model.head_dim", "4").Set("model.mlp", "7").Set("model.layers", "2");
    s.Set("model.vocab", "259").Set("batch.sequences", "12").Set("batch.micro", "1");
    s.Set("run.steps", "4").Set("run.validate_every", "4").Set("data.validation_fraction", "0.2");
    s.Set("mesh.tp", std::to_string(layout.tp));
    s.Set("zero.stage", std::to_string(layout.zero_stage));
    return s;
  }
  void ExpectSameRun(const std::string& one, const std::string& many, const std::string& what) {
    const std::vector<StepMetrics> a = Metrics(one), b = Metrics(many);
    ASSERT_EQ(a.size(), b.size()) << what;
    for (size_t i = 0; i < a.size(); ++i) {
      EXPECT_NEAR(a[i].loss, b[i].loss, 1e-10 * a[i].loss) << what << ", step " << i + 1;
      EXPECT_NEAR(a[i].grad_norm, b[i].grad_norm, 1e-10 * a[i].grad_norm) << what;
      EXPECT_EQ(a[i].validation_loss.has_value(), b[i].validation_loss.has_value()) << what;
      if (!a[i].validation_loss) continue;
      EXPECT_NEAR(*a[i].validation_loss, *b[i].validation_loss, 1e-10 * a[i].loss) << what;
    }
    const auto x = Tensors(one), y = Tensors(many);
    for (const auto& [name, values] : x) {
      const std::vector<double>& other = y.at(name);
      for (size_t i = 0; i < values.size(); ++i)
        ASSERT_NEAR(values[i], other[i], 1e-10) << what << ": " << name;
    }
  }
  // plan.json against the last step: every class of memory and
  // every axis.
  void ExpectAsPlanned(const std::string& run, const std::string& what) {
    const ordered_json plan = ordered_json::parse(ReadText(Path(run + "/plan.json")));
    const StepMetrics last = Metrics(run).back();
    const ordered_json& rank = plan["ranks"][0];
    for (const auto& [name, bytes] : last.peak_bytes) {
      EXPECT_EQ(bytes, rank["bytes"][name].get<int64_t>()) << what << ": " << name;
    }
    for (const auto& [name, bytes] : last.wire_bytes) {
      if (name == "control") continue;
      EXPECT_EQ(bytes, rank["wire_bytes"][name].get<int64_t>()) << what << ": " << name;
    }
  }
};

const Layout kLayouts[] = {{2, 1, 1}, {3, 1, 2}, {4, 1, 3}, {2, 2, 0},
                           {4, 4, 0}, {6, 3, 2}, {4, 2, 3}};

TEST_F(ProgramLayout, AnyLayoutIsTheSameRun) {
  ASSERT_EQ(Train(Uneven({1, 1, 0}), {"run.dir=one"}).exit_code, 0);
  ExpectAsPlanned("one", "one rank");
  int n = 0;
  for (const Layout& layout : kLayouts) {
    const std::string run = fmt::format("run{}", n++);
    const ProgramResult result =
        Train(Uneven(layout), {"run.dir=" + run, "--local-ranks", std::to_string(layout.ranks)});
    ASSERT_EQ(result.exit_code, 0) << layout.Name() << result.err;
    ExpectSameRun("one", run, layout.Name());
    ExpectAsPlanned(run, layout.Name());
  }
}

TEST_F(ProgramLayout, UnderMpirun) {
  if (!WhyNoMpi().empty()) GTEST_SKIP() << WhyNoMpi();
  ASSERT_EQ(Train(Uneven({1, 1, 0}), {"run.dir=one"}).exit_code, 0);
  int n = 0;
  for (const Layout& layout : {Layout{4, 2, 3}, Layout{3, 3, 1}, Layout{2, 1, 2}}) {
    const std::string run = fmt::format("run{}", n++);
    WriteText(Path("m.toml"), Uneven(layout).Text());
    std::vector<std::string> words = MpirunWords();
    for (const std::string& w : {std::string("-n"), std::to_string(layout.ranks),
                                 std::string(SHOAL_BINARY_DIR "/bin/shoal"), std::string("train"),
                                 std::string("m.toml"), "run.dir=" + run})
      words.push_back(w);
    ProgramOptions options;
    options.directory = directory_.path();
    const ProgramResult result = Program(words, options, true).Wait();
    ASSERT_EQ(result.exit_code, 0) << layout.Name() << result.err;
    ExpectSameRun("one", run, layout.Name());
  }
}

// The layout of a run may be changed in its config.toml between two starts.
TEST_F(ProgramLayout, ASaveGoesOnOnAnother) {
  ASSERT_EQ(Train(Uneven({1, 1, 0}), {"run.dir=one"}).exit_code, 0);
  const Layout from[] = {{1, 1, 0}, {4, 1, 3}, {6, 3, 2}}, to[] = {{3, 1, 1}, {4, 4, 0}, {2, 1, 3}};
  for (int i = 0; i < 3; ++i) {
    const std::string run = fmt::format("run{}", i);
    ASSERT_EQ(Train(Uneven(from[i]), {"run.dir=" + run, "run.steps=2", "optim.schedule=constant",
                                      "--local-ranks", std::to_string(from[i].ranks)})
                  .exit_code,
              0);
    std::string config = ReadText(Path(run + "/config.toml"));
    const auto change = [&](const std::string& key, const std::string& value) {
      const size_t at = config.find("\n" + key + " = ") + 1;
      ASSERT_NE(at, 0u) << key;
      config.replace(at, config.find_first_of("#\n", at) - at, key + " = " + value + " ");
    };
    change("steps", "4");
    change("tp", std::to_string(to[i].tp));
    change("stage", std::to_string(to[i].zero_stage));
    WriteText(Path(run + "/config.toml"), config);
    Must({"resume", run, "--local-ranks", std::to_string(to[i].ranks)});
    ASSERT_EQ(Train(Uneven({1, 1, 0}), {"run.dir=twin" + run, "optim.schedule=constant"}).exit_code,
              0);
    const auto got = Tensors(run), expected = Tensors("twin" + run);
    for (const auto& [name, values] : expected) {
      for (size_t k = 0; k < values.size(); ++k)
        ASSERT_NEAR(values[k], got.at(name)[k], 1e-10) << from[i].Name() << ": " << name;
    }
  }
}

TEST_F(ProgramLayout, VerifySaysEqual) {
  WriteText(Path("a.toml"), Uneven({4, 2, 3}).Text());
  const ordered_json json =
      ordered_json::parse(Must({"verify", "a.toml", "--ranks", "4", "--steps", "3", "--json"}).out);
  EXPECT_TRUE(json["equal"].get<bool>());
  EXPECT_LT(json["max_relative_difference"].get<double>(), 1e-10);
  EXPECT_TRUE(json["first_difference"].is_null());
}

TEST_F(ProgramLayout, DegreesThatDoNotFitAreRefused) {
  WriteText(Path("a.toml"), Uneven({1, 1, 0}).Text());
  ExpectOneBlock(Run({"train", "a.toml", "mesh.tp=7", "--local-ranks", "7"}), 2,
                 {"mesh.tp 7", "6 heads"});
  ExpectOneBlock(Run({"train", "a.toml", "mesh.tp=2", "--local-ranks", "3"}), 2,
                 {"tp 2", "2 or 4 ranks"});
  ExpectOneBlock(Run({"train", "a.toml", "zero.stage=4"}), 2, {"zero.stage", "0 to 3"});
  ExpectNoRun();
}

// Weights of a bf16 run are where the next one begins, its master copies included.
TEST_F(ProgramLayout, Bf16GoesOnFromWeights) {
  for (const int stage : {0, 2, 3}) {
    const std::string first = fmt::format("first{}", stage),
                      second = fmt::format("second{}", stage);
    Settings s = Uneven({2, 1, stage});
    s.Set("precision.compute", "\"bf16\"").Set("optim.lr", "1e-2").Set("run.steps", "20");
    ASSERT_EQ(Train(s, {"run.dir=" + first, "--local-ranks", "2"}).exit_code, 0);
    ASSERT_EQ(Train(s, {"run.dir=" + second, "--local-ranks", "2", "run.steps=3", "optim.lr=1e-9",
                        "model.from=" + first})
                  .exit_code,
              0);
    const double fresh = Metrics(first).front().loss, trained = Metrics(first).back().loss;
    ASSERT_LT(trained, fresh - 1);
    for (const StepMetrics& m : Metrics(second)) EXPECT_NEAR(m.loss, trained, 0.5) << m.step;
  }
}

}  // namespace
}  // namespace shoal
