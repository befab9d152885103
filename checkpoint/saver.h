// Writes this rank's part of a save while training goes on. One thread copies the state into
// staging memory of a fixed size; another takes digests of what is there, writes it and flushes it
// to the disk. Passes only read the state, so both may run behind forward and backward: the state
// must stay as it is until WaitCopied returns, which is to be called before the next update. Where
// the staging memory is smaller than the state, copies wait for writes, and the update for the
// copies; no collective ever does. The staging memory is a mapping of its own, beside what the
// allocator counts.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <string>

#include "checkpoint/part.h"
#include "core/state_dict.h"

namespace shoal {

struct SaverOptions {
  int64_t staging = int64_t{256} << 20;  // bytes; at least 128
  FullDisk full_disk;                    // `cancelled` is the saver's own
  // Before staged bytes are written; a test makes the disk slow with it.
  std::function<void()> before_write;
};

// Its calls are made by one thread.
class Saver {
 public:
  // `plan` is of every state that it will be given.
  Saver(std::string directory, PartPlan plan, SaverOptions options);
  ~Saver();  // gives up what is under way
  Saver(const Saver&) = delete;
  Saver& operator=(const Saver&) = delete;

  const PartPlan& plan() const { return plan_; }
  // Staging memory of a save, while it is under way; for ever after Warm.
  int64_t staging_bytes() const;

  // From now on the staging memory stays for the saves to come, and a thread touches it behind what
  // this one goes on with: memory is several times slower when it is touched for the first time.
  void Warm();

  // Begins to save; none may be under way.
  void Begin(int64_t step, const StateDict& state);
  // Until all has been copied. A save that fails is copied no further: TakePart says why.
  void WaitCopied();
  // Whether this rank's part is on the disk, or has failed.
  bool Written() const;
  // What CommitSave needs of this rank, once it is written. Throws what has failed:
  // Error(kStorage), or Error(kConfig) if the state is not finite.
  std::string TakePart();

  // Then one rank runs `commit` behind training.
  void Commit(std::function<void(const FullDisk&)> commit);
  bool Committed() const;  // or failed; true if there is nothing to commit
  void TakeCommit();       // throws what has failed

  // Staging memory that was ever in use at once.
  int64_t peak_staged() const;

 private:
  struct Memory;
  struct Staging;
  int64_t slot_bytes() const;
  std::string Write(int64_t step, Staging& staging) const;

  const std::string directory_;
  const PartPlan plan_;
  const SaverOptions options_;
  std::atomic<bool> given_up_ = false;
  std::shared_ptr<Memory> memory_;
  std::future<void> warmed_;
  // Of the save under way. The futures wait for the threads that use the rest.
  StateDict state_;
  std::shared_ptr<Staging> staging_;
  std::future<void> copied_;
  std::future<std::string> part_;
  std::future<void> commit_;
  int64_t peak_staged_ = 0;
};

}  // namespace shoal
