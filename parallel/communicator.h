// A group of ranks and what they can do together. Every call is collective: all ranks of the group
// make the same calls in the same order. A call blocks until this rank's part is done and its
// buffers may be used again (on a GPU: by what is queued next); CommQueue runs calls behind
// computation. A group of one is the same code path and moves nothing.
//
// Several arrays count as one, their concatenation. Where each rank has a share of it, the shares
// are ranges in rank order, equal but for rounding (ShardBegin) unless `bounds` says otherwise.
//
// Sums are taken in rank order in at least f32, so all ranks hold the same bits afterwards. When a
// rank fails, Abort makes the others' calls throw instead of waiting for it.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/base/kernel_profile.h"
#include "core/base/view.h"
#include "core/placement.h"
#include "kernels/reduce_arrays.h"

namespace shoal {

// Tensors, or scalars that steer the run. kAhead: tensors that whoever put the call in a queue has
// counted then (AllGatherBytes), so that a count does not depend on how far the queue is.
enum class Traffic { kData, kControl, kAhead };

// Where the share of rank `rank` of `size` begins in n elements: rank = size gives n.
inline int64_t ShardBegin(int64_t n, int rank, int size) { return n * rank / size; }
// Of all ranks: size + 1 offsets.
std::vector<int64_t> ShardBounds(int64_t n, int size);

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::string host() const = 0;  // of this rank
  // The mesh axis that the group lies along, if it is one: differentiable collectives place their
  // results on it.
  std::optional<MeshAxis> axis() const { return axis_; }
  void set_axis(MeshAxis axis) { axis_ = axis; }

  // In place over several contiguous arrays of one float dtype, as if they were one. The arrays'
  // sizes agree between the ranks.
  void AllReduce(std::span<const View> pieces, ReduceOp op = ReduceOp::kSum,
                 Traffic traffic = Traffic::kData);
  // Afterwards this rank's share holds the sum over the ranks; the rest keeps what it was.
  // `bounds`, if given, has size() + 1 offsets from 0 to the number of elements. With `into`,
  // contiguous, of the pieces' dtype and of the share's size, the sum goes there and no piece
  // changes.
  void ReduceScatter(std::span<const View> pieces, std::span<const int64_t> bounds = {},
                     Traffic traffic = Traffic::kData, const View& into = {});
  // In place: every rank's share, from where that rank holds it, to all. Any dtype.
  void AllGather(std::span<const View> pieces, std::span<const int64_t> bounds = {},
                 Traffic traffic = Traffic::kData);
  // What AllGather counts for this rank.
  int64_t AllGatherBytes(std::span<const View> pieces, std::span<const int64_t> bounds = {}) const;
  // `send` holds send_counts[r] elements for each rank r, one after the other; they arrive in rank
  // order in `receive`, receive_counts[r] from rank r. Any dtype.
  void AllToAll(const View& send, std::span<const int64_t> send_counts, const View& receive,
                std::span<const int64_t> receive_counts, Traffic traffic = Traffic::kData);
  // `data` of `root` to all.
  void Broadcast(const View& data, int root, Traffic traffic = Traffic::kData);
  // From one rank to another. Send may wait until the other receives; sizes and dtypes agree.
  void Send(const View& data, int to, Traffic traffic = Traffic::kData);
  void Receive(const View& data, int from, Traffic traffic = Traffic::kData);
  // Every rank's bytes to all, in rank order; lengths may differ. For small things: names, digests.
  std::vector<std::string> AllGatherStrings(const std::string& mine);
  virtual void Barrier() = 0;

  // The group of `members` (ranks of this one, of which this rank is one) in their order. All ranks
  // call it, each with its own group; the groups are disjoint. A failure in one is known to all.
  virtual std::unique_ptr<Communicator> Subgroup(std::span<const int> members) = 0;
  // The same ranks as a group of its own, for another thread. Collective.
  std::unique_ptr<Communicator> Duplicate();
  // Whether another thread of this rank may be in another communicator's call at the same time.
  virtual bool concurrent() const { return true; }

  // Over one scalar; counted as control.
  double Sum(double value);
  double Max(double value);

  // Bytes this rank has sent since it began, by the ring form of each collective, whatever the
  // transport shares or copies.
  int64_t wire_bytes(Traffic traffic) const {
    return wire_bytes_[static_cast<size_t>(traffic)].load(std::memory_order_relaxed);
  }

  // Collectives add their time to `profile` (may be null) from now on.
  void set_profile(KernelProfile* profile) { profile_ = profile; }

  // Calls `report(rank, what)` from another thread when a rank of this host is found to be dead or
  // stopped; it should end the program. Processes only: a thread ends with the others.
  virtual void WatchPeers(const std::function<void(int, const std::string&)>& /*report*/) {}

  // Puts what the current context's allocator gives from now on to parameters, gradients and
  // communication where all ranks of the host can read it, so that collectives copy none of it.
  // Collective; for groups made afterwards too. False, and nothing changes, where the system has no
  // such memory, where the ranks do not share a host, and where they share all memory anyhow.
  virtual bool ShareMemory() { return false; }

  // Ends the other ranks' waiting: their calls throw PeerFailed (threads), or they are ended with
  // `exit_code` (processes).
  virtual void Abort(int exit_code) = 0;

 protected:
  virtual void DoAllReduce(std::span<const View> pieces, ReduceOp op) = 0;
  // `bounds` is always given to these.
  // `into` null: in place.
  virtual void DoReduceScatter(std::span<const View> pieces, std::span<const int64_t> bounds,
                               char* into) = 0;
  virtual void DoAllGather(std::span<const View> pieces, std::span<const int64_t> bounds) = 0;
  virtual void DoAllToAll(const View& send, std::span<const int64_t> send_counts,
                          const View& receive, std::span<const int64_t> receive_counts) = 0;
  virtual void DoBroadcast(const View& data, int root) = 0;
  virtual void DoSend(const View& data, int to) = 0;
  virtual void DoReceive(const View& data, int from) = 0;
  virtual std::vector<std::string> DoAllGatherStrings(const std::string& mine) = 0;
  // Whether it moves what lies on such a device.
  virtual bool Moves(DeviceType type) const { return type != DeviceType::kCuda; }

 private:
  int64_t CheckPieces(const char* op, std::span<const View> pieces) const;
  double Scalar(double value, ReduceOp op);
  // Counts `bytes` as sent. True if there is anything to move.
  bool Count(int64_t bytes, Traffic traffic, const View& like);
  // One thread may send while another receives.
  std::array<std::atomic<int64_t>, 3> wire_bytes_ = {};
  KernelProfile* profile_ = nullptr;
  std::optional<MeshAxis> axis_;
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
// `shared_memory` false: as if the ranks did not share a host.
std::unique_ptr<Communicator> MakeMpiCommunicator(bool shared_memory = true);
std::string MpiDescription();  // the library's version; empty in a build without MPI

// The ranks of `host`, each of which computes on the CUDA device of its current context: arrays on
// the device go from device to device (NCCL), others and all else through `host`. In a thread that
// computes on that device a call is queued on its stream, in order with its kernels; in any other
// thread (CommQueue's) it returns when it is done. Collective. Error(kConfig) in a build without
// NCCL.
std::unique_ptr<Communicator> MakeNcclCommunicator(std::unique_ptr<Communicator> host);

}  // namespace shoal
