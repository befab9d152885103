#include "launch/console.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <thread>

#include "core/base/error.h"
#include "launch/failure.h"
#include "tests/launch/temporary_directory.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

constexpr Terminal kPipe{};
constexpr Terminal kScreen{.interactive = true, .color = false, .columns = 80};

class ConsoleTest : public ::testing::Test {
 protected:
  ConsoleTest() : file_(open((tmp_.path() + "/out").c_str(), O_CREAT | O_RDWR | O_APPEND, 0600)) {}
  ~ConsoleTest() override { close(file_); }
  std::string Output() const { return ReadText(tmp_.path() + "/out"); }
  std::vector<std::string> Lines() const {
    std::istringstream in(Output());
    std::vector<std::string> lines;
    for (std::string line; std::getline(in, line);) lines.push_back(line);
    return lines;
  }

  TemporaryDirectory tmp_;
  const int file_;
};

StepMetrics Example(int64_t step, bool validated = false) {
  StepMetrics m;
  m.step = step;
  m.loss = 10.0 / static_cast<double>(step);
  m.grad_norm = 1234.5678 / static_cast<double>(step * step);
  m.lr = 2e-3;
  m.tokens_per_second = 12345.0 / static_cast<double>(step);
  m.seconds = 0.01;
  m.peak_bytes = {{"parameters", 1}, {"peak", 123456789}};
  if (validated) m.validation_loss = 1.5;
  return m;
}

TEST_F(ConsoleTest, PlainLinesWhereThereIsNoTerminal) {
  Console console(0, 2, file_, kPipe);
  for (int64_t step = 1; step <= 105; ++step) console.Step(Example(step, step == 33), 105, 10);
  console.EndProgress();
  const std::vector<std::string> lines = Lines();
  ASSERT_EQ(lines.size(), 1 + 10 + 1 + 1);  // the first, each tenth, the validated, the last
  EXPECT_THAT(lines[0], StartsWith("step   1/105  loss 10.0000 "));
  EXPECT_THAT(lines[4], HasSubstr("validation 1.5000"));
  const std::string output = Output();
  EXPECT_EQ(std::ranges::count_if(output, [](unsigned char c) { return c < 0x20 && c != '\n'; }),
            0);
  for (const std::string& line : lines) {
    EXPECT_EQ(line.find("tok/s"), lines[0].find("tok/s")) << line;
    EXPECT_EQ(line.find(" left"), lines[0].find(" left")) << line;
  }
}

TEST_F(ConsoleTest, OtherRanksAreSilentButLog) {
  Console console(1, 2, file_, kScreen);
  console.OpenLog(tmp_.path() + "/rank-1.log");
  console.Info("hello");
  console.Warn("careful");
  console.Step(Example(1), 10, 1);
  EXPECT_EQ(Output(), "");
  const std::string log = ReadText(tmp_.path() + "/rank-1.log");
  EXPECT_THAT(log, HasSubstr("I hello"));
  EXPECT_THAT(log, HasSubstr("W careful"));
  EXPECT_THAT(log, HasSubstr("step  1/10"));
}

TEST_F(ConsoleTest, LogIsAppendedTo) {
  for (int i = 0; i < 2; ++i) {
    Console console(0, 1, file_, kPipe);
    console.OpenLog(tmp_.path() + "/rank-0.log");
    console.Info(fmt::format("start {} {{}}", i));
  }
  EXPECT_THAT(ReadText(tmp_.path() + "/rank-0.log"), HasSubstr("start 0 {}"));
  EXPECT_THAT(ReadText(tmp_.path() + "/rank-0.log"), HasSubstr("start 1 {}"));
  Console console(0, 1, file_, kPipe);
  try {
    console.OpenLog("/proc/none/rank-0.log");
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kStorage);
  }
}

TEST_F(ConsoleTest, BarFitsTheTerminal) {
  for (const int columns : {1, 10, 40, 60, 80, 200}) {
    Terminal terminal = kScreen;
    terminal.columns = columns;
    Console console(0, 1, file_, terminal);
    console.Step(Example(1), 2, 1);
    console.Step(Example(2), 2, 1);
  }
  std::istringstream in(Output());
  int drawn = 0;
  size_t widest = 0;
  for (std::string part; std::getline(in, part, '\r');) {
    if (part.size() <= 3) continue;
    ++drawn;
    widest = std::max(widest, part.size() - 3);
    EXPECT_THAT(part, StartsWith("\x1b[K"));
  }
  EXPECT_EQ(drawn, 12);
  EXPECT_LT(widest, 120);
  EXPECT_THAT(Output(), Not(HasSubstr("\n")));
}

TEST_F(ConsoleTest, BarGivesWayToLines) {
  Console console(0, 1, file_, kScreen);
  console.Step(Example(1), 10, 1);
  console.Info("saved");
  EXPECT_THAT(Output(), ::testing::EndsWith("\r\x1b[Ksaved\n"));
  console.Step(Example(2, true), 10, 1);
  EXPECT_THAT(Output(), HasSubstr("validation 1.5000\n"));
  EXPECT_THAT(Output(), Not(HasSubstr("\x1b[3")));
  console.EndProgress();
  EXPECT_THAT(Output(), ::testing::EndsWith("\r\x1b[K"));
}

