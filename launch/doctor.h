// `shoal doctor`: what this machine offers, and what would fail later. Checks that need a library
// that only one file may include come from the caller.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace shoal {

struct Check {
  enum Status { kOk, kWarn, kFail };
  Status status = kOk;
  std::string name;    // "memory"
  std::string found;   // "15.6 GiB, 12.1 GiB free"
  std::string advice;  // what to do; empty if all is well
};

// Cores, CPU features, memory, shared memory, GPU, and writing in `directory`.
std::vector<Check> CheckMachine(const std::string& directory);
// One line each, aligned; the advice on a line of its own.
std::string CheckText(const std::vector<Check>& checks, bool color);
// {"ok": bool, "checks": [{"name", "status", "found", "advice"}]}
std::string CheckJson(const std::vector<Check>& checks);

// Prints the checks of this machine and those of `more` (MPI, HDF5, ...). Returns 0, or 70 if
// something would fail.
int DoctorCommand(bool json, const std::vector<std::function<Check()>>& more = {});

}  // namespace shoal
