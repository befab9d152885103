// Whatever is wrong with what the user gives: one block that says what, where and what to do, the
// exit code, no hang, and nothing left behind that looks like a run.
#include <sys/mount.h>
#include <unistd.h>

#include <csignal>

#include "checkpoint/store.h"
#include "tests/launch/program.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

constexpr int kConfig = 2, kData = 72, kStorage = 73;

// How the program is started: alone, as threads, under mpirun.
struct Start {
  const char* name;
  int local_ranks, mpi_ranks;
};

class ProgramBadInput : public ProgramTest, public ::testing::WithParamInterface<Start> {
 protected:
  void SetUp() override {
    if (GetParam().mpi_ranks > 0 && !WhyNoMpi().empty()) GTEST_SKIP() << WhyNoMpi();
  }
  void ExpectRefused(const Settings& settings, int code, const std::vector<std::string>& words,
                     std::vector<std::string> more = {}) {
    if (GetParam().local_ranks > 1)
      more.insert(more.end(), {"--local-ranks", std::to_string(GetParam().local_ranks)});
    ExpectOneBlock(Train(settings, more, {.mpi_ranks = GetParam().mpi_ranks}), code, words);
    ExpectNoRun();
  }
};

INSTANTIATE_TEST_SUITE_P(Starts, ProgramBadInput,
                         ::testing::Values(Start{"Alone", 1, 0}, Start{"Threads", 3, 0},
                                           Start{"Mpi", 1, 2}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(ProgramBadInput, UnknownKey) {
  ExpectRefused(Settings().Set("optim.lrr", "1"), kConfig,
                {"a.toml:", "unknown key optim.lrr", "Did you mean optim.lr"});
}

TEST_P(ProgramBadInput, MissingDataFile) {
  ExpectRefused(Settings("nowhere.txt"), kData, {"nowhere.txt", "does not exist"});
}

TEST_P(ProgramBadInput, BatchNotDivisible) {
  const int ranks = std::max(GetParam().local_ranks, GetParam().mpi_ranks);
  if (ranks == 1) {
    ExpectRefused(Settings().Set("batch.micro", "5"), kConfig,
                  {"batch.micro 5 does not divide the 12 sequences", "set batch.micro to 4 or 6"});
  } else {
    ExpectRefused(Settings().Set("batch.sequences", "7"), kConfig,
                  {"batch.sequences 7 is not divisible by", "set it to 6 or"});
  }
}

TEST_P(ProgramBadInput, ExistingRunDirectory) {
  WriteText(Path("a.toml"), Settings().Text());
  Must({"train", "a.toml", "run.steps=1"});
  const std::string before = ReadText(Path("run/config.toml"));
  std::vector<std::string> arguments = {"train", "a.toml"};
  if (GetParam().local_ranks > 1) arguments.insert(arguments.end(), {"--local-ranks", "3"});
  ExpectOneBlock(Run(arguments, {.mpi_ranks = GetParam().mpi_ranks}), kStorage,
                 {"run already holds a run", "shoal resume run", "another run.dir"});
  EXPECT_EQ(ReadText(Path("run/config.toml")), before);
}

TEST_P(ProgramBadInput, WrongCommandLine) {
  ExpectRefused(Settings(), kConfig, {"--local-rank", "Did you mean --local-ranks"},
                {"--local-rank=2"});
}

TEST_P(ProgramBadInput, EvalAndGenerateOfNothing) {
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"eval", "nowhere", "--data", "corpus.txt"},
        {"generate", "nowhere", "--prompt", "x"},
        {"resume", "nowhere"}}) {
    std::vector<std::string> all = arguments;
    if (GetParam().local_ranks > 1 && all[0] != "generate")
      all.insert(all.end(), {"--local-ranks", "3"});
    ExpectOneBlock(Run(all, {.mpi_ranks = GetParam().mpi_ranks}), kStorage,
                   {"nowhere does not exist"});
  }
}

