// Saves and loads a run's state. A save is a directory
//   step-00000042/{rank-0000.h5, .., manifest.json}
// that is written under another name, flushed to the disk, and renamed when complete: a directory
// with that name is whole, whenever the process or the machine stops. A rank writes the pieces of
// tensors that it holds; the manifest says where in its tensor each piece lies, and its digest
// (XXH3-128), checked when it is loaded. So a save is read by any number of ranks, whatever they
// hold of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/state_dict.h"

namespace shoal {

// What a run needs besides tensors to go on: nothing else has state.
struct SaveInfo {
  int64_t step = 0;
  int64_t tokens = 0;
  std::string config;            // the resolved configuration, TOML
  std::string data_fingerprint;  // of the corpus
};

struct SaveEntry {
  std::string path;
  int64_t step = 0;
  int64_t bytes = 0;
};

// Writes `state` as `directory`/step-N and returns its path. An older save of the same step is
// replaced. Error(kStorage) if it cannot; then no save has been touched.
std::string SaveState(const std::string& directory, const SaveInfo& info, const StateDict& state);

// The same by several ranks: one calls BeginSave, then all WritePart, then one CommitSave with what
// the others' WritePart returned. Every element of a tensor is in one part. After an Error in any
// of them, AbandonSave takes away what there is.
void BeginSave(const std::string& directory, int64_t step, int64_t bytes);
std::string WritePart(const std::string& directory, int64_t step, int rank, const StateDict& state);
std::string CommitSave(const std::string& directory, const SaveInfo& info,
                       const std::vector<std::string>& parts);
void AbandonSave(const std::string& directory, int64_t step);

// Complete saves in `directory`, newest first. Names decide; VerifySave looks inside.
std::vector<SaveEntry> ListSaves(const std::string& directory);

// The manifest's part of a save. Error(kStorage) if it is missing or damaged.
SaveInfo ReadSaveInfo(const std::string& save);

// Reads `state`'s tensors from `save`, converting dtypes, and checks the digests. Error(kStorage)
// naming the file and the tensor if anything is missing or not as it was written; then some tensors
// may have been overwritten.
void LoadState(const std::string& save, const StateDict& state);

// Every tensor of the save against its digest. Error(kStorage) as above.
void VerifySave(const std::string& save);

// What a save holds, by name.
struct StoredTensor {
  std::string name;  // as StateEntry::name
  DType dtype = DType::kF32;
  Dims shape;
};
std::vector<StoredTensor> ListTensors(const std::string& save);

// Deletes the oldest saves until `keep` are left (at least one).
void PruneSaves(const std::string& directory, int64_t keep);

// Error(kStorage) if the file system of `directory` has less than `bytes` free.
void CheckFreeSpace(const std::string& directory, int64_t bytes);
// What a save of `state` takes, up to HDF5's own few kilobytes.
int64_t SaveBytes(const StateDict& state);

}  // namespace shoal
