// The real program as a child process, and what its tests say about it.
#pragma once

#include <gtest/gtest.h>
#include <sys/types.h>

#include <chrono>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "launch/metrics.h"
#include "tests/launch/temporary_directory.h"

namespace shoal {

// Where the program stands; its directory is the one that CMake builds into.
std::string ProgramPath();

struct ProgramResult {
  int exit_code = -1;  // -S: ended by signal S
  bool timed_out = false;
  std::string out, err;
  int64_t resident_kib = 0;  // the largest of the child itself and those it waited for
};

// A sanitizer makes the program, and its start under mpirun, about ten times as slow.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr double kProgramSeconds = 300;
#else
inline constexpr double kProgramSeconds = 30;
#endif

struct ProgramOptions {
  int mpi_ranks = 0;                 // > 0: under mpirun -n
  std::string directory;             // to run in
  double seconds = kProgramSeconds;  // a hang is a failure
  int64_t file_size_limit = 0;       // > 0: RLIMIT_FSIZE
  int user = 0;                      // > 0: run as this user, which only root can ask for
};

class Program {
 public:
  // `arguments` of the program, or (`raw`) all of a command line with its program.
  Program(const std::vector<std::string>& arguments, const ProgramOptions& options = {},
          bool raw = false);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  pid_t pid() const { return pid_; }
  void Signal(int signal) const;
  bool Running();
  // Polls; false if it did not come true while the program ran and within its time.
  bool WaitFor(const std::function<bool()>& condition);
  ProgramResult Wait();

 private:
  void Poll(int milliseconds);  // takes what the child has written, and its end

  using Clock = std::chrono::steady_clock;
  Clock::time_point deadline_;
  pid_t pid_ = -1;
  int pipes_[2] = {-1, -1};  // the child's standard output and error
  bool ended_ = false;
  ProgramResult result_;
};

ProgramResult RunProgram(const std::vector<std::string>& arguments,
                         const ProgramOptions& options = {});

// "mpirun" and what it needs to run here.
std::vector<std::string> MpirunWords();
// Why MPI tests cannot run here; empty if they can.
std::string WhyNoMpi();

// A configuration file in the making: "section.key" -> value as TOML.
class Settings {
 public:
  // One layer of width 16, 12 sequences of 8 bytes, six steps of fp64.
  explicit Settings(const std::string& data = "corpus.txt");
  Settings& Set(const std::string& key, const std::string& toml);
  Settings& Remove(const std::string& key);
  std::string Text() const;

 private:
  std::map<std::string, std::map<std::string, std::string>> sections_;
};

void WriteText(const std::string& path, const std::string& text);

// English-looking words, the same on every machine.
std::string SomeText(int64_t bytes, int seed = 1);

// Runs in a directory of its own that holds corpus.txt and what a test adds.
class ProgramTest : public ::testing::Test {
 protected:
  ProgramTest();
  std::string Path(const std::string& name) const { return directory_.path() + "/" + name; }
  bool Exists(const std::string& name) const;
  // Writes the settings as `name` and starts training on them.
  ProgramResult Train(const Settings& settings, const std::vector<std::string>& more = {},
                      ProgramOptions options = {}, const std::string& name = "a.toml");
  ProgramResult Run(const std::vector<std::string>& arguments, ProgramOptions options = {});
  // The same, but it must end well.
  ProgramResult Must(const std::vector<std::string>& arguments, ProgramOptions options = {});

  std::vector<StepMetrics> Metrics(const std::string& run) const;
  // What the newest save of a run holds, by name: parameters and optimizer states.
  std::map<std::string, std::vector<double>> Tensors(const std::string& run) const;
  std::string NewestSave(const std::string& run) const;
  std::vector<int64_t> SavedSteps(const std::string& run) const;

  // One block on standard error that holds all `words`, nothing on standard output.
  static void ExpectOneBlock(const ProgramResult& result, int code,
                             const std::vector<std::string>& words);
  // Neither the run nor anything of its making.
  void ExpectNoRun(const std::string& run = "run") const;

  TemporaryDirectory directory_;
};

}  // namespace shoal
