// `shoal torture` on a small run: nothing that this machine does to it loses anything.
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "tests/launch/program.h"

namespace shoal {
namespace {

class ProgramTorture : public ProgramTest {
 protected:
  // mpirun then waits no second between the two signals to ranks whose peer is dead.
  static void EndAtOnce() { setenv("OMPI_MCA_odls_base_sigkill_timeout", "0", 1); }

  // Every trial must have been made, and passed.
  void ExpectPassed(const Settings& settings, const std::vector<std::string>& options,
                    const ProgramOptions& program = {}) {
    ASSERT_EQ(Train(settings, {"--local-ranks", "4"}).exit_code, 0);
    std::vector<std::string> words = {"torture", "run", "--json"};
    words.insert(words.end(), options.begin(), options.end());
    const ProgramResult result = Run(words, program);
    EXPECT_EQ(result.exit_code, 0) << result.out << result.err;
    const auto json = nlohmann::json::parse(result.out, nullptr, false);
    ASSERT_TRUE(json.is_object()) << result.out;
    EXPECT_TRUE(json.value("passed", false));
    ASSERT_EQ(json["trials"].size(), 6u);
    for (const auto& trial : json["trials"]) {
      EXPECT_GT(trial["tries"], 0) << trial;
      EXPECT_EQ(trial["tries"], trial["passed"]) << trial;
    }
    for (const auto& entry : std::filesystem::directory_iterator(directory_.path()))
      EXPECT_EQ(entry.path().filename().string().find("torture"), std::string::npos);
  }
};

TEST_F(ProgramTorture, AFewKills) {
  ExpectPassed(Settings(), {"--kills", "5", "--flips", "100"}, {.seconds = 120});
}

// Rank 0, any one, all.
TEST_F(ProgramTorture, AFewKillsOfProcesses) {
  if (!WhyNoMpi().empty()) GTEST_SKIP() << WhyNoMpi();
  EndAtOnce();
  ExpectPassed(Settings(), {"--kills", "3", "--flips", "10", "--ranks", "2"}, {.seconds = 120});
}

TEST_F(ProgramTorture, OfTooFewRanks) {
  Settings settings;
  settings.Set("mesh.tp", "2").Set("run.steps", "1");
  ASSERT_EQ(Train(settings, {"--local-ranks", "2"}).exit_code, 0);
  ExpectOneBlock(Run({"torture", "run"}), 2, {"1 rank", "tp 2", "start 2", "--local-ranks"});
  ExpectOneBlock(Run({"torture", "run", "--ranks", "2", "--local-ranks", "2"}), 2,
                 {"use one of the two"});
}

TEST_F(ProgramTorture, OfWhatIsNoRun) {
  ExpectOneBlock(Run({"torture", "nothing"}), 73, {"nothing does not exist"});
  ExpectOneBlock(Run({"torture", "corpus.txt"}), 73, {"not a directory"});
  ASSERT_EQ(Train(Settings()).exit_code, 0);
  std::filesystem::remove(Path("corpus.txt"));
  ExpectOneBlock(Run({"torture", "run"}), 73, {"the copy whole ended with 72", "corpus.txt"});
}

class LongTorture : public ProgramTorture {};

TEST_F(LongTorture, OneRank) {
  ExpectPassed(Settings(), {"--kills", "200", "--flips", "1000"}, {.seconds = 900});
}

TEST_F(LongTorture, FourRanks) {
  Settings settings;
  settings.Set("zero.stage", "3").Set("model.family", "\"gpt2\"").Set("model.dropout", "0.1");
  ExpectPassed(settings, {"--kills", "200", "--flips", "1000", "--local-ranks", "4", "--seed", "2"},
               {.seconds = 900});
}

TEST_F(LongTorture, FourProcesses) {
  if (!WhyNoMpi().empty()) GTEST_SKIP() << WhyNoMpi();
  EndAtOnce();
  Settings settings;
  settings.Set("mesh.tp", "2").Set("zero.stage", "2");
  ExpectPassed(settings, {"--kills", "200", "--flips", "100", "--ranks", "4", "--seed", "3"},
               {.seconds = 1700});
}

}  // namespace
}  // namespace shoal
