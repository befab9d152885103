// With AddressSanitizer GCC takes members of std::regex for uninitialised (its bug 105562), where
// they are inlined.
#ifdef __SANITIZE_ADDRESS__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "tests/launch/program.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <random>
#include <regex>

#include "checkpoint/store.h"
#include "core/base/build_config.h"
#include "launch/config.h"
#include "launch/session.h"

extern char** environ;

namespace shoal {
namespace {

namespace fs = std::filesystem;

// Ours, without what another launcher has left in it.
std::vector<std::string> ChildEnvironment() {
  std::vector<std::string> kept;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    bool ours = false;
    for (const char* prefix : {"OMPI_COMM_", "PMIX_", "PMI_", "SLURM_", "OMP_NUM_THREADS="})
      ours = ours || text.starts_with(prefix);
    if (!ours) kept.emplace_back(text);
  }
  kept.emplace_back("OMP_NUM_THREADS=1");  // several ranks on few cores must not spin
  return kept;
}

// OpenMPI keeps memory of components that it unloads before AddressSanitizer looks for leaks, which
// then cannot tell whose they are. Ranks as threads are searched for ours.
void IgnoreLeaks(std::vector<std::string>& environment) {
  std::string options = "ASAN_OPTIONS=";
  for (const std::string& entry : environment)
    if (entry.starts_with(options)) options = entry + ":";
  std::erase_if(environment,
                [](const std::string& entry) { return entry.starts_with("ASAN_OPTIONS="); });
  environment.push_back(options + "detect_leaks=0");
}

std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  for (std::string& s : strings) pointers.push_back(s.data());
  pointers.push_back(nullptr);
  return pointers;
}

std::string Mpirun() {
  const char* path = std::getenv("PATH");
  std::istringstream folders(path == nullptr ? "" : path);
  for (std::string folder; std::getline(folders, folder, ':');)
    if (access((folder + "/mpirun").c_str(), X_OK) == 0) return folder + "/mpirun";
  return "";
}

}  // namespace

std::vector<std::string> MpirunWords() {
  // Without the wait of a second between the two signals to ranks whose peer has failed.
  return {Mpirun(), "--allow-run-as-root",       "--oversubscribe",
          "--mca",  "odls_base_sigkill_timeout", "0"};
}

std::string ProgramPath() { return std::string(SHOAL_BINARY_DIR) + "/bin/shoal"; }

std::string WhyNoMpi() {
  if (!kHaveMpi) return "this build has no MPI";
  if (Mpirun().empty()) return "there is no mpirun here";
  return "";
}

Program::Program(const std::vector<std::string>& arguments, const ProgramOptions& options,
                 bool raw) {
  std::vector<std::string> words;
  if (options.mpi_ranks > 0) {
    words = MpirunWords();
    words.insert(words.end(), {"-n", std::to_string(options.mpi_ranks)});
  }
  if (!raw) words.push_back(ProgramPath());
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<std::string> environment = ChildEnvironment();
  if (words[0] == Mpirun()) IgnoreLeaks(environment);
  const std::vector<char*> argv = Pointers(words), envp = Pointers(environment);
  int out[2], err[2];
  if (pipe2(out, O_CLOEXEC) != 0 || pipe2(err, O_CLOEXEC) != 0) throw std::bad_alloc();
  deadline_ = Clock::now() + std::chrono::microseconds(static_cast<int64_t>(options.seconds * 1e6));
  pid_ = fork();
  if (pid_ == 0) {
    // Only calls that are safe after fork in a process with threads.
    setpgid(0, 0);
    dup2(out[1], STDOUT_FILENO);
    dup2(err[1], STDERR_FILENO);
    if (!options.directory.empty() && chdir(options.directory.c_str()) != 0) _exit(126);
    if (options.file_size_limit > 0) {
      const rlimit limit = {static_cast<rlim_t>(options.file_size_limit),
                            static_cast<rlim_t>(options.file_size_limit)};
      if (setrlimit(RLIMIT_FSIZE, &limit) != 0) _exit(126);
    }
    if (options.user > 0 && (setgid(static_cast<gid_t>(options.user)) != 0 ||
                             setuid(static_cast<uid_t>(options.user)) != 0)) {
      _exit(126);
    }
    execve(argv[0], argv.data(), envp.data());
    _exit(127);
  }
  if (pid_ > 0) setpgid(pid_, pid_);
  close(out[1]);
  close(err[1]);
  pipes_[0] = out[0];
  pipes_[1] = err[0];
  for (int pipe : pipes_) fcntl(pipe, F_SETFL, O_NONBLOCK);
}

