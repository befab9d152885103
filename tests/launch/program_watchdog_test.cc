// A rank that is stopped or killed from outside: the others say which, and nothing hangs.
#include <signal.h>

#include <chrono>
#include <fstream>

#include "tests/launch/program.h"

namespace shoal {
namespace {

class ProgramWatchdog : public ProgramTest {
 protected:
  // Processes that `pid` has started.
  static std::vector<pid_t> Children(pid_t pid) {
    std::ifstream in("/proc/" + std::to_string(pid) + "/task/" + std::to_string(pid) + "/children");
    std::vector<pid_t> children;
    for (pid_t child = 0; in >> child;) children.push_back(child);
    return children;
  }

  // Sends `signal` to the second of three ranks once the run has a save.
  ProgramResult Signalled(int signal) {
    Settings s;
    s.Set("run.steps", "1000000").Set("checkpoint.every", "2").Set("zero.stage", "2");
    WriteText(Path("a.toml"), s.Text());
    std::vector<std::string> words = MpirunWords();
    const std::string program_path = SHOAL_BINARY_DIR "/bin/shoal";
    for (const std::string& w : {std::string("-n"), std::string("3"), program_path,
                                 std::string("train"), std::string("a.toml")})
      words.push_back(w);
    ProgramOptions options;
    options.directory = directory_.path();
    options.seconds = 60;
    Program program(words, options, true);
    EXPECT_TRUE(program.WaitFor([&] {
      return Exists("run/checkpoints/step-00000006") && Children(program.pid()).size() == 3;
    }));
    const std::vector<pid_t> ranks = Children(program.pid());
    if (ranks.size() == 3) kill(ranks[1], signal);
    return program.Wait();
  }
};

TEST_F(ProgramWatchdog, AStoppedRankIsNamed) {
  if (!WhyNoMpi().empty()) GTEST_SKIP() << WhyNoMpi();
  const auto begin = std::chrono::steady_clock::now();
  const ProgramResult result = Signalled(SIGSTOP);
  EXPECT_EQ(result.exit_code, 71);
  for (const char* words : {"a rank stopped answering, rank 1 of 3", "has not run for", "at step",
                            "Last good save", "resume run"})
    EXPECT_NE(result.err.find(words), std::string::npos) << words << " in\n" << result.err;
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(30));
}

// mpirun notices that itself, ends the others within a second and drops what they still write, so
// the block may be lost; mpirun's own message names the rank. The run goes on from its last save.
TEST_F(ProgramWatchdog, AKilledRankIsNamed) {
  if (!WhyNoMpi().empty()) GTEST_SKIP() << WhyNoMpi();
  const ProgramResult result = Signalled(SIGKILL);
  EXPECT_NE(result.exit_code, 0);
  EXPECT_NE(result.err.find("rank 1"), std::string::npos) << result.err;
  EXPECT_GE(SavedSteps("run").back(), 2);
}

}  // namespace
}  // namespace shoal
