#include "launch/child.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>

#include "core/base/error.h"

extern char** environ;

namespace shoal {

Child::Child(const std::vector<std::string>& arguments, const std::string& output) {
  std::vector<std::string> words = {"shoal"};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_addopen(&files, STDOUT_FILENO, output.c_str(),
                                   O_WRONLY | O_CREAT | O_APPEND, 0666);
  posix_spawn_file_actions_adddup2(&files, STDOUT_FILENO, STDERR_FILENO);
  const int error = posix_spawn(&pid_, "/proc/self/exe", &files, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&files);
  if (error != 0)
    SHOAL_FAIL(ErrorKind::kStorage, "child", "this program cannot be started again: {}",
               std::strerror(error));
}

Child::~Child() {
  if (!ended_) Kill();
}

std::optional<int> Child::Ended() {
  int status = 0;
  if (!ended_ && waitpid(pid_, &status, WNOHANG) == pid_)
    ended_ = WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
  return ended_;
}

int Child::Wait() {
  int status = 0;
  while (!ended_) {
    if (waitpid(pid_, &status, 0) == pid_)
      ended_ = WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
    else if (errno != EINTR)
      SHOAL_FAIL(ErrorKind::kBug, "child", "process {} is lost: {}", pid_, std::strerror(errno));
  }
  return *ended_;
}

int Child::Kill() {
  kill(pid_, SIGKILL);
  return Wait();
}

void Child::LimitFiles(int64_t bytes) const {
  rlimit limit = {};
  prlimit(pid_, RLIMIT_FSIZE, nullptr, &limit);
  limit.rlim_cur = bytes < 0 ? limit.rlim_max : static_cast<rlim_t>(bytes);
  if (prlimit(pid_, RLIMIT_FSIZE, &limit, nullptr) != 0)
    SHOAL_FAIL(ErrorKind::kStorage, "child", "the files of process {} cannot be limited: {}", pid_,
               std::strerror(errno));
}

}  // namespace shoal
