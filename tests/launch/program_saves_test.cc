// When a run saves, what stays, and what a full disk or a damaged file does to it.
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#include <fstream>
#include <thread>

#include "checkpoint/manifest.h"
#include "tests/launch/program.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

constexpr int kStorage = 73, kRequeue = 75;

class ProgramSaves : public ProgramTest {
 protected:
  std::string Text(const std::string& name) const {
    std::ifstream in(Path(name), std::ios::binary);
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  }
  std::string Log() const { return Text("run/log/rank-0.log"); }
  size_t Steps() const { return ReadMetrics(Path("run/metrics.jsonl")).steps.size(); }
  static Settings Endless() {
    return Settings().Set("run.steps", "1000000").Set("optim.schedule", "\"constant\"");
  }
  std::string Digests(const std::string& run, int64_t step) const {
    return PartToText(ReadManifest(SavePath(Path(run + "/checkpoints"), step)).all);
  }
};

TEST_F(ProgramSaves, BehindTrainingOrNotTheyAreTheSame) {
  Settings settings;
  settings.Set("run.steps", "12").Set("checkpoint.every", "2").Set("checkpoint.keep", "9");
  settings.Set("zero.stage", "3").Set("precision.compute", "\"bf16\"");
  ASSERT_EQ(Train(settings, {"--local-ranks", "2"}).exit_code, 0);
  settings.Set("run.dir", "\"other\"").Set("checkpoint.async", "false");
  ASSERT_EQ(Train(settings, {"--local-ranks", "2"}).exit_code, 0);
  EXPECT_EQ(SavedSteps("run"), (std::vector<int64_t>{2, 4, 6, 8, 10, 12}));
  for (const int64_t step : SavedSteps("run"))
    EXPECT_EQ(Digests("run", step), Digests("other", step)) << step;
  for (int step = 2; step <= 12; step += 2) {
    const size_t requested = Log().find(fmt::format("save of step {} requested", step));
    const size_t durable = Log().find(fmt::format("save of step {} durable after ", step));
    ASSERT_NE(requested, std::string::npos);
    ASSERT_NE(durable, std::string::npos);
    EXPECT_LT(requested, durable);
  }
  const SaveInfo info = ReadSaveInfo(NewestSave("run"));
  EXPECT_EQ(info.mesh, (std::map<std::string, int64_t>{
                           {"dp", 2}, {"tp", 1}, {"pp", 1}, {"cp", 1}, {"ep", 1}}));
  EXPECT_EQ(info.epoch, 12 * 12 / ((4000) / 8));
}

TEST_F(ProgramSaves, Retention) {
  Settings settings;
  settings.Set("run.steps", "20").Set("checkpoint.every", "1").Set("checkpoint.keep", "1");
  settings.Set("checkpoint.keep_every", "8");
  ASSERT_EQ(Train(settings).exit_code, 0);
  EXPECT_EQ(SavedSteps("run"), (std::vector<int64_t>{8, 16, 19, 20}));
  // A learning rate that grows too high: the best save is not the last.
  settings.Set("run.dir", "\"best\"").Set("checkpoint.keep_best", "true");
  settings.Set("checkpoint.keep_every", "0").Set("data.validation_fraction", "0.1");
  settings.Set("run.validate_every", "1").Set("optim.lr", "200").Set("optim.warmup_steps", "1000");
  ASSERT_EQ(Train(settings).exit_code, 0);
  int64_t best = 0;
  double least = INFINITY;
  for (const StepMetrics& m : Metrics("best")) {
    if (*m.validation_loss >= least) continue;
    least = *m.validation_loss;
    best = m.step;
  }
  ASSERT_LT(best, 19);
  EXPECT_EQ(SavedSteps("best"), (std::vector<int64_t>{best, 19, 20}));
  EXPECT_EQ(ReadSaveInfo(SavePath(Path("best/checkpoints"), best)).validation_loss, least);
}

TEST_F(ProgramSaves, RequestFiles) {
  WriteText(Path("a.toml"), Endless().Text());
  Program program({"train", "a.toml", "--local-ranks", "2"}, {.directory = directory_.path()});
  ASSERT_TRUE(program.WaitFor([&] { return Steps() >= 10; }));
  WriteText(Path("run/save"), "");
  ASSERT_TRUE(program.WaitFor([&] { return ListSaves(Path("run/checkpoints")).size() == 1; }));
  const size_t saved = static_cast<size_t>(SavedSteps("run")[0]);
  ASSERT_TRUE(program.WaitFor([&] { return Steps() >= saved + 10; }));
  EXPECT_FALSE(Exists("run/save"));
  EXPECT_EQ(SavedSteps("run").size(), 1u);
  WriteText(Path("run/stop"), "");
  const ProgramResult result = program.Wait();
  EXPECT_EQ(result.exit_code, kRequeue) << result.err;
  EXPECT_FALSE(Exists("run/stop"));
  EXPECT_EQ(SavedSteps("run").size(), 2u);
  EXPECT_EQ(Steps(), static_cast<size_t>(SavedSteps("run").back()));
}

