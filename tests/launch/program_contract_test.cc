// The contract of the program (docs/design.md, section 5), held against the program itself.
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "launch/config.h"
#include "tests/launch/program.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

// Shards of unequal size on every number of ranks, validation, two passes or more.
Settings Recipe() {
  Settings settings;
  settings.Set("model.mlp", "25").Set("model.vocab", "321").Set("batch.micro", "1");
  settings.Set("data.validation_fraction", "0.1").Set("run.validate_every", "2");
  return settings;
}

double Relative(double a, double b) { return std::abs(a - b) / std::abs(a); }

struct Start {
  int local_ranks = 1, mpi_ranks = 0;
  int ranks() const { return std::max(local_ranks, mpi_ranks); }
  std::string name() const { return (mpi_ranks > 0 ? "Mpi" : "Threads") + std::to_string(ranks()); }
};

class ProgramStarts : public ProgramTest, public ::testing::WithParamInterface<Start> {
 protected:
  void SetUp() override {
    if (GetParam().mpi_ranks > 0 && !WhyNoMpi().empty()) GTEST_SKIP() << WhyNoMpi();
  }
  ProgramResult TrainHere(const Settings& settings) {
    return Train(settings, {"--local-ranks", std::to_string(GetParam().local_ranks)},
                 {.mpi_ranks = GetParam().mpi_ranks});
  }
};

INSTANTIATE_TEST_SUITE_P(Starts, ProgramStarts,
                         ::testing::Values(Start{2, 0}, Start{3, 0}, Start{1, 2}, Start{1, 3},
                                           Start{1, 4}),
                         [](const auto& info) { return info.param.name(); });

TEST_P(ProgramStarts, SameNumbersAsAlone) {
  ASSERT_EQ(Train(Recipe().Set("run.dir", "\"alone\"")).exit_code, 0);
  const ProgramResult result = TrainHere(Recipe());
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(result.err, "");
  const std::vector<StepMetrics> one = Metrics("alone"), many = Metrics("run");
  ASSERT_EQ(one.size(), 6u);
  ASSERT_EQ(many.size(), 6u);
  for (size_t i = 0; i < one.size(); ++i) {
    EXPECT_LT(Relative(one[i].loss, many[i].loss), 1e-10);
    EXPECT_LT(Relative(one[i].grad_norm, many[i].grad_norm), 1e-10);
    EXPECT_EQ(one[i].lr, many[i].lr);
    EXPECT_EQ(one[i].tokens, many[i].tokens);
    ASSERT_EQ(one[i].validation_loss.has_value(), many[i].validation_loss.has_value());
    if (one[i].validation_loss) {
      EXPECT_LT(Relative(*one[i].validation_loss, *many[i].validation_loss), 1e-10);
    }
  }
  const auto a = Tensors("alone"), b = Tensors("run");
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [name, values] : a) {
    ASSERT_TRUE(b.contains(name)) << name;
    const std::vector<double>& other = b.at(name);
    ASSERT_EQ(values.size(), other.size()) << name;
    double largest = name.starts_with("model/") ? 6 * 1e-2 : 0, difference = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      largest = std::max(largest, std::abs(values[i]));
      difference = std::max(difference, std::abs(values[i] - other[i]));
    }
    EXPECT_LE(difference, 1e-10 * largest) << name;
  }
}

// What `plan` says beforehand is what the run measures.
TEST_P(ProgramStarts, PlannedBytesAreMeasured) {
  const ProgramResult result = TrainHere(Recipe());
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const ProgramResult planned =
      Must({"plan", "a.toml", "--json", "--ranks", std::to_string(GetParam().ranks())});
  const ordered_json plan = ordered_json::parse(planned.out);
  EXPECT_EQ(plan, ordered_json::parse(ReadText(Path("run/plan.json"))));
  ASSERT_EQ(plan["ranks"].size(), static_cast<size_t>(GetParam().ranks()));
  const ordered_json& rank0 = plan["ranks"][0];
  const std::vector<StepMetrics> steps = Metrics("run");
  for (const StepMetrics& m : steps) {
    for (const auto& [axis, bytes] : m.wire_bytes) {
      if (axis == "control") continue;
      EXPECT_EQ(rank0["wire_bytes"][axis].get<int64_t>(), bytes) << axis << ", step " << m.step;
      EXPECT_EQ(bytes > 0, axis == "dp") << axis;
    }
  }
  for (const auto& [name, bytes] : steps.back().peak_bytes)
    EXPECT_EQ(rank0["bytes"][name].get<int64_t>(), bytes) << name;
}

class ProgramContract : public ProgramTest {};