// The rest is found by the same code on any number of ranks.
class ProgramRefuses : public ProgramTest {
 protected:
  void ExpectRefused(const Settings& settings, int code, const std::vector<std::string>& words,
                     const std::vector<std::string>& more = {},
                     const ProgramOptions& options = {}) {
    ExpectOneBlock(Train(settings, more, options), code, words);
    ExpectNoRun();
  }
};

TEST_F(ProgramRefuses, WrongType) {
  ExpectRefused(Settings().Set("run.steps", "\"six\""), kConfig,
                {"a.toml:", "run.steps is a string, but takes an integer"});
  ExpectRefused(Settings().Set("optim.lr", "nan"), kConfig, {"optim.lr = nan is out of range"});
}

TEST_F(ProgramRefuses, EveryMistakeAtOnce) {
  ExpectRefused(Settings().Set("run.steps", "0").Set("mdoel.layers", "2"), kConfig,
                {"run.steps = 0 is out of range", "unknown section [mdoel]"});
}

TEST_F(ProgramRefuses, MissingOrUnreadableConfiguration) {
  ExpectOneBlock(Run({"train", "none.toml"}), kConfig, {"cannot read none.toml", "No such file"});
  ExpectOneBlock(Run({"train", "."}), kConfig, {". is a directory"});
  WriteText(Path("empty.toml"), "");
  ExpectOneBlock(Run({"train", "empty.toml"}), kConfig, {"empty.toml: run.dir is required"});
  WriteText(Path("garbage.toml"), std::string("\x7f"
                                              "ELF\0\1\2\xff\xfe garbage",
                                              17));
  ExpectOneBlock(Run({"train", "garbage.toml"}), kConfig, {"garbage.toml:1:"});
  WriteText(Path("open.toml"), "[run\ndir = 3");
  ExpectOneBlock(Run({"train", "open.toml"}), kConfig, {"open.toml:1:"});
}

TEST_F(ProgramRefuses, EmptyAndTooShortData) {
  WriteText(Path("empty.txt"), "");
  ExpectRefused(Settings("empty.txt"), kData, {"empty.txt is empty"});
  fs::create_directory(Path("folder"));
  ExpectRefused(Settings("folder"), kData, {"folder", "holds no text"});
  WriteText(Path("short.txt"), "seven b");  // and the document's end: eight tokens, one too few
  ExpectRefused(Settings("short.txt"), kData, {"short.txt", "sequence"});
  WriteText(Path("short.txt"), "eight by");
  Settings one_sequence("short.txt");
  one_sequence.Set("batch.sequences", "1");
  EXPECT_EQ(Train(one_sequence).exit_code, 0);
}

TEST_F(ProgramRefuses, BinaryGarbageAsText) {
  std::string garbage = SomeText(500);
  garbage[100] = '\0';
  WriteText(Path("nul.txt"), garbage);
  ExpectRefused(Settings("nul.txt"), kData,
                {"nul.txt is not text: byte 100 is NUL", "data.binary"});
  for (size_t i = 0; i < garbage.size(); ++i) garbage[i] = static_cast<char>(0x80 + i % 0x40);
  WriteText(Path("latin.txt"), garbage);
  ExpectRefused(Settings("latin.txt"), kData, {"latin.txt is not text", "not UTF-8"});
}

TEST_F(ProgramRefuses, TokenOutsideTheVocabulary) {
  for (const char* output : {"ids.h5", "ids"}) {
    Must({"data", "build", "corpus.txt", output});
    ExpectRefused(Settings(output).Set("model.vocab", "101"), kData, {"ids", "101", "model.vocab"});
    ExpectRefused(Settings(output), kConfig, {"model.vocab is not known", "set it"});
  }
  ExpectRefused(Settings().Set("model.vocab", "101"), kData,
                {"corpus.txt: token 0 has the id", "outside the vocabulary of 101", "model.vocab"});
  // The end of a document has an id too.
  ExpectRefused(Settings().Set("model.vocab", "256"), kData, {"token 4000 has the id 256"});
}

