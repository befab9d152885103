// A rank's part of a save: one file that holds the pieces of tensors which this rank has.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/digest.h"
#include "checkpoint/file_io.h"
#include "checkpoint/hdf5_file.h"
#include "checkpoint/manifest.h"
#include "core/state_dict.h"

namespace shoal {

// Where everything will lie. A run's state has the same names and shapes at every save, so it plans
// once; no call of HDF5 is made while it trains.
struct PartPlan {
  std::string file;  // its name; the part is empty and has no file if there are no arrays
  std::vector<Hdf5Array> arrays;
  std::vector<Piece> pieces;  // of each array
  Hdf5Layout layout;
  int64_t data_bytes = 0;  // of all arrays
};
PartPlan PlanPart(int rank, const StateDict& state);

// Writes the arrays' bytes as they come, one array after the other in the order of the plan, and
// takes their digests. May be used by any one thread.
class PartFile {
 public:
  // In the directory `partial`, which is made if it is not there. The file's space is taken first.
  PartFile(const std::string& partial, const PartPlan& plan, const FullDisk& full_disk);

  // Ends between two elements.
  void Append(const void* data, int64_t bytes);
  // All is on the disk; returns the part's text for CommitSave.
  std::string Finish();
  // The first array in which an infinite value or a NaN was seen; empty if there is none.
  const std::string& non_finite() const { return non_finite_; }

 private:
  void AppendToArray(const char* data, int64_t bytes);
  void PassEmpty();

  const PartPlan& plan_;
  FullDisk full_disk_;
  std::unique_ptr<File> file_;
  RunningDigest digest_;  // of the chunk so far
  Part part_;
  size_t array_ = 0;  // that comes next
  int64_t done_ = 0;  // of its bytes
  std::vector<std::string> digests_;
  std::string non_finite_;
};

}  // namespace shoal
