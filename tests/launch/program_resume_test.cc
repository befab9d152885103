// A run that was interrupted, wherever and however, goes on bitwise; and one command line gives one
// result on any number of ranks.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/launch/program.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

class ProgramResume : public ProgramTest {
 protected:
  // Dropout, accumulation, clipping, warm-up, a batch that crosses the epoch's end: all that could
  // have state.
  static Settings Everything() {
    return Settings()
        .Set("run.steps", "24")
        .Set("model.dropout", "0.1")
        .Set("batch.micro", "3")
        .Set("optim.warmup_steps", "5")
        .Set("checkpoint.every", "5");
  }
  // Everything but times must be the same.
  void ExpectSame(const std::string& a, const std::string& b) const {
    const std::vector<StepMetrics> x = Metrics(a), y = Metrics(b);
    ASSERT_EQ(x.size(), y.size());
    for (size_t i = 0; i < x.size(); ++i) {
      EXPECT_EQ(x[i].step, static_cast<int64_t>(i) + 1);
      EXPECT_EQ(x[i].step, y[i].step);
      EXPECT_EQ(x[i].loss, y[i].loss) << "step " << x[i].step;
      EXPECT_EQ(x[i].grad_norm, y[i].grad_norm) << "step " << x[i].step;
      EXPECT_EQ(x[i].lr, y[i].lr);
      EXPECT_EQ(x[i].tokens, y[i].tokens);
    }
    EXPECT_EQ(Tensors(a), Tensors(b));
  }
};

// Killed without warning, somewhere after its first save.
TEST_F(ProgramResume, AfterAKillBitwise) {
  Settings settings = Everything();
  settings.Set("run.steps", "60").Set("model.layers", "3");
  ASSERT_EQ(Train(settings.Set("run.dir", "\"whole\"")).exit_code, 0);
  WriteText(Path("b.toml"), settings.Set("run.dir", "\"cut\"").Text());
  Program program({"train", "b.toml"}, {.directory = directory_.path()});
  ASSERT_TRUE(program.WaitFor([&] { return !SavedSteps("cut").empty(); }));
  program.Signal(SIGKILL);
  program.Wait();
  Must({"resume", "cut"});
  ExpectSame("whole", "cut");
}

TEST_F(ProgramResume, StoppedBySignalAndContinuedBitwise) {
  Settings settings = Everything();
  settings.Set("run.steps", "40").Set("model.layers", "3");
  ASSERT_EQ(Train(settings.Set("run.dir", "\"whole\"")).exit_code, 0);
  WriteText(Path("b.toml"), settings.Set("run.dir", "\"cut\"").Text());
  Program program({"train", "b.toml"}, {.directory = directory_.path()});
  ASSERT_TRUE(program.WaitFor([&] { return Metrics("cut").size() >= 3; }));
  program.Signal(SIGUSR1);
  const ProgramResult stopped = program.Wait();
  ASSERT_TRUE(stopped.exit_code == 75 || stopped.exit_code == 0) << stopped.err;
  if (stopped.exit_code == 75) {
    EXPECT_NE(stopped.out.find("shoal resume cut"), std::string::npos) << stopped.out;
    EXPECT_LT(Metrics("cut").size(), 40u);
    Must({"resume", "cut"});
  }
  ExpectSame("whole", "cut");
  // Finished: nothing more to do, and it says so.
  const ProgramResult again = Must({"resume", "cut"});
  EXPECT_NE(again.out.find("finished"), std::string::npos) << again.out;
  ExpectSame("whole", "cut");
}

