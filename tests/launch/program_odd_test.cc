// Sizes, models and data away from the middle of the road, from `data build` to `generate`.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <random>

#include "data/array_source.h"
#include "data/file.h"
#include "data/indexed_file.h"
#include "tests/launch/program.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

class ProgramOdd : public ProgramTest {
 protected:
  // Trains alone and on `ranks` threads: both end well, with equal losses that are numbers.
  void ExpectTrains(const Settings& settings, int ranks = 1) {
    const ProgramResult result = Train(settings);
    ASSERT_EQ(result.exit_code, 0) << result.err;
    EXPECT_EQ(result.err, "");
    const std::vector<StepMetrics> one = Metrics("run");
    ASSERT_FALSE(one.empty());
    for (const StepMetrics& m : one) EXPECT_TRUE(std::isfinite(m.loss) && m.loss > 0) << m.loss;
    if (ranks == 1) return;
    const ProgramResult other =
        Run({"train", "a.toml", "run.dir=many", "--local-ranks", std::to_string(ranks)});
    ASSERT_EQ(other.exit_code, 0) << other.err;
    const std::vector<StepMetrics> many = Metrics("many");
    ASSERT_EQ(many.size(), one.size());
    for (size_t i = 0; i < one.size(); ++i)
      EXPECT_NEAR(one[i].loss, many[i].loss, 1e-10 * one[i].loss) << "step " << i + 1;
  }
  std::string Text(const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {"generate", "run", "--json"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const ordered_json json = ordered_json::parse(Must(arguments).out, nullptr, false);
    EXPECT_TRUE(json.is_object());
    return json.value("text", std::string());
  }
};

TEST_F(ProgramOdd, OneSequenceOfOneToken) {
  ExpectTrains(Settings().Set("batch.sequences", "1").Set("data.sequence_length", "1"));
  EXPECT_EQ(Metrics("run").back().tokens, 6);
}

TEST_F(ProgramOdd, OneTokenOnThreeRanks) {
  ExpectTrains(Settings().Set("batch.sequences", "3").Set("data.sequence_length", "1"), 3);
}

TEST_F(ProgramOdd, OddEverything) {
  Settings settings;
  settings.Set("data.sequence_length", "31").Set("batch.sequences", "3").Set("model.mlp", "7");
  settings.Set("model.d_model", "18").Set("model.heads", "3").Set("model.vocab", "259");
  ExpectTrains(settings, 3);
}

TEST_F(ProgramOdd, OtherRulesAndSchedules) {
  Settings settings;
  settings.Set("optim.name", "\"sgd\"").Set("optim.momentum", "0.9").Set("optim.clip", "0");
  settings.Set("optim.schedule", "\"wsd\"").Set("optim.decay_fraction", "0.5");
  ExpectTrains(settings, 2);
  EXPECT_NEAR(Metrics("run")[1].lr, 1e-2, 1e-15);
  EXPECT_LT(Metrics("run")[5].lr, 5e-3);
}

TEST_F(ProgramOdd, GroupedHeadsAndAVocabularyBeyondTheTokenizer) {
  Settings settings;
  settings.Set("model.heads", "4").Set("model.kv_heads", "1").Set("model.head_dim", "6");
  settings.Set("model.vocab", "321").Set("model.tied", "true").Set("model.layers", "2");
  ExpectTrains(settings, 2);
  // Ids without text are never drawn.
  EXPECT_EQ(Text({"--tokens", "40", "--temperature", "5"}).find("\uFFFD\uFFFD\uFFFD\uFFFD"),
            std::string::npos);
}

TEST_F(ProgramOdd, Gpt2TiedWithDropout) {
  Settings settings;
  settings.Set("model.family", "\"gpt2\"").Set("model.dropout", "0.25").Set("batch.micro", "2");
  ExpectTrains(settings, 3);
  // It was dropped out: without it the numbers are others.
  Must({"train", "a.toml", "run.dir=plain", "model.dropout=0"});
  EXPECT_NE(Metrics("plain")[0].loss, Metrics("run")[0].loss);
  EXPECT_EQ(Tensors("run").count("model/head.weight"), 0u);
}

TEST_F(ProgramOdd, ADirectoryOfTexts) {
  fs::create_directories(Path("texts/deep"));
  for (int i = 0; i < 40; ++i)
    WriteText(Path((i % 2 ? "texts/deep/" : "texts/") + std::to_string(i) + ".txt"),
              SomeText(1 + 7 * i, i));
  WriteText(Path("texts/empty.txt"), "");
  WriteText(Path("texts/.hidden"), std::string(10, '\0'));
  for (const char* documents : {"false", "true"}) {
    fs::remove_all(Path("run"));
    fs::remove_all(Path("many"));
    ExpectTrains(Settings("texts").Set("data.documents", documents), 2);
    // Where documents are kept apart, the token after an end has no label.
    const int64_t all = 6 * 12 * 8;
    if (std::string(documents) == "true") {
      EXPECT_LT(Metrics("run").back().tokens, all);
    } else {
      EXPECT_EQ(Metrics("run").back().tokens, all);
    }
  }
}

// The same tokens in any format are the same run.
TEST_F(ProgramOdd, BuiltDataIsTheSameRun) {
  Must({"data", "build", "corpus.txt", "ids.h5"});
  Must({"data", "build", "corpus.txt", "pair"});
  for (const char* data : {"corpus.txt", "ids.h5", "pair", "pair.bin"}) {
    Settings settings(data);
    settings.Set("run.dir", std::string("\"run-") + data + "\"").Set("model.vocab", "257");
    ASSERT_EQ(Train(settings).exit_code, 0) << data;
    EXPECT_EQ(Tensors(std::string("run-") + data), Tensors("run-corpus.txt")) << data;
  }
  // A run even goes on after its corpus has moved into another format.
  fs::remove(Path("corpus.txt"));
  EXPECT_NE(Must({"data", "inspect", "ids.h5"}).out.find("4001 tokens"), std::string::npos);
}

TEST_F(ProgramOdd, Vocabulary65) {
  std::mt19937 random(3);
  std::vector<char> ids;
  for (int i = 0; i < 2000; ++i) ids.push_back(static_cast<char>(random() % 65));
  WriteText(Path("pair.bin"), std::string(ids.begin(), ids.end()));
  {
    AtomicFile index(Path("pair.idx"));
    const std::vector<int64_t> starts = {0, 700, 1999};
    WriteIndex(IntType::kU8, starts, 2000, index);
    index.Commit();
  }
  ExpectTrains(Settings("pair").Set("model.vocab", "65").Set("data.documents", "true"), 3);
  EXPECT_NEAR(Metrics("run")[0].loss, std::log(65), 0.3);
}

TEST_F(ProgramOdd, ASentencePieceModel) {
  WriteText(Path("long.txt"), SomeText(30000));
  const ordered_json built = ordered_json::parse(
      Must({"data", "build", "long.txt", "ids.h5", "--train-vocab", "321", "--json"}).out);
  EXPECT_EQ(built["vocab"], 321);
  const std::string model = built["tokenizer"];
  ASSERT_TRUE(model.ends_with(".model")) << model;
  Settings text("long.txt");
  text.Set("data.tokenizer", "\"" + model + "\"");
  ExpectTrains(text, 2);
  EXPECT_NEAR(Metrics("run")[0].loss, std::log(321), 0.3);
  // The same tokens, tokenized once or at every start.
  Settings ids("ids.h5");
  ids.Set("data.tokenizer", "\"" + model + "\"").Set("model.vocab", "321");
  ASSERT_EQ(Train(ids.Set("run.dir", "\"ids\"")).exit_code, 0);
  EXPECT_EQ(Tensors("ids"), Tensors("run"));
  const std::string written = Text({"--prompt", "the ship", "--tokens", "10"});
  EXPECT_EQ(written.rfind("the ship", 0), 0u) << written;
}

TEST_F(ProgramOdd, WarmupLongerThanTheRun) {
  Settings settings;
  settings.Set("optim.warmup_steps", "60");
  ExpectTrains(settings);
  const std::vector<StepMetrics> metrics = Metrics("run");
  for (const StepMetrics& m : metrics)
    EXPECT_NEAR(m.lr, 1e-2 * static_cast<double>(m.step) / 60, 1e-15);
}

TEST_F(ProgramOdd, NothingHeldOut) {
  ExpectTrains(Settings().Set("data.validation_fraction", "0").Set("run.validate_every", "1"));
  EXPECT_FALSE(Metrics("run").back().validation_loss.has_value());
  ExpectOneBlock(Run({"eval", "run"}), 2, {"held no validation data out", "--data"});
  Must({"eval", "run", "--data", "corpus.txt"});
}

// The smallest share there is: one sequence.
TEST_F(ProgramOdd, OneSequenceHeldOut) {
  Settings settings;
  settings.Set("data.validation_fraction", "1e-9").Set("run.validate_every", "6");
  ExpectTrains(settings, 3);
  EXPECT_TRUE(Metrics("many").back().validation_loss.has_value());
}

// A corpus smaller than one step: it is read over and over.
TEST_F(ProgramOdd, ABatchLargerThanTheCorpus) {
  WriteText(Path("tiny.txt"), SomeText(40));
  ExpectTrains(Settings("tiny.txt"), 3);
}

TEST_F(ProgramOdd, Generation) {
  Settings settings;
  settings.Set("run.steps", "80").Set("model.context", "24").Set("precision.compute", "\"fp32\"");
  ASSERT_EQ(Train(settings).exit_code, 0);
  const std::vector<std::string> base = {"--prompt", "the ship ", "--tokens", "40"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), base.begin(), base.end());
    return Text(more);
  };
  // Greedy: no seed matters. The best of one, or the first that has any probability, is the same.
  const std::string greedy = with({"--temperature", "0"});
  EXPECT_EQ(greedy, with({"--temperature", "0", "--seed", "7"}));
  EXPECT_EQ(greedy, with({"--top-k", "1", "--seed", "3"}));
  EXPECT_EQ(greedy, with({"--top-p", "0", "--seed", "3"}));
  EXPECT_EQ(greedy.rfind("the ship ", 0), 0u);
  // Drawn: the same for a seed, another for another.
  const std::string drawn = with({"--seed", "1"});
  EXPECT_EQ(drawn, with({"--seed", "1"}));
  EXPECT_NE(drawn, with({"--seed", "2"}));
  EXPECT_NE(with({"--seed", "1", "--temperature", "3"}), drawn);
  EXPECT_NE(with({"--seed", "1", "--temperature", "3", "--top-k", "2"}),
            with({"--seed", "1", "--temperature", "3", "--top-k", "50"}));
  // No filter at all is what filters that let all pass are.
  EXPECT_EQ(drawn, with({"--seed", "1", "--top-k", "100000", "--top-p", "1"}));
  // A prompt longer than the context, and no prompt, and nothing to write.
  const std::string prompt = SomeText(100);
  EXPECT_EQ(Text({"--prompt", prompt, "--tokens", "30"}).rfind(prompt, 0), 0u);
  EXPECT_FALSE(Text({"--tokens", "30"}).empty());
  EXPECT_EQ(Text({"--prompt", "as it is", "--tokens", "0"}), "as it is");
  // From a save, and as text: the same words.
  const ProgramResult plain = Must(
      {"generate", NewestSave("run"), "--prompt", "the ship ", "--tokens", "40", "--seed", "1"});
  EXPECT_EQ(plain.out, drawn + "\n");
}

