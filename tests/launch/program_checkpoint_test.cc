// shoal ckpt, and what trains, evaluates and writes from what it made.
#include <filesystem>
#include <nlohmann/json.hpp>

#include "checkpoint/manifest.h"
#include "checkpoint/store.h"
#include "tests/launch/program.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

class ProgramCheckpoint : public ProgramTest {
 protected:
  // Three saves of a run of six steps.
  void TrainRun(const std::string& run = "run", const std::vector<std::string>& more = {}) {
    Settings settings;
    settings.Set("run.dir", '"' + run + '"').Set("checkpoint.every", "2");
    settings.Set("checkpoint.keep", "3").Set("model.layers", "2");
    ASSERT_EQ(Train(settings, more).exit_code, 0);
  }
  json Json(std::vector<std::string> arguments, int code = 0) {
    arguments.push_back("--json");
    const ProgramResult result = Run(arguments);
    EXPECT_EQ(result.exit_code, code) << result.err;
    const json object = json::parse(result.out, nullptr, false);
    EXPECT_FALSE(object.is_discarded()) << result.out;
    return object;
  }
  // Changes a byte of a save's tensors.
  static void Damage(const std::string& save) {
    const std::string file = save + "/rank-0000.h5";
    std::string bytes = ReadText(file);
    bytes[bytes.size() - 100] = static_cast<char>(bytes[bytes.size() - 100] ^ 1);
    WriteText(file, bytes);
  }
  std::string SaveAt(int step, const std::string& run = "run") const {
    return fmt::format("{}/checkpoints/step-{:08}", run, step);
  }
};

TEST_F(ProgramCheckpoint, LsVerifyAndPruneKnowWhatIsWhole) {
  TrainRun();
  const auto valid = [](const json& list) {
    std::vector<std::pair<int64_t, bool>> found;
    for (const json& save : list) found.emplace_back(save["step"], save["valid"]);
    return found;
  };
  using List = std::vector<std::pair<int64_t, bool>>;
  json list = Json({"ckpt", "ls", "run"});
  EXPECT_EQ(valid(list), (List{{6, true}, {4, true}, {2, true}}));
  EXPECT_EQ(list[0]["path"], SaveAt(6));
  int64_t bytes = 0;
  for (const auto& file : fs::directory_iterator(Path(SaveAt(6))))
    bytes += static_cast<int64_t>(file.file_size());
  EXPECT_EQ(list[0]["bytes"], bytes);
  EXPECT_EQ(Json({"ckpt", "verify", "run"})["valid"], true);
  EXPECT_EQ(Json({"ckpt", "verify", SaveAt(4)})["saves"][0]["step"], 4);

  Damage(Path(SaveAt(6)));
  EXPECT_EQ(valid(Json({"ckpt", "ls", "run"})), (List{{6, false}, {4, true}, {2, true}}));
  ProgramResult result = Run({"ckpt", "verify", "run"});
  EXPECT_EQ(result.exit_code, 73);
  for (const char* words :
       {"exit code 73", "step-00000006/rank-0000.h5: tensor ", "digests differ"})
    EXPECT_NE(result.err.find(words), std::string::npos) << result.err;
  EXPECT_EQ(Json({"ckpt", "verify", SaveAt(6)}, 73)["valid"], false);
  EXPECT_EQ(Run({"ckpt", "verify", SaveAt(4)}).exit_code, 0);
  fs::remove(Path(SaveAt(6)) + "/manifest.json");
  EXPECT_EQ(Run({"ckpt", "verify", SaveAt(6)}).exit_code, 73);

  // The damaged one is none of the two that are kept; nor is it deleted for what it is.
  EXPECT_EQ(Json({"ckpt", "prune", "run", "--keep", "2"})["removed"].size(), 0u);
  // Two whole ones stay at least.
  EXPECT_EQ(Json({"ckpt", "prune", "run", "--keep", "1"})["removed"].size(), 0u);
  EXPECT_EQ(Run({"resume", "run"}).exit_code, 0) << "it goes on after step 4";
  const json pruned = Json({"ckpt", "prune", "run", "--keep", "1"});
  EXPECT_EQ(pruned["removed"], json({SaveAt(2)}));
  EXPECT_EQ(SavedSteps("run"), (std::vector<int64_t>{4, 6}));

  ExpectOneBlock(Run({"ckpt", "prune", "run"}), 2, {"--keep"});
  ExpectOneBlock(Run({"ckpt", "prune", "run", "--keep", "0"}), 2, {"--keep"});
  ExpectOneBlock(Run({"ckpt", "ls", "corpus.txt"}), 73, {"corpus.txt is not a directory"});
  ExpectOneBlock(Run({"ckpt", "verify", "absent"}), 73, {"absent does not exist"});
  ExpectOneBlock(Run({"ckpt", "verify", "corpus.txt"}), 73, {"corpus.txt"});
  ExpectOneBlock(Run({"ckpt", "verfy", "run"}), 2, {"Did you mean verify?"});
  ExpectOneBlock(Run({"ckpt"}), 2, {});
}