TEST_F(ProgramRefuses, DamagedTokenFiles) {
  Must({"data", "build", "corpus.txt", "ids.h5"});
  Must({"data", "build", "corpus.txt", "pair"});
  const std::string h5 = ReadText(Path("ids.h5")), idx = ReadText(Path("pair.idx"));
  for (const size_t size : {h5.size() - 1, h5.size() / 2, size_t{600}, size_t{8}}) {
    WriteText(Path("ids.h5"), h5.substr(0, size));
    ExpectRefused(Settings("ids.h5").Set("model.vocab", "257"), kData, {"ids.h5"});
  }
  for (const size_t size : {idx.size() - 1, size_t{10}, size_t{0}}) {
    WriteText(Path("pair.idx"), idx.substr(0, size));
    ExpectRefused(Settings("pair").Set("model.vocab", "257"), kData, {"pair.idx"});
  }
  WriteText(Path("pair.idx"), idx);
  fs::resize_file(Path("pair.bin"), 100);
  ExpectRefused(Settings("pair").Set("model.vocab", "257"), kData, {"pair.bin", "100"});
  fs::remove(Path("pair.bin"));
  ExpectRefused(Settings("pair").Set("model.vocab", "257"), kData, {"pair"});
}

TEST_F(ProgramRefuses, TokenizerModels) {
  ExpectRefused(Settings().Set("data.tokenizer", "\"none.model\""), kData, {"none.model"});
  WriteText(Path("garbage.model"), SomeText(300));
  ExpectRefused(Settings().Set("data.tokenizer", "\"garbage.model\""), kData, {"garbage.model"});
}

TEST_F(ProgramRefuses, MoreRanksThanSequences) {
  ExpectRefused(Settings().Set("batch.sequences", "2"), kConfig,
                {"more ranks than sequences", "batch.sequences 2", "at most 2 ranks"},
                {"--local-ranks", "3"});
}

TEST_F(ProgramRefuses, Meshes) {
  ExpectRefused(Settings().Set("mesh.dp", "2"), kConfig, {"dp 2", "2 ranks, but there are 3"},
                {"--local-ranks", "3"});
  ExpectRefused(Settings(), kConfig, {"--local-ranks 0 is not positive"}, {"--local-ranks", "0"});
}

TEST_F(ProgramRefuses, CommandLines) {
  WriteText(Path("a.toml"), Settings().Text());
  for (const auto& [arguments, words] :
       std::vector<std::pair<std::vector<std::string>, std::vector<std::string>>>{
           {{}, {"shoal --help"}},
           {{"trian", "a.toml"}, {"trian", "Did you mean train"}},
           {{"train"}, {"config", "shoal train --help"}},
           {{"train", "a.toml", "b.toml"}, {"two configurations, a.toml and b.toml"}},
           {{"train", "run.steps=1"}, {"no configuration file is named"}},
           {{"train", "a.toml", "optim.lrr=1"}, {"optim.lrr=1", "Did you mean optim.lr"}},
           {{"train", "a.toml", "lr=1"}, {"lr=1", "optim.lr"}},
           {{"train", "a.toml", "run.steps=1", "run.steps=2"}, {"run.steps is overridden twice"}},
           {{"train", "a.toml", "--local-ranks", "two"}, {"--local-ranks", "two"}},
           {{"train", "a.toml", "--device", "abacus"}, {"--device abacus is not cpu or cuda"}},
           {{"plan", "a.toml", "--ranks", "-1"}, {"--ranks"}},
           {{"generate", "run", "--temperature", "-1"}, {"--temperature"}},
           {{"generate", "run", "--top-p", "1.5"}, {"--top-p"}},
           {{"eval"}, {"path", "shoal eval --help"}},
           {{"data", "build", "corpus.txt"}, {"output", "shoal data build --help"}},
           {{"data"}, {"shoal data --help"}}}) {
    ExpectOneBlock(Run(arguments), kConfig, words);
  }
  ExpectNoRun();
}