// Saves at every fifth step; all later ones are taken away: the run goes on from the fifth.
TEST_F(ProgramResume, FromAnyOfItsSavesBitwise) {
  for (const char* precision : {"\"fp64\"", "\"fp32\"", "\"bf16\""}) {
    const std::string whole = std::string("whole") + precision[1] + precision[3],
                      cut = "cut" + whole;
    Settings settings = Everything();
    settings.Set("precision.compute", precision).Set("checkpoint.keep", "10");
    ASSERT_EQ(Train(settings.Set("run.dir", "\"" + whole + "\"")).exit_code, 0);
    ASSERT_EQ(Train(settings.Set("run.dir", "\"" + cut + "\"")).exit_code, 0);
    ExpectSame(whole, cut);
    EXPECT_EQ(SavedSteps(cut).size(), 5u);
    for (const int64_t step : SavedSteps(cut)) {
      if (step > 5) fs::remove_all(Path(fmt::format("{}/checkpoints/step-{:08}", cut, step)));
    }
    std::ofstream(Path(cut + "/metrics.jsonl"), std::ios::app) << "{\"step\": 9999, \"lo";
    Must({"resume", cut});
    ExpectSame(whole, cut);
  }
}

TEST_F(ProgramResume, ADamagedSaveIsPassedOver) {
  ASSERT_EQ(Train(Everything().Set("run.dir", "\"whole\"")).exit_code, 0);
  ASSERT_EQ(Train(Everything().Set("run.dir", "\"cut\"").Set("checkpoint.keep", "10")).exit_code,
            0);
  fs::resize_file(Path("cut/checkpoints/step-00000024/state.h5"), 2000);
  const ProgramResult resumed = Must({"resume", "cut"});
  EXPECT_NE(resumed.err.find("step-00000024"), std::string::npos) << resumed.err;
  ExpectSame("whole", "cut");
  for (const int64_t step : SavedSteps("cut")) {
    fs::resize_file(Path(fmt::format("cut/checkpoints/step-{:08}/state.h5", step)), 2000);
  }
  const ProgramResult none = Run({"resume", "cut"});
  EXPECT_EQ(none.exit_code, 73);
  EXPECT_NE(none.err.find("no valid save"), std::string::npos) << none.err;
}

TEST_F(ProgramResume, AChangedCorpusIsRefused) {
  ASSERT_EQ(Train(Everything().Set("run.dir", "\"run\"").Set("checkpoint.keep", "10")).exit_code,
            0);
  fs::remove_all(Path("run/checkpoints/step-00000024"));
  WriteText(Path("corpus.txt"), SomeText(5000, 9));
  EXPECT_EQ(Run({"resume", "run"}).exit_code, 72);
}

TEST_F(ProgramResume, OntoAnotherNumberOfRanks) {
  ASSERT_EQ(Train(Everything().Set("run.dir", "\"whole\"").Remove("batch.micro")).exit_code, 0);
  ASSERT_EQ(
      Train(
          Everything().Set("run.dir", "\"cut\"").Remove("batch.micro").Set("checkpoint.keep", "10"))
          .exit_code,
      0);
  for (const int64_t step : SavedSteps("cut")) {
    if (step > 10) fs::remove_all(Path(fmt::format("cut/checkpoints/step-{:08}", step)));
  }
  Must({"resume", "cut", "--local-ranks", "3"});
  const std::vector<StepMetrics> a = Metrics("whole"), b = Metrics("cut");
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i].loss, b[i].loss, 1e-10 * a[i].loss);
}

TEST_F(ProgramResume, UserSignalTwoSavesAndGoesOn) {
  WriteText(Path("b.toml"), Settings().Set("run.dir", "\"run\"").Set("run.steps", "100000").Text());
  Program program({"train", "b.toml"}, {.directory = directory_.path()});
  ASSERT_TRUE(program.WaitFor([&] { return Metrics("run").size() >= 2; }));
  program.Signal(SIGUSR2);
  ASSERT_TRUE(program.WaitFor([&] { return !SavedSteps("run").empty(); }));
  const size_t steps = Metrics("run").size();
  ASSERT_TRUE(program.WaitFor([&] { return Metrics("run").size() > steps; }));
  // Meanwhile the run is locked.
  const ProgramResult second = Run({"resume", "run"});
  EXPECT_EQ(second.exit_code, 73) << second.err;
  program.Signal(SIGTERM);
  EXPECT_EQ(program.Wait().exit_code, 75);
}

class ProgramContract : public ProgramTest {};

