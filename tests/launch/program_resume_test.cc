// A run that was stopped, killed or damaged goes on as if nothing had happened.
#include <csignal>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "checkpoint/store.h"
#include "launch/config.h"
#include "tests/launch/program.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

constexpr int kData = 72, kStorage = 73, kRequeue = 75;

class ProgramResume : public ProgramTest {
 protected:
  // Steps that are on the disk now.
  size_t StepsOf(const std::string& run) const {
    return ReadMetrics(Path(run + "/metrics.jsonl")).steps.size();
  }

  // Runs `arguments` until `steps` are done, then sends `signal`. The run is endless, so that no
  // machine is too fast or too slow for it.
  ProgramResult Interrupt(const std::vector<std::string>& arguments, size_t steps, int signal,
                          int mpi_ranks = 0) {
    Program program(arguments, {.mpi_ranks = mpi_ranks, .directory = directory_.path()});
    EXPECT_TRUE(program.WaitFor([&] { return StepsOf("run") >= steps; }));
    program.Signal(signal);
    ProgramResult result = program.Wait();
    EXPECT_FALSE(result.timed_out) << result.out << result.err;
    return result;
  }

  static Settings Endless() {
    return Settings().Set("run.steps", "1000000").Set("optim.schedule", "\"constant\"");
  }

  // A run of as many steps as "run" has taken, at once.
  void TrainWhole(const Settings& settings, const std::vector<std::string>& ranks = {}) {
    ASSERT_FALSE(SavedSteps("run").empty());
    Settings whole = settings;
    whole.Set("run.dir", "\"whole\"");
    whole.Set("run.steps", std::to_string(SavedSteps("run").back()));
    ASSERT_EQ(Train(whole, ranks, {}, "whole.toml").exit_code, 0);
  }

  // Bitwise, but for times and for memory that reading a save takes.
  void ExpectSame(const std::string& one, const std::string& other) {
    std::vector<StepMetrics> a = Metrics(one), b = Metrics(other);
    ASSERT_EQ(a.size(), b.size());
    // A run validates at its end, wherever that is.
    a.back().validation_loss = b.back().validation_loss;
    for (std::vector<StepMetrics>* all : {&a, &b}) {
      for (StepMetrics& m : *all) {
        m.seconds = m.tokens_per_second = m.host_gap_seconds = 0;
        std::erase_if(m.peak_bytes, [](const auto& entry) {
          return entry.first == "workspace" || entry.first == "peak";
        });
      }
    }
    for (size_t i = 0; i < a.size(); ++i) ASSERT_EQ(ToJsonLine(a[i]), ToJsonLine(b[i]));
    EXPECT_EQ(Digests(one), Digests(other));
    EXPECT_EQ(Tensors(one), Tensors(other));
  }

  std::string Digests(const std::string& run) const {
    const auto manifest =
        nlohmann::json::parse(ReadText(NewestSave(run) + "/manifest.json"), nullptr, false);
    return manifest.value("tensors", nlohmann::json()).dump();
  }

  // "whole": 40 steps with a save after each ten. "run": the same, had it been killed after 38 and
  // a save after 30.
  void MakeKilledRun(const std::vector<std::pair<const char*, const char*>>& keys = {}) {
    Settings settings;
    settings.Set("run.steps", "40").Set("run.dir", "\"whole\"");
    settings.Set("checkpoint.every", "10").Set("checkpoint.keep", "9");
    for (const auto& [key, value] : keys) settings.Set(key, value);
    ASSERT_EQ(Train(settings).exit_code, 0);
    fs::copy(Path("whole"), Path("run"), fs::copy_options::recursive);
    fs::remove_all(Path("run/checkpoints/step-00000040"));
    std::string lines;
    for (const StepMetrics& m : Metrics("whole"))
      if (m.step <= 38) lines += ToJsonLine(m) + "\n";
    WriteText(Path("run/metrics.jsonl"), lines);
    ASSERT_EQ(SavedSteps("run"), (std::vector<int64_t>{10, 20, 30}));
  }
};