TEST_F(ProgramRefuses, RunDirectoriesThatCannotBe) {
  fs::create_directory(Path("full"));
  WriteText(Path("full/notes.txt"), "mine");
  ExpectOneBlock(Train(Settings().Set("run.dir", "\"full\"")), kStorage,
                 {"full is not empty and holds no run", "another run.dir"});
  EXPECT_EQ(ReadText(Path("full/notes.txt")), "mine");
  ExpectOneBlock(Train(Settings().Set("run.dir", "\"corpus.txt\"")), kStorage,
                 {"corpus.txt is a file"});
  ExpectOneBlock(Train(Settings().Set("run.dir", "\"corpus.txt/run\"")), kStorage, {"corpus.txt"});
}

TEST_F(ProgramRefuses, ReadOnlyDirectory) {
  // Root may write anywhere, so it starts the program as somebody else.
  const int nobody = geteuid() == 0 ? 65534 : 0;
  fs::permissions(directory_.path(), fs::perms(0755));
  if (nobody > 0 && RunProgram({"--version"}, {.user = nobody}).exit_code != 0)
    GTEST_SKIP() << "another user cannot start " << ProgramPath();
  fs::create_directory(Path("closed"));
  fs::permissions(Path("closed"), fs::perms(0555));
  for (const char* ranks : {"1", "3"}) {
    ExpectOneBlock(Train(Settings().Set("run.dir", "\"closed/a/run\""), {"--local-ranks", ranks},
                         {.user = nobody}),
                   kStorage, {"closed", "Permission denied"});
    EXPECT_TRUE(fs::is_empty(Path("closed")));
  }
}

TEST_F(ProgramRefuses, FilesLimitedFromTheStart) {
  // A save of this model takes 250 kB.
  ExpectRefused(Settings(), kStorage,
                {"a save takes a file of 0.3 MB", "0.1 MB at most", "ulimit -f"}, {},
                {.file_size_limit = 100000});
  // Not even config.toml.
  ExpectRefused(Settings(), kStorage, {"rank 0 of 2", "0.0 MB at most"}, {"--local-ranks", "2"},
                {.file_size_limit = 100});
}

// A byte less than a save's file has.
TEST_F(ProgramRefuses, FilesLimitedByOneByte) {
  ASSERT_EQ(Train(Settings().Set("run.dir", "\"good\"").Set("run.steps", "1")).exit_code, 0);
  const auto bytes = static_cast<int64_t>(fs::file_size(NewestSave("good") + "/rank-0000.h5"));
  ExpectRefused(Settings(), kStorage, {"a save takes a file of 0.3 MB", "ulimit -f"},
                {"--local-ranks", "2"}, {.file_size_limit = bytes - 1});
  EXPECT_EQ(Train(Settings(), {"--local-ranks", "2"}, {.file_size_limit = bytes}).exit_code, 0);
}

// A file system of `kilobytes`, if this process may mount one.
class SmallFileSystem {
 public:
  SmallFileSystem(std::string path, int kilobytes) : path_(std::move(path)) {
    fs::create_directory(path_);
    const std::string size = "size=" + std::to_string(kilobytes) + "k";
    mounted_ = mount("shoal-test", path_.c_str(), "tmpfs", 0, size.c_str()) == 0;
  }
  ~SmallFileSystem() {
    if (mounted_) umount2(path_.c_str(), MNT_DETACH);
  }
  bool mounted() const { return mounted_; }

 private:
  std::string path_;
  bool mounted_ = false;
};