// Narrow parameters with wide masters, and gradients that are added up in f32; and what is kept in
// 8 bits, and updated before backward is over.
TEST_F(ProgramContract, PlannedBytesOfBf16) {
  Settings all = Recipe();
  all.Set("precision.compute", "\"bf16\"");
  for (const char* stage : {"", "0", "2", "3"}) {
    if (*stage != '\0') {
      all.Set("memory.compress_activations", "\"int8\"").Set("optim.clip", "0");
      all.Set("optim.in_backward", "true").Set("zero.stage", stage);
    }
    all.Set("run.dir", fmt::format("\"run{}\"", stage));
    ASSERT_EQ(Train(all, {"--local-ranks", "3"}).exit_code, 0);
    const std::string run = fmt::format("run{}", stage);
    const ordered_json plan = ordered_json::parse(ReadText(Path(run + "/plan.json")));
    const StepMetrics last = Metrics(run).back();
    EXPECT_EQ(plan["ranks"][0]["wire_bytes"]["dp"], last.wire_bytes[0].second);
    for (const auto& [name, bytes] : last.peak_bytes)
      EXPECT_EQ(plan["ranks"][0]["bytes"][name].get<int64_t>(), bytes) << run << ' ' << name;
  }
}

// Where documents end, labels are ignored: in every step others, and other numbers of them.
TEST_F(ProgramContract, PlannedBytesOfPackedDocuments) {
  std::filesystem::create_directory(Path("texts"));
  for (int i = 0; i < 300; ++i)
    WriteText(Path(fmt::format("texts/{:03}.txt", i)), SomeText(1 + i * i % 40, i));
  for (const char* precision : {"fp32", "bf16"}) {
    // One chunk of the loss; two whose logits' gradients are held for a narrow gradient; two.
    for (const auto& [length, ranks] : {std::pair(8, 1), {132, 3}, {140, 1}}) {
      const std::string run = fmt::format("{}-{}", precision, length);
      SCOPED_TRACE(run);
      Settings all = Recipe();
      all.Set("data.path", "\"texts\"").Set("data.documents", "true");
      all.Set("data.sequence_length", std::to_string(length)).Set("batch.micro", "4");
      all.Set("precision.compute", fmt::format("\"{}\"", precision));
      if (std::string(precision) == "bf16") all.Set("precision.gradients", "\"bf16\"");
      all.Set("run.dir", fmt::format("\"{}\"", run));
      const ProgramResult result = Train(all, {"--local-ranks", std::to_string(ranks)});
      ASSERT_EQ(result.exit_code, 0) << result.err;
      const ordered_json plan = ordered_json::parse(ReadText(Path(run + "/plan.json")));
      const std::vector<StepMetrics> steps = Metrics(run);
      EXPECT_LT(steps.back().tokens, 6 * 12 * length);
      for (const auto& [name, bytes] : steps.back().peak_bytes)
        EXPECT_EQ(plan["ranks"][0]["bytes"][name].get<int64_t>(), bytes) << name;
    }
  }
}

TEST_F(ProgramContract, RunDirectoryIsSelfContained) {
  ASSERT_EQ(Train(Recipe(), {"--local-ranks", "3"}).exit_code, 0);
  std::vector<std::string> found;
  int event_files = 0;
  for (const auto& entry : fs::recursive_directory_iterator(Path("run"))) {
    const std::string name = fs::relative(entry.path(), Path("run"));
    if (name.starts_with("events.out.tfevents.")) {
      ++event_files;
      EXPECT_GT(entry.file_size(), 0u);
    } else {
      found.push_back(name);
    }
  }
  std::sort(found.begin(), found.end());
  const std::vector<std::string> expected = {"checkpoints",
                                             "checkpoints/step-00000006",
                                             "checkpoints/step-00000006/manifest.json",
                                             "checkpoints/step-00000006/rank-0000.h5",
                                             "config.toml",
                                             "lock",
                                             "log",
                                             "log/rank-0.log",
                                             "log/rank-1.log",
                                             "log/rank-2.log",
                                             "metrics.jsonl",
                                             "plan.json"};
  EXPECT_EQ(found, expected);
  EXPECT_EQ(event_files, 1);
  // Its configuration, alone, makes the run again; also from another directory.
  fs::create_directory(Path("elsewhere"));
  const ProgramResult again =
      Run({"train", Path("run/config.toml"), "run.dir=again", "--local-ranks", "3"},
          {.directory = Path("elsewhere")});
  ASSERT_EQ(again.exit_code, 0) << again.err;
  EXPECT_EQ(Tensors("run"), Tensors("elsewhere/again"));
}