// Bytes of memory, now.
int64_t Resident(pid_t pid) {
  std::ifstream in("/proc/" + std::to_string(pid) + "/statm");
  int64_t total = 0, resident = 0;
  in >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

class LongProgram : public ProgramTest {};

TEST_F(LongProgram, MemoryDoesNotGrow) {
  for (const auto& [precision, ranks] :
       std::vector<std::pair<const char*, const char*>>{{"\"fp32\"", "1"}, {"\"bf16\"", "3"}}) {
    fs::remove_all(Path("run"));
    Settings settings;
    settings.Set("run.steps", "1000").Set("model.layers", "2").Set("model.d_model", "64");
    settings.Set("precision.compute", precision)
        .Set("batch.micro", "2")
        .Set("run.validate_every", "50");
    settings.Set("data.validation_fraction", "0.1").Set("checkpoint.every", "100");
    WriteText(Path("a.toml"), settings.Text());
    Program program({"train", "a.toml", "--local-ranks", ranks},
                    {.directory = directory_.path(), .seconds = 600});
    const auto resident_after = [&](size_t steps) {
      EXPECT_TRUE(program.WaitFor(
          [&] { return ReadMetrics(Path("run/metrics.jsonl")).steps.size() >= steps; }));
      return Resident(program.pid());
    };
    // Validation and a save have been by then.
    const int64_t early = resident_after(110), late = resident_after(990);
    ASSERT_EQ(program.Wait().exit_code, 0);
    EXPECT_GT(early, 1 << 20);
    EXPECT_LE(late, early + (1 << 20));
    const std::vector<StepMetrics> metrics = Metrics("run");
    ASSERT_EQ(metrics.size(), 1000u);
    for (const StepMetrics& m : metrics) {
      if (m.step < 5) continue;
      for (size_t i = 0; i < m.peak_bytes.size(); ++i) {
        // What validation and saving add is there after the first of each.
        const StepMetrics& settled = m.step < 101 ? metrics[4] : metrics[100];
        const std::string& name = m.peak_bytes[i].first;
        if (m.step < 101 && (name == "workspace" || name == "peak" || name == "activations"))
          continue;
        ASSERT_EQ(m.peak_bytes[i], settled.peak_bytes[i]) << "step " << m.step;
      }
    }
  }
}

}  // namespace
}  // namespace shoal