TEST_F(ProgramRefuses, DiskFullFromTheStart) {
  const SmallFileSystem small(Path("small"), 64);
  if (!small.mounted()) GTEST_SKIP() << "this user may not mount a tmpfs";
  for (const char* ranks : {"1", "3"}) {
    ExpectOneBlock(Train(Settings().Set("run.dir", "\"small/runs/run\""), {"--local-ranks", ranks}),
                   kStorage, {"small", "a save takes 0.3 MB and 0.1 MB are free", "run.dir"});
    EXPECT_TRUE(fs::is_empty(Path("small")));
  }
  // Not a byte: the directory itself cannot be written.
  WriteText(Path("small/ballast"), std::string(60 * 1024, 'x'));
  Settings tiny;
  tiny.Set("run.dir", "\"small/run\"").Set("model.d_model", "2").Set("model.heads", "1");
  tiny.Set("model.mlp", "1").Set("optim.name", "\"sgd\"").Set("precision.compute", "\"fp32\"");
  ExpectOneBlock(Train(tiny), kStorage, {"small"});
  ExpectNoRun("small/run");
}

TEST_F(ProgramRefuses, DiskFullDuringASave) {
  const SmallFileSystem small(Path("small"), 900);
  if (!small.mounted()) GTEST_SKIP() << "this user may not mount a tmpfs";
  Settings settings;
  settings.Set("run.dir", "\"small/run\"").Set("run.steps", "9");
  settings.Set("checkpoint.every", "1").Set("checkpoint.keep", "9");
  settings.Set("checkpoint.full_disk_wait", "0");
  ProgramResult result = Train(settings, {"--local-ranks", "2"});
  result.out.clear();
  ExpectOneBlock(result, kStorage,
                 {"no space left: 0.3 MB are to be written", "are free",
                  "Last good save: small/run/checkpoints/step-",
                  "To go on:", " resume small/run --local-ranks 2"});
  const std::vector<int64_t> saved = SavedSteps("small/run");
  ASSERT_FALSE(saved.empty());
  for (const auto& entry : fs::directory_iterator(Path("small/run/checkpoints")))
    EXPECT_FALSE(entry.path().extension() == ".partial") << entry.path();
  EXPECT_NO_THROW(VerifySave(NewestSave("small/run")));
}

TEST_F(ProgramRefuses, DivergenceWithoutASave) {
  for (const char* ranks : {"1", "2"}) {
    fs::remove_all(Path("run"));
    Settings wild;
    wild.Set("optim.lr", "1e15");
    wild.Set("precision.compute", "\"fp32\"").Set("checkpoint.every", "1");
    ProgramResult result = Train(wild, {"--local-ranks", ranks});
    result.out.clear();
    ExpectOneBlock(result, kConfig, {"not finite", "diverged", "Lower optim.lr"});
    const std::vector<StepMetrics> metrics = Metrics("run");
    ASSERT_FALSE(metrics.empty());
    EXPECT_LT(metrics.size(), 6u);
    // Weights may be huge at a save, but they are numbers.
    if (SavedSteps("run").empty()) continue;
    for (const auto& [name, values] : Tensors("run"))
      for (double v : values) ASSERT_TRUE(std::isfinite(v)) << name;
  }
  // The same of SGD, which nothing bounds.
  fs::remove_all(Path("run"));
  Settings unbounded;
  unbounded.Set("optim.lr", "1e15").Set("optim.name", "\"sgd\"").Set("optim.clip", "0");
  unbounded.Set("run.steps", "200").Set("precision.compute", "\"fp32\"");
  ProgramResult sgd = Train(unbounded);
  sgd.out.clear();
  ExpectOneBlock(sgd, kConfig, {"not finite", "diverged"});
  EXPECT_TRUE(SavedSteps("run").empty());
  // Infinite after the first update, before any loss shows it.
  fs::remove_all(Path("run"));
  Settings wild;
  wild.Set("optim.lr", "1e15")
      .Set("optim.weight_decay", "1e15")
      .Set("optim.schedule", "\"constant\"");
  wild.Set("precision.compute", "\"fp32\"").Set("run.steps", "2").Set("checkpoint.every", "1");
  ProgramResult result = Train(wild);
  result.out.clear();
  ExpectOneBlock(result, kConfig, {"not finite", "diverged"});
}