Program::~Program() {
  if (!ended_) {
    Signal(SIGKILL);
    deadline_ = Clock::now() + std::chrono::seconds(5);
    Wait();
  }
}

void Program::Signal(int signal) const {
  if (!ended_) kill(signal == SIGKILL ? -pid_ : pid_, signal);
}

void Program::Poll(int milliseconds) {
  pollfd files[2] = {{pipes_[0], POLLIN, 0}, {pipes_[1], POLLIN, 0}};
  poll(files, 2, milliseconds);
  std::string* const texts[2] = {&result_.out, &result_.err};
  for (int i = 0; i < 2; ++i) {
    char buffer[4096];
    while (pipes_[i] >= 0) {
      const ssize_t n = read(pipes_[i], buffer, sizeof(buffer));
      if (n > 0) {
        texts[i]->append(buffer, static_cast<size_t>(n));
      } else if (n == 0) {
        close(std::exchange(pipes_[i], -1));
      } else if (errno != EINTR) {
        break;
      }
    }
  }
  if (ended_) return;
  int status = 0;
  rusage usage{};
  if (wait4(pid_, &status, WNOHANG, &usage) != pid_) return;
  ended_ = true;
  result_.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  result_.resident_kib = usage.ru_maxrss;
}

bool Program::Running() {
  Poll(0);
  return !ended_;
}

bool Program::WaitFor(const std::function<bool()>& condition) {
  while (!condition()) {
    if (!Running() || Clock::now() > deadline_) return condition();
    Poll(2);
  }
  return true;
}

ProgramResult Program::Wait() {
  while (!ended_) {
    if (Clock::now() > deadline_ && !result_.timed_out) {
      result_.timed_out = true;
      kill(-pid_, SIGKILL);
    }
    Poll(pipes_[0] < 0 && pipes_[1] < 0 ? 1 : 20);
  }
  // What is still in the pipes. A process that it has left behind may hold them open.
  for (int tries = 0; tries < 50 && (pipes_[0] >= 0 || pipes_[1] >= 0); ++tries) Poll(20);
  for (int& pipe : pipes_)
    if (pipe >= 0) close(std::exchange(pipe, -1));
  return result_;
}

ProgramResult RunProgram(const std::vector<std::string>& arguments, const ProgramOptions& options) {
  return Program(arguments, options).Wait();
}

Settings::Settings(const std::string& data) {
  Set("run.dir", "\"run\"").Set("run.steps", "6");
  Set("model.family", "\"llama\"").Set("model.layers", "1").Set("model.d_model", "16");
  Set("model.heads", "2").Set("model.mlp", "24");
  Set("data.path", "\"" + data + "\"").Set("data.sequence_length", "8");
  Set("batch.sequences", "12");
  Set("optim.name", "\"adamw\"").Set("optim.lr", "1e-2");
  Set("precision.compute", "\"fp64\"");
}

Settings& Settings::Set(const std::string& key, const std::string& toml) {
  const size_t dot = key.find('.');
  sections_[key.substr(0, dot)][key.substr(dot + 1)] = toml;
  return *this;
}

Settings& Settings::Remove(const std::string& key) {
  const size_t dot = key.find('.');
  sections_[key.substr(0, dot)].erase(key.substr(dot + 1));
  return *this;
}

std::string Settings::Text() const {
  std::string text;
  for (const auto& [section, keys] : sections_) {
    text += fmt::format("[{}]\n", section);
    for (const auto& [key, value] : keys) text += fmt::format("{} = {}\n", key, value);
  }
  return text;
}

void WriteText(const std::string& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  if (!out.flush()) ADD_FAILURE() << "cannot write " << path;
}

std::string SomeText(int64_t bytes, int seed) {
  static constexpr const char* kWords[] = {"the", "ship", "sails",  "over", "a",  "quiet",
                                           "sea", "and",  "nobody", "sees", "it", "go"};
  std::mt19937 random(static_cast<uint32_t>(seed));
  std::string text;
  while (static_cast<int64_t>(text.size()) < bytes) {
    text += kWords[random() % std::size(kWords)];
    text += random() % 12 == 0 ? ".\n" : " ";
  }
  text.resize(static_cast<size_t>(bytes));
  return text;
}

