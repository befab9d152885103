// `shoal torture`: whether what this machine does to a run can lose it. A copy of the run, of a few
// steps, is killed at random moments and resumed, meets a full disk, and has its saves damaged.
#pragma once

#include <cstdint>
#include <string>

namespace shoal {

struct TortureOptions {
  std::string run;      // which is only read; the copy lives beside it, on the same file system
  int64_t kills = 20;   // SIGKILLs; every other one is aimed at a save
  int64_t flips = 100;  // damages to a save: flipped bits, cut files, files of another save
  uint64_t seed = 1;    // of when and where
  int local_ranks = 1;  // of the copy, as threads
  // Or as processes under mpirun: then rank 0, any one and all of them are killed in turn, and
  // those that are left must end within ten seconds.
  int ranks = 0;
  bool json = false;
};

// Prints a table; 0 if nothing was lost and no damage overlooked, else 73. Error(kStorage),
// Error(kConfig) if the run cannot be copied or trained, on so many ranks.
int TortureCommand(const TortureOptions& options);

}  // namespace shoal
