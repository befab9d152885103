// `shoal doctor`: what this machine offers, and what would fail later.
#pragma once

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
// MPI is started, in a process of its own; HDF5 writes a file in `directory` and reads it.
std::vector<Check> CheckLibraries(const std::string& directory);

// One line each, aligned; the advice on a line of its own.
std::string CheckText(const std::vector<Check>& checks, bool color);
// {"ok": bool, "checks": [{"name", "status", "found", "advice"}]}
std::string CheckJson(const std::vector<Check>& checks);

// Prints all checks, for the current directory. Returns 0, or 2 if something would fail.
int DoctorCommand(bool json);

}  // namespace shoal