// The limit on files falls while the run goes on, and rises again: it waits, says so, and its saves
// are those of a run that met no limit.
TEST_F(ProgramSaves, AFullDiskIsWaitedFor) {
  Settings settings = Endless();
  settings.Set("checkpoint.every", "5").Set("checkpoint.keep", "999");
  WriteText(Path("a.toml"), settings.Text());
  Program program({"train", "a.toml"}, {.directory = directory_.path()});
  ASSERT_TRUE(program.WaitFor([&] { return !ListSaves(Path("run/checkpoints")).empty(); }));
  const rlimit low = {50000, RLIM_INFINITY}, none = {RLIM_INFINITY, RLIM_INFINITY};
  ASSERT_EQ(prlimit(program.pid(), RLIMIT_FSIZE, &low, nullptr), 0);
  // Of all of a file, or of what is left of one that was begun before.
  ASSERT_TRUE(
      program.WaitFor([&] { return Log().find("no space left: 0.") != std::string::npos; }));
  const size_t before = ListSaves(Path("run/checkpoints")).size();
  ASSERT_EQ(prlimit(program.pid(), RLIMIT_FSIZE, &none, nullptr), 0);
  ASSERT_TRUE(
      program.WaitFor([&] { return ListSaves(Path("run/checkpoints")).size() > before + 1; }));
  program.Signal(SIGUSR1);
  const ProgramResult result = program.Wait();
  EXPECT_EQ(result.exit_code, kRequeue) << result.err;
  EXPECT_NE(result.err.find("waiting for room"), std::string::npos) << result.err;
  EXPECT_NE(result.err.find("there is room again"), std::string::npos) << result.err;
  const int64_t last = SavedSteps("run").back();
  settings.Set("run.dir", "\"whole\"").Set("run.steps", std::to_string(last));
  ASSERT_EQ(Train(settings).exit_code, 0);
  for (const int64_t step : SavedSteps("run"))
    ASSERT_EQ(Digests("run", step), Digests("whole", step)) << step;
}