ProgramTest::ProgramTest() { WriteText(Path("corpus.txt"), SomeText(4000)); }

bool ProgramTest::Exists(const std::string& name) const { return fs::exists(Path(name)); }

ProgramResult ProgramTest::Run(const std::vector<std::string>& arguments, ProgramOptions options) {
  if (options.directory.empty()) options.directory = directory_.path();
  ProgramResult result = RunProgram(arguments, options);
  EXPECT_FALSE(result.timed_out) << "a hang:\n" << result.out << result.err;
  return result;
}

ProgramResult ProgramTest::Must(const std::vector<std::string>& arguments, ProgramOptions options) {
  ProgramResult result = Run(arguments, std::move(options));
  EXPECT_EQ(result.exit_code, 0) << result.out << result.err;
  return result;
}

ProgramResult ProgramTest::Train(const Settings& settings, const std::vector<std::string>& more,
                                 ProgramOptions options, const std::string& name) {
  WriteText(Path(name), settings.Text());
  std::vector<std::string> arguments = {"train", name};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return Run(arguments, std::move(options));
}

std::vector<StepMetrics> ProgramTest::Metrics(const std::string& run) const {
  const MetricsFile file = ReadMetrics(Path(run + "/metrics.jsonl"));
  EXPECT_EQ(file.skipped_lines, 0);
  return file.steps;
}

std::vector<int64_t> ProgramTest::SavedSteps(const std::string& run) const {
  std::vector<int64_t> steps;
  for (const SaveEntry& save : ListSaves(Path(run + "/checkpoints"))) steps.push_back(save.step);
  std::reverse(steps.begin(), steps.end());
  return steps;
}

std::string ProgramTest::NewestSave(const std::string& run) const {
  const std::vector<SaveEntry> saves = ListSaves(Path(run + "/checkpoints"));
  if (saves.empty()) ADD_FAILURE() << run << " has no save";
  return saves.empty() ? "" : saves[0].path;
}

std::map<std::string, std::vector<double>> ProgramTest::Tensors(const std::string& run) const {
  std::map<std::string, std::vector<double>> tensors;
  const std::string save = NewestSave(run);
  if (save.empty()) return tensors;
  Config config = ParseConfig(ReadSaveInfo(save).config, save);
  config.mesh = {};  // read on one rank, whatever it was written on
  config.zero = {};
  const auto communicator = MakeSelfCommunicator();
  TrainingStep step(MakeTrainingOptions(config, CheckBatch(config, 1)), *communicator);
  const StateDict state = step.State();
  LoadState(save, state);
  for (const StateEntry& entry : state) tensors[entry.name] = entry.tensor.ToVector();
  return tensors;
}

void ProgramTest::ExpectOneBlock(const ProgramResult& result, int code,
                                 const std::vector<std::string>& words) {
  const std::string& text = result.err;
  EXPECT_EQ(result.exit_code, code) << text;
  EXPECT_EQ(result.out, "");
  // "shoal: data error, rank 0 of 3 on host (exit code 72)", then lines that are set in.
  static const std::regex head("(^|\n)shoal: [^\n]*\\(exit code ([0-9]+)\\)\n(  [^\n]+\n)+");
  const std::sregex_iterator first(text.begin(), text.end(), head), none;
  ASSERT_EQ(std::distance(first, none), 1) << "blocks in:\n" << text;
  const std::string block = first->str();
  EXPECT_EQ(first->str(2), std::to_string(code)) << text;
  for (const std::string& word : words)
    EXPECT_NE(block.find(word), std::string::npos) << '"' << word << "\" in:\n" << text;
  // mpirun adds lines of its own, we do not.
  const bool launched =
      text.find("mpirun") != std::string::npos || text.find("MPI_ABORT") != std::string::npos;
  EXPECT_TRUE(launched || block.size() == text.size()) << text;
}

void ProgramTest::ExpectNoRun(const std::string& run) const {
  const fs::path path = Path(run);
  if (!fs::exists(path.parent_path())) return;
  for (const auto& entry : fs::directory_iterator(path.parent_path()))
    EXPECT_FALSE(entry.path().filename().string().starts_with(path.filename().string()))
        << entry.path() << " was left behind";
}

}  // namespace shoal
