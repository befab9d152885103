// Collectives of ranks that share a host, through memory that all of them map: a barrier, and
// buffers through which arrays are copied piece by piece. Arrays that lie in the ranks' pools are
// not copied: each rank reads the others' where they are.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "core/shared_range.h"
#include "parallel/communicator.h"
#include "parallel/direct.h"
#include "parallel/shared_barrier.h"

namespace shoal {

class SharedWindow {
 public:
  // A range of each rank, as this rank maps it.
  using Pools = std::vector<std::shared_ptr<const SharedRange>>;

  static constexpr int64_t kHeaderBytes = 4096;
  // What all ranks map together: a header, two staging buffers per rank and two for sums.
  static int64_t Bytes(int ranks) { return kHeaderBytes + kStagingBytes * 2 * (ranks + 1); }
  // The header is zero before the first rank makes its window.
  SharedWindow(void* memory, int rank, int ranks)
      : barrier_(static_cast<SharedBarrier*>(memory)),
        staging_(static_cast<char*>(memory) + kHeaderBytes),
        rank_(rank),
        size_(ranks) {}

  // By rank of this window. All ranks call it, or none does.
  void set_pools(Pools pools) { pools_ = std::move(pools); }
  const Pools& pools() const { return pools_; }

  void Barrier() { barrier_->Wait(size_); }
  // As of Communicator, whose promises hold.
  void AllReduce(std::span<const View> pieces, ReduceOp op);
  // `into` null: in place.
  void ReduceScatter(std::span<const View> pieces, std::span<const int64_t> bounds,
                     char* into = nullptr);
  void AllGather(std::span<const View> pieces, std::span<const int64_t> bounds);
  // Rank r's elements begin at from[r] of what is sent and at to[r] of what is received; no rank
  // sends more than `longest` to another.
  void AllToAll(const View& send, std::span<const int64_t> from, const View& receive,
                std::span<const int64_t> to, int64_t longest);

 private:
  // Per rank and buffer: together within the second-level cache.
  static constexpr int64_t kStagingBytes = int64_t{1} << 20;

  char* Staging(int r) const { return staging_ + (2 * r + buffer_) * kStagingBytes; }
  char* Sums(int buffer) const { return staging_ + (2 * size_ + buffer) * kStagingBytes; }
  bool Publish(const char* op, std::span<const View> pieces, PeerArrays& arrays);
  template <class F>
  bool Direct(const char* op, std::span<const View> pieces, F&& work);

  SharedBarrier* barrier_;
  char* staging_;
  int rank_, size_;
  // The buffers take turns: who fills one again has passed a barrier that all reached after
  // reading it.
  int buffer_ = 0;
  Pools pools_;  // empty: none
};

}  // namespace shoal