TEST_F(ProgramContract, AnyNumberOfRanksGivesTheSameNumbers) {
  ASSERT_EQ(Train(Settings().Set("run.dir", "\"one\"").Set("run.steps", "10")).exit_code, 0);
  const std::vector<StepMetrics> one = Metrics("one");
  const auto tensors = Tensors("one");
  const auto check = [&](const std::string& run) {
    const std::vector<StepMetrics> many = Metrics(run);
    ASSERT_EQ(many.size(), one.size());
    for (size_t i = 0; i < one.size(); ++i) {
      EXPECT_NEAR(one[i].loss, many[i].loss, 1e-10 * one[i].loss) << run;
      EXPECT_NEAR(one[i].grad_norm, many[i].grad_norm, 1e-10 * one[i].grad_norm) << run;
    }
    for (const auto& [name, values] : Tensors(run)) {
      if (!name.starts_with("model/")) continue;
      double largest = 10 * 1e-3, worst = 0;
      for (size_t i = 0; i < values.size(); ++i) {
        largest = std::max(largest, std::abs(values[i]));
        worst = std::max(worst, std::abs(values[i] - tensors.at(name)[i]));
      }
      EXPECT_LT(worst / largest, 1e-10) << run << " " << name;
    }
  };
  for (const char* ranks : {"2", "3", "4"}) {
    const std::string run = std::string("threads") + ranks;
    Settings settings = Settings().Set("run.dir", "\"" + run + "\"").Set("run.steps", "10");
    ASSERT_EQ(Train(settings, {"--local-ranks", ranks}).exit_code, 0);
    check(run);
    if (!WhyNoMpi().empty()) continue;
    const std::string mpi = std::string("mpi") + ranks;
    ASSERT_EQ(Train(settings.Set("run.dir", "\"" + mpi + "\""), {}, {.mpi_ranks = std::stoi(ranks)})
                  .exit_code,
              0);
    check(mpi);
  }
}

// plan's bytes are the run's: on the wire, and of every class but kernels' scratch.
TEST_F(ProgramContract, PlanIsWhatHappens) {
  for (const char* precision : {"\"fp64\"", "\"bf16\""}) {
    const std::string run = std::string("run") + precision[1];
    Settings settings = Settings()
                            .Set("run.dir", "\"" + run + "\"")
                            .Set("batch.micro", "2")
                            .Set("precision.compute", precision);
    ASSERT_EQ(Train(settings, {"--local-ranks", "3"}).exit_code, 0);
    const ProgramResult planned = Must({"plan", "a.toml", "--ranks", "3", "--json"});
    const json plan = json::parse(planned.out);
    ASSERT_EQ(plan.at("ranks").size(), 3u);
    EXPECT_TRUE(plan.at("fits").get<bool>());
    const json& rank = plan.at("ranks")[0];
    const std::vector<StepMetrics> metrics = Metrics(run);
    for (const StepMetrics& m : metrics) {
      for (const auto& [axis, bytes] : m.wire_bytes) {
        if (axis == "control") continue;
        EXPECT_EQ(bytes, rank.at("wire_bytes").at(axis).get<int64_t>()) << axis;
      }
    }
    for (const auto& [name, bytes] : metrics.back().peak_bytes) {
      if (name == "workspace" || name == "peak") continue;
      EXPECT_EQ(bytes, rank.at("bytes").at(name).get<int64_t>()) << name;
    }
  }
}

TEST_F(ProgramContract, JsonIsAllThatIsOnStandardOutput) {
  ASSERT_EQ(
      Train(Settings().Set("run.dir", "\"run\"").Set("data.validation_fraction", "0.2")).exit_code,
      0);
  const json eval = json::parse(Must({"eval", "run", "--json"}).out);
  EXPECT_GT(eval.at("loss").get<double>(), 0);
  EXPECT_GT(eval.at("tokens").get<int64_t>(), 0);
  const json whole = json::parse(
      Must({"eval", "run", "--data", "corpus.txt", "--sequence-length", "5", "--json"}).out);
  EXPECT_EQ(whole.at("tokens").get<int64_t>() % 5, 0);
  const auto generate = [&](const std::string& seed, const std::string& temperature) {
    return json::parse(Must({"generate", "run", "--prompt", "The ", "--tokens", "20",
                             "--temperature", temperature, "--seed", seed, "--json"})
                           .out);
  };
  EXPECT_EQ(generate("1", "0").at("text"), generate("2", "0").at("text"));
  EXPECT_EQ(generate("1", "1").at("text"), generate("1", "1").at("text"));
  EXPECT_NE(generate("1", "1").at("text"), generate("2", "1").at("text"));
  EXPECT_LE(generate("1", "1").at("tokens").get<int64_t>(), 20);
}