TEST_F(ProgramCheckpoint, DiffFindsWhatDiffersOverLayouts) {
  TrainRun();
  // The same numbers to rounding, in other pieces.
  TrainRun("many", {"mesh.tp=2", "zero.stage=3", "--local-ranks", "4"});
  const json equal = Json({"ckpt", "diff", SaveAt(6), "run"});
  EXPECT_EQ(equal["equal"], true);
  EXPECT_EQ(equal["first_difference"], nullptr);
  const json rounding = Json({"ckpt", "diff", "run", "many"}, 1);
  EXPECT_EQ(rounding["tensors"], equal["tensors"]);
  EXPECT_GT(rounding["max_absolute_difference"], 0.0);
  EXPECT_LT(rounding["max_absolute_difference"], 1e-10);
  const json steps = Json({"ckpt", "diff", SaveAt(4), SaveAt(6)}, 1);
  EXPECT_EQ(steps["equal"], false);
  EXPECT_EQ(steps["first_difference"]["what"], "values");
  EXPECT_EQ(steps["different"].size(), steps["tensors"]);

  // Masters are compared as what they hold, in whichever form.
  for (const char* form : {"whole", "split"})
    TrainRun(form, {"precision.compute=bf16", "run.steps=1", fmt::format("optim.master={}", form)});
  const json forms = Json({"ckpt", "diff", "whole", "split"});
  EXPECT_EQ(forms["equal"], true);
  EXPECT_EQ(forms["tensors"], 4 * equal["tensors"].get<int>() / 3);  // of three in f64

  // One value of one tensor.
  const std::string save = Path(SaveAt(6));
  StateDict state;
  std::string touched;
  for (const auto& [name, stored] : ReadManifest(save).all.tensors) {
    Dims zero = stored.shape;
    for (int d = 0; d < zero.rank(); ++d) zero[d] = 0;
    state.push_back({name, Tensor::Empty(stored.shape, stored.dtype), stored.shape, zero});
  }
  LoadState(save, state);
  const Tensor changed = state[5].tensor.Reshaped({-1}).Narrowed(0, 7, 1);
  const double before = changed.Item();
  changed.Fill(before + 0.5);
  state.erase(state.begin() + 2);
  SaveState(Path(""), {9, 0, ReadSaveInfo(save).config, ""}, state);
  const json one = Json({"ckpt", "diff", SaveAt(6), "step-00000009"}, 1);
  ASSERT_EQ(one["different"].size(), 2u);
  EXPECT_EQ(one["different"][0]["what"], "only in the first");
  EXPECT_EQ(one["different"][1]["tensor"], state[4].name);
  EXPECT_EQ(one["different"][1]["elements"], 1);
  EXPECT_NEAR(one["max_absolute_difference"].get<double>(), 0.5, 1e-15);
  const ProgramResult text = Run({"ckpt", "diff", SaveAt(6), "step-00000009"});
  EXPECT_EQ(text.exit_code, 1);
  EXPECT_NE(text.out.find(state[4].name + ": values, 1 elements"), std::string::npos) << text.out;
  EXPECT_NE(text.out.find("first [7]: "), std::string::npos) << text.out;
}

// The loss of a run, of its export, and of what is imported again, is one number.
TEST_F(ProgramCheckpoint, AnExportIsTheRunToTheLastDigit) {
  TrainRun("run", {"precision.compute=fp32", "mesh.tp=2", "zero.stage=1", "--local-ranks", "4"});
  EXPECT_EQ(Json({"ckpt", "export", "run", "hf"})["dtype"], "f32");
  Must({"ckpt", "import", "hf", "save"});
  Must({"ckpt", "export", "save", "again"});
  for (const auto& file : fs::directory_iterator(Path("hf")))
    EXPECT_TRUE(ReadText(file.path()) == ReadText(Path("again/") + file.path().filename().string()))
        << file.path();
  const json loss = Json({"eval", "run", "--data", "corpus.txt"})["loss"];
  EXPECT_GT(loss, 0.0);
  for (const std::string path : {"hf", "save"})
    EXPECT_EQ(Json({"eval", path, "--data", "corpus.txt", "--sequence-length", "8"})["loss"], loss);
  const std::vector<std::string> sample = {"--tokens", "9", "--prompt", "the ", "--seed", "4"};
  std::vector<std::string> of_run = {"generate", "run"}, of_hf = {"generate", "hf"};
  of_run.insert(of_run.end(), sample.begin(), sample.end());
  of_hf.insert(of_hf.end(), sample.begin(), sample.end());
  EXPECT_EQ(Must(of_run).out, Must(of_hf).out);

  ExpectOneBlock(Run({"ckpt", "export", "run", "hf"}), 73, {"hf is there already"});
  ExpectOneBlock(Run({"ckpt", "import", "hf", "save"}), 73, {"save is there already"});
  ExpectOneBlock(Run({"ckpt", "import", "run", "x"}), 73, {"it has no config.json"});
  ExpectOneBlock(Run({"ckpt", "export", "hf", "x"}), 2, {"is a Hugging Face directory"});
  ExpectOneBlock(Run({"ckpt", "export", "run", "x", "--dtype", "int8"}), 2, {"int8"});
  ExpectOneBlock(Run({"ckpt", "export", "run", "x", "--shard-size", "much"}), 2, {"much"});
  ExpectOneBlock(Run({"eval", "hf"}), 2, {"--data PATH", "--sequence-length"});
  ExpectOneBlock(Run({"eval", "save", "--data", "corpus.txt"}), 2, {"--sequence-length"});
  EXPECT_FALSE(Exists("x"));
}

