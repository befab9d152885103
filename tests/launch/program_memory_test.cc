// The program and its memory: what it tells at any step, and how it ends when there is no more.
#include <atomic>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "checkpoint/store.h"
#include "core/context.h"
#include "launch/bootstrap.h"
#include "launch/failure.h"
#include "launch/trainer.h"
#include "tests/launch/program.h"

namespace shoal {
namespace {

using nlohmann::ordered_json;

class ProgramMemory : public ProgramTest {
 protected:
  std::string Read(const std::string& name) const {
    std::ifstream in(Path(name));
    std::stringstream text;
    text << in.rdbuf();
    return text.str();
  }
  // A position table that no machine holds: only the first stage has it, and its states.
  static Settings TooLarge() {
    return Settings()
        .Set("model.family", "\"gpt2\"")
        .Set("model.context", "1000000000")
        .Set("model.d_model", "1024")
        .Set("memory.overcommit", "true");
  }
  static void ExpectWords(const std::string& text, const std::vector<std::string>& words) {
    for (const std::string& w : words)
      EXPECT_NE(text.find(w), std::string::npos) << w << "\n" << text;
  }
};

// A running step is asked, and says line by line what was planned.
TEST_F(ProgramMemory, TellsWhatIsAliveAtTheNextStep) {
  Settings s;
  s.Set("model.layers", "4").Set("run.steps", "1000000").Set("zero.stage", "2");
  WriteText(Path("a.toml"), s.Text());
  ProgramOptions options;
  options.directory = directory_.path();
  Program program({"train", "a.toml", "--local-ranks", "2"}, options);
  ASSERT_TRUE(program.WaitFor([&] { return Exists("run/metrics.jsonl"); }));
  WriteText(Path("run/memory"), "");
  std::string reports[2];
  const auto found = [&] {
    for (const auto& entry : std::filesystem::directory_iterator(Path("run/log")))
      for (const int rank : {0, 1})
        if (entry.path().string().ends_with("-rank-" + std::to_string(rank) + ".txt"))
          reports[rank] = entry.path();
    return !reports[0].empty() && !reports[1].empty();
  };
  ASSERT_TRUE(program.WaitFor(found));
  WriteText(Path("run/stop"), "");
  EXPECT_EQ(program.Wait().exit_code, 75);
  EXPECT_FALSE(Exists("run/memory"));
  const ordered_json plan = ordered_json::parse(Read("run/plan.json"));
  const int rank = plan["peak_rank"];
  std::ifstream in(reports[rank]);
  std::string line, text;
  std::vector<std::string> lines;
  while (std::getline(in, line)) {
    lines.push_back(line);
    text += line + '\n';
  }
  ASSERT_EQ(plan["peak_tensors"].size(), 10u);
  ASSERT_GE(lines.size(), 12u) << text;
  ExpectWords(lines[0], {"at the peak of rank " + std::to_string(rank) + " in step "});
  for (size_t i = 0; i < 10; ++i) {
    const ordered_json& t = plan["peak_tensors"][i];
    ExpectWords(lines[i + 2], {fmt::format("{:.2f}", t["bytes"].get<double>() / 1e6), t["class"],
                               t["tensor"], t["module"], t["op"], t["pass"]});
  }
  ExpectWords(text, {"by module, MB:", "blocks", "smaller activations: memory.recompute",
                     "smaller parameters: zero.stage = 3"});
  EXPECT_EQ(text.find("zero.stage = 2"), std::string::npos) << text;
  // The plan as text, and on the page.
  ExpectWords(Must({"plan", "a.toml", "--ranks", "2"}).out,
              {"at the peak of rank ", "smaller with", " x f64 [", "blocks.*.attention", "forward",
               "by module, MB:", "one change", "memory.recompute = \"full\""});
  Must({"report", "run"});
  ExpectWords(Read("run/report.html"), {"as planned", "blocks.*.attention", "By module, MB:"});
}

TEST_F(ProgramMemory, OutOfItOnOneRankAlone) {
  if (!WhyNoMpi().empty()) GTEST_SKIP() << WhyNoMpi();
  WriteText(Path("a.toml"), TooLarge().Set("mesh.pp", "2").Text());
  ProgramOptions options;
  options.mpi_ranks = 2;
  const ProgramResult result = Run({"train", "a.toml"}, options);
  EXPECT_EQ(result.exit_code, 76) << result.err;
  ExpectWords(result.err,
              {"out of memory, rank 0 of 2", "exit code 76", "no room for", "of parameters",
               "position.weight", "live: parameters", "smaller activations: "});
  ExpectNoRun();
}

TEST_F(ProgramMemory, OutOfItOnThreadsAndAlone) {
  WriteText(Path("a.toml"), TooLarge().Set("zero.stage", "3").Text());
  for (const char* ranks : {"1", "2"})
    ExpectOneBlock(Run({"train", "a.toml", "--local-ranks", ranks}), 76,
                   {"out of memory", "no room for", "position.weight", "smaller "});
  ExpectNoRun();
}

// In the middle of a run, on one of two ranks: the other ends too, and the last save stays.
TEST_F(ProgramMemory, OutOfItInTheMiddleKeepsTheLastSave) {
  Settings s(Path("corpus.txt"));
  s.Set("run.dir", "\"" + Path("run") + "\"").Set("run.steps", "1000000");
  s.Set("checkpoint.every", "2").Set("zero.stage", "2");
  const Config config = ParseConfig(s.Text(), "a.toml");
  std::shared_ptr<Allocator> of_one;
  std::atomic<bool> known = false, ended = false;
  std::thread taker([&] {
    while (!ended && !(known && Exists("run/checkpoints/step-00000004")))
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    if (!ended) of_one->set_limit(1000);
  });
  ::testing::internal::CaptureStderr();
  const int code = RunRanks({.local_ranks = 2}, [&](Communicator& c) {
    if (c.rank() == 1) {
      of_one = ExecutionContext::Current().allocator();
      known = true;
    }
    return shoal::Train(config, c);
  });
  const std::string block = ::testing::internal::GetCapturedStderr();
  ended = true;
  taker.join();
  EXPECT_EQ(code, 76) << block;
  ExpectWords(block, {"out of memory, rank 1 of 2", "live: parameters", "optimizer",
                      "by module, MB:", "smaller activations: memory.recompute", "zero.stage = 3",
                      "Last good save", "resume"});
  ASSERT_FALSE(SavedSteps("run").empty());
  EXPECT_NO_THROW(VerifySave(NewestSave("run")));
  SetFailureContext([](FailureContext& context) { context = {}; });
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
// The system's own limit, which nobody has told the plan.
TEST_F(ProgramMemory, OutOfItUnderALimitOnAddresses) {
  Settings s;
  s.Set("model.d_model", "2048").Set("model.heads", "16").Set("model.mlp", "8192");
  WriteText(Path("a.toml"), s.Set("memory.overcommit", "true").Text());
  ProgramOptions options;
  options.directory = directory_.path();
  // Beside what its libraries take, which differs from build to build.
  const std::string script = fmt::format(
      "kb=100000; until (ulimit -v $kb; exec {0} --help > /dev/null 2>&1); do kb=$((kb + 100000)); "
      "done; ulimit -v $((kb + 250000)); exec {0} train a.toml",
      ProgramPath());
  const ProgramResult result = Program({"/bin/bash", "-c", script}, options, true).Wait();
  EXPECT_EQ(result.exit_code, 76) << result.err;
  ExpectWords(result.err, {"out of memory", "no room for", "smaller "});
  ExpectNoRun();
}
#endif

TEST_F(ProgramMemory, OutOfItWhileGenerating) {
  Settings s;
  s.Set("model.context", "1000000000").Set("model.d_model", "1024").Set("run.steps", "1");
  ASSERT_EQ(Train(s).exit_code, 0);
  const ProgramResult result = Run({"generate", "run", "--prompt", "a", "--tokens", "900000000"});
  EXPECT_EQ(result.exit_code, 76) << result.err;
  ExpectWords(result.err, {"out of memory", "kv_cache", "fewer --tokens"});
}

}  // namespace
}  // namespace shoal
