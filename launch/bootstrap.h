// From a command line to ranks: one process, threads (--local-ranks), or what mpirun or srun
// started.
#pragma once

#include <functional>

#include "core/base/error.h"
#include "launch/commands.h"
#include "parallel/communicator.h"

namespace shoal {

// Runs f on every rank of this process and returns the exit code of the program. An Error ends all
// ranks and is printed once, by the lowest rank that has it. f begins with Agree, so that a process
// whose command line is wrong (FailOnAllRanks) meets the others there.
int RunRanks(const RunOptions& options, const std::function<int(Communicator&)>& f);

// What is wrong with this process before it runs anything, told to all ranks and printed once.
// Returns the exit code.
int FailOnAllRanks(const Error& error);

// True if a launcher started several of us: rank and size by its variables. Starts nothing.
struct Launcher {
  bool present = false;
  int rank = 0, size = 1;
};
Launcher DetectLauncher();

// Runs f on this rank; if it throws Error on any rank, throws the lowest such rank's Error on all
// of them. Collective: what can fail on one rank alone (a file that only one host has) becomes a
// common end instead of a hang.
void Agree(Communicator& communicator, const std::function<void()>& f);

}  // namespace shoal