// A file system without a byte left: metrics wait too, not saves alone.
TEST_F(ProgramSaves, ADiskWithoutAByteIsWaitedFor) {
  fs::create_directory(Path("small"));
  if (mount("shoal-test", Path("small").c_str(), "tmpfs", 0, "size=4m") != 0)
    GTEST_SKIP() << "this user may not mount a tmpfs";
  Settings settings = Endless();
  settings.Set("checkpoint.every", "5").Set("run.dir", "\"small/run\"");
  WriteText(Path("a.toml"), settings.Text());
  {
    Program program({"train", "a.toml"}, {.directory = directory_.path()});
    EXPECT_TRUE(program.WaitFor([&] { return !ListSaves(Path("small/run/checkpoints")).empty(); }));
    {
      std::ofstream ballast(Path("small/ballast"), std::ios::binary);
      const std::string block(4096, 'x');
      for (int i = 0; i < 1024 && ballast.write(block.data(), 4096).flush(); ++i) {
      }
    }
    const auto steps = [&] { return ReadMetrics(Path("small/run/metrics.jsonl")).steps.size(); };
    // It stands still.
    size_t before = 0;
    for (int same = 0; same < 20 && program.Running();) {
      const size_t now = steps();
      same = now == before ? same + 1 : 0;
      before = now;
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    EXPECT_TRUE(program.Running());
    fs::remove(Path("small/ballast"));
    EXPECT_TRUE(program.WaitFor([&] { return steps() > before + 20; }));
    program.Signal(SIGUSR1);
    const ProgramResult result = program.Wait();
    EXPECT_EQ(result.exit_code, kRequeue) << result.err;
    EXPECT_NE(result.err.find("waiting for room"), std::string::npos) << result.err;
    const MetricsFile metrics = ReadMetrics(Path("small/run/metrics.jsonl"));
    EXPECT_EQ(metrics.skipped_lines, 0);
    for (size_t i = 0; i < metrics.steps.size(); ++i)
      ASSERT_EQ(metrics.steps[i].step, static_cast<int64_t>(i) + 1);
    for (const SaveEntry& save : ListSaves(Path("small/run/checkpoints")))
      EXPECT_NO_THROW(VerifySave(save.path));
  }
  umount2(Path("small").c_str(), MNT_DETACH);
}

// Nobody makes room: the run ends, and what was saved before is as it was.
TEST_F(ProgramSaves, AFullDiskIsNotWaitedForForEver) {
  Settings settings = Endless();
  settings.Set("checkpoint.every", "5").Set("checkpoint.full_disk_wait", "0.5");
  WriteText(Path("a.toml"), settings.Text());
  Program program({"train", "a.toml", "--local-ranks", "2"}, {.directory = directory_.path()});
  ASSERT_TRUE(program.WaitFor([&] { return ListSaves(Path("run/checkpoints")).size() > 1; }));
  const rlimit low = {50000, RLIM_INFINITY};
  ASSERT_EQ(prlimit(program.pid(), RLIMIT_FSIZE, &low, nullptr), 0);
  const ProgramResult result = program.Wait();
  EXPECT_EQ(result.exit_code, kStorage);
  EXPECT_NE(result.err.find("no space left"), std::string::npos) << result.err;
  EXPECT_NE(result.err.find("Last good save: run/checkpoints/step-"), std::string::npos);
  for (const auto& entry : fs::directory_iterator(Path("run/checkpoints"))) {
    EXPECT_EQ(entry.path().extension(), "") << entry.path();
    EXPECT_NO_THROW(VerifySave(entry.path()));
  }
}

// Every rank checks what it reads: damage that only one meets sends all of them to the older save.
TEST_F(ProgramSaves, AllRanksFallBackTogether) {
  Settings settings;
  settings.Set("run.steps", "12").Set("checkpoint.every", "4").Set("checkpoint.keep", "9");
  settings.Set("zero.stage", "3");
  const std::vector<std::string> ranks = {"--local-ranks", "3"};
  ASSERT_EQ(Train(settings, ranks).exit_code, 0);
  const std::string whole = Digests("run", 12);
  fs::remove_all(SavePath(Path("run/checkpoints"), 12));
  const std::string newest = SavePath(Path("run/checkpoints"), 8);
  const Manifest manifest = ReadManifest(newest);
  const auto damage = [&](const std::string& save) {
    // A bit of what rank 1 has of the embedding.
    for (const StoredPiece& p : manifest.all.tensors.at("optim/m/embed.weight").pieces) {
      if (p.file != "rank-0001.h5") continue;
      std::string bytes = Text(fs::relative(save + "/" + p.file, directory_.path()));
      bytes[static_cast<size_t>(p.at) + 9] ^= 4;
      WriteText(save + "/" + p.file, bytes);
    }
  };
  damage(newest);
  const ProgramResult generated = Must({"generate", "run", "--tokens", "3"});
  EXPECT_EQ(generated.err, "");  // it needs no optimizer state
  const ProgramResult resumed = Run({"resume", "run", "--local-ranks", "3"});
  EXPECT_EQ(resumed.exit_code, 0) << resumed.err;
  for (const char* words : {"step-00000008/rank-0001.h5: tensor optim/m/embed.weight",
                            "(found by rank 1); trying an older save"})
    EXPECT_NE(resumed.err.find(words), std::string::npos) << resumed.err;
  EXPECT_EQ(Digests("run", 12), whole);
  // The damaged save was written anew on the way.
  EXPECT_NO_THROW(VerifySave(newest));
  // Of a finished run whose last save is damaged, the end is trained again.
  damage(SavePath(Path("run/checkpoints"), 12));
  ASSERT_EQ(Run({"resume", "run", "--local-ranks", "3"}).exit_code, 0);
  EXPECT_NO_THROW(VerifySave(NewestSave("run")));
  EXPECT_EQ(Digests("run", 12), whole);
  // None is left: the reason for each.
  for (const SaveEntry& save : ListSaves(Path("run/checkpoints"))) damage(save.path);
  ExpectOneBlock(Run({"eval", "run", "--data", "none.txt"}), 72, {"none.txt"});
  ProgramResult none = Run({"resume", "run", "--local-ranks", "3"});
  EXPECT_EQ(none.exit_code, kStorage);
  const size_t block = none.err.find("run holds no valid save: all are damaged\n");
  ASSERT_NE(block, std::string::npos) << none.err;
  for (const char* step : {"step-00000004", "step-00000008", "step-00000012"})
    EXPECT_NE(none.err.find(step, block), std::string::npos) << none.err;
}

// A process that was killed while a save replaced one of the same step.
TEST_F(ProgramSaves, LeftoversOfADeadRunAreTidied) {
  Settings settings;
  settings.Set("run.steps", "12").Set("checkpoint.every", "4").Set("checkpoint.keep", "9");
  ASSERT_EQ(Train(settings).exit_code, 0);
  const std::string whole = Digests("run", 12);
  const std::string folder = Path("run/checkpoints");
  fs::remove_all(SavePath(folder, 12));
  fs::rename(SavePath(folder, 8), SavePath(folder, 8) + ".old");
  fs::copy(SavePath(folder, 4), PartialSave(folder, 8));
  fs::copy(SavePath(folder, 4), PartialSave(folder, 12));
  Must({"generate", "run", "--tokens", "3"});
  const ProgramResult resumed = Must({"resume", "run"});
  EXPECT_EQ(resumed.err, "");
  EXPECT_EQ(Digests("run", 12), whole);
  EXPECT_EQ(SavedSteps("run"), (std::vector<int64_t>{4, 8, 12}));
  for (const auto& entry : fs::directory_iterator(folder))
    EXPECT_EQ(entry.path().extension(), "") << entry.path();
}

}  // namespace
}  // namespace shoal
