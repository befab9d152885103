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
  // The file from its first byte to its last: arrays, and what HDF5 put around them.
  struct Stretch {
    int64_t bytes;
    int array;  // -1: of layout.frame
  };
  std::vector<Stretch> stretches;
};
PartPlan PlanPart(int rank, const StateDict& state);

// The file's bytes, made of the state's as they are asked for. Errors if the state is not as it was
// planned.
class PartImage {
 public:
  // The state's tensors must live while this does.
  PartImage(const PartPlan& plan, const StateDict& state);
  // Copies the next `bytes`, or as many as are left; how many.
  int64_t Next(char* to, int64_t bytes);
  int64_t left() const { return left_; }

 private:
  std::vector<std::pair<const char*, int64_t>> sources_;
  size_t source_ = 0;  // that comes next
  int64_t done_ = 0;   // of its bytes
  int64_t left_ = 0;
};

// Writes the file's bytes as they come, and takes the arrays' digests. May be used by any one
// thread.
class PartFile {
 public:
  // In the directory `partial`, which is made if it is not there. The file's space is taken first.
  PartFile(const std::string& partial, const PartPlan& plan, const FullDisk& full_disk);

  // See File::WriteDirect for what makes it fast.
  void Append(const char* data, int64_t bytes);
  // All is on the disk; returns the part's text for CommitSave.
  std::string Finish();
  // The first array in which an infinite value or a NaN was seen; empty if there is none.
  const std::string& non_finite() const { return non_finite_; }

 private:
  void TakeDigests(const char* data, int64_t bytes);
  void AddToArray(size_t array, const char* data, int64_t bytes);
  bool Finite(DType dtype, const char* data, int64_t bytes);

  const PartPlan& plan_;
  FullDisk full_disk_;
  std::unique_ptr<File> file_;
  RunningDigest digest_;  // of the chunk so far
  Part part_;
  int64_t written_ = 0;
  size_t stretch_ = 0;    // that comes next
  int64_t done_ = 0;      // of its bytes
  char element_[8] = {};  // that lies across two Appends, as far as it came
  std::string non_finite_;
};

}  // namespace shoal