// Ranks that disagree from the start, which only processes can.
class ProgramMpi : public ProgramTest {
 protected:
  void SetUp() override {
    if (!WhyNoMpi().empty()) GTEST_SKIP() << WhyNoMpi();
  }
  ProgramResult RunTwo(const std::vector<std::string>& first,
                       const std::vector<std::string>& second) {
    std::vector<std::string> words = MpirunWords();
    words.insert(words.end(), {"-n", "1", ProgramPath()});
    words.insert(words.end(), first.begin(), first.end());
    words.insert(words.end(), {":", "-n", "1", ProgramPath()});
    words.insert(words.end(), second.begin(), second.end());
    ProgramResult result = Program(words, {.directory = directory_.path()}, true).Wait();
    EXPECT_FALSE(result.timed_out) << "a hang:\n" << result.out << result.err;
    return result;
  }
};

TEST_F(ProgramMpi, DifferentConfigurations) {
  WriteText(Path("a.toml"), Settings().Text());
  WriteText(Path("b.toml"), Settings().Set("optim.lr", "2e-2").Text());
  ExpectOneBlock(
      RunTwo({"train", "a.toml"}, {"train", "b.toml"}), kConfig,
      {"rank 1 was started with another configuration", "[optim] lr = 0.02 instead of lr = 0.01."});
  ExpectNoRun();
  // In its length as well.
  WriteText(Path("b.toml"), Settings().Set("run.dir", "\"another-directory\"").Text());
  ExpectOneBlock(RunTwo({"train", "a.toml"}, {"train", "b.toml"}), kConfig,
                 {"rank 1 was started with another configuration", "another-directory"});
  ExpectNoRun();
  ExpectNoRun("another-directory");
}

TEST_F(ProgramMpi, WhatOnlyOneRankCannotDo) {
  WriteText(Path("a.toml"), Settings().Text());
  ExpectOneBlock(RunTwo({"train", "a.toml"}, {"train", "missing.toml"}), kConfig,
                 {"cannot read missing.toml", "rank 1 of 2"});
  ExpectOneBlock(RunTwo({"train", "a.toml"}, {"train", "a.toml", "--nonsense"}), kConfig,
                 {"--nonsense", "rank 1 of 2"});
  ExpectOneBlock(RunTwo({"train", "a.toml", "--nonsense"}, {"train", "a.toml"}), kConfig,
                 {"--nonsense"});
  ExpectNoRun();
}

// Two hosts whose copies of the corpus differ, as two paths with one name.
TEST_F(ProgramMpi, DifferentCorpora) {
  fs::create_directory(Path("one"));
  fs::create_directory(Path("two"));
  WriteText(Path("one/c.txt"), SomeText(3000, 1));
  WriteText(Path("two/c.txt"), SomeText(3000, 2));
  // A path that each process resolves for itself.
  std::error_code error;
  fs::create_symlink("/proc/self/cwd/c.txt", Path("corpus.link"), error);
  ASSERT_FALSE(error);
  Settings settings(Path("corpus.link"));
  settings.Set("run.dir", "\"" + Path("run") + "\"");
  WriteText(Path("a.toml"), settings.Text());
  std::vector<std::string> words = MpirunWords();
  for (const char* folder : {"one", "two"}) {
    if (std::string(folder) == "two") words.push_back(":");
    words.insert(words.end(),
                 {"-n", "1", "--wdir", Path(folder), ProgramPath(), "train", Path("a.toml")});
  }
  const ProgramResult result = Program(words, {}, true).Wait();
  EXPECT_FALSE(result.timed_out);
  ExpectOneBlock(result, kData, {"rank 1 finds another corpus", "corpus.link"});
  ExpectNoRun();
}

}  // namespace
}  // namespace shoal
