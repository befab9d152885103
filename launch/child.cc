#include "launch/child.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "core/base/error.h"

extern char** environ;

namespace shoal {

namespace {

int CodeOf(int status) { return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status); }

// What mpirun is to start.
std::string ThisProgram() {
  std::error_code error;
  const std::filesystem::path path = std::filesystem::read_symlink("/proc/self/exe", error);
  return error ? "/proc/self/exe" : path.string();
}

std::vector<std::string> MpirunWords(int ranks) {
  std::vector<std::string> words = {"mpirun", "--oversubscribe", "-n", std::to_string(ranks)};
  if (geteuid() == 0) words.emplace_back("--allow-run-as-root");
  words.push_back(ThisProgram());
  return words;
}

// Of a process that mpirun has started; nothing before it is our program.
std::optional<int> RankOf(pid_t pid) {
  std::ifstream in(fmt::format("/proc/{}/environ", pid), std::ios::binary);
  const std::string key = "OMPI_COMM_WORLD_RANK=";
  for (std::string entry; std::getline(in, entry, '\0');)
    if (entry.starts_with(key)) return std::atoi(entry.c_str() + key.size());
  return std::nullopt;
}

}  // namespace

bool IsRunning(pid_t pid) {
  std::ifstream in(fmt::format("/proc/{}/stat", pid));
  std::string text;
  std::getline(in, text);
  // "12 (name) S ..": a name may hold anything.
  const size_t state = text.rfind(") ");
  return state != std::string::npos && text[state + 2] != 'Z' && text[state + 2] != 'X';
}

Child::Child(const std::vector<std::string>& arguments, const std::string& output, int ranks)
    : ranks_(ranks) {
  std::vector<std::string> words =
      ranks > 0 ? MpirunWords(ranks) : std::vector<std::string>{"shoal"};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_addopen(&files, STDOUT_FILENO, output.c_str(),
                                   O_WRONLY | O_CREAT | O_APPEND, 0666);
  posix_spawn_file_actions_adddup2(&files, STDOUT_FILENO, STDERR_FILENO);
  const int error = posix_spawnp(&pid_, ranks > 0 ? "mpirun" : "/proc/self/exe", &files, nullptr,
                                 argv.data(), environ);
  posix_spawn_file_actions_destroy(&files);
  if (error != 0 && ranks > 0)
    SHOAL_FAIL(ErrorKind::kConfig, "child",
               "mpirun cannot be started: {}. Install it, or take ranks that are threads",
               std::strerror(error));
  if (error != 0)
    SHOAL_FAIL(ErrorKind::kStorage, "child", "this program cannot be started again: {}",
               std::strerror(error));
}

Child::~Child() {
  if (!ended_) Kill();
}

std::optional<int> Child::Ended() {
  int status = 0;
  if (!ended_ && waitpid(pid_, &status, WNOHANG) == pid_) ended_ = CodeOf(status);
  return ended_;
}

int Child::Wait() {
  int status = 0;
  while (!ended_) {
    if (waitpid(pid_, &status, 0) == pid_)
      ended_ = CodeOf(status);
    else if (errno != EINTR)
      SHOAL_FAIL(ErrorKind::kBug, "child", "process {} is lost: {}", pid_, std::strerror(errno));
  }
  return *ended_;
}

std::vector<pid_t> Child::Children() const {
  std::ifstream in(fmt::format("/proc/{0}/task/{0}/children", pid_));
  return {std::istream_iterator<pid_t>(in), {}};
}

std::map<int, pid_t> Child::Ranks() const {
  if (ranks_ == 0) return {{0, pid_}};
  std::map<int, pid_t> ranks;
  for (const pid_t pid : Children())
    if (const std::optional<int> rank = RankOf(pid)) ranks[*rank] = pid;
  return ranks;
}

int Child::Kill() {
  if (ended_) return *ended_;
  if (ranks_ > 0) {
    // One that is stopped starts no more of them.
    kill(pid_, SIGSTOP);
    int status = 0;
    while (waitpid(pid_, &status, WUNTRACED) < 0 && errno == EINTR) {
    }
    if (!WIFSTOPPED(status)) {
      ended_ = CodeOf(status);
      return *ended_;
    }
    for (const pid_t rank : Children()) kill(rank, SIGKILL);
  }
  kill(pid_, SIGKILL);
  return Wait();
}

void Child::LimitFiles(int64_t bytes) const {
  for (const auto& [rank, pid] : Ranks()) {
    rlimit limit = {};
    prlimit(pid, RLIMIT_FSIZE, nullptr, &limit);
    limit.rlim_cur = bytes < 0 ? limit.rlim_max : static_cast<rlim_t>(bytes);
    if (prlimit(pid, RLIMIT_FSIZE, &limit, nullptr) != 0 && errno != ESRCH)
      SHOAL_FAIL(ErrorKind::kStorage, "child", "the files of process {} cannot be limited: {}", pid,
                 std::strerror(errno));
  }
}

}  // namespace shoal
