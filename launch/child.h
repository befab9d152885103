// This program once more, as a child process that may be killed.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

namespace shoal {

class Child {
 public:
  // Starts this program with `arguments`; what it prints goes to the end of the file `output`.
  Child(const std::vector<std::string>& arguments, const std::string& output);
  ~Child();  // kills it
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  pid_t pid() const { return pid_; }
  // Its exit code, or -S if signal S has ended it; nothing while it runs.
  std::optional<int> Ended();
  int Wait();
  int Kill();  // SIGKILL, and waits
  // Of the size of its files, from now on; negative: none. Where it is met, writing fails as on a
  // full disk.
  void LimitFiles(int64_t bytes) const;

 private:
  pid_t pid_ = -1;
  std::optional<int> ended_;
};

}  // namespace shoal