TEST_F(ProgramContract, DivergenceStopsWithoutASave) {
  const ProgramResult result = Train(Settings()
                                         .Set("run.dir", "\"run\"")
                                         .Set("run.steps", "200")
                                         .Set("precision.compute", "\"fp32\"")
                                         .Set("optim.name", "\"sgd\"")
                                         .Set("optim.clip", "0")
                                         .Set("optim.lr", "1e15")
                                         .Set("optim.schedule", "\"constant\""));
  EXPECT_EQ(result.exit_code, 2) << result.err;
  EXPECT_NE(result.err.find("not finite"), std::string::npos) << result.err;
  EXPECT_TRUE(SavedSteps("run").empty());
}

TEST_F(ProgramContract, OddSizes) {
  int i = 0;
  for (const auto& changes : std::vector<std::map<std::string, std::string>>{
           {{"batch.sequences", "1"}, {"data.sequence_length", "1"}},
           {{"model.vocab", "321"}, {"data.sequence_length", "7"}},
           {{"model.family", "\"gpt2\""}, {"model.dropout", "0.2"}, {"batch.sequences", "5"}},
           {{"optim.warmup_steps", "100"}, {"data.documents", "true"}},
           {{"optim.schedule", "\"wsd\""}, {"optim.name", "\"sgd\""}, {"optim.momentum", "0.9"}}}) {
    Settings settings = Settings().Set("run.dir", fmt::format("\"run{}\"", i++));
    for (const auto& [key, value] : changes) settings.Set(key, value);
    const ProgramResult result = Train(settings);
    EXPECT_EQ(result.exit_code, 0) << result.err;
  }
}

TEST_F(ProgramContract, TokenFilesAreTheTextTheyWereBuiltFrom) {
  Must({"data", "build", "corpus.txt", "corpus.h5"});
  Must({"data", "build", "corpus.txt", "corpus_ids"});
  ASSERT_EQ(Train(Settings().Set("run.dir", "\"text\"")).exit_code, 0);
  for (const char* data : {"corpus.h5", "corpus_ids"}) {
    const std::string run = std::string("run_") + data;
    ASSERT_EQ(
        Train(Settings(data).Set("run.dir", "\"" + run + "\"").Set("model.vocab", "257")).exit_code,
        0);
    EXPECT_EQ(Tensors("text"), Tensors(run)) << data;
  }
}

// Nothing grows: neither what is counted nor what the system counts.
class LongProgram : public ProgramTest {};

TEST_F(LongProgram, MemoryDoesNotGrowOverThousandsOfSteps) {
  WriteText(Path("b.toml"), Settings()
                                .Set("run.dir", "\"run\"")
                                .Set("run.steps", "4000")
                                .Set("data.sequence_length", "64")
                                .Text());
  Program program({"train", "b.toml"}, {.directory = directory_.path(), .seconds = 600});
  const auto resident = [&] {
    std::ifstream in(fmt::format("/proc/{}/statm", program.pid()));
    int64_t size = 0, pages = 0;
    in >> size >> pages;
    return pages;
  };
  ASSERT_TRUE(program.WaitFor([&] { return Metrics("run").size() >= 50; }));
  const int64_t early = resident();
  ASSERT_TRUE(program.WaitFor([&] { return Metrics("run").size() >= 900; }));
  EXPECT_LT(resident(), early + early / 50);
  EXPECT_EQ(program.Wait().exit_code, 0);
  const std::vector<StepMetrics> all = Metrics("run");
  EXPECT_EQ(all[4].peak_bytes, all[3999].peak_bytes);
}

}  // namespace
}  // namespace shoal
