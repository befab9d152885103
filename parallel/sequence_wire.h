// Messages of sequence parallelism behind computation: one thread of this rank sends what was
// posted, another receives, each in order. So a rank never waits for the receiver of what it sends,
// while what it sends and receives moves as it computes.
#pragma once

#include <memory>

#include "core/tensor.h"
#include "parallel/comm_queue.h"

namespace shoal {

class SequenceWire {
 public:
  // Collective: all ranks of `ranks`, which must outlive it.
  explicit SequenceWire(Communicator& ranks);

  // Waits until fewer than `most` messages are on their way. Before the next one takes memory.
  void WaitForRoom(size_t most);
  // `buffer` must stay as it is until it is sent: it is kept alive as long.
  void Send(const Tensor& buffer, int to);
  CommQueue::Ticket Receive(const Tensor& buffer, int from);
  void WaitFor(CommQueue::Ticket received) { receives_->Wait(received); }
  // Until everything is sent.
  void Finish() { sends_->WaitAll(); }
  // After a failure: nobody waits for what is still on its way.
  void Abandon();
  int64_t bytes() const { return group_->wire_bytes(Traffic::kData); }
  void set_profile(KernelProfile* profile);

 private:
  std::shared_ptr<Communicator> group_;  // of the same ranks, used by these two threads alone
  std::unique_ptr<CommQueue> sends_, receives_;
  CommQueue::Ticket last_send_ = 0;
};

}  // namespace shoal
