// A group of ranks and what they can do together. Every call is collective: all ranks of the group
// make the same calls in the same order. Calls block until this rank's part is done and its buffers
// may be used again. A group of one is the same code path and moves nothing.
//
// Sums are taken in rank order in at least f32, so all ranks hold the same bits afterwards. When a
// rank fails, Abort makes the others' calls throw instead of waiting for it.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/base/kernel_profile.h"
#include "core/base/view.h"

namespace shoal {

enum class ReduceOp { kSum, kMax };
enum class Traffic { kData, kControl };  // tensors, or scalars that steer the run

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::string host() const = 0;  // of this rank

  // In place over several contiguous arrays of one float dtype, as if they were one. The arrays'
  // sizes agree between the ranks.
  void AllReduce(std::span<const View> pieces, ReduceOp op = ReduceOp::kSum,
                 Traffic traffic = Traffic::kData);
  // `data` of `root` to all.
  void Broadcast(const View& data, int root, Traffic traffic = Traffic::kData);
  // Every rank's bytes to all, in rank order; lengths may differ. For small things: names, digests.
  std::vector<std::string> AllGatherStrings(const std::string& mine);
  virtual void Barrier() = 0;

  // Over one scalar; counted as control.
  double Sum(double value);
  double Max(double value);

  // Bytes this rank has sent since it began, by the ring form of each collective, whatever the
  // transport shares or copies.
  int64_t wire_bytes(Traffic traffic) const { return wire_bytes_[static_cast<int>(traffic)]; }

  // Collectives add their time to `profile` (may be null) from now on.
  void set_profile(KernelProfile* profile) { profile_ = profile; }

  // Ends the other ranks' waiting: their calls throw PeerFailed (threads), or they are ended with
  // `exit_code` (processes).
  virtual void Abort(int exit_code) = 0;

 protected:
  virtual void DoAllReduce(std::span<const View> pieces, ReduceOp op) = 0;
  virtual void DoBroadcast(const View& data, int root) = 0;
  virtual std::vector<std::string> DoAllGatherStrings(const std::string& mine) = 0;

 private:
  double Scalar(double value, ReduceOp op);
  int64_t wire_bytes_[2] = {};
  KernelProfile* profile_ = nullptr;
};

// What a rank's call throws when another rank has failed; the other's own error is the one to
// report.
struct PeerFailed {
  int rank;
};

// Rank `rank` of a group that is only counted; see `plan`.
std::unique_ptr<Communicator> MakeMetaCommunicator(int rank, int size);

// The group of one.
std::unique_ptr<Communicator> MakeSelfCommunicator();

// Runs f(communicator) on `ranks` threads of this process, each with its own ExecutionContext on
// the CPU. `threads_per_rank` 0 shares the cores. The first rank's error ends the others and is
// rethrown.
void RunThreadRanks(int ranks, int threads_per_rank, const std::function<void(Communicator&)>& f);

// All ranks that the launcher started; starts MPI on first use, and ends it with the process.
std::unique_ptr<Communicator> MakeMpiCommunicator();
std::string MpiDescription();  // the library's version; empty in a build without MPI

}  // namespace shoal