TEST_F(ProgramContract, MetricsMeanWhatTheySay) {
  Settings settings = Recipe();
  settings.Set("optim.warmup_steps", "3").Set("optim.schedule", "\"constant\"");
  ASSERT_EQ(Train(settings, {"--local-ranks", "2"}).exit_code, 0);
  std::istringstream lines(ReadText(Path("run/metrics.jsonl")));
  int64_t step = 0;
  for (std::string line; std::getline(lines, line);) {
    const ordered_json m = ordered_json::parse(line);
    ++step;
    for (const char* key : {"step", "loss", "grad_norm", "lr", "tokens", "seconds",
                            "tokens_per_second", "peak_bytes", "wire_bytes", "host_gap_seconds"})
      EXPECT_TRUE(m.contains(key)) << key;
    EXPECT_EQ(m["step"], step);
    EXPECT_EQ(m["tokens"], step * 12 * 8);
    EXPECT_NEAR(m["lr"].get<double>(), 1e-2 * std::min(1.0, static_cast<double>(step) / 3), 1e-15);
    EXPECT_NEAR(m["tokens_per_second"].get<double>() * m["seconds"].get<double>(), 96, 1e-6);
    EXPECT_GE(m["host_gap_seconds"].get<double>(), 0);
    EXPECT_LE(m["host_gap_seconds"].get<double>(), m["seconds"].get<double>());
    EXPECT_EQ(m.contains("validation_loss"), step % 2 == 0) << "step " << step;
    EXPECT_EQ(m["wire_bytes"].size(), 6u);
    for (const char* axis : {"dp", "tp", "pp", "cp", "ep", "control"})
      EXPECT_TRUE(m["wire_bytes"].contains(axis)) << axis;
    int64_t sum = 0;
    for (const char* name :
         {"parameters", "gradients", "optimizer", "activations", "communication", "workspace"})
      sum += m["peak_bytes"].at(name).get<int64_t>();
    EXPECT_LE(m["peak_bytes"].at("peak"), sum);
    // Exact: read and written again, each number is the same text.
    EXPECT_EQ(ToJsonLine(*ParseMetrics(line)), line);
  }
  EXPECT_EQ(step, 6);
  // The loss before the first update is that of a model that knows nothing: near log(vocab).
  EXPECT_NEAR(Metrics("run")[0].loss, std::log(321), 0.3);
}

TEST_F(ProgramContract, TheSameCommandGivesTheSameBits) {
  for (const char* precision : {"\"fp32\"", "\"bf16\""}) {
    for (const char* run : {"\"one\"", "\"two\""}) {
      Settings settings = Recipe();
      settings.Set("run.dir", run).Set("precision.compute", precision);
      ASSERT_EQ(Train(settings, {"--local-ranks", "2"}).exit_code, 0);
    }
    EXPECT_EQ(Tensors("one"), Tensors("two"));
    fs::remove_all(Path("one"));
    fs::remove_all(Path("two"));
  }
}

// Standard output holds one object and nothing else.
ordered_json OneObject(const ProgramResult& result) {
  ordered_json json = ordered_json::parse(result.out, nullptr, false);
  EXPECT_FALSE(json.is_discarded()) << result.out << result.err;
  return json;
}

TEST_F(ProgramContract, JsonAndNothingElse) {
  const ProgramResult trained = Train(Recipe(), {"--json", "--local-ranks", "2"});
  EXPECT_EQ(OneObject(trained)["exit_code"], 0);
  EXPECT_NE(trained.err.find("Finished at step 6"), std::string::npos);
  EXPECT_EQ(OneObject(Run({"resume", "run", "--json"}))["exit_code"], 0);
  const ordered_json plan = OneObject(Must({"plan", "a.toml", "--json"}));
  EXPECT_EQ(plan["fits"], true);
  EXPECT_EQ(plan["bubble"], 0.0);
  const ordered_json eval = OneObject(Must({"eval", "run", "--json"}));
  EXPECT_EQ(eval.size(), 2u);
  EXPECT_DOUBLE_EQ(eval["loss"], *Metrics("run").back().validation_loss);
  const ordered_json text =
      OneObject(Must({"generate", "run", "--json", "--prompt", "the \xff", "--tokens", "5"}));
  EXPECT_EQ(text.size(), 2u);
  EXPECT_LE(text["tokens"], 5);
  const ordered_json built = OneObject(Must({"data", "build", "corpus.txt", "ids.h5", "--json"}));
  EXPECT_EQ(built["tokens"], 4001);
  EXPECT_EQ(OneObject(Must({"data", "inspect", "ids.h5", "--json"}))["largest_id"], 256);
  EXPECT_EQ(OneObject(Must({"report", "run", "--json"}))["steps"], 6);
  EXPECT_TRUE(Exists("run/report.html"));
  EXPECT_TRUE(OneObject(Run({"doctor", "--json"})).contains("checks"));
  // A failure says nothing there, or its exit code.
  EXPECT_EQ(Run({"eval", "nowhere", "--json"}).out, "");
  EXPECT_EQ(OneObject(Run({"train", "a.toml", "--json"}))["exit_code"], 73);
}