struct Variant {
  const char* name;
  std::vector<std::pair<const char*, const char*>> keys;
  int local_ranks = 1;
};

class ProgramResumeVariants : public ProgramResume,
                              public ::testing::WithParamInterface<Variant> {};

INSTANTIATE_TEST_SUITE_P(All, ProgramResumeVariants,
                         ::testing::Values(Variant{"Fp64", {}},
                                           Variant{"Fp32Sgd",
                                                   {{"precision.compute", "\"fp32\""},
                                                    {"optim.name", "\"sgd\""},
                                                    {"optim.momentum", "0.9"}}},
                                           Variant{"Fp32SgdWarmUpDropout",
                                                   {{"precision.compute", "\"fp32\""},
                                                    {"optim.name", "\"sgd\""},
                                                    {"optim.momentum", "0.9"},
                                                    {"optim.warmup_steps", "500"},
                                                    {"model.dropout", "0.1"},
                                                    {"model.attention_dropout", "0.2"}}},
                                           Variant{"Bf16WarmUpDropoutZero",
                                                   {{"precision.compute", "\"bf16\""},
                                                    {"optim.warmup_steps", "500"},
                                                    {"zero.stage", "3"},
                                                    {"model.dropout", "0.1"}},
                                                   2},
                                           Variant{"Bf16AccumulationDropout",
                                                   {{"precision.compute", "\"bf16\""},
                                                    {"optim.master", "\"split\""},
                                                    {"model.family", "\"gpt2\""},
                                                    {"model.dropout", "0.1"},
                                                    {"batch.micro", "3"},
                                                    {"data.validation_fraction", "0.1"},
                                                    {"run.validate_every", "7"}},
                                                   2},
                                           Variant{"Fp32DocumentsThreads",
                                                   {{"precision.compute", "\"fp32\""},
                                                    {"data.documents", "true"},
                                                    {"model.dropout", "0.2"},
                                                    {"batch.micro", "2"}},
                                                   3}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(ProgramResumeVariants, StoppedAndResumedIsBitwiseTheWhole) {
  Settings settings = Endless();
  for (const auto& [key, value] : GetParam().keys) settings.Set(key, value);
  WriteText(Path("a.toml"), settings.Text());
  const std::vector<std::string> ranks = {"--local-ranks", std::to_string(GetParam().local_ranks)};
  const ProgramResult stopped = Interrupt({"train", "a.toml", ranks[0], ranks[1]}, 30, SIGUSR1);
  ASSERT_EQ(stopped.exit_code, kRequeue) << stopped.err;
  EXPECT_NE(stopped.out.find("shoal resume run"), std::string::npos) << stopped.out;
  ASSERT_EQ(SavedSteps("run").size(), 1u);
  const int64_t first = SavedSteps("run")[0];
  EXPECT_EQ(StepsOf("run"), static_cast<size_t>(first));
  // Past the end of an epoch, wherever it was stopped: one has 41 steps.
  const ProgramResult resumed =
      Interrupt({"resume", "run", ranks[0], ranks[1]}, static_cast<size_t>(first) + 45, SIGUSR1);
  ASSERT_EQ(resumed.exit_code, kRequeue) << resumed.err;
  EXPECT_EQ(resumed.err, "");
  TrainWhole(settings, ranks);
  ExpectSame("whole", "run");
}

TEST_F(ProgramResume, KilledAndResumedIsBitwiseTheWhole) {
  Settings settings = Endless();
  settings.Set("checkpoint.every", "20");
  WriteText(Path("a.toml"), settings.Text());
  EXPECT_EQ(Interrupt({"train", "a.toml"}, 70, SIGKILL).exit_code, -SIGKILL);
  const size_t killed = StepsOf("run");
  ASSERT_GE(killed, 70u);
  EXPECT_EQ(Interrupt({"resume", "run"}, killed + 30, SIGUSR1).exit_code, kRequeue);
  TrainWhole(settings);
  ExpectSame("whole", "run");
}

// With a learning rate that depends on where the run is, and lines that the kill left behind.
TEST_F(ProgramResume, TornAndLaterLinesAreCut) {
  MakeKilledRun({{"optim.schedule", "\"cosine\""}, {"optim.warmup_steps", "35"}});
  std::ofstream(Path("run/metrics.jsonl"), std::ios::app) << "{\"step\": 39, \"lo";
  EXPECT_EQ(Must({"resume", "run"}).err, "");
  const std::vector<StepMetrics> steps = Metrics("run");  // no torn line is left
  ASSERT_EQ(steps.size(), 40u);
  for (size_t i = 0; i < steps.size(); ++i) EXPECT_EQ(steps[i].step, static_cast<int64_t>(i) + 1);
  ExpectSame("whole", "run");
}

// Ranks may be other ones: in fp64 the numbers are the same to rounding.
TEST_F(ProgramResume, OnAnotherNumberOfRanks) {
  MakeKilledRun({{"optim.lr", "1e-3"}});
  const int mpi_ranks = WhyNoMpi().empty() ? 2 : 0;
  Must({"resume", "run", "--local-ranks", mpi_ranks > 0 ? "1" : "2"}, {.mpi_ranks = mpi_ranks});
  const std::vector<StepMetrics> a = Metrics("whole"), b = Metrics("run");
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_NEAR(a[i].loss, b[i].loss, 1e-10 * a[i].loss);
    EXPECT_NEAR(a[i].grad_norm, b[i].grad_norm, 1e-10 * a[i].grad_norm);
  }
  EXPECT_TRUE(Exists("run/log/rank-1.log"));
}

TEST_F(ProgramResume, SignalsUnderMpirun) {
  if (!WhyNoMpi().empty()) GTEST_SKIP() << WhyNoMpi();
  WriteText(Path("a.toml"), Endless().Text());
  // mpirun passes it on.
  const ProgramResult stopped = Interrupt({"train", "a.toml"}, 20, SIGUSR1, 2);
  EXPECT_EQ(stopped.exit_code, kRequeue) << stopped.out << stopped.err;
  ASSERT_EQ(SavedSteps("run").size(), 1u);
  EXPECT_NO_THROW(VerifySave(NewestSave("run")));
  EXPECT_EQ(StepsOf("run"), static_cast<size_t>(SavedSteps("run")[0]));
}

TEST_F(ProgramResume, TermSavesToo) {
  WriteText(Path("a.toml"), Endless().Text());
  EXPECT_EQ(Interrupt({"train", "a.toml", "--local-ranks", "2"}, 20, SIGTERM).exit_code, kRequeue);
  EXPECT_EQ(SavedSteps("run").size(), 1u);
}

TEST_F(ProgramResume, SaveAndGoOn) {
  WriteText(Path("a.toml"), Endless().Text());
  Program program({"train", "a.toml"}, {.directory = directory_.path()});
  ASSERT_TRUE(program.WaitFor([&] { return StepsOf("run") >= 20; }));
  program.Signal(SIGUSR2);
  const auto saves = [&] { return ListSaves(Path("run/checkpoints")).size(); };
  ASSERT_TRUE(program.WaitFor([&] { return saves() == 1; }));
  const int64_t saved = SavedSteps("run")[0];
  ASSERT_TRUE(program.WaitFor([&] { return StepsOf("run") > static_cast<size_t>(saved) + 5; }));
  EXPECT_EQ(saves(), 1u);  // one for one signal
  program.Signal(SIGUSR1);
  EXPECT_EQ(program.Wait().exit_code, kRequeue);
  EXPECT_EQ(saves(), 2u);
  TrainWhole(Endless());
  ExpectSame("whole", "run");
}

TEST_F(ProgramResume, AFinishedRunIsLeftAsItIs) {
  ASSERT_EQ(Train(Settings()).exit_code, 0);
  const std::string metrics = ReadText(Path("run/metrics.jsonl")), digests = Digests("run");
  fs::remove(Path("corpus.txt"));  // which it does not need any more
  const ProgramResult result = Must({"resume", "run"});
  EXPECT_NE(result.out.find("run is finished"), std::string::npos) << result.out;
  EXPECT_EQ(ReadText(Path("run/metrics.jsonl")), metrics);
  EXPECT_EQ(Digests("run"), digests);
}

TEST_F(ProgramResume, WithoutASave) {
  WriteText(Path("a.toml"), Endless().Text());
  Interrupt({"train", "a.toml"}, 5, SIGKILL);
  for (const char* ranks : {"1", "3"}) {
    ExpectOneBlock(Run({"resume", "run", "--local-ranks", ranks}), kStorage,
                   {"run holds no valid save: the run ended before its first"});
  }
  ExpectOneBlock(Run({"resume", "corpus.txt"}), kStorage, {"corpus.txt is not a directory"});
  ExpectOneBlock(Run({"resume", "."}), kStorage, {"not a run directory"});
  ExpectOneBlock(Run({"generate", "run"}), kStorage, {"run holds no valid save"});
}

// Each damage to the newest save: it is named and passed over, and the run ends as it would have.
TEST_F(ProgramResume, DamagedSavesArePassedOver) {
  MakeKilledRun();
  const std::string newest = fs::path(NewestSave("run")).filename();
  const auto flip = [](const std::string& path, size_t at) {
    std::string bytes = ReadText(path);
    ASSERT_LT(at, bytes.size());
    bytes[at] ^= 1;
    WriteText(path, bytes);
  };
  // In the middle of a tensor, wherever the library has put it.
  const auto flip_tensor = [&](const std::string& save) {
    const std::vector<double> values = Tensors("run").at("model/embed.weight");
    const size_t at = ReadText(save + "/rank-0000.h5")
                          .find(std::string_view(reinterpret_cast<const char*>(&values[100]), 40));
    ASSERT_NE(at, std::string::npos);
    flip(save + "/rank-0000.h5", at + 3);
  };
  const std::vector<std::pair<std::string, std::function<void(const std::string&)>>> damages = {
      {"flipped tensor", flip_tensor},
      {"cut file",
       [&](const std::string& save) {
         fs::resize_file(save + "/rank-0000.h5", fs::file_size(save + "/rank-0000.h5") / 2);
       }},
      {"no file", [&](const std::string& save) { fs::remove(save + "/rank-0000.h5"); }},
      {"no manifest", [&](const std::string& save) { fs::remove(save + "/manifest.json"); }},
      {"cut manifest",
       [&](const std::string& save) { fs::resize_file(save + "/manifest.json", 99); }},
      {"flipped manifest", [&](const std::string& save) { flip(save + "/manifest.json", 200); }},
  };
  fs::rename(Path("run"), Path("stopped"));
  for (const auto& [name, damage] : damages) {
    SCOPED_TRACE(name);
    fs::remove_all(Path("run"));
    fs::copy(Path("stopped"), Path("run"), fs::copy_options::recursive);
    damage(Path("run/checkpoints/" + newest));
    const ProgramResult result = Must({"resume", "run", "--local-ranks", "1"});
    EXPECT_NE(result.err.find(newest), std::string::npos) << result.err;
    EXPECT_NE(result.err.find("trying an older save"), std::string::npos) << result.err;
    EXPECT_EQ(Digests("run"), Digests("whole"));
    EXPECT_EQ(StepsOf("run"), 40u);
  }
  // All of them.
  fs::remove_all(Path("run"));
  fs::copy(Path("stopped"), Path("run"), fs::copy_options::recursive);
  for (const SaveEntry& save : ListSaves(Path("run/checkpoints")))
    fs::resize_file(save.path + "/rank-0000.h5", 5000);
  const ProgramResult result = Run({"resume", "run"});
  EXPECT_EQ(result.exit_code, kStorage);
  EXPECT_NE(result.err.find("all are damaged"), std::string::npos) << result.err;
}

TEST_F(ProgramResume, AChangedCorpusIsRefused) {
  MakeKilledRun();
  const std::string metrics = ReadText(Path("run/metrics.jsonl")),
                    text = ReadText(Path("corpus.txt"));
  std::string changed = text;
  changed[1234] ^= 1;
  WriteText(Path("corpus.txt"), changed);
  for (const char* ranks : {"1", "2"}) {
    ExpectOneBlock(Run({"resume", "run", "--local-ranks", ranks}), kData,
                   {"corpus.txt is not the corpus", "model.from"});
  }
  fs::remove(Path("corpus.txt"));
  ExpectOneBlock(Run({"resume", "run"}), kData, {"corpus.txt", "does not exist"});
  EXPECT_EQ(ReadText(Path("run/metrics.jsonl")), metrics);
  WriteText(Path("corpus.txt"), text);
  Must({"resume", "run"});
}

TEST_F(ProgramResume, ARunningRunIsLocked) {
  Settings settings = Endless();
  settings.Set("checkpoint.every", "10");
  WriteText(Path("a.toml"), settings.Text());
  Program program({"train", "a.toml"}, {.directory = directory_.path()});
  ASSERT_TRUE(program.WaitFor([&] { return !ListSaves(Path("run/checkpoints")).empty(); }));
  const std::string owner = "process " + std::to_string(program.pid());
  ExpectOneBlock(Run({"resume", "run"}), kStorage, {"run is in use by", owner});
  ExpectOneBlock(Run({"train", "a.toml"}), kStorage, {"run already holds a run"});
  EXPECT_TRUE(program.Running());
  // Reading it is no harm.
  EXPECT_EQ(Run({"generate", "run", "--tokens", "3"}).exit_code, 0);
  // The lock dies with its process.
  program.Signal(SIGKILL);
  program.Wait();
  Program resumed({"resume", "run"}, {.directory = directory_.path()});
  const size_t steps = StepsOf("run");
  EXPECT_TRUE(resumed.WaitFor([&] { return StepsOf("run") > steps + 10; }));
  resumed.Signal(SIGUSR1);
  EXPECT_EQ(resumed.Wait().exit_code, kRequeue);
}

// A new run may begin with what another has learnt.
TEST_F(ProgramResume, WeightsOfAnotherRun) {
  ASSERT_EQ(Train(Settings().Set("run.steps", "60")).exit_code, 0);
  Settings next;
  next.Set("run.dir", "\"next\"").Set("model.from", "\"run\"");
  for (const char* key : {"family", "layers", "d_model", "heads", "mlp"})
    next.Remove(std::string("model.") + key);
  const ProgramResult result = Train(next);
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_LT(Metrics("next")[0].loss, Metrics("run")[0].loss - 1);
  ExpectOneBlock(Train(next.Set("model.layers", "3").Set("run.dir", "\"third\"")), 2,
                 {"model.layers is 3 in the configuration, but 1"});
}

// Every rank reads what it needs once; what one finds damaged sends all to an older save.
TEST_F(ProgramResume, WeightsOfAnotherRunWhoseNewestSaveIsDamaged) {
  ASSERT_EQ(Train(Settings().Set("checkpoint.every", "3")).exit_code, 0);
  const std::string file = NewestSave("run") + "/rank-0000.h5";
  std::ifstream in(file, std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(in)), {});
  for (size_t i = 0; i < bytes.size(); i += 1000) bytes[i] ^= 1;
  WriteText(file, bytes);
  Settings next;
  next.Set("run.dir", "\"next\"").Set("model.from", "\"run\"").Set("run.steps", "1");
  const ProgramResult result = Train(next, {"--local-ranks", "2"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_NE(result.err.find("trying an older save"), std::string::npos) << result.err;
  EXPECT_EQ(LoadConfig(Path("next/config.toml")).model.from,
            std::filesystem::canonical(Path("run/checkpoints/step-00000003")));
  next.Set("model.from", "\"run/checkpoints/step-00000006\"").Set("run.dir", "\"third\"");
  ExpectOneBlock(Train(next), 73, {"rank-0000.h5", "damaged"});
  ExpectNoRun("third");
}

}  // namespace
}  // namespace shoal
