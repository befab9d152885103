// Saves and loads a run's state. A save is a directory
//   step-00000042/{rank-0000.h5, .., manifest.json}
// that is written under another name, flushed to the disk, and renamed when complete: a directory
// with that name is whole, whenever the process or the machine stops. A rank writes the pieces of
// tensors that it holds; the manifest says where in its tensor and in its file each piece lies, and
// has a digest (XXH3-128) of every 8 MiB of it and of all between the pieces, checked as they are
// read. So a save is read by any number of ranks, whatever they hold of it; and the files are HDF5
// to whoever reads them without us.
//
// Other names in the directory: step-N.partial is being written, step-N.old is a save that one of
// the same step replaces, step-N.doomed is being deleted.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/file_io.h"
#include "core/state_dict.h"

namespace shoal {

// What a run needs besides tensors to go on: nothing else has state.
struct SaveInfo {
  int64_t step = 0;
  int64_t tokens = 0;
  std::string config;            // the resolved configuration, TOML
  std::string data_fingerprint;  // of the corpus
  int64_t updates = 0;           // of the optimizer: fewer than steps where some were skipped
  int64_t data_offset = 0;       // step s reads the batch of step s + data_offset
  int64_t epoch = 0;             // that the next step reads, from 0
  std::map<std::string, int64_t> mesh;    // degrees of the ranks that wrote it; for people
  std::optional<double> validation_loss;  // where it was measured after this step
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
// of them, AbandonSave takes away what there is. (saver.h does it while a run goes on.)
void BeginSave(const std::string& directory, int64_t step);
std::string WritePart(const std::string& directory, int64_t step, int rank, const StateDict& state);
std::string CommitSave(const std::string& directory, const SaveInfo& info,
                       const std::vector<std::string>& parts, const FullDisk& full_disk = {});
void AbandonSave(const std::string& directory, int64_t step);
// Where a save will be, and where its parts are written until then.
std::string SavePath(const std::string& directory, int64_t step);
std::string PartialSave(const std::string& directory, int64_t step);

// Complete saves in `directory`, newest first. Names decide; CheckSave and VerifySave look inside.
std::vector<SaveEntry> ListSaves(const std::string& directory);

// The manifest's part of a save. Error(kStorage) if it is missing or damaged.
SaveInfo ReadSaveInfo(const std::string& save);
// The same, and all files are there and of their size. Reads no tensor.
SaveInfo CheckSave(const std::string& save);

// A save whose manifest is read, and whose files are opened and looked through, once.
class SaveReader {
 public:
  // Error(kStorage) if the manifest is missing or damaged.
  explicit SaveReader(const std::string& save);
  ~SaveReader();
  SaveReader(const SaveReader&) = delete;
  SaveReader& operator=(const SaveReader&) = delete;

  const SaveInfo& info() const;
  // As it is stored; nothing if it is not there.
  std::optional<DType> dtype(const std::string& tensor) const;
  // Reads `state`'s tensors, converting dtypes; reads the chunks that they need, one at a time, and
  // checks each. Error(kStorage) naming the file and the tensor if anything is missing or not as it
  // was written; then some tensors may have been overwritten.
  void Load(const StateDict& state);

 private:
  struct Opened;
  std::unique_ptr<Opened> opened_;
};
void LoadState(const std::string& save, const StateDict& state);

// Every byte of the save against its digest. Error(kStorage) as above.
void VerifySave(const std::string& save);

// Which saves stay. Only those that CheckSave accepts count, and at least two of them stay.
struct Retention {
  int64_t keep = 2;        // the newest
  int64_t keep_every = 0;  // those of each so many steps; 0: none
  bool keep_best = false;  // the one with the least validation loss
  bool verify = false;     // only those that VerifySave accepts count
};
// Deletes the others. Damaged saves go with those that are older than all that `keep` keeps.
void PruneSaves(const std::string& directory, const Retention& retention);

// What a process that was killed has left: a save under the name .old that nothing has replaced
// gets its own name back, the rest is deleted. For the only process that writes there.
void RecoverSaves(const std::string& directory);

// Error(kStorage) if the file system of `directory` has less than `bytes` free, or if this process
// may not write files of `largest_file` bytes.
void CheckFreeSpace(const std::string& directory, int64_t bytes, int64_t largest_file);

}  // namespace shoal
