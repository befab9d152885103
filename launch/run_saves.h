// The saves of a run, as its loop sees them: one is requested, written behind the steps that
// follow, and at some later step durable. All ranks call the same at the same step.
#pragma once

#include <chrono>
#include <functional>
#include <optional>
#include <string>

#include "checkpoint/saver.h"
#include "checkpoint/store.h"
#include "launch/config.h"
#include "launch/console.h"
#include "launch/training_step.h"
#include "parallel/communicator.h"

namespace shoal {

// Error(kConfig) of a run whose numbers are not finite any more.
[[noreturn]] void Diverged(const std::string& what);

// Whoever writes into a run's directory waits so for a full disk.
FullDisk WaitForRoom(const CheckpointConfig& config, const Console& console);

class RunSaves {
 public:
  // Saves of `step`'s state to `directory`. `before_commit` is called on rank 0, from another
  // thread. All must outlive it.
  RunSaves(const CheckpointConfig& config, Communicator& communicator, Console& console,
           std::string directory, TrainingStep& step, std::function<void()> before_commit);
  ~RunSaves();

  // Bytes of a save over all ranks, and of its largest file.
  int64_t all_bytes() const { return all_bytes_; }
  int64_t largest_file() const { return largest_file_; }

  // Requests a save of the state as it is. If one is under way it is waited for: none is dropped.
  // Returns when it is durable if saves are not asynchronous.
  void Begin(const SaveInfo& info);
  // Whether this rank has work on its way that is not done. `Advance` takes the maximum over the
  // ranks: where no rank has, what comes next is begun, or the save is durable. No collective waits
  // for a disk.
  bool Busy() const;
  void Advance(bool any_rank_busy);
  // Until nothing is under way.
  void Finish();

  // The newest save that is durable; empty before the first.
  const std::string& last() const { return last_; }
  void set_last(const std::string& save);
  // The step of the last one, if it was written and could not be a save; else 0.
  int64_t failed_step() const { return failed_step_; }

 private:
  struct UnderWay {
    SaveInfo info;
    std::chrono::steady_clock::time_point requested;
    bool committing = false;
    std::chrono::steady_clock::time_point durable = {};  // on rank 0; the others hear of it later
    std::chrono::duration<double> waited = {};           // training, for it
  };
  class Waiting;
  void CommitParts();

  const CheckpointConfig config_;
  Communicator& communicator_;
  Console& console_;
  const std::string directory_;
  TrainingStep& step_;
  std::function<void()> before_commit_;
  std::optional<UnderWay> under_way_;
  std::string last_;
  int64_t all_bytes_ = 0, largest_file_ = 0, failed_step_ = 0;
  std::optional<Saver> saver_;
};

}  // namespace shoal
