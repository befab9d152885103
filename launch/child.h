// This program once more, as a child process that may be killed, or as ranks under mpirun.
#pragma once

#include <sys/types.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace shoal {

// Whether it is there, and has not ended.
bool IsRunning(pid_t pid);

class Child {
 public:
  // Starts this program with `arguments`; what it prints goes to the end of the file `output`.
  // `ranks` > 0: as so many processes of this host, by mpirun. Error(kConfig) if there is none.
  Child(const std::vector<std::string>& arguments, const std::string& output, int ranks = 0);
  ~Child();  // kills it
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  // The processes that run `arguments`, by rank; under mpirun only those that are there.
  std::map<int, pid_t> Ranks() const;
  // Its exit code (mpirun's), or -S if signal S has ended it; nothing while it runs.
  std::optional<int> Ended();
  int Wait();
  int Kill();  // SIGKILL to all of its processes, and waits
  // Of the size of its files, from now on; negative: none. Where it is met, writing fails as on a
  // full disk.
  void LimitFiles(int64_t bytes) const;

 private:
  std::vector<pid_t> Children() const;

  int ranks_ = 0;
  pid_t pid_ = -1;
  std::optional<int> ended_;
};

}  // namespace shoal