// A directory brings its tokenizer along, if it is one that we read.
TEST_F(ProgramCheckpoint, TheTokenizerGoesWithTheModel) {
  WriteText(Path("long.txt"), SomeText(60000));
  const json built = json::parse(
      Must({"data", "build", "long.txt", "ids.h5", "--train-vocab", "300", "--json"}).out);
  const std::string tokenizer = built["tokenizer"];
  Settings settings("corpus.txt");
  settings.Set("data.tokenizer", '"' + tokenizer + '"');
  ASSERT_EQ(Train(settings).exit_code, 0);
  Must({"ckpt", "export", "run", "hf"});
  EXPECT_TRUE(ReadText(Path("hf/tokenizer.model")) == ReadText(Path(tokenizer)));
  EXPECT_TRUE(json::parse(ReadText(Path("hf/config.json")))["eos_token_id"].is_number());
  const auto sample = [&](const std::string& path, const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {"generate", path, "--tokens", "5", "--prompt", "the"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return Must(arguments);
  };
  const std::string expected = sample("run", {}).out;
  EXPECT_EQ(sample("hf", {}).out, expected);
  // Another kind is not passed over in silence.
  fs::remove(Path("hf/tokenizer.model"));
  WriteText(Path("hf/tokenizer.json"), "{}");
  EXPECT_NE(sample("hf", {}).err.find("hf/tokenizer.json"), std::string::npos);
  const ProgramResult named = sample("hf", {"--tokenizer", tokenizer});
  EXPECT_EQ(named.out, expected);
  EXPECT_EQ(named.err, "");
}

// Any mesh begins with the weights of a directory, and so with the same loss.
TEST_F(ProgramCheckpoint, TrainingBeginsWithTheWeightsOnAnyMesh) {
  for (const std::string family : {"llama", "gpt2"}) {
    TrainRun(family, {"model.family=" + family, "model.heads=4", "model.dropout=0.0"});
    Must({"ckpt", "export", family, family + "_hf", "--shard-size", "10KB"});
    Settings settings;
    for (const char* key : {"family", "layers", "d_model", "heads", "mlp"})
      settings.Remove(std::string("model.") + key);
    settings.Set("model.dropout", "0.0");
    const auto first_loss = [&](const std::string& from, const std::string& run,
                                std::vector<std::string> more) {
      more.insert(more.end(), {"model.from=" + from, "run.dir=" + run, "run.steps=2"});
      EXPECT_EQ(Train(settings, more).exit_code, 0);
      return std::pair(Metrics(run)[0].loss, Metrics(run)[1].loss);
    };
    const auto expected = first_loss(family, family + "_from_run", {});
    int n = 0;
    for (const std::vector<std::string>& mesh :
         {std::vector<std::string>{},
          {"mesh.tp=3", "zero.stage=3", "--local-ranks", "6"},
          {"mesh.pp=2", "zero.stage=2", "batch.micro=3", "--local-ranks", "4"}}) {
      const auto got = first_loss(family + "_hf", fmt::format("{}_{}", family, n++), mesh);
      EXPECT_NEAR(got.first, expected.first, 1e-12 * expected.first);
      EXPECT_NEAR(got.second, expected.second, 1e-10 * expected.second);
    }
  }
  // Where it came from may go: the run has all that it needs.
  Must(
      {"train", "a.toml", "model.from=gpt2_hf", "run.dir=on", "run.steps=2", "checkpoint.every=1"});
  fs::remove_all(Path(SaveAt(2, "on")));
  fs::remove_all(Path("gpt2_hf"));
  Must({"resume", "on"});
  EXPECT_EQ(SavedSteps("on"), (std::vector<int64_t>{1, 2}));
  ExpectOneBlock(Run({"train", "a.toml", "model.from=llama_hf", "model.heads=8", "run.dir=x"}), 2,
                 {"model.heads is 8", "but 4"});
  const std::string shard = json::parse(
      ReadText(Path("llama_hf/model.safetensors.index.json")))["weight_map"]["model.norm.weight"];
  ASSERT_TRUE(fs::remove(Path("llama_hf/" + shard)));
  ExpectOneBlock(Run({"train", "a.toml", "model.from=llama_hf", "run.dir=x", "--local-ranks", "2"}),
                 73, {shard});
  ExpectNoRun("x");
}

}  // namespace
}  // namespace shoal