TEST_F(ConsoleTest, LinesOfThreadsDoNotInterleave) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      Console console(0, 4, file_, kPipe);
      for (int i = 0; i < 200; ++i) console.Info(std::string(100, static_cast<char>('a' + t)));
    });
  for (std::thread& thread : threads) thread.join();
  const std::vector<std::string> lines = Lines();
  ASSERT_EQ(lines.size(), 800);
  for (const std::string& line : lines) EXPECT_EQ(line, std::string(100, line[0]));
}

TEST_F(ConsoleTest, OddNumbers) {
  Console console(0, 1, file_, kPipe);
  StepMetrics m = Example(1);
  m.loss = std::nan("");
  m.grad_norm = HUGE_VAL;
  m.tokens_per_second = HUGE_VAL;
  m.peak_bytes.clear();
  console.Step(m, 1, 1);
  EXPECT_THAT(Output(), HasSubstr("loss nan"));
  EXPECT_THAT(Output(), HasSubstr("norm inf"));
}

TEST(ConsoleText, ShortForms) {
  EXPECT_EQ(ShortNumber(0), "0");
  EXPECT_EQ(ShortNumber(7), "7");
  EXPECT_EQ(ShortNumber(999), "999");
  EXPECT_EQ(ShortNumber(999.9), "1.00k");
  EXPECT_EQ(ShortNumber(1234), "1.23k");
  EXPECT_EQ(ShortNumber(12345), "12.3k");
  EXPECT_EQ(ShortNumber(999999), "1.00M");
  EXPECT_EQ(ShortNumber(124.4e6), "124M");
  EXPECT_EQ(ShortNumber(1.5), "1.50");
  EXPECT_EQ(ShortBytes(0), "0 B");
  EXPECT_EQ(ShortBytes(1023), "1023 B");
  EXPECT_EQ(ShortBytes(1 << 20), "1.00 MiB");
  EXPECT_EQ(ShortBytes(1.5e9), "1.40 GiB");
  EXPECT_EQ(ShortDuration(0), "0:00");
  EXPECT_EQ(ShortDuration(59.6), "1:00");
  EXPECT_EQ(ShortDuration(3661), "1:01:01");
  EXPECT_EQ(ShortDuration(90000), "1d 01:00");
  EXPECT_EQ(ShortDuration(std::nan("")), "?");
  EXPECT_EQ(ShortDuration(-1), "?");
}

// --- the error block

TEST(Failure, BlockOfARunUnderALauncher) {
  FailureContext context;
  context.program = "build/bin/shoal";
  context.launcher = "mpirun -n 4 ";
  context.ranks = 4;
  context.run = "runs/my run";
  context.last_save = "runs/my run/checkpoints/step-00000400";
  SetThreadRank(3);
  const Error error(ErrorKind::kStorage, "checkpoint", "cannot write x: No space left on device",
                    __FILE__, __LINE__);
  SetThreadRank(0);
  EXPECT_EQ(ErrorBlock(error, context, "node7", false),
            "shoal: storage error, rank 3 of 4 on node7 (exit code 73)\n"
            "  cannot write x: No space left on device\n"
            "  Last good save: runs/my run/checkpoints/step-00000400\n"
            "  To go on:       mpirun -n 4 build/bin/shoal resume 'runs/my run'\n");
}

TEST(Failure, BlockBeforeThereIsARun) {
  const Error error(ErrorKind::kConfig, "config", "c.toml:1:1: one\nc.toml:2:1: two", __FILE__,
                    __LINE__);
  EXPECT_EQ(ErrorBlock(error, {}, "node7", false),
            "shoal: configuration error (exit code 2)\n  c.toml:1:1: one\n  c.toml:2:1: two\n");
  EXPECT_THAT(ErrorBlock(error, {}, "node7", true), StartsWith("\x1b[1;31mshoal: configuration"));
}

TEST(Failure, BugsNameOurSource) {
  const Error error(ErrorKind::kBug, "matmul", "inner dimensions differ", "a/b.cc", 42);
  const std::string block = ErrorBlock(error, {}, "h", false);
  EXPECT_THAT(block, HasSubstr("[matmul] inner dimensions differ"));
  EXPECT_THAT(block, HasSubstr("a/b.cc:42"));
}

TEST(Failure, ResumeCommands) {
  FailureContext context;
  context.run = "r";
  EXPECT_EQ(ResumeCommand(context), "shoal resume r");
  context.ranks = 3;
  context.threads = true;
  EXPECT_EQ(ResumeCommand(context), "shoal resume r --local-ranks 3");
  EXPECT_EQ(ShellWord(""), "''");
  EXPECT_EQ(ShellWord("it's"), "'it'\\''s'");
  EXPECT_EQ(ShellWord("a$b"), "'a$b'");
}

TEST(Failure, ConsoleKeepsTheContext) {
  const FailureContext before = CurrentFailureContext();
  const TemporaryDirectory tmp;
  Console console(1, 2);
  console.SetLastSave("runs/a/checkpoints/step-7");
  EXPECT_EQ(CurrentFailureContext().run, "runs/a");
  EXPECT_EQ(CurrentFailureContext().last_save, "runs/a/checkpoints/step-7");
  SetFailureContext([&](FailureContext& context) { context = before; });
}

}  // namespace
}  // namespace shoal