TEST_F(ProgramContract, EvaluationOnAnyNumberOfRanks) {
  ASSERT_EQ(Train(Recipe()).exit_code, 0);
  const std::vector<std::string> eval = {
      "eval", "run", "--json", "--data", "corpus.txt", "--sequence-length", "7", "--batch", "3"};
  const ordered_json one = OneObject(Must(eval));
  EXPECT_EQ(one["tokens"], 4000 / 7 * 7);
  std::vector<std::string> three = eval;
  three.insert(three.end(), {"--local-ranks", "3"});
  const ordered_json many = OneObject(Must(three));
  EXPECT_EQ(many["tokens"], one["tokens"]);
  EXPECT_LT(Relative(one["loss"], many["loss"]), 1e-12);
  // fp32 of the same weights is near, and not the same.
  std::vector<std::string> narrow = eval;
  narrow.insert(narrow.end(), {"--precision", "fp32"});
  const double difference = Relative(one["loss"], OneObject(Must(narrow))["loss"]);
  EXPECT_GT(difference, 0);
  EXPECT_LT(difference, 1e-5);
  if (!WhyNoMpi().empty()) GTEST_SKIP() << WhyNoMpi();
  const ordered_json mpi = OneObject(Must(eval, {.mpi_ranks = 2}));
  EXPECT_LT(Relative(one["loss"], mpi["loss"]), 1e-12);
  // One of them speaks, whatever the command.
  OneObject(Must({"plan", "a.toml", "--json"}, {.mpi_ranks = 2}));
  OneObject(Must({"generate", "run", "--json", "--tokens", "3"}, {.mpi_ranks = 2}));
}

TEST_F(ProgramContract, OverridesAndFlagsInAnyOrder) {
  WriteText(Path("a.toml"), Settings().Text());
  const std::vector<std::vector<std::string>> orders = {
      {"train", "a.toml", "run.steps=2", "optim.lr=1e-3", "--local-ranks", "2", "run.dir=r0"},
      {"train", "--local-ranks", "2", "run.dir=r1", "optim.lr=1e-3", "a.toml", "run.steps=2"},
      {"train", "run.steps=2", "--local-ranks=2", "a.toml", "run.dir=\"r2\"", "optim.lr=1e-3"}};
  for (const auto& arguments : orders) Must(arguments);
  for (const char* run : {"r0", "r1", "r2"}) {
    const Config config = LoadConfig(Path(std::string(run) + "/config.toml"));
    EXPECT_EQ(config.run.steps, 2);
    EXPECT_EQ(config.optim.lr, 1e-3);
    EXPECT_EQ(config.run.dir, run);
    EXPECT_TRUE(Exists(std::string(run) + "/log/rank-1.log"));
    EXPECT_EQ(Tensors(run), Tensors("r0"));
  }
  // A dash, a space and a bare string.
  Must({"train", "a.toml", "run.dir=odd name-1", "run.steps=1"});
  EXPECT_TRUE(Exists("odd name-1/config.toml"));
}

TEST_F(ProgramContract, HelpAndVersion) {
  const ProgramResult help = Must({"train", "--help"});
  EXPECT_NE(help.out.find("warmup_steps"), std::string::npos);
  EXPECT_EQ(help.err, "");
  for (const char* command : {"resume", "plan", "eval", "generate", "data", "doctor", "report"})
    EXPECT_NE(Must({command, "--help"}).out.find("--help"), std::string::npos) << command;
  EXPECT_EQ(Must({"--version"}).out.rfind("shoal ", 0), 0u);
}

// A reader that goes away ends no run.
TEST_F(ProgramContract, NobodyReadsTheOutput) {
  WriteText(Path("a.toml"), Settings().Text());
  Program shell({"/bin/sh", "-c", ProgramPath() + " train a.toml run.log_every=1 | true"},
                {.directory = directory_.path()}, true);
  EXPECT_FALSE(shell.Wait().timed_out);
  EXPECT_EQ(SavedSteps("run"), std::vector<int64_t>{6});
}

}  // namespace
}  // namespace shoal
